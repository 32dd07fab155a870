"""`SamEverything-v0`: find all objects of an image with few points for a Segment Anything Model."""

from __future__ import annotations

from sam_gym.envs.everything_core import EverythingConfig, EverythingCore
from sam_gym.envs.faces import SlotEnv, SlotVectorEnv


class SamEverythingEnv(SlotEnv):
    """Find all objects of an image with few points for a Segment Anything Model.

    ## Description

    An image is given. The agent chooses where on a point grid SAM is prompted; of the three masks
    that SAM finds for a point, the one of the highest predicted IoU counts. It is kept if SAM
    trusts it (`keep_iou`), unless it is a duplicate of a mask that is kept already
    (`duplicate_iou`): of the two, the one that SAM trusts more stays. The aim is a mask of every
    whole object with a small part of the points of the full grid.

    ## Action Space

    With `actions="points"`: `Discrete(grid * grid [+ 1])`, a cell of the grid over SAM's square
    input frame, row by row, and with `stop=True` the action that ends the episode after them.

    With `actions="set"`: `MultiBinary(grid * grid)`, all points of a step at once. They are played
    in the order of the grid, with the outcome that they would have one by one; of a set that is
    larger than what is left of the budget, only the first points count. With `stop=True`, an empty
    set ends the episode.

    SAM pads an image that is not square; a point in the padding is the nearest one in the image.

    ## Observation Space

    A `Dict`. With `obs="full"`:

    | key                    | space                       | meaning                               |
    |------------------------|-----------------------------|---------------------------------------|
    | `image`                | uint8 (S, S, 3)             | RGB, in SAM's input frame             |
    | `sam_image_embeddings` | float32 (C, h, w)           | SAM's image embedding                 |
    | `coverage`             | float32 (4h, 4w) in [0, 1]  | where a mask was kept                 |
    | `overlap`              | float32 (4h, 4w) in [0, 1]  | a quarter for each kept mask there    |
    | `predicted_iou`        | float32 (4h, 4w) in [0, 1]  | the highest of the kept masks there   |
    | `tried`                | float32 (grid, grid)        | 1 where a point was                   |
    | `num_points`           | Discrete(budget + 1)        | points so far                         |

    With `obs="handle"` (for training) the first two are replaced by `handle`, int32 (1,), the index
    of the embedding in the store of this process, and the maps are uint8: (h, w) the first three,
    0 or 255 of (grid, grid) the last.

    ## Rewards

    The gain in matched IoU: the mean over all objects of the IoU with their own mask, under the
    best one-to-one matching of kept masks and objects, on SAM's low-res masks. Subtracted are
    `point_cost` for every point, `duplicate_cost` for every duplicate, and `part_cost` for every
    mask that is kept of which at least 0.8 lies inside one object but covers less than half of it.

    ## Starting State

    No points and no masks. The image is drawn from the dataset with the environment's own random
    generator; objects that cover less than `min_target` of the frame do not count.

    ## Episode End

    *Terminated* by stop. *Truncated* when the budget of points is used up (or as many steps were
    made with empty sets).

    ## Information

    `iou` (matched), `points`, `masks` (kept), `duplicates`, `parts` (among the kept masks), `found`
    (share of the objects with a matched IoU of at least 0.5), `source`.

    ## Arguments

    ```python
    import gymnasium as gym
    import sam_gym

    env = gym.make("SamEverything-v0", budget=32, render_mode="rgb_array")
    ```

    All arguments are the fields of `sam_gym.envs.everything_core.EverythingConfig`. The vector
    environment, `gym.make_vec("SamEverything-v0", num_envs=64,
    vectorization_mode="vector_entry_point")`, decodes the points of all its environments in one
    batch.

    ## Version History

    * v0: initial version.

    Args:
        render_mode: None, "rgb_array" or "human".
        **settings: fields of `EverythingConfig`.

    Raises:
        ValueError: unknown name or impossible value, or data that does not validate.
        FileNotFoundError: a file is missing.
    """

    env_id = "SamEverything-v0"
    config_class = EverythingConfig
    core_class = EverythingCore
    core: EverythingCore


class SamEverythingVectorEnv(SlotVectorEnv):
    """`SamEverything-v0` with many environments that share one SAM decode per step.

    Sub-environment `i` seeded with `seed` plays as the scalar environment seeded with `seed + i`.

    Args:
        num_envs: how many environments.
        render_mode: None, "rgb_array" (one frame per environment) or "human" (all in one window).
        autoreset_mode: "NextStep" (default), "SameStep" or "Disabled", or the enum.
        **settings: fields of `EverythingConfig`; see `SamEverythingEnv`.
    """

    env_id = SamEverythingEnv.env_id
    config_class = SamEverythingEnv.config_class
    core_class = SamEverythingEnv.core_class
    core: EverythingCore
