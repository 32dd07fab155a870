"""`SamSeg-v0`: segment a target by clicking a Segment Anything Model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from sam_gym.envs.core import ClickConfig, ClickCore, TaskConfig, check_render_mode
from sam_gym.registry import unknown_name
from sam_gym.render import show

C = TypeVar("C", bound=TaskConfig)


class SamSegEnv(gym.Env[Any, Any]):
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

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 2}
    #: The id, the settings and the rules: what another click task replaces.
    env_id = "SamSeg-v0"
    config_class: type[TaskConfig] = ClickConfig
    core_class: type[ClickCore] = ClickCore

    def __init__(self, render_mode: str | None = None, **settings: Any) -> None:
        check_render_mode(render_mode)
        self.render_mode = render_mode
        config = make_settings(self.config_class, self.env_id, settings)
        self.core = self.core_class(config, num_slots=1)
        self.action_space = self.core.action_space
        self.observation_space = self.core.observation_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        self.core.plan([0], [] if seed is None else [0], options or {})
        self.core.reset([0], [self.np_random])
        if self.render_mode == "human":
            self.render()
        return self._observation(), self._info()

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        actions = self.core.check_actions(np.array([action]))
        reward, terminated, truncated = self.core.step(np.array([0]), actions)
        if self.render_mode == "human":
            self.render()
        return (
            self._observation(),
            float(reward[0]),
            bool(terminated[0]),
            bool(truncated[0]),
            self._info(),
        )

    def render(self) -> np.ndarray | None:
        if self.render_mode is None:
            gym.logger.warn('Call gym.make(..., render_mode="rgb_array") to render.')
            return None
        frame = self.core.render(0)
        if self.render_mode == "human":
            show(self.env_id, frame)
            return None
        return frame

    def close(self) -> None:
        self.core.close()

    def _observation(self) -> dict[str, Any]:
        spaces = self.core.observation_space.spaces
        return {
            key: np.int64(value[0]) if isinstance(spaces[key], gym.spaces.Discrete) else value[0]
            for key, value in self.core.observe([0]).items()
        }

    def _info(self) -> dict[str, Any]:
        return {
            key: bool(value[0]) if value.dtype == bool else value[0]
            for key, value in self.core.info([0]).items()
        }


class SamSegVectorEnv(VectorEnv[dict[str, np.ndarray], np.ndarray, np.ndarray]):
    """`SamSeg-v0` with many environments that share one SAM decode per step.

    Sub-environment `i` seeded with `seed` plays as the scalar environment seeded with `seed + i`.

    Args:
        num_envs: how many environments.
        render_mode: None, "rgb_array" (one frame per environment) or "human" (all in one window).
        autoreset_mode: "NextStep" (default), "SameStep" or "Disabled", or the enum.
        **settings: fields of `sam_gym.envs.core.ClickConfig`; see `SamSegEnv`.
    """

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 2}
    env_id = SamSegEnv.env_id
    config_class = SamSegEnv.config_class
    core_class = SamSegEnv.core_class

    def __init__(
        self,
        num_envs: int = 1,
        render_mode: str | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        **settings: Any,
    ) -> None:
        check_render_mode(render_mode)
        self.autoreset_mode = _autoreset_mode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.render_mode = render_mode
        self.num_envs = num_envs
        config = make_settings(self.config_class, self.env_id, settings)
        self.core = self.core_class(config, num_envs)
        self.single_action_space = self.core.action_space
        self.single_observation_space = self.core.observation_space
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._all = np.arange(num_envs)
        self._ended = np.zeros(num_envs, bool)
        self._rngs = [seeding.np_random(None)[0] for _ in range(num_envs)]

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin new episodes; `options={"reset_mask": bool (num_envs,)}` limits them to some."""
        mask = np.ones(self.num_envs, bool)
        if options and "reset_mask" in options:
            mask = np.asarray(options["reset_mask"], bool)
            if mask.shape != (self.num_envs,):
                raise ValueError(
                    f"reset_mask must be bool ({self.num_envs},), got shape {mask.shape}."
                )
        seeds = self._seeds(seed)
        seeded = [i for i, own in enumerate(seeds) if own is not None and mask[i]]
        self.core.plan(np.flatnonzero(mask).tolist(), seeded, options or {})
        for i in seeded:
            self._rngs[i] = seeding.np_random(seeds[i])[0]
        self._begin(np.flatnonzero(mask))
        self._ended[mask] = False
        self._show()
        return self.core.observe(self._all), self._infos(mask)

    def _seeds(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, (int, np.integer)):
            return [int(seed) + i for i in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise ValueError(f"Expected {self.num_envs} seeds, got {len(seed)}.")
        return list(seed)

    def step(
        self, actions: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        actions = self.core.check_actions(actions)
        reward = np.zeros(self.num_envs)
        terminated = np.zeros(self.num_envs, bool)
        truncated = np.zeros(self.num_envs, bool)
        if self.autoreset_mode == AutoresetMode.NEXT_STEP:
            self._begin(np.flatnonzero(self._ended))
            playing = np.flatnonzero(~self._ended)
        else:
            if self._ended.any():
                raise RuntimeError(
                    f"Environments {np.flatnonzero(self._ended).tolist()} have ended: reset them "
                    'with reset(options={"reset_mask": ...}) before the next step.'
                )
            playing = self._all
        if len(playing):
            reward[playing], terminated[playing], truncated[playing] = self.core.step(
                playing, actions[playing]
            )
        ended = terminated | truncated
        final: dict[str, Any] = {}
        if self.autoreset_mode == AutoresetMode.SAME_STEP:
            final = self._final(np.flatnonzero(ended))
            self._begin(np.flatnonzero(ended))
        else:
            self._ended = ended
        self._show()
        infos = self._infos(np.ones(self.num_envs, bool)) | final
        return self.core.observe(self._all), reward, terminated, truncated, infos

    def get_state(self) -> list[dict[str, Any]]:
        """The state of each environment: its episode and its random numbers, for `set_state`.

        Numpy arrays and plain values, copied, so that it can be kept in a file. An environment
        plays the same from it in another process and in another place of the batch.
        """
        return [
            {"episode": episode, "ended": bool(ended), "rng": rng.bit_generator.state}
            for episode, ended, rng in zip(
                self.core.get_state(), self._ended, self._rngs, strict=True
            )
        ]

    def set_state(self, state: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
        """Go on from `get_state` of environments with the same settings and data.

        Returns:
            What the last `reset` or `step` had returned as observations. Embeddings are computed
            again, so handles differ.

        Raises:
            ValueError: another number of environments, one that was never reset, or other data.
        """
        if len(state) != self.num_envs:
            raise ValueError(
                f"Expected the state of {self.num_envs} environments, got {len(state)}."
            )
        self.core.set_state([own["episode"] for own in state], self._rngs)
        for i, (own, rng) in enumerate(zip(state, self._rngs, strict=True)):
            if rng.bit_generator.state != own["rng"]:
                raise ValueError(
                    f"Environment {i} draws another episode than when its state was taken: the "
                    f"dataset {self.core.dataset.name} has changed. Bring the old data back, or "
                    "begin anew."
                )
        self._ended[:] = [own["ended"] for own in state]
        return self.core.observe(self._all)

    def _begin(self, slots: np.ndarray) -> None:
        if len(slots):
            self.core.reset(slots.tolist(), [self._rngs[slot] for slot in slots])

    def _final(self, slots: np.ndarray) -> dict[str, Any]:
        """`final_obs` and `final_info` of episodes that are about to be replaced."""
        if not len(slots):
            return {}
        mask = np.zeros(self.num_envs, bool)
        mask[slots] = True
        observations = self.core.observe(slots)
        final_obs = np.full(self.num_envs, None, object)
        for i, slot in enumerate(slots):
            final_obs[slot] = {key: value[i] for key, value in observations.items()}
        return {
            "final_obs": final_obs,
            "_final_obs": mask,
            "final_info": self._infos(mask),
            "_final_info": mask,
        }

    def _infos(self, mask: np.ndarray) -> dict[str, Any]:
        """Gymnasium's form of vector infos: an array per key, and which entries count."""
        infos: dict[str, Any] = {}
        slots = np.flatnonzero(mask)
        for key, values in self.core.info(slots).items():
            full = np.full(self.num_envs, None if values.dtype == object else 0, values.dtype)
            full[slots] = values
            infos[key], infos[f"_{key}"] = full, mask.copy()
        return infos

    def _show(self) -> None:
        if self.render_mode == "human":
            self.render()

    def render(self) -> tuple[np.ndarray, ...] | None:
        if self.render_mode is None:
            gym.logger.warn('Call gym.make_vec(..., render_mode="rgb_array") to render.')
            return None
        frames = tuple(self.core.render(slot) for slot in range(self.num_envs))
        if self.render_mode == "human":
            from sam_gym.render import tile

            columns = int(np.ceil(np.sqrt(self.num_envs)))
            show(self.env_id, tile(frames, columns))
            return None
        return frames

    def close_extras(self, **kwargs: Any) -> None:
        self.core.close()


def _autoreset_mode(mode: str | AutoresetMode) -> AutoresetMode:
    modes = {valid.value: valid for valid in AutoresetMode}
    name = mode.value if isinstance(mode, AutoresetMode) else mode
    if name not in modes:
        raise unknown_name("autoreset_mode", name, modes)
    return modes[name]


def make_config(settings: dict[str, Any]) -> ClickConfig:
    """The config of `SamSeg-v0` with keyword arguments; see `make_settings`."""
    return make_settings(ClickConfig, SamSegEnv.env_id, settings)


def make_settings(kind: type[C], env_id: str, settings: dict[str, Any]) -> C:
    """The config of keyword arguments; an unknown one raises `ValueError` with the nearest name.

    Args:
        kind: class of the config.
        env_id: environment that they are the arguments of, for the message.
        settings: the arguments.
    """
    valid = [f.name for f in fields(kind)]
    for name in settings:
        if name not in valid:
            raise unknown_name(f"argument of {env_id}", name, valid)
    return kind(**settings)
