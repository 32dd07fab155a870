"""The scalar and the vector environment of any core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import fields
from typing import Any, TypeVar, cast

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from sam_gym.envs.base_core import BaseCore
from sam_gym.envs.config import EnvConfig
from sam_gym.utils.registry import check_choice, unknown_name
from sam_gym.utils.window import Window

C = TypeVar("C", bound=EnvConfig)

#: Valid values of `render_mode`.
RENDER_MODES = (None, "rgb_array", "human")


class BaseEnv(gym.Env[Any, Any]):
    """The scalar environment of a core.

    A subclass sets `env_id`, `config_class` and `core_class`; its docstring is the page of the
    environment. Register it with gymnasium together with a `BaseVectorEnv` of the same core.

    Args:
        render_mode: None, "rgb_array" or "human".
        **kwargs: fields of `config_class`.

    Raises:
        ValueError: unknown name or impossible value, or data that does not validate.
        FileNotFoundError: a file is missing.
    """

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 2}
    #: Id under which gymnasium knows the environment.
    env_id: str
    #: Dataclass of the arguments.
    config_class: type[Any]
    #: Core with the rules; takes a config and the number of sub-environments.
    core_class: type[Any]
    core: BaseCore[Any, Any]

    def __init__(self, render_mode: str | None = None, **kwargs: Any) -> None:
        check_choice("render_mode", render_mode, RENDER_MODES)
        self.render_mode = render_mode
        self.window = Window(self.env_id, self.metadata["render_fps"])
        config = make_config(self.config_class, self.env_id, kwargs)
        self.core = self.core_class(config, num_envs=1)
        self.action_space = self.core.action_space
        self.observation_space = self.core.observation_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin an episode; `options={"index": i}` chooses image `i` of the dataset.

        Raises:
            ValueError: an option is unknown or impossible.
        """
        _check_options(options, self.core.reset_options)
        super().reset(seed=seed)
        self.core.take_options([0], [] if seed is None else [0], options or {})
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
        """Draw the episode: uint8 (H, W, 3), RGB, of one shape for all images."""
        if self.render_mode is None:
            gym.logger.warn('Call gym.make(..., render_mode="rgb_array") to render.')
            return None
        frame = self.core.frame(0)
        if self.render_mode == "human":
            self.window.show(frame)
            return None
        return frame

    def get_state(self) -> dict[str, Any]:
        """Return the state of the episode and the random generator; see `BaseVectorEnv`."""
        return {
            "episode": self.core.get_state()[0],
            "rng": deepcopy(self.np_random.bit_generator.state),
        }

    def set_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Continue from `get_state`; returns the observation. See `BaseVectorEnv.set_state`."""
        _restore(self.core, [state], [self.np_random])
        return self._observation()

    def get_keys_to_action(self) -> dict[tuple[str], int]:
        """Return the actions that have a key, for `gymnasium.utils.play` and `agents.play`."""
        return {(key,): action for key, action in self.core.keys().items()}

    def close(self) -> None:
        self.window.close()
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


class BaseVectorEnv(VectorEnv[dict[str, np.ndarray], np.ndarray, np.ndarray]):
    """The vector environment of a core; subclass it as `BaseEnv`.

    Args:
        num_envs: number of sub-environments.
        render_mode: None, "rgb_array" (one frame per sub-environment) or "human" (all in one
            window).
        autoreset_mode: "NextStep" (default), "SameStep" or "Disabled", or the enum.
        **kwargs: fields of `config_class`.
    """

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 2}
    env_id: str
    config_class: type[Any]
    core_class: type[Any]
    core: BaseCore[Any, Any]

    def __init__(
        self,
        num_envs: int = 1,
        render_mode: str | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        **kwargs: Any,
    ) -> None:
        check_choice("render_mode", render_mode, RENDER_MODES)
        self.autoreset_mode = _autoreset_mode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.render_mode = render_mode
        self.window = Window(self.env_id, self.metadata["render_fps"])
        self.num_envs = num_envs
        config = make_config(self.config_class, self.env_id, kwargs)
        self.core = self.core_class(config, num_envs)
        self.single_action_space = self.core.action_space
        self.single_observation_space = self.core.observation_space
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = _batched(self.single_observation_space, num_envs)
        self._all = np.arange(num_envs)
        self._ended = np.zeros(num_envs, bool)
        self._rngs = [seeding.np_random(None)[0] for _ in range(num_envs)]

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin new episodes.

        Args:
            seed: sub-environment `i` gets `seed + i`, or the `i`-th of a sequence.
            options: `{"reset_mask": bool (num_envs,)}` resets some sub-environments only;
                `{"index": i}` chooses image `i` of the dataset for all, and int (num_envs,) one
                for each.

        Raises:
            ValueError: an option is unknown or impossible.
        """
        _check_options(options, (*self.core.reset_options, "reset_mask"))
        mask = np.ones(self.num_envs, bool)
        if options and "reset_mask" in options:
            mask = np.asarray(options["reset_mask"], bool)
            if mask.shape != (self.num_envs,):
                raise ValueError(
                    f"reset_mask must be bool ({self.num_envs},), got shape {mask.shape}."
                )
        seeds = self._seeds(seed)
        seeded = [i for i, own in enumerate(seeds) if own is not None and mask[i]]
        self.core.take_options(np.flatnonzero(mask).tolist(), seeded, options or {})
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
                    f"Sub-environments {np.flatnonzero(self._ended).tolist()} have ended: reset "
                    'them with reset(options={"reset_mask": ...}) before the next step.'
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
        """Return the state of each sub-environment: its episode and its random generator.

        Numpy arrays and plain values, copied, so that it can be saved. `set_state` continues from
        it in another process or at another index, with the same results.
        """
        return [
            {"episode": episode, "ended": bool(ended), "rng": rng.bit_generator.state}
            for episode, ended, rng in zip(
                self.core.get_state(), self._ended, self._rngs, strict=True
            )
        ]

    def set_state(self, state: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
        """Continue from `get_state` of an environment with the same arguments and data.

        Returns:
            The observations that the last `reset` or `step` returned. Embeddings are computed
            again, so handles differ.

        Raises:
            ValueError: the number of sub-environments differs, one was never reset, or the data
                has changed.
        """
        if len(state) != self.num_envs:
            raise ValueError(
                f"Expected the state of {self.num_envs} sub-environments, got {len(state)}."
            )
        _restore(self.core, state, self._rngs)
        self._ended[:] = [own["ended"] for own in state]
        return self.core.observe(self._all)

    def _begin(self, indices: np.ndarray) -> None:
        if len(indices):
            self.core.reset(indices.tolist(), [self._rngs[i] for i in indices])

    def _final(self, indices: np.ndarray) -> dict[str, Any]:
        """Return `final_obs` and `final_info` of episodes that are about to be replaced."""
        if not len(indices):
            return {}
        mask = np.zeros(self.num_envs, bool)
        mask[indices] = True
        observations = self.core.observe(indices)
        final_obs = np.full(self.num_envs, None, object)
        for row, i in enumerate(indices):
            final_obs[i] = {key: value[row] for key, value in observations.items()}
        return {
            "final_obs": final_obs,
            "_final_obs": mask,
            "final_info": self._infos(mask),
            "_final_info": mask,
        }

    def _infos(self, mask: np.ndarray) -> dict[str, Any]:
        """Return gymnasium's vector infos: per key an array, and a mask of its valid entries."""
        infos: dict[str, Any] = {}
        indices = np.flatnonzero(mask)
        for key, values in self.core.info(indices).items():
            full = np.full(self.num_envs, None if values.dtype == object else 0, values.dtype)
            full[indices] = values
            infos[key], infos[f"_{key}"] = full, mask.copy()
        return infos

    def _show(self) -> None:
        if self.render_mode == "human":
            self.render()

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Draw all sub-environments: uint8 (H, W, 3) each, RGB, of one shape."""
        if self.render_mode is None:
            gym.logger.warn('Call gym.make_vec(..., render_mode="rgb_array") to render.')
            return None
        frames = tuple(self.core.frame(i) for i in range(self.num_envs))
        if self.render_mode == "human":
            from sam_gym.utils.render import tile

            columns = int(np.ceil(np.sqrt(self.num_envs)))
            self.window.show(tile(frames, columns))
            return None
        return frames

    def close_extras(self, **kwargs: Any) -> None:
        self.window.close()
        self.core.close()


def _restore(
    core: BaseCore[Any, Any],
    state: Sequence[Mapping[str, Any]],
    rngs: Sequence[np.random.Generator],
) -> None:
    """Continue the episodes of a core, and set the generators of its sub-environments."""
    core.set_state([own["episode"] for own in state], rngs)
    for i, (own, rng) in enumerate(zip(state, rngs, strict=True)):
        if rng.bit_generator.state != own["rng"]:
            raise ValueError(
                f"Sub-environment {i} draws another episode than when its state was taken: "
                f"the dataset {core.dataset.name} has changed. Restore the old data, or "
                "start again."
            )


def _check_options(options: dict[str, Any] | None, valid: Sequence[str]) -> None:
    """Raise `ValueError` if an option of a reset is unknown."""
    for name in options or {}:
        if name not in valid:
            raise unknown_name("reset option", name, valid)


def _autoreset_mode(mode: str | AutoresetMode) -> AutoresetMode:
    name = mode.value if isinstance(mode, AutoresetMode) else mode
    check_choice("autoreset_mode", name, [valid.value for valid in AutoresetMode])
    return AutoresetMode(name)


def make_config(config_class: type[C], env_id: str, kwargs: dict[str, Any]) -> C:
    """Make the config of an environment from keyword arguments.

    Raises:
        ValueError: an argument is unknown; the message names `env_id` and the nearest match.
    """
    valid = [f.name for f in fields(config_class)]
    for name in kwargs:
        if name not in valid:
            raise unknown_name(f"argument of {env_id}", name, valid)
    return config_class(**kwargs)


def _batched(space: spaces.Space[Any], count: int) -> spaces.Space[Any]:
    """Batch a space as gymnasium's `batch_space` does, without a copy of its bounds for each row.

    Four arrays of bounds per `Box` take more memory than the observations.
    """
    if isinstance(space, spaces.Dict):
        own = {name: _batched(part, count) for name, part in space.items()}
        return spaces.Dict(own, seed=deepcopy(space.np_random))
    if type(space) is not spaces.Box:
        return batch_space(space, count)
    batch = cast(spaces.Box, batch_space(space, 1))
    batch._shape = (count, *batch.shape[1:])
    for name in ("low", "high", "bounded_below", "bounded_above"):
        setattr(batch, name, np.broadcast_to(getattr(batch, name), batch._shape))
    return batch
