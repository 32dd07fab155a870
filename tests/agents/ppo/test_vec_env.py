"""The SB3 adaptor keeps SB3's contract."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import sam_gym  # noqa: F401
from agents.ppo.vec_env import VectorEnvAdaptor


def make(settings: dict[str, Any], mode: str = "SameStep", count: int = 3) -> gym.vector.VectorEnv:
    return gym.make_vec(
        "SamSeg-v0",
        count,
        vectorization_mode="vector_entry_point",
        autoreset_mode=mode,
        obs="handle",
        **settings,
    )


def test_other_autoreset_modes_are_refused(tiny_env: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="SameStep"):
        VectorEnvAdaptor(make(tiny_env, "NextStep"))


def test_final_observation_and_truncation_reach_the_infos(tiny_env: dict[str, Any]) -> None:
    env = VectorEnvAdaptor(make(tiny_env | {"max_steps": 2, "stop": True}))
    env.seed(3)
    first = env.reset()
    assert set(first) == set(env.observation_space.spaces)
    stop = int(env.action_space.n) - 1
    env.step_async(np.array([0, 1, 2]))
    _, _, done, _ = env.step_wait()
    assert not done.any()
    env.step_async(np.array([5, stop, 7]))
    observation, reward, done, infos = env.step_wait()
    assert done.all() and reward.dtype == np.float32
    assert [info["TimeLimit.truncated"] for info in infos] == [True, False, True]
    for i, info in enumerate(infos):
        assert info["terminal_observation"]["num_steps"] == 2
        assert observation["num_steps"][i] == 0
        assert 0 <= info["iou"] <= 1
    assert infos[0]["clicks"] == 2 and infos[1]["clicks"] == 1


def test_seed_makes_the_next_reset_repeatable(tiny_env: dict[str, Any]) -> None:
    env = VectorEnvAdaptor(make(tiny_env))
    runs = []
    for _ in range(2):
        env.seed(11)
        env.reset()
        runs.append([info["source"] for info in env.reset_infos])
    env.reset()
    assert runs[0] == runs[1]
    assert runs[0] != [info["source"] for info in env.reset_infos]


def test_attributes_are_shared_by_all_environments(tiny_env: dict[str, Any]) -> None:
    env = VectorEnvAdaptor(make(tiny_env))
    assert env.get_attr("num_envs") == [3, 3, 3]
    with pytest.raises(NotImplementedError, match="share"):
        env.set_attr("anything", 1, indices=[0])
