"""The rules of `SamVideo-v0`, and the memory behind it."""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from sam_gym.backbones import load_backbone
from sam_gym.backbones.video.bank import MemoryBank
from sam_gym.backbones.video.prompting import first_prompts
from sam_gym.backbones.video.tracker import VideoTracker
from sam_gym.data.base import FrameAnnotation
from sam_gym.data.synthetic.clips import Clips
from sam_gym.envs.video import PLACE_COLUMNS, MemoryCore, SamVideoConfig
from sam_gym.metrics.masks import iou

pytestmark = pytest.mark.usefixtures("own_references")

ID = "SamVideo-v0"


@pytest.fixture
def make_core(tiny_video_env: dict[str, Any]) -> Callable[..., MemoryCore]:
    def make_core(num_envs: int = 3, dataset: Any = None, **more: Any) -> MemoryCore:
        config = SamVideoConfig(**tiny_video_env | more)
        core = MemoryCore(config, num_envs, dataset)
        core.reset(range(num_envs), [np.random.default_rng(seed) for seed in range(num_envs)])
        return core

    return make_core


def play(core: MemoryCore, actions: Sequence[int] | np.ndarray) -> np.ndarray:
    """Play the same actions in all sub-environments; return rewards (steps, num_envs)."""
    rows = np.arange(core.num_envs)
    return np.array([core.step(rows, np.full(core.num_envs, a))[0] for a in actions])


# The memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "kind"),
    [("tiny_video", kind) for kind in ("mask", "box", "point")] + [("tiny_edgetam", "mask")],
)
def test_keeping_every_frame_is_the_tracker(
    request: pytest.FixtureRequest, tiny_video_env: dict[str, Any], model: str, kind: Any
) -> None:
    backbone = load_backbone(request.getfixturevalue(model), device="cpu")
    tracker = VideoTracker(backbone)
    videos = [Clips("train", frames=20, size=64)[index] for index in (0, 1)]
    truths = [clip.annotation(0).masks[0] for clip in videos]
    for truth in truths:
        assert truth.any()
    bank = MemoryBank(tracker, 2)
    prompts = first_prompts([None] * 2, np.stack(truths), [kind] * 2, torch.device("cpu"))
    rows, oldest = np.arange(2), np.full(2, bank.num_slots - 1)
    bank.begin(rows, backbone.encode([clip.image(0) for clip in videos]), prompts)
    session = tracker.open(videos)
    for video, truth in enumerate(truths):
        x0, y0, x1, y1 = prompts.clicks.boxes[video].tolist()  # type: ignore[index]
        session.prompt(
            video,
            0,
            object=0,
            **{
                "mask": {"mask": truth},
                "box": {"box": (x0, y0, x1, y1)},
                "point": {"points": prompts.clicks.points[video].numpy(), "labels": [1]},  # type: ignore[index]
            }[kind],
        )
    expected = {(own.video, own.frame): own for own in session.propagate()}
    for frame in range(1, 20):
        features = backbone.encode([clip.image(frame) for clip in videos])
        decoded = bank.track(rows, features, np.full(2, frame), np.full(2, 20))
        for video in range(2):
            own = expected[video, frame]
            limit = 1e-4 * float(own.logits.std())
            torch.testing.assert_close(
                decoded.entry.logits[video], own.logits[0], atol=max(limit, 1e-4), rtol=1e-4
            )
            torch.testing.assert_close(
                decoded.entry.score[video], own.scores[0], atol=1e-4, rtol=1e-4
            )
        bank.keep(rows, oldest)
    kept = [19 - k for k in range(bank.num_slots)]
    assert bank.frames[0].tolist() == [0, *kept, 19]
    assert bank.past_frames[1].tolist() == list(range(19, 4, -1))


def test_a_memory_of_tokens_plays(make_core: Callable[..., MemoryCore], tiny_edgetam: str) -> None:
    core = make_core(2, backbone=tiny_edgetam)
    rewards = play(core, [0, core.sam2_action, 1])
    assert np.isfinite(rewards).all()
    width = core.bank.tracker.memory.maskmem_tpos_enc.shape[-1]
    assert core.bank.memories.shape[2:] == (7, width) and core.bank.pooled.shape[2:] == (width,)
    assert core.bank.pooled[:, core.bank.present].abs().min() > 0


