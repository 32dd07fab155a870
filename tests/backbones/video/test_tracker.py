"""The video tracker: batches, memory that does not grow, frames, wrong inputs."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from sam_gym.backbones import Backbone, load_backbone
from sam_gym.backbones.edgetam import edgetam_memory_state, edgetam_state
from sam_gym.backbones.sam2 import Sam2
from sam_gym.backbones.video.frames import open_video
from sam_gym.backbones.video.memory import Entry, VideoMemory, closest_frames, recall
from sam_gym.backbones.video.session import TrackingSession
from sam_gym.backbones.video.tracker import VideoTracker
from sam_gym.data import make_video_dataset


def video(seed: int, count: int = 20, size: tuple[int, int] = (48, 80)) -> np.ndarray:
    """Frames of noise that change slowly: uint8 (T, H, W, 3)."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(0, 20, (count, *size, 3)).cumsum(axis=0)
    return np.clip(128 + steps, 0, 255).astype(np.uint8)


def prompted(session: TrackingSession, number: int, rng: np.random.Generator) -> None:
    """Four objects with prompts of every kind, in different frames."""
    mask = np.zeros((48, 80), bool)
    mask[10:30, 20:50] = True
    session.prompt(number, 0, "click", [rng.uniform(0, 48, 2)], [1])
    session.prompt(number, 0, "box", box=[10, 5, 60, 40])
    session.prompt(number, 3, "mask", mask=mask)
    session.prompt(number, 5, "clicks", rng.uniform(0, 48, (2, 2)), [1, 0])


def logits_of(session: TrackingSession, **options: Any) -> dict[tuple[int, int], torch.Tensor]:
    return {(own.video, own.frame): own.logits for own in session.propagate(**options)}


def test_batches_change_no_result(tracker: Callable[..., VideoTracker]) -> None:
    """Four videos of different lengths at once, and each alone; objects together and alone."""
    lengths = (20, 9, 14, 20)
    together = tracker(batch_size=3).open([video(k, length) for k, length in enumerate(lengths)])
    for number in range(4):
        prompted(together, number, np.random.default_rng(number))
    all_logits = logits_of(together)
    assert len(all_logits) == sum(lengths)
    for number, length in enumerate(lengths):
        alone = tracker(batch_size=8).open([video(number, length)])
        prompted(alone, 0, np.random.default_rng(number))
        for (_, frame), logits in logits_of(alone).items():
            torch.testing.assert_close(logits, all_logits[number, frame], rtol=1e-4, atol=1e-4)
    single = tracker().open([video(2, 14)])
    single.prompt(0, 0, "box", box=[10, 5, 60, 40])
    for (_, frame), logits in logits_of(single).items():
        torch.testing.assert_close(logits[0], all_logits[2, frame][1], rtol=1e-4, atol=1e-4)


