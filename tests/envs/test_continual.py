"""`SamContinual-v0`: its own rules, beside those of every registered environment."""

import pickle
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import sam_gym  # noqa: F401 (registers the environments)
from sam_gym.data.streams import Domain, Stream
from sam_gym.envs.click import EPISODE_ARRAYS
from sam_gym.envs.continual import ContinualConfig, StreamDataset

Make = Callable[..., Any]

DOMAINS = ["cells", "night", "sonar"]


@pytest.fixture
def settings(tiny_env: dict[str, Any]) -> dict[str, Any]:
    """Arguments: three domains of four small images, two episodes of one click in each."""
    del tiny_env["dataset_kwargs"]
    kwargs = {"domains": ",".join(DOMAINS), "train_images": 4, "size": 64}
    return tiny_env | {"stream_kwargs": kwargs, "episodes_per_domain": 2, "max_steps": 1}


@pytest.fixture
def make(settings: dict[str, Any]) -> Make:
    return lambda **more: gym.make("SamContinual-v0", **(settings | more))


@pytest.fixture
def make_vec(settings: dict[str, Any]) -> Make:
    def make_vec(num_envs: int = 3, **more: Any) -> Any:
        arguments = {"autoreset_mode": "SameStep", **settings, **more}
        return gym.make_vec(
            "SamContinual-v0", num_envs, vectorization_mode="vector_entry_point", **arguments
        )

    return make_vec


def tasks(env: gym.Env, episodes: int, **first: Any) -> list[int]:
    """Return the domains of some episodes; the first is reset with arguments."""
    played = [env.reset(**first)[1]["task_id"]]
    for _ in range(episodes - 1):
        env.step(0)
        played.append(env.reset()[1]["task_id"])
    return [int(task) for task in played]


# The schedule ----------------------------------------------------------------------------------