def test_rows_with_other_memories_do_not_matter(make_core: Callable[..., MemoryCore]) -> None:
    """Objects with few memories are padded in a batch; alone, they are not."""
    choices = np.array([[0, 1, 6], [0, 2, 6], [3, 0, 6], [0, 1, 6], [0, 0, 6]])
    together = make_core(3)
    for actions in choices:
        together.step(np.arange(3), actions)
    counts = (together.bank.frames[:, together.bank.slots] >= 0).sum(axis=1)
    assert counts.tolist() == [1, 2, 5]
    for row in range(3):
        core = make_core(1)
        core.reset([0], [np.random.default_rng(row)])
        for actions in choices:
            core.step(np.arange(1), actions[row : row + 1])
        expected = core.bank.logits[0]
        close = {"atol": 1e-4 * float(expected.std()), "rtol": 1e-4}
        torch.testing.assert_close(together.bank.logits[row], expected, **close)
        np.testing.assert_array_equal(together.bank.frames[row], core.bank.frames[0])


def test_the_memory_follows_the_actions(make_core: Callable[..., MemoryCore]) -> None:
    core = make_core(1, frames=16)

    def slots() -> list[int]:
        return [frame for frame in core.bank.frames[0, core.bank.slots].tolist() if frame >= 0]

    # Present frames are 1, 2, ...; the k-th latest memory goes.
    for action, expected in (
        (0, []),
        (6, [2]),
        (6, [3, 2]),
        (1, [4, 2]),
        (0, [4, 2]),
        (3, [6, 4, 2]),
        (2, [7, 6, 2]),
        (6, [8, 7, 6, 2]),
    ):
        core.step(np.arange(1), np.array([action]))
        assert slots() == expected
    # Pointers of kept frames remain when their memory is gone.
    assert core.bank.past_frames[0, :7].tolist() == [8, 7, 6, 4, 3, 2, -1]
    assert core.info([0])["kept"] == [6]


def test_what_is_kept_matters_and_pointers_alone_do(make_core: Callable[..., MemoryCore]) -> None:
    ends = []
    for actions in ([0] * 5, [6] * 5, [1] * 5):
        core = make_core(1)
        play(core, actions)
        ends.append(core.bank.logits[0].clone())
    assert not torch.allclose(ends[0], ends[1]) and not torch.allclose(ends[1], ends[2])


# Rewards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["low", "full"])
def test_the_reward_is_the_gain_over_the_rule_of_sam2(
    make_core: Callable[..., MemoryCore], score: str
) -> None:
    core = make_core(3, score=score)
    rewards = play(core, [core.sam2_action] * 6)
    np.testing.assert_allclose(rewards, 0.0, atol=1e-9)
    np.testing.assert_allclose(core.info(range(3))["gain"], 0.0, atol=1e-9)

    rule = core.js.copy()
    core = make_core(3, score=score)
    rewards = play(core, [0, 2, 0, 1, 0, 1])
    np.testing.assert_allclose(rewards, (core.js - rule)[:, 2:].T, atol=1e-9)
    info = core.info(range(3))
    np.testing.assert_allclose(info["gain"], rewards.sum(axis=0) / 7, atol=1e-9)
    np.testing.assert_allclose(info["iou"] - info["sam2_iou"], info["gain"], atol=1e-12)
    # J against an independent computation, at the size of the video.
    for row in range(3):
        target = core.ground_truth(row)
        own = iou(core.mask(row), target.mask)
        assert core.js[row, 7] == pytest.approx(own, abs=1e-9 if score == "full" else 0.25)


class Still:
    """A video of an object that is out of sight in some frames, and not annotated in others."""

    name, objects, categories = "still", (5,), (0,)

    def __init__(
        self,
        size: tuple[int, int],
        annotated: Sequence[int],
        seen: Sequence[int],
        length: int = 7,
    ) -> None:
        self.size, self.seen, self.frames = size, seen, tuple("0123456"[:length])
        self.annotated = np.isin(np.arange(length), annotated)[:, None]

    def __len__(self) -> int:
        return len(self.frames)

    def image(self, frame: int) -> np.ndarray:
        image = np.full((*self.size, 3), 20 * frame, np.uint8)
        image[10:40, 10:40] = 250
        return image

    def annotation(self, frame: int) -> FrameAnnotation:
        masks = np.zeros((1, *self.size), bool)
        masks[0, 10:40, 10:40] = frame in self.seen
        return FrameAnnotation(masks, self.annotated[frame])


