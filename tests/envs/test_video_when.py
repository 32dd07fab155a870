"""The task `when` of `SamVideo-v0`: clicks that are bought while a video is tracked."""

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from sam_gym.data.base import FrameAnnotation
from sam_gym.envs.video import SamVideoConfig, WhenCore, make_core
from sam_gym.simulation.clicks import error_click

pytestmark = pytest.mark.usefixtures("own_references")

ID = "SamVideo-v0"
Make = Callable[..., WhenCore]


@pytest.fixture
def make(tiny_video_env: dict[str, Any]) -> Make:
    def make(num_envs: int = 2, dataset: Any = None, **more: Any) -> WhenCore:
        config = SamVideoConfig(**tiny_video_env | {"task": "when", "budget": 3} | more)
        core = make_core(config, num_envs, dataset)
        assert isinstance(core, WhenCore)
        core.reset(range(num_envs), [np.random.default_rng(seed) for seed in range(num_envs)])
        return core

    return make


def play(core: WhenCore, actions: Sequence[int]) -> np.ndarray:
    """Play the same actions in all sub-environments; return rewards (steps, num_envs)."""
    rows = np.arange(core.num_envs)
    return np.array([core.step(rows, np.full(core.num_envs, a))[0] for a in actions])


def test_clicks_and_memories_are_those_of_the_tracker(make: Make) -> None:
    """Two clicks in frame 2 and one in frame 4, as a user of `VideoTracker` would give them."""
    core = make(1)
    target, tracker = core.ground_truth(0), core.tracker
    video = [frame.image for frame in target.frames]
    session = tracker.open([video])
    session.prompt(0, 0, object=0, mask=target.frames[0].mask(target.number))

    def tracked(start: int, count: int) -> Any:
        return list(session.propagate(start=start, max_frames=count))[-1]

    def same(expected: Any) -> None:
        own, other = core.bank.logits[0], expected.logits[0]
        torch.testing.assert_close(own, other, atol=1e-4 * float(other.std()), rtol=1e-4)

    same(tracked(0, 1))
    play(core, [0])
    same(tracked(2, 0))
    for frame, count in ((2, 2), (4, 1)):
        while int(core.now[0]) < frame:
            play(core, [0])
            same(tracked(int(core.now[0]), 0))
        for number in range(count):
            truth, mask = target.frames[frame].mask(target.number), core.mask(0)
            clicked = np.zeros_like(truth)
            if number:
                clicked[click.y, click.x] = True  # noqa: F821
            click = error_click(truth, mask, clicked)
            assert click is not None
            play(core, [1])
            # The videos have the size of the input frame.
            np.testing.assert_allclose(core.points[0, number], (click.x, click.y))
            assert core.labels[0, number] == click.positive
            point = {"points": [(click.x, click.y)], "labels": [int(click.positive)]}
            same(session.prompt(0, frame, object=0, **point, clear=False))
    for frame in range(5, 8):
        play(core, [0])
        same(tracked(frame, 0))
    assert core.bank.frames[0, :4].tolist() == [0, 2, 4, -1]
    assert core.info([0])["clicks"] == [3]


@pytest.mark.parametrize("score", ["low", "full"])
def test_rewards_are_the_gain_in_mean_j_minus_the_cost(make: Make, score: str) -> None:
    actions = [0, 1, 0, 1, 1, 0, 1, 0, 0]
    rewards = {cost: play(make(3, score=score, click_cost=cost), actions) for cost in (0.0, 0.25)}
    core = make(3, score=score)
    np.testing.assert_allclose(play(core, [0] * 6), 0.0, atol=1e-6)
    rule = core.js.copy()
    core = make(3, score=score)
    play(core, actions)
    assert core._is_over(np.arange(3)).all() and core.num_clicks.tolist() == [3] * 3
    # The fourth click is beyond the budget: the tracker goes on, and nothing is paid.
    bought = np.array([0, 1, 0, 1, 1, 0, 0, 0, 0])
    np.testing.assert_allclose(
        rewards[0.0] - rewards[0.25], np.tile(0.25 * bought[:, None], 3), atol=1e-12
    )
    gain = np.nanmean(core.js[:, 1:], axis=1) - np.nanmean(rule[:, 1:], axis=1)
    np.testing.assert_allclose(rewards[0.0].sum(axis=0), gain, atol=1e-6)
    np.testing.assert_allclose(core.info(range(3))["gain"], gain, atol=1e-6)
    assert (core.js != rule).any()


