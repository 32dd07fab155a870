"""An adaptor from Gymnasium's vector environments to stable-baselines3's `VecEnv`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, cast

import gymnasium as gym
import numpy as np
from gymnasium.vector import (
    AsyncVectorEnv,
    AutoresetMode,
    SyncVectorEnv,
    VectorEnv,
    VectorWrapper,
)
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvObs

from sam_gym.envs.base_core import BaseCore
from sam_gym.envs.config import EnvConfig


def make_vector_env(
    env_id: str, num_envs: int, env_config: EnvConfig, **options: Any
) -> tuple[VectorEnv, BaseCore[Any, Any]]:
    """Make a vector environment with handle observations; return it and its core.

    Args:
        env_id: a registered environment.
        num_envs: number of sub-environments.
        env_config: of the environment; its `obs` is ignored.
        **options: more arguments of the vector environment; the default autoreset mode is
            "SameStep".
    """
    arguments = asdict(replace(env_config, obs="handle")) | {"autoreset_mode": "SameStep"} | options
    env = gym.make_vec(env_id, num_envs, vectorization_mode="vector_entry_point", **arguments)
    return env, cast(Any, env.unwrapped).core


class VectorEnvAdaptor(VecEnv):
    """An SB3 `VecEnv` over a `gymnasium.vector.VectorEnv` with autoreset mode SAME_STEP.

    When an episode ends, `infos[i]` holds the final information, `terminal_observation` and
    `TimeLimit.truncated`, and the returned observation is the first of the next episode.

    Args:
        env: the vector environment.

    Raises:
        ValueError: the environment has another autoreset mode, or is no vector environment.
    """

    def __init__(self, env: VectorEnv) -> None:
        if not isinstance(env, VectorEnv):
            raise ValueError(
                f"Expected a vector environment, got {type(env).__name__}. Make one with "
                "gymnasium.make_vec; stable-baselines3 takes a scalar environment as it is."
            )
        mode = env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise ValueError(
                f"stable-baselines3 needs autoreset mode SameStep, got {mode}. Make the "
                'environment with autoreset_mode="SameStep".'
            )
        self.env = env
        self.render_mode = env.render_mode
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self.metadata = env.metadata
        self._next_seed: int | None = None
        self._actions: np.ndarray = np.empty(0)

    def reset(self) -> VecEnvObs:
        observations, infos = self.env.reset(seed=self._next_seed, options=self._merged_options())
        self._next_seed = None
        self._reset_options()
        self.reset_infos = _split(infos, self.num_envs)
        return observations

    def _merged_options(self) -> dict[str, Any] | None:
        """Return the options of `set_options` as those of one reset.

        Raises:
            ValueError: sub-environments cannot have the options that they got.
        """
        first, count = self._options[0], len(self._options)
        if all(own is first for own in self._options):
            return first or None
        names = {name for own in self._options for name in own}
        if not names:
            return None
        if count != self.num_envs or any(own.keys() != names for own in self._options):
            raise ValueError(
                f"Expected one dict for all sub-environments, or {self.num_envs} dicts with the "
                f"same keys, got {self._options}."
            )
        if isinstance(self.env.unwrapped, (SyncVectorEnv, AsyncVectorEnv)):
            raise ValueError(
                f"{type(self.env.unwrapped).__name__} takes one dict of options for all "
                f"sub-environments, got {self._options}."
            )
        return {name: [own[name] for own in self._options] for name in first}

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seed the next reset; sub-environment `i` gets `seed + i`."""
        self._next_seed = seed
        return [None if seed is None else seed + i for i in range(self.num_envs)]

    def get_state(self) -> list[dict[str, Any]]:
        """Return the state of each sub-environment, for `set_state`."""
        return cast(Any, self.env.unwrapped).get_state()

    def set_state(self, state: list[dict[str, Any]]) -> VecEnvObs:
        """Restore `get_state` and return the observations of then, with other handles."""
        self._next_seed = None
        return cast(Any, self.env.unwrapped).set_state(state)

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[VecEnvObs, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        observations, rewards, terminated, truncated, infos = self.env.step(self._actions)
        rows = _split(infos, self.num_envs)
        done = terminated | truncated
        for i in np.flatnonzero(done):
            final, last = rows[i].pop("final_info", {}), rows[i].pop("final_obs", None)
            # What only wrappers know, such as episode statistics, stands beside `final_info`.
            rows[i] |= final
            rows[i]["terminal_observation"] = last
            rows[i]["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
        return observations, rewards.astype(np.float32), done, rows

    def close(self) -> None:
        self.env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        frames = self.env.render()
        return [None] * self.num_envs if frames is None else list(cast(Any, frames))

    def _owner(self, name: str) -> Any:
        """Return the outermost wrapper that has an attribute, or else the innermost environment."""
        env = self.env
        while isinstance(env, VectorWrapper) and not hasattr(env, name):
            env = env.env
        return env

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return an attribute of each sub-environment, or the one that they share."""
        owner = self._owner(attr_name)
        if isinstance(owner, (SyncVectorEnv, AsyncVectorEnv)):
            values = owner.get_attr(attr_name)
            return [values[i] for i in self._get_indices(indices)]
        value = getattr(owner, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute where it is found.

        Raises:
            NotImplementedError: of some sub-environments of a batched core only.
        """
        owner, chosen = self._owner(attr_name), self._get_indices(indices)
        if isinstance(owner, SyncVectorEnv):
            for i in chosen:
                owner.envs[i].set_wrapper_attr(attr_name, value)
            return
        if isinstance(owner, AsyncVectorEnv):
            values = [value] * self.num_envs if indices is None else [*owner.get_attr(attr_name)]
            for i in chosen:
                values[i] = value
            owner.set_attr(attr_name, values)
        elif {*chosen} != {*range(self.num_envs)}:
            raise NotImplementedError(
                "The environments of a batched core share their attributes: pass indices=None."
            )
        else:
            setattr(owner, attr_name, value)

    def env_method(
        self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        """Call a method of each sub-environment, or once the one that they share.

        Raises:
            NotImplementedError: of some workers of an `AsyncVectorEnv` only.
        """
        owner, chosen = self._owner(method_name), self._get_indices(indices)
        if isinstance(owner, SyncVectorEnv):
            return [owner.envs[i].get_wrapper_attr(method_name)(*args, **kwargs) for i in chosen]
        if isinstance(owner, AsyncVectorEnv):
            if {*chosen} != {*range(self.num_envs)}:
                raise NotImplementedError(
                    "AsyncVectorEnv calls methods of all sub-environments: pass indices=None."
                )
            results = owner.call(method_name, *args, **kwargs)
            return [results[i] for i in chosen]
        result = getattr(owner, method_name)(*args, **kwargs)
        return [result for _ in chosen]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None
    ) -> list[bool]:
        inner, chosen = self.env.unwrapped, self._get_indices(indices)
        if not isinstance(inner, SyncVectorEnv):
            return [False for _ in chosen]
        return [is_wrapped(inner.envs[i], wrapper_class) for i in chosen]


def _split(infos: dict[str, Any] | list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Split vector infos, nested ones too, into a dict per sub-environment.

    `_KEY` marks the sub-environments that have `KEY`; without it, all do.
    """
    if isinstance(infos, list):  # from gymnasium's DictInfoToList
        return infos
    rows: list[dict[str, Any]] = [{} for _ in range(count)]
    for key, values in infos.items():
        if key.startswith("_") and key[1:] in infos:
            continue
        if isinstance(values, dict):
            values = _split(values, count)
        elif f"_{key}" not in infos and getattr(values, "shape", ())[:1] != (count,):
            values = [values] * count
        for i in np.flatnonzero(infos.get(f"_{key}", np.ones(count, bool))):
            rows[i][key] = values[i]
    return rows