class Stills:
    """A dataset of given videos."""

    name, categories = "stills", ("thing",)

    def __init__(self, *videos: Still) -> None:
        self.videos = videos

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> Still:
        return self.videos[index]


def test_frames_without_truth_do_not_count(make_core: Callable[..., MemoryCore]) -> None:
    video = Still((64, 64), annotated=[0, 1, 2, 5, 6], seen=[0, 1, 2, 5])
    core = make_core(1, Stills(video), dataset_kwargs={}, frames=9)
    assert core.lengths.tolist() == [7]
    rewards = play(core, [0, 0, 0, 0])
    assert np.isnan(core.js[0]).tolist() == [True, False, False, True, True] + [False] + [True] * 3
    assert rewards[[1, 2], 0].tolist() == [0.0, 0.0]
    _, terminated, truncated = core.step(np.arange(1), np.array([0]))
    assert terminated.tolist() == [True] and truncated.tolist() == [False]
    # The object is out of sight: nothing found is right, anything found is wrong.
    assert core.js[0, 6] == float(not core.mask(0).any())
    with pytest.raises(RuntimeError, match="is over: call reset"):
        core.step(np.arange(1), np.array([0]))


def test_videos_of_different_lengths_share_a_batch(make_core: Callable[..., MemoryCore]) -> None:
    """The reference of a short video does not go on while a longer one is tracked beside it."""
    short, long = (Still((64, 64), range(7), range(7), length) for length in (4, 7))
    core = make_core(2, Stills(short, long), dataset_kwargs={})
    core.reset([0, 1], [np.random.default_rng(seed) for seed in (0, 1)])
    assert sorted(core.lengths.tolist()) == [4, 7]
    rows = np.arange(2)
    while len(rows):
        rewards, over, _ = core.step(rows, np.full(len(rows), core.sam2_action))
        np.testing.assert_allclose(rewards, 0.0, atol=1e-6)
        rows = rows[~over]
    assert core.steps.tolist() == [length - 2 for length in core.lengths]


def test_frames_have_one_shape(make_core: Callable[..., MemoryCore]) -> None:
    videos = [Still(size, range(7), range(7)) for size in ((64, 96), (96, 64))]
    core = make_core(2, Stills(*videos), dataset_kwargs={})
    shapes, sizes = set(), set()
    for seed in range(6):
        core.reset([0], [np.random.default_rng(seed)])
        sizes.add(core.ground_truth(0).size)
        shapes.add(core.frame(0).shape)
    assert len(sizes) == 2 and shapes == {(414, 576, 3)}


def test_long_videos_are_cut(make_core: Callable[..., MemoryCore]) -> None:
    core = make_core(1, frames=4, dataset_kwargs={"length": 3, "size": 64, "frames": 20})
    first = set()
    for seed in range(12):
        core.reset([0], [np.random.default_rng(seed)])
        target = core.ground_truth(0)
        assert len(target.frames) == 4 and target.frames[0].mask(target.number).any()
        video = core.samples.video(int(target.source.rpartition("/")[2]))
        starts = [
            start
            for start in range(17)
            if np.array_equal(video.image(start), target.frames[0].image)
        ]
        first |= set(starts)
    assert len(first) > 3


def test_impossible_data_and_models(make_core: Callable[..., MemoryCore]) -> None:
    hidden = Still((64, 64), range(7), seen=[3])
    with pytest.raises(ValueError, match=r"stills: 200 draws found no target that covers at least"):
        make_core(1, Stills(hidden), dataset_kwargs={})
    with pytest.raises(ValueError, match=r"'vit_b' has no video memory, .* micro_video, "):
        gym.make(ID, backbone="vit_b", device="cpu")
    with pytest.raises(ValueError, match=r"Unknown video dataset 'clip'\. Did you mean 'clips'"):
        gym.make(ID, dataset="clip")
    with pytest.raises(ValueError, match=r"has no clicks\. Leave out budget and click_cost, or"):
        SamVideoConfig(budget=3, click_cost=0.1).validate()
    with pytest.raises(ValueError, match=r"frames must be from 3 to 1000"):
        gym.make(ID, frames=2)
    core = make_core(2)
    with pytest.raises(ValueError, match=r"Action 7 is out of range: expected 0 \(keep nothing\)"):
        core.check_actions(np.array([0, 7]))


