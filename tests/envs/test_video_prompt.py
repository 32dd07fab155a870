"""The task `prompt` of `SamVideo-v0`: clicks anywhere in a clip."""

import pickle
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3

from sam_gym.envs.video import FRAME_COLUMNS, PromptCore, SamVideoConfig, make_core
from sam_gym.envs.video.prompt import NEGATIVE, POSITIVE, STOP
from sam_gym.metrics.masks import iou

pytestmark = pytest.mark.usefixtures("own_references")

ID = "SamVideo-v0"
Make = Callable[..., PromptCore]
FRAMES = 4


@pytest.fixture
def own(tiny_video_env: dict[str, Any]) -> dict[str, Any]:
    return tiny_video_env | {"task": "prompt", "frames": FRAMES, "grid": 8, "budget": 3}


@pytest.fixture
def make(own: dict[str, Any]) -> Make:
    def make(num_envs: int = 1, **more: Any) -> PromptCore:
        core = make_core(SamVideoConfig(**own | more), num_envs)
        assert isinstance(core, PromptCore)
        core.reset(range(num_envs), [np.random.default_rng(seed) for seed in range(num_envs)])
        return core

    return make


def step(core: PromptCore, *actions: tuple[int, int, int]) -> np.ndarray:
    checked = core.check_actions(np.array(actions))
    return core.step(np.arange(core.num_envs), checked)[0]


@pytest.mark.parametrize("kind", ["mask", "point"])
def test_masks_are_those_of_the_tracker(make: Make, kind: Any) -> None:
    """The same clicks on the pixels of the frames, given to `VideoTracker` as a user would."""
    core = make(prompt=kind)
    target = core.ground_truth(0)
    truth = target.frames[0].mask(target.number)
    session = core.tracker.open([[frame.image for frame in target.frames]])
    if kind == "mask":
        session.prompt(0, 0, 0, mask=truth)
    else:
        session.prompt(0, 0, 0, points=core._first_prompt(0)["points"], labels=[1])

    def same() -> None:
        for shown in session.propagate():
            expected = shown.logits[0]
            torch.testing.assert_close(
                core.logits[0, shown.frame],
                expected,
                atol=1e-4 * max(1.0, float(expected.std())),
                rtol=1e-4,
            )
            assert core.ious[0, shown.frame] == pytest.approx(float(shown.ious[0]), abs=1e-4)

    same()
    # Cells of 8 x 8 pixels: row 2, column 5 has its middle at (43.5, 19.5).
    for frame, cell, kind_of, place in (
        (3, 21, POSITIVE, (43.5, 19.5)),
        (3, 0, NEGATIVE, (3.5, 3.5)),
        (1, 21, POSITIVE, (43.5, 19.5)),
    ):
        step(core, (frame, cell, kind_of))
        session.prompt(0, frame, 0, points=[place], labels=[kind_of], clear=False)
        same()
    exists, prompted = core.observe([0])["frames"][0].T[:2]
    assert exists.tolist() == [1] * FRAMES and prompted.tolist() == [1, 1, 0, 1]
    assert core.clicks[0].sum(axis=(2, 3)).tolist() == [[0, 0], [0, 1], [0, 0], [1, 1]]


def test_rewards_are_the_gain_in_mean_j_minus_the_cost(make: Make) -> None:
    core = make(2, score="full", click_cost=0.125)

    def js(row: int) -> float:
        target = core.ground_truth(row)
        own = [iou(core._mask(row, t), target.at(t).mask) for t in range(1, int(core.lengths[row]))]
        return float(np.mean(own))

    before = [js(0), js(1)]
    assert core.info([0, 1])["gain"].tolist() == [0.0, 0.0]
    rewards = step(core, (2, 20, POSITIVE), (0, 0, STOP))
    assert rewards[0] == pytest.approx(js(0) - before[0] - 0.125, abs=1e-9) and rewards[1] == 0.0
    assert core.info([0])["gain"] == pytest.approx(js(0) - before[0], abs=1e-9)
    assert core._is_over(np.arange(2)).tolist() == [False, True]
    with pytest.raises(RuntimeError, match="is over: call reset"):
        core.step(np.array([1]), np.array([[0, 0, POSITIVE]]))
    for _ in range(2):
        _, over, cut = core.step(np.array([0]), np.array([[2, 20, POSITIVE]]))
    assert over.tolist() == [True] and cut.tolist() == [False]
    assert core.observe([0])["budget"] == 0 and core.info([0])["clicks"] == 3


def test_truth_is_not_observed(make: Make) -> None:
    """Other true masks after the prompt change rewards, but nothing that an agent sees."""
    seen = []
    for known in (True, False):
        core = make(obs="full")
        if not known:
            core._truth.zero_()
        rewards = step(core, (2, 30, POSITIVE))
        seen.append((core.observe([0]), rewards, core.js.copy()))
    for key in seen[0][0]:
        np.testing.assert_array_equal(seen[0][0][key], seen[1][0][key], err_msg=key)
    assert (seen[0][2][0, 1:] != seen[1][2][0, 1:]).any()


