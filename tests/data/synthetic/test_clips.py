"""Procedural clips: always the same, one drawing, and with what a memory is needed for."""

import pickle

import cv2
import numpy as np
import pytest

from sam_gym.data import Video, VideoDataset, make_video_dataset
from sam_gym.data.synthetic.base import SPLITS
from sam_gym.data.synthetic.clips import Clip, Clips
from sam_gym.data.synthetic.shapes import SHAPES

FRAMES = 24


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return [Clips(frames=FRAMES, size=64)[index] for index in range(24)]


@pytest.fixture(scope="module")
def areas(clips: list[Clip]) -> list[np.ndarray]:
    """Visible area of the objects of each clip: int64 (T, N)."""
    return [
        np.stack([clip.annotation(frame).masks.sum(axis=(1, 2)) for frame in range(FRAMES)])
        for clip in clips
    ]


def test_is_a_registered_dataset() -> None:
    dataset = make_video_dataset(
        "clips", "val", frames=3, size=64, length=5, categories="star,gear"
    )
    assert isinstance(dataset, VideoDataset)
    assert (dataset.name, len(dataset), dataset.categories) == ("clips", 5, ("star", "gear"))
    video = dataset[4]
    assert isinstance(video, Video) and len(video) == 3 and video.name == "clips/val/4"
    assert set(video.categories) <= {0, 1}
    with pytest.raises(IndexError, match=r"video 5 is not in range\(5\)"):
        _ = dataset[5]
    with pytest.raises(IndexError, match=r"clips/val/4: index 3 is outside 0\.\.2"):
        video.image(3)


def test_fields_have_the_declared_form(clips: list[Clip]) -> None:
    for clip in clips:
        count = len(clip.objects)
        assert clip.size == (64, 64) and len(clip) == FRAMES == len(clip.frames)
        assert clip.objects == tuple(range(1, count + 1)) and 1 <= count <= 5
        assert all(0 <= category < len(SHAPES.names()) for category in clip.categories)
        assert clip.annotated.shape == (FRAMES, count) and clip.annotated.all()
        image, annotation = clip.image(2), clip.annotation(2)
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        assert annotation.masks.shape == (count, 64, 64) and annotation.masks.dtype == bool
        assert annotation.masks.sum(axis=0).max() <= 1  # visible pixels belong to one object


def test_same_index_gives_the_same_video_in_any_order(clips: list[Clip]) -> None:
    again = Clips(frames=FRAMES, size=64, length=30)[7]
    for frame in (20, 3, 20, 0):
        np.testing.assert_array_equal(clips[7].image(frame), again.image(frame))
        np.testing.assert_array_equal(
            clips[7].annotation(frame).masks, again.annotation(frame).masks
        )
    copied = pickle.loads(pickle.dumps(again))
    np.testing.assert_array_equal(copied.image(5), clips[7].image(5))


def test_splits_seeds_and_indices_are_disjoint() -> None:
    images = {
        Clips(split, frames=2, size=64, seed=seed)[index].image(0).tobytes()
        for split in SPLITS
        for seed in (0, 1)
        for index in range(4)
    }
    assert len(images) == 24


def test_arrays_are_fresh(clips: list[Clip]) -> None:
    clip = clips[0]
    image, masks = clip.image(1), clip.annotation(1).masks
    kept = image.copy(), masks.copy()
    image[:], masks[:] = 0, True
    assert (clip.image(1) == kept[0]).all() and (clip.annotation(1).masks == kept[1]).all()


def test_an_object_starts_in_sight_and_none_is_never_seen(areas: list[np.ndarray]) -> None:
    for own in areas:
        assert own[0].max() >= 0.004 * 64**2
        assert (own.max(axis=0) > 0).all()


def test_objects_hide_leave_return_and_appear_late(areas: list[np.ndarray]) -> None:
    visible = [column > 0 for own in areas for column in own.T]
    late = np.mean([not column[0] for column in visible])
    back = np.mean([column[0] and (np.diff(column.astype(int)) == 1).any() for column in visible])
    assert late > 0.03 and back > 0.05
    assert 0.6 < np.mean(np.concatenate(visible)) < 0.97


def test_objects_have_distractors_of_their_category(clips: list[Clip]) -> None:
    several = [clip for clip in clips if len(clip.objects) > 1]
    assert np.mean([len(set(c.categories)) < len(c.categories) for c in several]) > 0.5


def test_masks_lie_where_the_image_changes() -> None:
    """Image and masks of a frame come from one drawing, wherever the object has moved."""
    ratios = []
    for index in range(12):
        clip = Clips("val", frames=12, size=128)[index]
        for frame in (0, 11):
            masks, image = clip.annotation(frame).masks, clip.image(frame).astype(int)
            change = np.abs(image[:, 5:] - image[:, :-5]).sum(axis=2)
            across = (masks[:, :, 5:] ^ masks[:, :, :-5]).any(axis=0)
            if across.sum() > 50:
                ratios.append(change[across].mean() / change[~across].mean())
    # Pixels on two sides of an outline differ more than others at the same distance.
    assert len(ratios) > 12 and np.median(ratios) > 1.4 and np.mean(np.array(ratios) > 1) > 0.8


def test_the_camera_and_the_light_move() -> None:
    moved, brightness = [], []
    for index in range(10):
        clip = Clips(frames=13, size=96)[index]
        first, last = (cv2.cvtColor(clip.image(f), cv2.COLOR_RGB2GRAY) for f in (0, 12))
        shift, _ = cv2.phaseCorrelate(np.float32(first), np.float32(last))
        moved.append(np.hypot(*shift))
        brightness.append(abs(float(first.mean()) - float(last.mean())))
    assert np.median(moved) > 1 and np.median(brightness) > 1


def test_a_long_video_opens_at_once_and_its_end_is_drawn() -> None:
    clip = Clips(frames=2000, size=64)[0]
    assert clip.image(1999).shape == (64, 64, 3) and len(clip.annotated) == 2000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 32}, "size must be from 64 to 320"),
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"max_objects": 9}, "max_objects must be from 1 to 8, got 9"),
        ({"categories": "dog"}, "Unknown category 'dog'"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_video_dataset("clips", **options)


def test_one_object_of_one_category() -> None:
    clip = Clips(frames=2, size=64, max_objects=1, categories="fish")[3]
    assert clip.objects == (1,) and clip.categories == (0,)
