"""The attributes of stable-baselines3 that are set from outside."""

from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from agents.ppo.sb3 import progress, rollout_start, set_progress, set_rollout_start


def test_a_version_without_an_attribute_is_an_error() -> None:
    model: Any = SimpleNamespace(_last_obs=None, num_timesteps=0)
    with pytest.raises(RuntimeError, match=r"stable-baselines3 .* has no .*_last_episode_starts"):
        set_rollout_start(model, {}, np.ones(2, bool))
    with pytest.raises(RuntimeError, match="_n_updates"):
        progress(model)


def test_what_is_set_is_read() -> None:
    model: Any = SimpleNamespace(
        _last_obs=None,
        _last_episode_starts=None,
        num_timesteps=0,
        _n_updates=0,
        _current_progress_remaining=1.0,
        _episode_num=0,
        ep_info_buffer=deque(),
        ep_success_buffer=deque(),
    )
    set_progress(model, progress(model) | {"num_timesteps": 7})
    assert progress(model)["num_timesteps"] == 7
    set_rollout_start(model, {"x": 1}, np.array([True, False]))
    observations, starts = rollout_start(model)
    assert observations == {"x": 1} and starts.tolist() == [True, False]