class Square:
    """A video of a bright square, whose annotation may say something else."""

    name, objects, categories, frames = "square", (5,), (0,), tuple("0123456")
    annotated = np.ones((7, 1), bool)

    def __init__(self, seen: Sequence[int], known: Sequence[int] = range(7)) -> None:
        self.seen, self.annotated = seen, np.isin(np.arange(7), known)[:, None]

    def __len__(self) -> int:
        return 7

    def image(self, frame: int) -> np.ndarray:
        image = np.full((64, 64, 3), 20 * frame, np.uint8)
        image[10:40, 10:40] = 250
        return image

    def annotation(self, frame: int) -> FrameAnnotation:
        masks = np.zeros((1, 64, 64), bool)
        masks[0, 10:40, 10:40] = frame in self.seen
        return FrameAnnotation(masks, self.annotated[frame])


class Squares(list):
    name, categories = "squares", ("thing",)


def test_truth_is_not_observed_before_a_click(make: Make) -> None:
    seen = []
    for frames in (range(7), [0]):
        core = make(1, Squares([Square(frames)]), dataset_kwargs={}, frames=7)
        play(core, [0, 0])
        seen.append((core.observe([0]), core))
    for key in seen[0][0]:
        np.testing.assert_array_equal(seen[0][0][key], seen[1][0][key], err_msg=key)
    for _, core in seen:
        play(core, [1])
    masks = [core.observe([0])["sam_pred_mask_prob"] for _, core in seen]
    assert (masks[0] != masks[1]).any()


def test_a_click_where_nothing_is_known_costs_and_changes_nothing(make: Make) -> None:
    video = Square(range(7), known=[0, 1, 3, 4, 5, 6])
    core = make(1, Squares([video]), dataset_kwargs={}, frames=7, click_cost=0.125)
    play(core, [0])
    before = core.observe([0])
    assert play(core, [1]).tolist() == [[-0.125]]
    after = core.observe([0])
    for key in set(before) - {"budget"}:
        np.testing.assert_array_equal(before[key], after[key], err_msg=key)
    assert (before["budget"], after["budget"]) == (1, pytest.approx(2 / 3))
    play(core, [0])
    assert core.bank.frames[0, :5].tolist() == [0, -1, -1, -1, 2]


def test_trying_a_click_changes_nothing_and_is_right(make: Make) -> None:
    core = make(2)
    play(core, [0, 1])
    before = pickle.dumps(core.get_state())
    gains = core.click_gains(np.arange(2))
    assert pickle.dumps(core.get_state()) == before
    now = core.now.copy()
    js = core.js[np.arange(2), now].copy()
    play(core, [1])
    np.testing.assert_allclose(core.js[np.arange(2), now] - js, gains, atol=1e-3)


def test_a_restored_episode_has_the_same_future(tiny_video_env: dict[str, Any]) -> None:
    def create() -> Any:
        own = {"task": "when", "obs": "handle", **tiny_video_env}
        return gym.make_vec(ID, 3, vectorization_mode="vector_entry_point", **own).unwrapped

    first, rng = create(), np.random.default_rng(1)
    first.reset(seed=3)
    for _ in range(4):
        observations, *_ = first.step(rng.integers(2, size=3))
    assert first.core.num_here.any()
    second = create()
    resumed = second.set_state(pickle.loads(pickle.dumps(first.get_state())))
    for key in set(observations) - {"handle"}:
        np.testing.assert_array_equal(resumed[key], observations[key], err_msg=key)
    for _ in range(10):
        actions = rng.integers(2, size=3)
        one, two = first.step(actions), second.step(actions)
        for key in set(observations) - {"handle"}:
            np.testing.assert_array_equal(one[0][key], two[0][key], err_msg=key)
        for a, b in zip(one[1:4], two[1:4], strict=True):
            np.testing.assert_array_equal(a, b)


def test_wrong_arguments(make: Make) -> None:
    core = make(2)
    with pytest.raises(ValueError, match=r"Action 2 is out of range: expected 0 \(go on\) or 1"):
        core.check_actions(np.array([0, 2]))
    with pytest.raises(ValueError, match="task"):
        gym.make(ID, task="wen")
    with pytest.raises(ValueError, match="budget must be from 1 to 64"):
        gym.make(ID, task="when", budget=0)