# Observations, states --------------------------------------------------------------------------


def test_observations_tell_what_is_remembered(make_core: Callable[..., MemoryCore]) -> None:
    core = make_core(2)
    first = core.observe([0, 1])
    assert core.observation_space.contains({key: own[0] for key, own in first.items()})
    exists = first["places"][..., PLACE_COLUMNS.index("exists")]
    assert exists.tolist() == [[1, 0, 0, 0, 0, 0, 0, 1]] * 2
    assert not first["memories"][0, 1:7].any() and first["memories"][0, [0, 7]].all()
    play(core, [1, 0, 6])
    places = core.observe([0, 1])["places"][0]
    ages = places[:, PLACE_COLUMNS.index("age")] * 7
    np.testing.assert_allclose(ages, [4, 1, 3, 0, 0, 0, 0, 0], atol=1e-6)
    last = places[-1]
    logits = core.bank.logits[0]
    assert last[PLACE_COLUMNS.index("area")] == pytest.approx(float((logits > 0).float().mean()))
    assert last[PLACE_COLUMNS.index("similarity")] == pytest.approx(1.0, abs=1e-6)
    assert core.observe([0])["progress"] == pytest.approx(4 / 7)


def test_truth_is_not_observed(make_core: Callable[..., MemoryCore]) -> None:
    """After the prompt, other true masks change rewards, but nothing that an agent sees."""
    seen = []
    for frames in (range(7), [0]):
        core = make_core(
            1, Stills(Still((64, 64), range(7), frames)), dataset_kwargs={}, obs="full"
        )
        rewards = play(core, [1, 0, 6, 2])
        seen.append((core.observe([0]), rewards, core.js[0].copy()))
    for key in seen[0][0]:
        np.testing.assert_array_equal(seen[0][0][key], seen[1][0][key], err_msg=key)
    assert (seen[0][2][1:6] != seen[1][2][1:6]).any()


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_episodes_continue_in_another_environment(
    tiny_video_env: dict[str, Any], mode: str
) -> None:
    def make() -> Any:
        own = {"obs": "handle", "autoreset_mode": mode, **tiny_video_env}
        return gym.make_vec(ID, 3, vectorization_mode="vector_entry_point", **own).unwrapped

    first, rng = make(), np.random.default_rng(0)
    first.reset(seed=3)
    for _ in range(9):
        observations, *_ = first.step(rng.integers(7, size=3))
    state = pickle.loads(pickle.dumps(first.get_state()))
    second = make()
    resumed = second.set_state(state)
    for key in set(observations) - {"handle"}:
        np.testing.assert_array_equal(resumed[key], observations[key], err_msg=key)
    for _ in range(12):
        actions = rng.integers(7, size=3)
        one, two = first.step(actions), second.step(actions)
        for key in set(observations) - {"handle"}:
            np.testing.assert_array_equal(one[0][key], two[0][key], err_msg=key)
        for a, b in zip(one[1:4], two[1:4], strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(one[4]["iou"], two[4]["iou"])


def test_looking_ahead_changes_nothing_and_is_right(make_core: Callable[..., MemoryCore]) -> None:
    core = make_core(2)
    play(core, [6, 0, 6])
    before = pickle.dumps(core.get_state())
    ahead = core.next_js(np.arange(2))
    assert ahead.shape == (2, 7) and pickle.dumps(core.get_state()) == before
    for action in (0, 1, 6):
        other = pickle.loads(pickle.dumps(core))
        other.step(np.arange(2), np.full(2, action))
        np.testing.assert_allclose(other.js[np.arange(2), other.now], ahead[:, action], atol=1e-3)


def test_a_low_limit_of_the_cache_changes_nothing(make_core: Callable[..., MemoryCore]) -> None:
    rewards = [play(make_core(3, cache_mib=size), [0, 1, 6, 6]) for size in (0, 64)]
    np.testing.assert_array_equal(*rewards)
    assert replace(SamVideoConfig(), frames=5).max_episode_steps == 3