def test_frames_are_encoded_once_and_ahead(
    tracker: Callable[..., VideoTracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tracker(batch_size=4, keep="window")
    encode, sizes = own.encode, []

    def counted(images: Any) -> Any:
        sizes.append(len(images))
        return encode(images)

    monkeypatch.setattr(own, "encode", counted)
    session = own.open([video(0, 11), video(1, 5)])
    session.prompt(0, 0, 1, points=[[30, 30]], labels=[1])
    session.prompt(1, 0, 1, points=[[30, 30]], labels=[1])
    steps = []
    for step in session.propagate():
        steps.append((step.video, step.frame))
        assert len(session._cache) <= 2 * own.batch_size
    assert len(steps) == 16
    # Prompts encode both first frames; then four at a time, until both videos end.
    assert sizes == [1, 1, 4, 4, 4, 2]


def test_a_window_gives_the_same_and_does_not_grow(tracker: Callable[..., VideoTracker]) -> None:
    frames, found, sizes = video(5, 40), [], []
    for keep in ("all", "window"):
        session = tracker(keep=keep).open([frames])
        session.prompt(0, 0, 1, [[20.0, 20.0]], [1])
        found.append(logits_of(session))
        (track,) = session._tracks[0].values()
        memories = sum(entry.memory is not None for entry in track.known.values())
        sizes.append((len(track.known), memories))
        assert len(track.keys) == 7
    for key, logits in found[0].items():
        assert torch.equal(logits, found[1][key]), key
    # One conditioning frame beside all others, or beside 15 pointers and 6 memories.
    assert sizes == [(40, 40), (16, 7)]


def test_keys_of_large_memories_are_not_kept(
    tracker: Callable[..., VideoTracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for cells in (16, 15):
        monkeypatch.setattr("sam_gym.backbones.video.memory.KEPT_CELLS", cells)
        session = tracker().open([video(2, 9)])
        session.prompt(0, 0, 1, [[20.0, 20.0]], [1])
        found.append(logits_of(session))
        (track,) = session._tracks[0].values()
        assert len(track.keys) == (7 if cells == 16 else 0)
    for key, logits in found[0].items():
        torch.testing.assert_close(logits, found[1][key], rtol=1e-4, atol=1e-4)


def test_corrections_stay(tracker: Callable[..., VideoTracker]) -> None:
    """A prompted frame keeps its result in later passes; "sam2" tracks it again."""
    mask = np.zeros((48, 80), bool)
    mask[:20, :20] = True
    kept = []
    for correct in ("conditioning", "sam2"):
        session = tracker(correct=correct).open([video(6, 8)])
        session.prompt(0, 0, 1, [[20.0, 20.0]], [1])
        logits_of(session)
        shown = session.prompt(0, 4, 1, mask=mask)
        assert (shown.masks()[0] & mask).sum() > 0.8 * mask.sum()
        kept.append(torch.equal(logits_of(session)[0, 4], shown.logits))
    assert kept == [True, False]


def test_objects_come_and_go(tracker: Callable[..., VideoTracker]) -> None:
    session = tracker().open([video(7, 6)])
    session.prompt(0, 0, "one", [[20.0, 20.0]], [1])
    first = logits_of(session)
    session.prompt(0, 2, "two", box=[5, 5, 40, 40])
    both = logits_of(session, start=0)
    assert both[0, 5].shape[0] == 2
    torch.testing.assert_close(both[0, 5][0], first[0, 5][0], rtol=1e-4, atol=1e-4)
    session.remove(0, "one")
    assert logits_of(session, start=2)[0, 5].shape[0] == 1
    with pytest.raises(KeyError, match="no object 'one'"):
        session.remove(0, "one")
    shown = session.prompt(0, 2, "three", [[4.0, 4.0]], [1])
    masks = shown.masks(overlap=False)
    assert shown.objects == ("two", "three") and masks.shape == (2, 48, 80)
    assert masks.sum(axis=0).max() <= 1


def test_late_objects_are_tracked_from_their_prompts(tracker: Callable[..., VideoTracker]) -> None:
    """Both ways, as if nothing else had been prompted earlier."""
    together, alone = (tracker().open([video(3, 12)]) for _ in range(2))
    together.prompt(0, 0, "early", box=[10, 5, 60, 40])
    for session in (together, alone):
        session.prompt(0, 6, "late", points=[[30, 20]], labels=[1])
    for reverse, count in ((False, 6), (True, 7)):
        expected = logits_of(alone, reverse=reverse)
        found = logits_of(together, reverse=reverse, from_prompts=True)
        assert len(expected) == count and len(found) == (count if reverse else 12)
        for key, logits in expected.items():
            torch.testing.assert_close(found[key][1], logits[0], rtol=1e-4, atol=1e-4)


def test_a_mask_of_one_pixel_is_an_object(tracker: Callable[..., VideoTracker]) -> None:
    session = tracker().open([video(0, 1, (480, 800))])
    mask = np.zeros((480, 800), bool)
    for object_is_there in (False, True):
        mask[101, 203] = object_is_there
        shown = session.prompt(0, 0, object_is_there, mask=mask)
        assert (shown.scores[-1] > 0) == object_is_there


def test_wrong_prompts_are_refused(tracker: Callable[..., VideoTracker]) -> None:
    session = tracker().open([video(8, 3)])
    with pytest.raises(ValueError, match="prompt an object first"):
        next(session.propagate())
    mask, point = np.ones((48, 80), bool), [[4.0, 4.0]]
    for options, message in (
        ({}, "needs points and labels, a box, or a mask"),
        ({"points": point}, "come together"),
        ({"points": point, "labels": [1, 0]}, "1 points with 2 labels"),
        ({"points": point, "labels": [2]}, "labels must be 0 or 1"),
        ({"box": [1, 2, 3]}, "box must be"),
        ({"mask": mask, "box": [1, 2, 3, 4]}, "not both"),
        ({"mask": mask[:5]}, "size of the video"),
        ({"points": np.zeros((0, 2)), "labels": []}, "needs points and labels"),
        ({"points": [[np.nan, 3.0]], "labels": [1]}, "points have values that are NaN"),
        ({"box": [1, 2, np.inf, 4]}, "box has values that are NaN"),
        ({"box": [30, 30, 5, 5]}, "not .x, y, width, height."),
        ({"mask": 0.3 * mask}, "mask must be bool"),
    ):
        with pytest.raises(ValueError, match=message):
            session.prompt(0, 0, 1, **options)
    for place, message in (((1, 0), "video must be from 0 to 0"), ((0, 3), "frame must be from")):
        with pytest.raises(IndexError, match=message):
            session.prompt(*place, 1, point, [1])
    with pytest.raises(ValueError, match="prompt an object first"):
        next(session.propagate())


def test_wrong_spans_are_refused(tracker: Callable[..., VideoTracker]) -> None:
    session = tracker().open([video(8, 4)])
    session.prompt(0, 0, 1, [[4.0, 4.0]], [1])
    for options, error, message in (
        ({"start": -2}, IndexError, "frame must be from 0 to 3 in video 0, got -2"),
        ({"start": 99, "reverse": True}, IndexError, "got 99"),
        ({"videos": [7]}, IndexError, "video must be from 0 to 0, got 7"),
        ({"max_frames": -1}, ValueError, "max_frames must be at least 0"),
    ):
        with pytest.raises(error, match=message):
            next(session.propagate(**options))
    assert [step.frame for step in session.propagate(start=2)] == [2, 3]


def test_a_video_without_objects_is_tracked_no_further(
    tracker: Callable[..., VideoTracker],
) -> None:
    session = tracker().open([video(8, 4), video(9, 4)])
    for number in range(2):
        session.prompt(number, 0, 1, [[4.0, 4.0]], [1])
    seen = []
    for step in session.propagate():
        seen.append((step.video, step.frame))
        if step.frame == 1 and step.video == 0:
            session.remove(0, 1)
            session.remove(1, 1)
    assert seen == [(0, 0), (1, 0), (0, 1)]


def test_options_are_checked(tracker: Callable[..., VideoTracker], tiny: Backbone) -> None:
    for options in ({"correct": "never"}, {"keep": "some"}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            tracker(**options)
    with pytest.raises(ValueError, match="no video memory: load micro_video, edgetam or a SAM 2.1"):
        VideoTracker(tiny)
    # Before weights are downloaded.
    with pytest.raises(ValueError, match="'vit_h' has no video memory, which tracking needs. Take"):
        VideoTracker("vit_h")


def test_a_name_is_loaded(tiny_video: str) -> None:
    assert VideoTracker(tiny_video).backbone is load_backbone(tiny_video)


def test_a_checkpoint_brings_its_memory(
    build_sam2: Callable[..., Sam2],
    memory: VideoMemory,
    tracker: Callable[..., VideoTracker],
    add_backbone: Callable[..., None],
    tmp_path: Path,
) -> None:
    add_backbone(
        "whole",
        build=build_sam2,
        convert=edgetam_state,
        memory=(lambda: deepcopy(memory), edgetam_memory_state),
    )
    image, path = build_sam2().state_dict(), tmp_path / "whole.pt"

    def loaded(state: dict[str, torch.Tensor]) -> Backbone:
        torch.save({"model": state}, path)
        return load_backbone("whole", str(path), "cpu")

    session = VideoTracker(loaded(image | memory.state_dict())).open([video(1, 4)])
    expected = tracker().open([video(1, 4)])
    for own in (session, expected):
        own.prompt(0, 0, 1, [[20.0, 20.0]], [1])
    for found, wanted in zip(session.propagate(), expected.propagate(), strict=True):
        assert torch.equal(found.logits, wanted.logits)
    # Weights of the image part alone are a SAM 2 without a memory; others are refused.
    assert loaded(image).memory is None
    with pytest.raises(ValueError, match="'whole': weights .* missing .first: mask_downsample"):
        loaded(image | {"no_obj_ptr": memory.no_obj_ptr.detach()})


# What a frame attends to ------------------------------------------------------------------------


def entries(frames: range) -> dict[int, Entry]:
    nothing = torch.zeros(())
    return {frame: Entry(nothing, nothing, nothing, nothing, nothing) for frame in frames}


def test_recall_by_hand() -> None:
    own = recall(10, [0, 12], entries(range(1, 10)), num_frames=100)
    assert own.frames == ((0, 6), (12, 6), (4, 5), (5, 4), (6, 3), (7, 2), (8, 1), (9, 0))
    # The pointer of a later conditioning frame is left out.
    assert own.pointers == ((0, 10), *((10 - age, age) for age in range(1, 10)))
    assert own.span == 15
    back = recall(5, [9], entries(range(6, 9)), reverse=True, num_frames=10)
    assert back.frames == ((9, 6), (8, 2), (7, 1), (6, 0))
    assert back.pointers == ((9, 4), (6, 1), (7, 2), (8, 3)) and back.span == 9


def test_closest_conditioning_frames() -> None:
    frames = [0, 5, 11, 20, 40]
    assert closest_frames(12, frames, -1) == frames
    assert closest_frames(12, frames, 3) == [11, 20, 5]
    assert closest_frames(50, frames, 2) == [40, 20]


# Frames -----------------------------------------------------------------------------------------


def test_videos_are_read_from_files_and_folders(tmp_path: Path) -> None:
    frames = video(9, 12, (32, 48))
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, frame in enumerate(frames):
        cv2.imwrite(str(folder / f"{number}.png"), frame[..., ::-1])
    (folder / "notes.txt").write_text("no frame")
    source = open_video(folder)
    assert (len(source), source.size) == (12, (32, 48))
    for number in (0, 10, 2):  # "10" comes after "2"
        assert np.array_equal(source[number], frames[number])

    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (48, 32))
    shades = [np.full((32, 48, 3), 20 * number, np.uint8) for number in range(12)]
    for shade in shades:
        writer.write(shade)
    writer.release()
    source = open_video(str(path))
    assert (len(source), source.size) == (12, (32, 48))
    for number in (0, 1, 2, 7, 3, 11, 11, 0):
        assert abs(float(source[number].mean()) - 20 * number) < 3


def test_videos_of_datasets_are_tracked(tracker: Callable[..., VideoTracker]) -> None:
    clip = make_video_dataset("clips", "val")[0]
    session = tracker().open([clip])
    session.prompt(0, 0, clip.objects[0], mask=clip.annotation(0).masks[0])
    steps = list(session.propagate(max_frames=2))
    assert [step.frame for step in steps] == [0, 1, 2]
    assert steps[2].masks().shape == (1, *clip.size)


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such video"):
        open_video(tmp_path / "missing.mp4")
    with pytest.raises(ValueError, match="no frames"):
        open_video(tmp_path)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match="no video that OpenCV can read"):
        open_video(tmp_path / "text.mp4")
    with pytest.raises(ValueError, match="at least one frame"):
        open_video([])
    with pytest.raises(ValueError, match="frame 0 must be uint8"):
        open_video([np.zeros((4, 4, 3))])
    source = open_video([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)])
    with pytest.raises(ValueError, match=r"frame 1 has the size \(4, 5\), frame 0 has \(4, 4\)"):
        source[1]


def test_a_session_goes_on_where_another_ended(tracker: Callable[..., VideoTracker]) -> None:
    frames, mask = video(0, 12), np.zeros((48, 80), bool)
    mask[10:30, 20:50] = True
    whole = tracker().open([frames])
    whole.prompt(0, 2, "a", mask=mask)
    expected = logits_of(whole)
    again = tracker(keep="window").open([frames])
    again.restore(0, 2, "a", mask, prompted=True)
    for key, logits in logits_of(again).items():
        torch.testing.assert_close(logits, expected[key])
    # Frames that were tracked are recalled: what follows depends on them.
    later = []
    for known in (mask, np.zeros_like(mask)):
        session = tracker(keep="window").open([frames])
        session.restore(0, 2, "a", mask, prompted=True)
        session.restore(0, 5, "a", known, prompted=False)
        found = logits_of(session, start=6)
        assert sorted(frame for _, frame in found) == list(range(6, 12))
        later.append(found[0, 6])
    assert (later[0] - later[1]).abs().max() > 1e-3
    for place, error, message in (
        ((1, 0), IndexError, "video must be from 0 to 0"),
        ((0, 12), IndexError, "frame must be from 0 to 11"),
    ):
        with pytest.raises(error, match=message):
            again.restore(*place, "a", mask, prompted=True)
    with pytest.raises(ValueError, match="size of the video"):
        again.restore(0, 0, "b", mask[:-1], prompted=True)
    assert "b" not in again._tracks[0]


def test_large_frames_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "0.png"), np.zeros((40, 50, 3), np.uint8))
    assert open_video(tmp_path, 2000).size == (40, 50)
    with pytest.raises(ValueError, match=r"50 x 40 pixels are larger than 1,999"):
        open_video(tmp_path, 1999)
    (tmp_path / "0.png").write_text("no image")
    with pytest.raises(ValueError, match=r"0.png"):
        open_video(tmp_path, 2000)