def test_trying_clicks_changes_nothing_and_is_right(make: Make) -> None:
    core = make(2)
    step(core, (1, 9, POSITIVE), (3, 30, NEGATIVE))
    before = pickle.dumps(core.get_state())
    actions = np.array([core.error_in(row, 2) for row in range(2)])
    expected = core.try_clicks(np.arange(2), actions)
    assert pickle.dumps(core.get_state()) == before
    step(core, *actions.tolist())
    np.testing.assert_allclose(core.mean_js(core.js), expected, atol=1e-9)


def test_short_clips_end_early(make: Make) -> None:
    core = make(frames=16, dataset_kwargs={"length": 3, "size": 64, "frames": 6})
    assert core.lengths.tolist() == [6]
    own = core.observe([0])
    exists = own["frames"][0, :, FRAME_COLUMNS.index("exists")]
    assert exists.tolist() == [1] * 6 + [0] * 10 and not own["sam_pred_mask_prob"][0, 6:].any()
    step(core, (15, 3, POSITIVE))
    assert core.session.conditioned(0) == [0, 5]


# The contract ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("checker", "obs"), [(check_env, "full"), (check_env_for_sb3, "handle")])
def test_checkers_pass(own: dict[str, Any], obs: str, checker: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checker(gym.make(ID, **own | {"obs": obs, "frames": 3, "budget": 2}).unwrapped)
    # Guesses of the checkers: an embedding has no bounds, and not every table is an image.
    expected = ("value is", "unconventional", "image", "shows nothing")
    assert all(any(text in str(one.message) for text in expected) for one in caught)


def test_vector_equals_scalars(own: dict[str, Any]) -> None:
    mode = AutoresetMode.SAME_STEP
    settings = own | {"obs": "handle", "frames": 3, "score": "full"}
    batched = gym.make_vec(
        ID, 2, vectorization_mode="vector_entry_point", autoreset_mode=mode.value, **settings
    )
    alone = gym.make_vec(
        ID, 2, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}, **settings
    )
    rng, ended = np.random.default_rng(0), 0
    one, two = batched.reset(seed=4), alone.reset(seed=4)
    for _ in range(7):
        for key in one[0]:
            atol = 1 if key == "sam_pred_mask_prob" else 1e-3 if key == "frames" else 0
            np.testing.assert_allclose(
                one[0][key].astype(float), two[0][key], atol=atol, err_msg=key
            )
        np.testing.assert_array_equal(one[-1]["clicks"], two[-1]["clicks"])
        actions = np.stack([rng.integers(space, size=2) for space in (3, 64, 3)], axis=1)
        one, two = batched.step(actions), alone.step(actions)
        np.testing.assert_allclose(one[1], two[1], atol=2e-3)
        np.testing.assert_array_equal(one[2], two[2])
        ended += int(one[2].sum())
    assert ended > 1


def test_a_restored_episode_has_the_same_future(own: dict[str, Any]) -> None:
    def create() -> Any:
        return gym.make_vec(
            ID, 2, vectorization_mode="vector_entry_point", obs="handle", **own
        ).unwrapped

    first = create()
    first.reset(seed=3)
    observations, *_ = first.step(np.array([[2, 9, POSITIVE], [1, 30, NEGATIVE]]))
    second, copied = create(), pickle.loads(pickle.dumps(first))
    resumed = second.set_state(pickle.loads(pickle.dumps(first.get_state())))
    for key in set(observations) - {"handle"}:
        np.testing.assert_array_equal(resumed[key], observations[key], err_msg=key)
    for actions in ([[2, 10, POSITIVE], [3, 7, POSITIVE]], [[0, 5, STOP], [3, 1, NEGATIVE]]):
        one = first.step(np.array(actions))
        for other in (second, copied):
            two = other.step(np.array(actions))
            for key in set(observations) - {"handle"}:
                np.testing.assert_array_equal(one[0][key], two[0][key], err_msg=key)
            for a, b in zip(one[1:4], two[1:4], strict=True):
                np.testing.assert_array_equal(a, b)


def test_pictures_and_wrong_actions(own: dict[str, Any], make: Make) -> None:
    env = gym.make(ID, render_mode="rgb_array", **own)
    env.reset(seed=0)
    before = env.render()
    env.step(np.array([3, 20, POSITIVE]))
    after = env.render()
    assert before.shape == after.shape and (before != after).any()
    core = make()
    with pytest.raises(ValueError, match=r"Action \[4, 0, 1\] is out of range: expected a frame"):
        core.check_actions(np.array([[4, 0, 1]]))
    with pytest.raises(ValueError, match=r"Expected integer actions \(frame, cell, kind\)"):
        core.check_actions(np.array([0]))