def test_domains_follow_one_another(make: Make) -> None:
    assert tasks(make(), 9, seed=0) == [0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert tasks(make(cycle=True), 9, seed=0) == [0, 0, 1, 1, 2, 2, 0, 0, 1]
    assert tasks(make(episodes_per_domain=None), 9, seed=0) == [0] * 9
    assert make(order="sonar,cells,night").unwrapped.stream.names == ("sonar", "cells", "night")
    env = make(order=["night", "sonar", "cells"])
    assert env.unwrapped.stream.names == ("night", "sonar", "cells")
    assert env.reset(seed=0)[1]["domain"] == "night"


def test_info_names_the_domain(make: Make) -> None:
    env = make(max_steps=2)
    seen = []
    for episode in range(5):
        infos = [env.reset(seed=0 if episode == 0 else None)[1]]
        infos += [env.step(0)[-1] for _ in range(2)]
        for info in infos:
            assert info["domain"] == DOMAINS[info["task_id"]] == info["source"].split("/")[0]
            assert info["domain"] == DOMAINS[env.unwrapped.task]
            assert type(info["boundary"]) is bool
        assert len({info["boundary"] for info in infos}) == 1
        seen.append(infos[0]["boundary"])
        assert env.unwrapped.core._caption(0).startswith(f"{info['domain']}: object  step 2")
    assert seen == [True, False, True, False, True]


def test_hidden_boundaries_leave_no_trace_of_the_domain(make: Make) -> None:
    hidden = make(boundaries="hidden", episodes_per_domain=1)
    for _ in range(3):
        observation, info = hidden.reset()
        for seen in (info, hidden.step(0)[-1]):
            assert not {"boundary", "task_id", "domain", "source"} & seen.keys()
            assert not any(name in str(value) for name in DOMAINS for value in seen.values())
        assert "task_id" not in observation and observation["target_category"] == 0
        caption = hidden.unwrapped.core._caption(0)
        assert caption.startswith("object") and not any(name in caption for name in DOMAINS)
    assert hidden.unwrapped.task == 2


def test_the_task_may_be_observed(make: Make) -> None:
    told = make(observe_task=True)
    assert told.observation_space["task_id"] == gym.spaces.Discrete(3)
    assert told.reset(options={"task": 2})[0]["task_id"] == 2


def test_another_domain_comes_with_the_next_reset(make: Make) -> None:
    env = make()
    env.unwrapped.set_task(1)
    assert tasks(env, 5, seed=0) == [1, 1, 2, 2, 2]  # asked for, and the schedule goes on
    env.unwrapped.set_task(0)
    assert env.step(0)[-1]["task_id"] == 2 == env.unwrapped.task
    assert tasks(env, 4) == [0, 0, 1, 1]
    env.unwrapped.advance()
    assert tasks(env, 2) == [2, 2]
    env.unwrapped.advance()
    assert tasks(env, 1) == [2]  # there is none after the last
    assert tasks(env, 4, options={"task": 0}) == [0, 0, 1, 1]

    again = make(cycle=True)
    again.reset(seed=0)
    for _ in range(4):
        again.unwrapped.advance()
    _, info = again.reset()
    assert info["task_id"] == 1 and info["boundary"]
    again.unwrapped.set_task(1)
    assert again.reset()[1]["boundary"] is False  # another start of the same domain


def test_a_seed_restarts_the_stream(make: Make) -> None:
    env = make()
    first = [env.reset(seed=3)[1]["source"]] + [env.reset()[1]["source"] for _ in range(4)]
    env.reset(options={"task": 1})
    again = [env.reset(seed=3)[1]["source"]] + [env.reset()[1]["source"] for _ in range(4)]
    assert again == first
    assert tasks(env, 2, seed=3, options={"task": 2}) == [2, 2]
    assert tasks(env, 1, seed=3) == [0]


@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_every_sub_environment_has_its_own_schedule(make_vec: Make, mode: str) -> None:
    env = make_vec(autoreset_mode=mode, max_steps=2)
    _, info = env.reset(seed=0, options={"task": np.array([0, 1, 2])})
    assert info["task_id"].tolist() == env.unwrapped.task.tolist() == [0, 1, 2]
    assert info["boundary"].dtype == bool and info["boundary"].all()
    steps = 2 if mode == "SameStep" else 3
    for _ in range(2 * steps):
        *_, info = env.step(np.zeros(3, int))
    assert info["task_id"].tolist() == [1, 2, 2]
    env.unwrapped.set_task(0)
    assert env.unwrapped.task.tolist() == [1, 2, 2]
    for _ in range(steps):
        *_, info = env.step(np.zeros(3, int))
    assert info["task_id"].tolist() == [0, 0, 0]

    mask = np.array([True, False, True])
    _, info = env.reset(options={"reset_mask": mask, "task": 1})
    assert info["task_id"][mask].tolist() == [1, 1]
    assert env.unwrapped.task.tolist() == [1, 0, 1]
    # A seed begins the stream anew where it is given.
    _, info = env.reset(seed=[None, None, 5])
    assert info["task_id"].tolist() == [1, 0, 0]


# Prefetching, copies, states --------------------------------------------------------------------


def test_prefetched_draws_are_of_the_right_domain(make: Make, make_vec: Make) -> None:
    """Without a cache every episode is prefetched, except in a scalar environment."""
    vector = make_vec(cache_mib=0)
    scalars = [make(cache_mib=0) for _ in range(3)]
    sources = [vector.reset(seed=7)[1]["source"].tolist()]
    expected = [[env.reset(seed=7 + i)[1]["source"] for i, env in enumerate(scalars)]]
    used = 0
    for step in range(12):
        if step in (2, 7):
            vector.unwrapped.set_task(2 - step // 4)
        if step == 5:
            vector.unwrapped.advance()
        used += len(vector.unwrapped.core.prefetcher.pending)
        sources.append(vector.step(np.zeros(3, int))[-1]["source"].tolist())
        for env in scalars:
            if step in (2, 7):
                env.unwrapped.set_task(2 - step // 4)
            if step == 5:
                env.unwrapped.advance()
        expected.append([env.reset()[1]["source"] for env in scalars])
    assert used == 36
    assert sources == expected
    vector.close()


def test_the_first_episode_of_the_next_domain_is_prefetched(make_vec: Make) -> None:
    env = make_vec(cache_mib=0)
    env.reset(seed=0)
    assert [pending.arguments for pending in env.unwrapped.core.prefetcher.pending.values()] == [
        (0, -1)
    ] * 3
    env.step(np.zeros(3, int))
    assert [pending.arguments for pending in env.unwrapped.core.prefetcher.pending.values()] == [
        (1, -1)
    ] * 3
    env.close()


@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
@pytest.mark.parametrize("how", ["state", "pickle"])
def test_the_schedule_continues_in_copies_and_states(make_vec: Make, mode: str, how: str) -> None:
    first = make_vec(autoreset_mode=mode, max_steps=2, cycle=True)
    first.reset(seed=4, options={"task": np.array([0, 1, 2])})
    for _ in range(7):
        first.step(np.zeros(3, int))
    first.unwrapped.set_task(np.array([2, 0, 0]))
    if how == "pickle":
        second = pickle.loads(pickle.dumps(first))
    else:
        second = make_vec(autoreset_mode=mode, max_steps=2, cycle=True)
        second.unwrapped.set_state(pickle.loads(pickle.dumps(first.unwrapped.get_state())))
    for _ in range(20):
        one, two = (env.step(np.arange(3))[-1] for env in (first, second))
        for key in ("source", "domain", "boundary", "iou"):
            np.testing.assert_array_equal(one[key], two[key])


def test_the_state_of_an_episode_is_complete(make_vec: Make) -> None:
    core = make_vec(7).unwrapped.core
    of_the_schedule = {"tasks", "played", "requested", "boundaries"}
    made_anew = {"handles", "_low_target", "_low_valid", "logits"}
    with_a_row_per_env = {
        name
        for name, value in vars(core).items()
        if isinstance(value, np.ndarray | torch.Tensor) and len(value) == core.num_envs
    }
    assert set(core.episode_arrays) == {*EPISODE_ARRAYS, *of_the_schedule}
    assert with_a_row_per_env == {*core.episode_arrays, *made_anew}


# The data --------------------------------------------------------------------------------------


def test_all_domains_as_one_dataset(settings: dict[str, Any]) -> None:
    dataset = ContinualConfig(stream_kwargs=settings["stream_kwargs"]).open_dataset()
    assert len(dataset) == 12 and dataset.categories == ("object",)
    assert [dataset[k].source for k in (0, 3, 4, 11)] == [
        *("cells/train/0", "cells/train/3", "night/train/0", "sonar/train/3")
    ]
    with pytest.raises(IndexError, match=r"image 12 is not in range\(12\)"):
        dataset[12]
    rng = np.random.default_rng(0)
    drawn = [dataset.draw_from(1, rng)[0] for _ in range(40)]
    assert set(drawn) == {4, 5, 6, 7}
    assert {dataset.draw(rng)[0] // 4 for _ in range(60)} == {0, 1, 2}


def test_a_stream_is_opened_once_while_it_is_in_use(settings: dict[str, Any]) -> None:
    config = ContinualConfig(stream_kwargs=settings["stream_kwargs"])
    held = config.open_stream()
    assert config.open_dataset().stream is held
    assert ContinualConfig(order="random:1").open_stream() is not held


def test_domains_share_their_categories(settings: dict[str, Any]) -> None:
    dataset = ContinualConfig(stream_kwargs=settings["stream_kwargs"]).open_dataset()
    other = type("Other", (), {"categories": ("cell",)})()
    stream = Stream(
        "mixed",
        (Domain("a", False, {"train": dataset}), Domain("b", False, {"train": other})),
    )
    with pytest.raises(ValueError, match=r"Domain 'b' has the categories \('cell',\), 'a' has"):
        StreamDataset(stream, "train")


# Errors ----------------------------------------------------------------------------------------


def test_a_domain_without_targets_is_named(make: Make) -> None:
    env = make(min_target=0.99)
    with pytest.raises(ValueError, match="domain 'night': 200 draws found no target"):
        env.reset(seed=0, options={"task": 1})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"episodes_per_domain": 0}, "episodes_per_domain must be at least 1, got 0"),
        ({"boundaries": "hiden"}, "Did you mean 'hidden'"),
        ({"stream": "scene-domains"}, "Did you mean 'scenes-domains'"),
        ({"stream_kwargs": {"order": "a"}}, "may not hold 'order': use order= instead"),
        ({"stream_kwargs": {"domain": "cells"}}, "Did you mean 'domains'"),
        ({"order": "cells,night"}, "order lacks sonar"),
        ({"data": "somewhere"}, "reads no files"),
        ({"split": "tets"}, "Did you mean 'test'"),
        ({"dataset": "scenes"}, "Unknown argument of SamContinual-v0 'dataset'"),
    ],
)
def test_impossible_arguments(make: Make, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**wrong)


@pytest.mark.parametrize("task", [3, -1, 0.0, "cells", np.zeros(2, int)])
def test_impossible_tasks(make_vec: Make, task: Any) -> None:
    env = make_vec()
    with pytest.raises(ValueError, match="expected 0 to 2|as an integer, or 3 integers"):
        env.unwrapped.set_task(task)
    with pytest.raises(ValueError, match="expected 0 to 2|as an integer, or 3 integers"):
        env.reset(options={"task": task})
