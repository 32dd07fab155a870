"""`SamVideo-v0`: decide what a video tracker remembers, and when it is helped."""

from __future__ import annotations

from typing import Any

from sam_gym.data import VideoDataset
from sam_gym.envs.base_env import BaseEnv, BaseVectorEnv
from sam_gym.envs.video.config import SamVideoConfig
from sam_gym.envs.video.core import VideoCore
from sam_gym.envs.video.memory import MemoryCore
from sam_gym.envs.video.prompt import PromptCore
from sam_gym.envs.video.when import WhenCore

#: Task -> its core.
CORES: dict[str, type[VideoCore]] = {
    "memory": MemoryCore,
    "when": WhenCore,
    "prompt": PromptCore,
}


def make_core(
    config: SamVideoConfig, num_envs: int, dataset: VideoDataset | None = None
) -> VideoCore:
    """Make the core of the task that a config names; arguments as for `BaseCore`."""
    config.validate()
    return CORES[config.task](config, num_envs, dataset)


class SamVideoEnv(BaseEnv):
    """Help a SAM 2 to follow an object through a video.

    ## Description

    The object is prompted in the first frame. SAM 2 then finds it in one frame after the other, by
    memories of prompted frames and of up to K others (6 in SAM 2, 4 in `micro_video`). The argument
    `task` names what is decided:

    - `memory`: SAM 2 remembers the latest frames, good or bad. Here the agent sees each mask, with
      SAM 2's own estimates of its quality, and decides whether to remember it, and which memory to
      give up for it.
    - `when`: in each frame, the agent goes on, or buys a click on the largest error (see
      `sam_gym.simulation.clicks.error_click`).
    - `prompt`: the agent sees all frames of a tracked clip, and clicks in any of them; the clip is
      tracked again.

    Clicks and memories are those of `VideoTracker`: a frame with clicks becomes a conditioning
    frame, which all other frames attend to.

    ## Action Space

    `memory`: `Discrete(K + 1)`, about the present frame:

    | action   | meaning                                                                  |
    |----------|--------------------------------------------------------------------------|
    | 0        | keep nothing                                                             |
    | k = 1..K | remember this frame, and forget the k-th latest memory, if there is one  |

    Action K, always, is SAM 2's own rule: the oldest memory goes. The latest memory has the
    temporal position of the frame before, and so on, also if it is older. Object pointers are those
    of the kept frames among the last 15. The prompted frame always stays.

    `when`: `Discrete(2)`:

    | action   | meaning                                                                  |
    |----------|--------------------------------------------------------------------------|
    | 0        | go on: SAM 2 remembers this frame by its own rule, and tracks the next   |
    | 1        | buy a click, and stay in this frame; without budget, go on               |

    A click where the mask is right, or the truth unknown, is paid and changes nothing.

    `prompt`: `MultiDiscrete([frames, grid * grid, 3])`: the frame, the cell whose middle is
    clicked, and 0 (negative click), 1 (positive click) or 2 (stop). Frames beyond the end of a
    short video mean the last one.

    ## Observation Space

    A `Dict`. `memory` and `when` have *places*: the prompted frames (one, and for each click of the
    budget one more), a slot for each of K memories (the latest one first), and, last, the present
    frame. Empty places are zero. With `obs="full"`, and P places:

    | key                    | space                       | meaning                               |
    |------------------------|-----------------------------|---------------------------------------|
    | `image`                | uint8 (S, S, 3)             | present frame, RGB, in SAM's frame    |
    | `sam_image_embeddings` | float32 (C, h, w)           | its embedding                         |
    | `sam_pred_mask_prob`   | float32 (hm, wm) in [0, 1]  | the present mask                      |
    | `rivals`               | float32 (2, 2) in [0, 1]    | of SAM's two other masks, before any  |
    |                        |                             | click: predicted IoU, and IoU with the|
    |                        |                             | mask that was chosen                  |
    | `places`               | float32 (P, 7) in [-1, 1]   | exists; age (fraction of `frames`);   |
    |                        |                             | predicted IoU; probability that the   |
    |                        |                             | object is in the frame; area of the   |
    |                        |                             | mask (fraction of the frame); IoU with|
    |                        |                             | the present mask; cosine similarity   |
    |                        |                             | with the present object pointer       |
    | `memories`             | float32 (P, D)              | memory, averaged over the mask        |
    | `progress`             | float32 (1,)                | present frame, as a fraction          |
    | `budget`               | float32 (1,)                | `when`: fraction of clicks left       |

    `prompt` shows all T frames of a clip of up to `frames`:

    | key                    | space                          | meaning                            |
    |------------------------|--------------------------------|------------------------------------|
    | `image`                | uint8 (T, S, S, 3)             | the frames                         |
    | `sam_image_embeddings` | float32 (T, C, h, w)           | their embeddings                   |
    | `sam_pred_mask_prob`   | float32 (T, 1, hm, wm)         | their masks                        |
    | `frames`               | float32 (T, 5) in [0, 1]       | exists; is prompted; predicted IoU;|
    |                        |                                | probability that the object is in  |
    |                        |                                | the frame; area of the mask        |
    | `clicks`               | uint8 (T, 2, grid, grid)       | cells that were clicked negatively,|
    |                        |                                | and positively: 0 or 1             |
    | `budget`               | float32 (1,)                   | fraction of clicks left            |

    With `obs="handle"` (for training) the first two are replaced by `handle`, int32 (1,) or (T,),
    the numbers of embeddings in the store of this process, and masks are uint8 (h, w).

    ## Rewards

    J is the IoU with the truth, 1 if both are empty, on low-res masks (`score="low"`) or at the
    size of the video (`"full"`). Frames that are not annotated do not count.

    - `memory`: J of the frame that is tracked next, minus its J under SAM 2's own rule.
    - `when`: what the step adds to mean J over the frames after the first, minus `click_cost` for a
      click. Without clicks, all rewards are 0.
    - `prompt`: what the click adds to mean J over the frames after the first, minus `click_cost`.

    ## Starting State

    A video and an object that is visible in its first frame, drawn by the environment's random
    generator; `reset(options={"index": i})` takes video `i` instead. Of a video of more than
    `frames` frames, a part is drawn. The second frame has been tracked, from the prompted frame
    only; in the task `prompt`, all frames have.

    ## Episode End

    *Terminated* when the last frame has been tracked; in the task `prompt`, by the action to stop,
    and when the budget is spent.

    ## Information

    `iou` (mean J of the frames tracked so far), `sam2_iou` (the same under SAM 2's own rule,
    without clicks), `gain` (their difference), `predicted_iou` (of the present frame; of `prompt`,
    the mean), `kept` (`memory`: number of frames that were kept) or `clicks` (number bought),
    `frame` (the present one, or the one that was clicked last), `target_name`, `source` (name of
    the video).

    ## Arguments

    ```python
    import gymnasium as gym
    import sam_gym

    env = gym.make("SamVideo-v0", task="when", frames=24, render_mode="rgb_array")
    ```

    All arguments are the fields of `sam_gym.envs.video.SamVideoConfig`. The vector environment,
    `gym.make_vec("SamVideo-v0", num_envs=32, vectorization_mode="vector_entry_point")`, tracks the
    objects of all sub-environments in one batch.

    ## Version History

    * v0: initial version.

    Args:
        render_mode: None, "rgb_array" or "human".
        **kwargs: fields of `SamVideoConfig`.

    Raises:
        ValueError: an argument is unknown or impossible, or the data does not validate.
        FileNotFoundError: a file is missing.
    """

    env_id = "SamVideo-v0"
    config_class = SamVideoConfig
    core_class: Any = staticmethod(make_core)
    core: VideoCore


class SamVideoVectorEnv(BaseVectorEnv):
    """`SamVideo-v0` in a batch: all sub-environments share one call of the model per step.

    With `reset(seed=seed)`, sub-environment `i` behaves as the scalar environment with
    `seed + i`. Arguments as for `BaseVectorEnv`, with the fields of `SamVideoConfig`.
    """

    env_id = SamVideoEnv.env_id
    config_class = SamVideoEnv.config_class
    core_class: Any = staticmethod(make_core)
    core: VideoCore
