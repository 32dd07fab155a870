"""`SamSeg-v0`: segment a target by clicking a Segment Anything Model."""

from __future__ import annotations

from typing import Any

from sam_gym.envs.core import ClickConfig, ClickCore, TaskConfig
from sam_gym.envs.faces import SlotEnv, SlotVectorEnv, make_settings


class SamSegEnv(SlotEnv):
    """Segment a target by clicking a Segment Anything Model.

    ## Description

    An image and the name of a category are given. The agent places positive and negative clicks on
    a grid over the image; after each click SAM decodes all clicks so far together with its previous
    mask. The aim is a mask of *all* instances of the category (`target="category"`), the task of
    AlignSAM (Huang et al., CVPR 2024), or of the one instance that a cue click shows
    (`target="instance"`).

    ## Action Space

    `Discrete(2 * grid * grid [+ 1] [+ 1])`, with G = grid * grid cells over SAM's square input
    frame, row by row:

    | action            | meaning                                               |
    |-------------------|-------------------------------------------------------|
    | 0 .. G - 1        | positive click at the centre of the cell              |
    | G .. 2G - 1       | negative click at the centre of the cell              |
    | 2G                | stop (with `stop=True`)                               |
    | the one after     | undo the last click (with `undo=True`)                |

    SAM pads an image that is not square; a click in the padding falls on the nearest image pixel.

    ## Observation Space

    A `Dict`. With `obs="full"`:

    | key                    | space                          | meaning                           |
    |------------------------|--------------------------------|-----------------------------------|
    | `image`                | uint8 (S, S, 3)                | RGB, in SAM's input frame         |
    | `target_category`      | Discrete(number of categories) | its name is in `info`             |
    | `sam_image_embeddings` | float32 (C, h, w)              | SAM's image embedding             |
    | `sam_pred_mask_prob`   | float32 (4h, 4w) in [0, 1]     | probability of the current mask   |
    | `num_steps`            | Discrete(max_steps + 1)        | actions so far                    |
    | `cue_click`            | float32 (2,) in [0, 1]         | only for `target="instance"`      |

    With `obs="handle"` (for training) the first and third are replaced by `handle`, int32 (1,),
    the index of the embedding in the store of this process, and the mask is uint8 (h, w).

    ## Rewards

    `reward="iou_gain"` (default), `"dice_gain"`, `"click_correct"`, `"foreground"` or `"shaped"`;
    see `sam_gym.rewards`. `click_cost` is subtracted for every click and undo.

    ## Starting State

    No clicks and an empty mask. Image and target are drawn from the dataset with the environment's
    own random generator.

    ## Episode End

    *Terminated* by `stop`, or when the true IoU reaches `iou_target` if one is set. *Truncated*
    after `max_steps` actions.

    ## Information

    `iou`, `dice` (of the current mask and the target), `predicted_iou` (SAM's own estimate),
    `clicks`, `target_name`, `source`.

    ## Arguments

    ```python
    import gymnasium as gym
    import sam_gym

    env = gym.make("SamSeg-v0", dataset="scenes", max_steps=5, render_mode="rgb_array")
    ```

    All arguments are the fields of `sam_gym.envs.core.ClickConfig`. The vector environment,
    `gym.make_vec("SamSeg-v0", num_envs=64, vectorization_mode="vector_entry_point")`, decodes the
    clicks of all its environments in one batch.

    ## Version History

    * v0: initial version.

    Args:
        render_mode: None, "rgb_array" or "human".
        **settings: fields of `ClickConfig`.

    Raises:
        ValueError: unknown name or impossible value, or data that does not validate.
        FileNotFoundError: a file is missing.
    """

    env_id = "SamSeg-v0"
    config_class: type[TaskConfig] = ClickConfig
    core_class: type[ClickCore] = ClickCore
    core: ClickCore


class SamSegVectorEnv(SlotVectorEnv):
    """`SamSeg-v0` with many environments that share one SAM decode per step.

    Sub-environment `i` seeded with `seed` plays as the scalar environment seeded with `seed + i`.

    Args:
        num_envs: how many environments.
        render_mode: None, "rgb_array" (one frame per environment) or "human" (all in one window).
        autoreset_mode: "NextStep" (default), "SameStep" or "Disabled", or the enum.
        **settings: fields of `sam_gym.envs.core.ClickConfig`; see `SamSegEnv`.
    """

    env_id = SamSegEnv.env_id
    config_class = SamSegEnv.config_class
    core_class = SamSegEnv.core_class
    core: ClickCore


def make_config(settings: dict[str, Any]) -> ClickConfig:
    """The config of `SamSeg-v0` with keyword arguments; see `make_settings`."""
    return make_settings(ClickConfig, SamSegEnv.env_id, settings)
