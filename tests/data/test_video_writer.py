"""Masklets that are written are read back by our readers, and have the fields of the formats."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from sam_gym.data import make_video_dataset
from sam_gym.data.videos.writer import (
    FRAME_FOLDERS,
    AnnotatedVideo,
    Masklet,
    VideoFormat,
    davis_palette,
    write_masklets,
)

SIZE = (20, 32)


def square(x: int, y: int, side: int = 6) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[y : y + side, x : x + side] = True
    return mask


#: Video -> object -> frame -> mask. The second object comes late, the third leaves.
TRUTH = {
    "one": {
        1: {k: square(2 + k, 3) for k in range(4)},
        2: {k: square(20, 10 + k) for k in range(2, 4)},
        3: {0: square(24, 0)},
    },
    "two": {1: {0: square(5, 5), 2: square(6, 6)}},
}
CATEGORIES = ("cat", "dog")
LENGTH = {"one": 4, "two": 3}


def code(mask: np.ndarray) -> str:
    return rle.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()


def written(root: Path, video_format: VideoFormat) -> Path:
    videos = []
    for name, objects in TRUTH.items():
        folder = root / FRAME_FOLDERS[video_format] / name
        folder.mkdir(parents=True)
        frames = [f"{k:05d}.jpg" for k in range(LENGTH[name])]
        for frame in frames:
            Image.new("RGB", SIZE[::-1]).save(folder / frame)
        masklets = {}
        for number, own in objects.items():
            masks = {frame: code(mask) for frame, mask in own.items()}
            masklets[number] = Masklet(CATEGORIES[number % 2], 0.5 + number / 10, masks)
        videos.append(AnnotatedVideo(name, SIZE, frames, masklets))
    return write_masklets(root, videos, CATEGORIES, video_format, "ours")


@pytest.mark.parametrize("video_format", ["coco-video", "youtube-vis", "davis"])
def test_our_readers_read_the_same_masks(tmp_path: Path, video_format: VideoFormat) -> None:
    path = written(tmp_path, video_format)
    options = {"objects": "all"} if video_format == "davis" else {"annotations": str(path)}
    dataset = make_video_dataset(video_format, "all", root=str(tmp_path), **options)
    assert [Path(video.name).name for video in dataset] == ["one", "two"]
    if video_format != "davis":
        assert dataset.categories == CATEGORIES
    for video, (name, objects) in zip(dataset, TRUTH.items(), strict=True):
        assert video.annotated.all() and len(video) == LENGTH[name]
        for frame in range(len(video)):
            annotation = video.annotation(frame)
            for number, truth in enumerate(objects.values()):
                expected = truth.get(frame, np.zeros(SIZE, bool))
                np.testing.assert_array_equal(annotation.masks[number], expected)
        if video_format != "davis":
            assert list(video.categories) == [number % 2 for number in objects]


def test_youtube_vis_has_the_fields_of_the_format(tmp_path: Path) -> None:
    content = json.loads(written(tmp_path, "youtube-vis").read_text())
    assert {"info", "videos", "annotations", "categories"} == set(content)
    videos = {own["id"]: own for own in content["videos"]}
    categories = {own["id"] for own in content["categories"]}
    assert len({own["id"] for own in content["annotations"]}) == len(content["annotations"]) == 4
    for video in videos.values():
        assert video["length"] == len(video["file_names"])
    for own in content["annotations"]:
        video = videos[own["video_id"]]
        assert own["category_id"] in categories and own["iscrowd"] == 0
        assert (own["height"], own["width"]) == (video["height"], video["width"]) == SIZE
        lists = [own[key] for key in ("segmentations", "areas", "bboxes")]
        assert {len(values) for values in lists} == {video["length"]}
        for segmentation, area, box in zip(*lists, strict=True):
            assert (segmentation is None) == (area is None) == (box is None)
            if segmentation is not None:
                mask = rle.decode(segmentation)
                ys, xs = np.nonzero(mask)
                assert area == mask.sum() == 36
                assert box == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]


def test_davis_files_have_a_palette_of_ids(tmp_path: Path) -> None:
    folder = written(tmp_path, "davis")
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    assert files == [f"{name}/{k:05d}.png" for name, n in LENGTH.items() for k in range(n)]
    with Image.open(folder / "one" / "00002.png") as picture:
        assert picture.mode == "P"
        assert set(np.unique(np.array(picture))) == {0, 1, 2}
        palette = np.array(picture.getpalette()).reshape(-1, 3)
    # The first colours of Pascal VOC, as its documentation lists them.
    known = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128)]
    known += [(0, 128, 128), (128, 128, 128), (64, 0, 0), (192, 0, 0)]
    np.testing.assert_array_equal(palette[: len(known)], known)
    assert len(np.unique(davis_palette(), axis=0)) == 256


def test_too_many_objects_for_davis(tmp_path: Path) -> None:
    masklet = Masklet("cat", 1.0, {0: code(square(0, 0))})
    video = AnnotatedVideo("many", SIZE, ["0.jpg"], dict.fromkeys(range(1, 256), masklet))
    with pytest.raises(ValueError, match=r"many: 255 objects.*at most 254.*--video-format"):
        write_masklets(tmp_path, [video], CATEGORIES, "davis")
