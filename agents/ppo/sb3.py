"""The private attributes of stable-baselines3 that a resumed or imitating run has to set.

stable-baselines3 offers no public way to say where a rollout begins, or how far a model has come.
pyproject.toml bounds its version; a version that names these attributes differently is an error
here, not a run that silently starts over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import stable_baselines3
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

_START = ("_last_obs", "_last_episode_starts")
_PROGRESS = (
    *("num_timesteps", "_n_updates", "_current_progress_remaining", "_episode_num"),
    *("ep_info_buffer", "ep_success_buffer"),
)


def rollout_start(model: OnPolicyAlgorithm) -> tuple[Any, np.ndarray]:
    """Return the observations that the next step acts on, and which of them begin an episode."""
    observations, starts = (_get(model, name) for name in _START)
    return observations, starts


def set_rollout_start(model: OnPolicyAlgorithm, observations: Any, starts: np.ndarray) -> None:
    """Set the observations that the next step acts on.

    Args:
        model: whose rollout it is.
        observations: of all sub-environments of the model.
        starts: bool (num_envs,), whether an observation is the first of its episode.
    """
    set_progress(model, dict(zip(_START, (observations, starts), strict=True)))


def progress(model: OnPolicyAlgorithm) -> dict[str, Any]:
    """Return the counters and episode statistics of a model, for `set_progress`."""
    state = {name: _get(model, name) for name in _PROGRESS}
    return {k: list(own) if isinstance(own, deque) else own for k, own in state.items()}


def set_progress(model: OnPolicyAlgorithm, state: Mapping[str, Any]) -> None:
    """Set what `progress` has returned."""
    for name, value in state.items():
        now = _get(model, name)
        setattr(model, name, deque(value, now.maxlen) if isinstance(now, deque) else value)


def _get(model: OnPolicyAlgorithm, name: str) -> Any:
    """Return a private attribute; `RuntimeError` without it."""
    if not hasattr(model, name):
        raise RuntimeError(
            f"stable-baselines3 {stable_baselines3.__version__} has no {type(model).__name__}."
            f"{name}, which this version of sam-gym needs. Install a version that pyproject.toml "
            "allows."
        )
    return getattr(model, name)
