"""`reset(options=...)`: images by index, and no option that is ignored."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from sam_gym import ENVIRONMENTS

VECTOR = {"num_envs": 3, "vectorization_mode": "vector_entry_point"}


@pytest.fixture(params=sorted(ENVIRONMENTS))
def settings(request: pytest.FixtureRequest, tiny_env: dict[str, Any]) -> dict[str, Any]:
    """Arguments of each environment over eight images."""
    env_id, own = request.param, dict(tiny_env)
    if env_id == "SamContinual-v0":
        del own["dataset_kwargs"]
        stream = {"domains": "cells,night", "train_images": 8, "size": 128}
        own |= {"stream_kwargs": stream, "episodes_per_domain": None}
    elif env_id == "SamEverything-v0":
        own["dataset"] = "scenes"
    elif env_id == "SamVideo-v0":
        own = request.getfixturevalue("tiny_video_env")
    return {"id": env_id} | own


def names(envs: Any, numbers: list[int], domain: int = 0) -> list[str]:
    """Return the sources of some images."""
    dataset = envs.unwrapped.core.dataset
    first = dataset.firsts[domain] if hasattr(dataset, "firsts") else 0
    items = [dataset[int(first) + number] for number in numbers]
    return [item.source if hasattr(item, "source") else item.name for item in items]


def test_an_index_chooses_the_image(settings: dict[str, Any]) -> None:
    env = gym.make(**settings)
    for index in (5, np.int64(0), 7):
        _, info = env.reset(seed=1, options={"index": index})
        assert [info["source"]] == names(env, [int(index)])
    plain = [env.reset(seed=1)[1]["source"], env.reset()[1]["source"]]
    other = gym.make(**settings)
    assert plain == [other.reset(seed=1)[1]["source"], other.reset(options={})[1]["source"]]


@pytest.mark.parametrize("cache_mib", [0, 64])
def test_an_index_for_each_sub_environment(settings: dict[str, Any], cache_mib: int) -> None:
    envs = gym.make_vec(**settings, **VECTOR, cache_mib=cache_mib, autoreset_mode="SameStep")
    plain = gym.make_vec(**settings, **VECTOR, autoreset_mode="SameStep")
    _, infos = envs.reset(seed=0, options={"index": [5, 1, 5]})
    assert infos["source"].tolist() == names(envs, [5, 1, 5])
    assert envs.reset(options={"index": 2})[1]["source"].tolist() == names(envs, [2, 2, 2])
    mask = np.array([False, True, False])
    _, infos = envs.reset(options={"index": np.array([0, 3, 0]), "reset_mask": mask})
    assert infos["_source"].tolist() == mask.tolist()
    assert infos["source"][1] == names(envs, [3])[0]
    # The choice is for one episode, and draws go on as they would have.
    plain.reset(seed=9)
    assert envs.reset(seed=9)[1]["source"].tolist() == plain.reset(seed=9)[1]["source"].tolist()
    assert envs.reset()[1]["source"].tolist() == plain.reset()[1]["source"].tolist()


def test_a_state_holds_the_choice(settings: dict[str, Any]) -> None:
    first, second = (gym.make_vec(**settings, **VECTOR).unwrapped for _ in range(2))
    _, infos = first.reset(seed=0, options={"index": [6, 2, 4]})
    second.set_state(first.get_state())
    sources = [second.core.ground_truth(i).source for i in range(3)]
    assert sources == infos["source"].tolist()
    assert second.reset()[1]["source"].tolist() == first.reset()[1]["source"].tolist()


def test_the_index_counts_within_the_domain(tiny_env: dict[str, Any]) -> None:
    del tiny_env["dataset_kwargs"]
    stream = {"domains": "cells,night", "train_images": 8, "size": 128}
    envs = gym.make_vec("SamContinual-v0", **VECTOR, stream_kwargs=stream, **tiny_env)
    _, infos = envs.reset(seed=0, options={"task": [1, 0, 1], "index": 3})
    expected = [names(envs, [3], domain)[0] for domain in (1, 0, 1)]
    assert infos["source"].tolist() == expected and infos["task_id"].tolist() == [1, 0, 1]


def test_options_that_are_wrong(settings: dict[str, Any]) -> None:
    env, envs = gym.make(**settings), gym.make_vec(**settings, **VECTOR)
    for wrong, message in (
        ({"indx": 3}, r"Unknown reset option 'indx'\. Did you mean 'index'\?"),
        ({"reset_mask": [True]}, r"Unknown reset option 'reset_mask'"),
        ({"index": 8}, r"Index 8 is out of range: .* has (image|video)s 0 to 7\."),
        ({"index": -1}, r"Index -1 is out of range"),
        ({"index": 1.0}, r"Expected an index as an integer, .*, got 1\.0"),
        ({"index": True}, r"Expected an index as an integer"),
        ({"index": [1, 2]}, r"Expected an index as an integer, or 1 integers"),
    ):
        with pytest.raises(ValueError, match=message):
            env.reset(seed=0, options=wrong)
    for wrong, message in (
        (
            {"reset_msk": [True] * 3},
            r"Unknown reset option 'reset_msk'\. Did you mean 'reset_mask'",
        ),
        ({"index": [1, 2]}, r"or 3 integers, one for each sub-environment, got \[1, 2\]"),
        ({"index": [1, 2, 8]}, r"Index 8 is out of range"),
        ({"index": ["a", "b", "c"]}, r"Expected an index as an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            envs.reset(seed=0, options=wrong)
    assert env.reset(options={"index": None})[1]["source"]


def test_an_image_without_a_target_is_named(tiny_env: dict[str, Any]) -> None:
    env = gym.make("SamSeg-v0", **tiny_env | {"min_target": 0.9})
    with pytest.raises(ValueError, match=r"scenes, image 5: 200 draws found no target that covers"):
        env.reset(options={"index": 5})
