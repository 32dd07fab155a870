"""The SB3 adaptor keeps SB3's contract."""

import copy
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import FlattenObservation, FrameStackObservation
from gymnasium.wrappers.vector import DictInfoToList, RecordEpisodeStatistics
from stable_baselines3 import PPO
from stable_baselines3.common.monitor import Monitor

import sam_gym  # noqa: F401
from agents.ppo.vec_env import VectorEnvAdaptor
from sam_gym.backbones.embeddings.store import MAX_HANDLES


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


def test_options_of_the_next_reset(tiny_env: dict[str, Any]) -> None:
    env = VectorEnvAdaptor(make(tiny_env))
    for options in ({"index": 4}, [{"index": 4}, {"index": 4}, {"index": 4}]):
        env.set_options(options)
        env.reset()
        assert {info["source"] for info in env.reset_infos} == {"scenes/train/4"}
    env.set_options([{"index": 1}, {"index": 0}, {"index": 5}])
    env.reset()
    assert [info["source"][-1] for info in env.reset_infos] == ["1", "0", "5"]
    env.seed(0)
    env.reset()  # options hold for one reset
    drawn = [info["source"] for info in env.reset_infos]
    env.set_options([{"index": 1}, {}, {}])
    with pytest.raises(ValueError, match=r"3 dicts with the same keys, got \[\{'index': 1"):
        env.reset()
    env.set_options()
    env.seed(0)
    env.reset()
    assert [info["source"] for info in env.reset_infos] == drawn
    env.set_options({"indx": 1})
    with pytest.raises(ValueError, match="Did you mean 'index'"):
        env.reset()


def test_options_of_separate_environments() -> None:
    env = VectorEnvAdaptor(nested())
    env.set_options({"level": 1})
    env.reset()
    env.set_options([{"level": 1}, {"level": 2}])
    with pytest.raises(ValueError, match="SyncVectorEnv takes one dict"):
        env.reset()


def test_a_scalar_environment_is_refused(tiny_env: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"vector environment, got .*gymnasium\.make_vec"):
        VectorEnvAdaptor(gym.make("SamSeg-v0", **tiny_env))


def test_wrappers_of_separate_environments_are_found() -> None:
    envs = SyncVectorEnv(
        [lambda: Monitor(Nested(0)), lambda: Nested(1)], autoreset_mode=AutoresetMode.SAME_STEP
    )
    assert VectorEnvAdaptor(envs).env_is_wrapped(Monitor) == [True, False]


def test_attributes_are_shared_by_all_environments(tiny_env: dict[str, Any]) -> None:
    env = VectorEnvAdaptor(make(tiny_env))
    assert env.get_attr("num_envs") == [3, 3, 3]
    with pytest.raises(NotImplementedError, match="share"):
        env.set_attr("anything", 1, indices=[0])


def test_statistics_of_episodes_reach_the_infos(tiny_env: dict[str, Any]) -> None:
    env = RecordEpisodeStatistics(make(tiny_env | {"max_steps": 2}))
    for wrapped in (env, DictInfoToList(env)):
        adaptor = VectorEnvAdaptor(wrapped)
        adaptor.seed(0)
        adaptor.reset()
        assert "iou" in adaptor.reset_infos[0]
        *_, infos = adaptor.step(np.zeros(3, int))
        assert not any("episode" in info for info in infos)
        _, _, done, infos = adaptor.step(np.zeros(3, int))
        assert done.all() and [info["episode"]["l"] for info in infos] == [2, 2, 2]
        assert infos[0]["clicks"] == 2 and infos[0]["episode"]["r"] == pytest.approx(
            infos[0]["iou"], abs=1e-6
        )
        assert "final_info" not in infos[0] and "terminal_observation" in infos[0]


class Nested(gym.Env):
    """Episodes of one step with nested infos; the second of two lacks one of them."""

    observation_space, action_space = gym.spaces.Discrete(9), gym.spaces.Discrete(2)

    def __init__(self, number: int) -> None:
        self.number, self.bonus = number, 0

    def twice(self, value: int) -> int:
        return 2 * value + self.number

    def move(self) -> None:
        self.number += 1

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        return 0, {"scores": {"iou": 0.25}, "_private": 1}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        more = {} if self.number else {"deep": {"er": np.arange(2)}}
        return 1, 0.0, action == 1, False, {"scores": {"iou": 0.75} | more, "_private": 2}


