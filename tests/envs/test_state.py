"""Saved states: episodes continue in another environment."""

import pickle
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import sam_gym  # noqa: F401 (registers the environments)
from sam_gym.envs.click import EPISODE_ARRAYS, SamSegVectorEnv

#: Arrays with a row per sub-environment that `set_state` recomputes from the drawn targets, and
#: the mask logits, which `get_state` trims to the clicks of the episode.
RECOMPUTED = {"handles", "_low_target", "_low_valid", "logits"}

MakeVec = Callable[..., SamSegVectorEnv]


@pytest.fixture
def make_vec(tiny_env: dict[str, Any]) -> MakeVec:
    def make_vec(num_envs: int = 5, **more: Any) -> SamSegVectorEnv:
        settings = {**tiny_env, "undo": True, "stop": True, **more}
        return gym.make_vec(
            "SamSeg-v0", num_envs, vectorization_mode="vector_entry_point", **settings
        )

    return make_vec


def without_handles(observations: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: value for key, value in observations.items() if key != "handle"}


def assert_play_alike(first: SamSegVectorEnv, second: SamSegVectorEnv, steps: int = 20) -> None:
    rng = np.random.default_rng(1)
    for _ in range(steps):
        actions = rng.integers(first.single_action_space.n, size=first.num_envs)
        actions[rng.random(first.num_envs) < 0.2] = first.core.undo_action
        one, two = first.step(actions), second.step(actions)
        np.testing.assert_equal(without_handles(one[0]), without_handles(two[0]))
        for a, b in zip(one[1:4], two[1:4], strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(one[4]["iou"], two[4]["iou"])
        np.testing.assert_array_equal(one[4]["source"], two[4]["source"])


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
@pytest.mark.parametrize("settings", [{"obs": "handle"}, {"obs": "full", "target": "instance"}])
def test_episodes_continue_in_another_environment(
    make_vec: MakeVec, mode: str, settings: dict[str, Any]
) -> None:
    first = make_vec(autoreset_mode=mode, **settings)
    observations, _ = first.reset(seed=3)
    rng = np.random.default_rng(0)
    for _ in range(13):
        observations, *_ = first.step(rng.integers(2 * 16**2, size=5))
    state = pickle.loads(pickle.dumps(first.get_state()))

    second = make_vec(autoreset_mode=mode, **settings)
    resumed = second.set_state(state)
    np.testing.assert_equal(without_handles(resumed), without_handles(observations))
    assert_play_alike(first, second)


def test_a_state_is_a_copy_that_can_be_used_again(make_vec: MakeVec) -> None:
    env, other = make_vec(), make_vec()
    env.reset(seed=0)
    env.step(np.arange(5))
    state = env.get_state()
    kept = pickle.dumps(state)
    env.step(np.arange(5))
    assert pickle.dumps(state) == kept
    for _ in range(2):
        env.set_state(state)
        other.set_state(state)
        assert_play_alike(env, other, steps=3)


@pytest.mark.parametrize("env_id", ["SamSeg-v0", "SamEverything-v0"])
def test_a_scalar_environment_continues(env_id: str, tiny_env: dict[str, Any]) -> None:
    first, second = (gym.make(env_id, **tiny_env) for _ in range(2))
    first.reset(seed=4)
    observation, *_ = first.step(3)
    state = pickle.loads(pickle.dumps(first.unwrapped.get_state()))  # type: ignore[attr-defined]
    np.testing.assert_equal(second.unwrapped.set_state(state), observation)  # type: ignore[attr-defined]
    env, other = first.unwrapped, second.unwrapped
    for action in (5, 9):
        for own, expected in zip(other.step(action), env.step(action), strict=True):
            np.testing.assert_equal(own, expected)
    np.testing.assert_equal(other.reset()[0], env.reset()[0])  # the next episode, too
    state["rng"] = np.random.default_rng(0).bit_generator.state
    with pytest.raises(ValueError, match="draws another episode than when its state was taken"):
        other.set_state(state)  # type: ignore[attr-defined]


def test_state_moves_between_batches(make_vec: MakeVec) -> None:
    together = make_vec(4)
    together.reset(seed=0)
    together.step(np.arange(4))
    halves = [make_vec(2), make_vec(2)]
    state = together.get_state()
    for half, own in zip(halves, (state[:2], state[2:]), strict=True):
        half.set_state(own)
    actions = np.array([5, 6, 7, 8])
    expected = together.step(actions)
    parts = [half.step(own) for half, own in zip(halves, (actions[:2], actions[2:]), strict=True)]
    np.testing.assert_array_equal(expected[1], np.concatenate([part[1] for part in parts]))


def test_nothing_of_an_episode_is_left_out(make_vec: MakeVec) -> None:
    core = make_vec(7).core
    with_a_row_per_env = {
        name
        for name, value in vars(core).items()
        if isinstance(value, np.ndarray | torch.Tensor) and len(value) == core.num_envs
    }
    assert with_a_row_per_env == {*EPISODE_ARRAYS, *RECOMPUTED}


def test_impossible_states_are_errors(make_vec: MakeVec) -> None:
    env = make_vec()
    with pytest.raises(ValueError, match="Sub-environment 0 had not been reset"):
        make_vec().set_state(env.get_state())
    env.reset(seed=0)
    with pytest.raises(ValueError, match="Expected the state of 3 sub-environments, got 5"):
        make_vec(3).set_state(env.get_state())
    state = env.get_state()
    # Of another dataset, a draw takes another number of random numbers.
    state[2]["rng"] = np.random.default_rng(99).bit_generator.state
    with pytest.raises(
        ValueError, match="Sub-environment 2 draws another episode.*scenes has changed"
    ):
        make_vec().set_state(state)