def nested() -> gym.vector.VectorEnv:
    mode = AutoresetMode.SAME_STEP
    return SyncVectorEnv([lambda: Nested(0), lambda: Nested(1)], autoreset_mode=mode)


def test_nested_infos_are_split() -> None:
    env = VectorEnvAdaptor(nested())
    env.reset()
    assert env.reset_infos == [{"scores": {"iou": 0.25}, "_private": 1}] * 2
    *_, infos = env.step(np.array([0, 1]))
    assert infos[0]["scores"]["iou"] == infos[1]["scores"]["iou"] == 0.75
    assert infos[0]["scores"]["deep"]["er"].tolist() == [0, 1]
    assert "deep" not in infos[1]["scores"] and infos[1]["_private"] == 2
    assert infos[1]["terminal_observation"] == 1


class Shared(gym.vector.VectorWrapper):
    """Adds infos without a mask."""

    bonus = 7

    def step(self, actions: np.ndarray) -> Any:
        *results, infos = super().step(actions)
        return *results, infos | {"round": 3, "name": "ab", "each": np.array([5, 6])}


def test_infos_without_a_mask_belong_to_all() -> None:
    env = VectorEnvAdaptor(Shared(nested()))
    env.reset()
    *_, infos = env.step(np.array([0, 1]))
    assert [(info["round"], info["name"], info["each"]) for info in infos] == [
        (3, "ab", 5),
        (3, "ab", 6),
    ]


def test_attributes_and_methods_are_found_behind_wrappers(tiny_env: dict[str, Any]) -> None:
    settings = {name: value for name, value in tiny_env.items() if name != "dataset_kwargs"}
    more = {"autoreset_mode": "SameStep", "episodes_per_domain": None}
    env = RecordEpisodeStatistics(
        gym.make_vec(
            "SamContinual-v0", 2, vectorization_mode="vector_entry_point", **more, **settings
        )
    )
    adaptor = VectorEnvAdaptor(env)
    assert adaptor.get_attr("stream")[1] is env.unwrapped.core.stream
    assert adaptor.get_attr("episode_count", indices=1) == [0]  # the wrapper's own
    assert adaptor.env_method("set_task", 1) == [None, None]
    assert env.unwrapped.core.requested.tolist() == [1, 1]
    adaptor.set_attr("render_fps", 3)
    assert env.unwrapped.render_fps == 3
    with pytest.raises(AttributeError, match="'nothing'"):
        adaptor.get_attr("nothing")


def test_attributes_and_methods_of_separate_environments() -> None:
    env = VectorEnvAdaptor(Shared(nested()))
    assert env.get_attr("number") == [0, 1] and env.get_attr("number", indices=[1]) == [1]
    assert env.env_method("twice", 5) == [10, 11] and env.env_method("twice", 5, indices=0) == [10]
    env.env_method("move", indices=[1])
    assert env.get_attr("number") == [0, 2]  # the other one did not move
    env.set_attr("number", 3, indices=1)
    assert env.get_attr("number") == [0, 3]
    env.set_attr("number", 4)
    assert env.env_method("twice", value=5) == [14, 14]
    assert env.get_attr("bonus") == [7, 7]


def test_policies_that_cannot_read_handles_are_refused(tiny_env: dict[str, Any]) -> None:
    env = VectorEnvAdaptor(make(tiny_env))
    with pytest.raises(
        ValueError, match=r"not an input of a network.*agents\.policies.*obs='full'"
    ):
        PPO("MultiInputPolicy", env)
    flat = gym.make("SamSeg-v0", obs="handle", **tiny_env)
    with pytest.raises(ValueError, match="not an input of a network"):
        FlattenObservation(flat)
    with pytest.raises(ValueError, match="not an input of a network"):
        PPO("MultiInputPolicy", FrameStackObservation(flat, 2))
    space = env.observation_space["handle"]
    assert type(copy.deepcopy(space)) is type(space)
    assert type(pickle.loads(pickle.dumps(space))) is gym.spaces.Box  # in saved policies
    assert (
        pickle.loads(pickle.dumps(space))
        == space
        == gym.spaces.Box(0, MAX_HANDLES - 1, (1,), np.int32)
    )
