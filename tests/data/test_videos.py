"""Readers of videos: ids behind palettes, run lengths, frames that are not annotated, faults."""

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sam_gym.data import VIDEO_DATASETS, Video, VideoDataset, make_video_dataset
from sam_gym.data.splits import check_held_out
from sam_gym.data.videos.coco_video import CocoVideo, link_components
from sam_gym.data.videos.davis import VOID, Davis, Mose
from sam_gym.data.videos.reader import Track
from sam_gym.data.videos.sav import Sav
from sam_gym.data.videos.youtube_vis import YoutubeVis

HEIGHT, WIDTH = 24, 32
#: Colours whose grey values are no ids.
PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0] + [77] * (256 * 3 - 12)


def write_frame(path: Path, shade: int = 90, height: int = HEIGHT, width: int = WIDTH) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = np.full((height, width, 3), shade, np.uint8)
    frame[..., 0] = np.arange(width)
    assert cv2.imwrite(str(path), frame[..., ::-1])


def write_ids(path: Path, ids: np.ndarray, palette: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids.astype(np.uint8))
    if palette:
        image.putpalette(PALETTE)
        assert image.mode == "P"
    image.save(path)


def boxes(**places: tuple[int, int]) -> np.ndarray:
    """Ids uint8 (HEIGHT, WIDTH) of squares of 6 pixels: id=(top, left)."""
    ids = np.zeros((HEIGHT, WIDTH), np.uint8)
    for name, (top, left) in places.items():
        ids[top : top + 6, left : left + 6] = int(name.lstrip("_"))
    return ids


def code(mask: np.ndarray, compressed: bool = True) -> dict[str, Any]:
    """RLE for JSON."""
    if compressed:
        own = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        return {"size": list(own["size"]), "counts": own["counts"].decode()}
    flat = mask.ravel(order="F").astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}


def write_json(path: Path, data: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return str(path)


# DAVIS and MOSE ---------------------------------------------------------------------------------

FIRST = boxes(_1=(2, 2), _3=(2, 20))
LATER = boxes(_1=(4, 4), _2=(14, 14), _3=(2, 18))


def write_2017(
    root: Path, sequence: str, sub: str = "", void: bool = True, shade: int = 60
) -> None:
    """Three annotated frames of four: ids 1 and 3, id 2 appears later, 3 leaves."""
    for frame in range(4):
        write_frame(root / "JPEGImages" / sub / sequence / f"{frame:05d}.jpg", shade + frame)
    last = boxes(_1=(6, 6))
    if void:
        last[20:, :] = VOID
    for frame, ids in ((0, FIRST), (1, LATER), (3, last)):
        write_ids(root / "Annotations" / sub / sequence / f"{frame:05d}.png", ids)


def write_2016(root: Path, sequence: str) -> None:
    for frame in range(3):
        write_frame(root / "JPEGImages" / sequence / f"{frame:05d}.jpg")
        mask = 255 * (boxes(_1=(2, 2 + frame)) > 0)
        write_ids(root / "Annotations" / sequence / f"{frame:05d}.png", mask, palette=False)


def write_lists(root: Path, year: str, **lists: str) -> None:
    (root / "ImageSets" / year).mkdir(parents=True)
    for name, text in lists.items():
        (root / f"ImageSets/{year}/{name.replace('_', '-')}.txt").write_text(text)


def test_palettes_are_read_as_ids(tmp_path: Path) -> None:
    write_2017(tmp_path, "cows")
    dataset = make_video_dataset("davis", "all", root=str(tmp_path))
    assert isinstance(dataset, VideoDataset) and isinstance(dataset, Davis)
    assert (len(dataset), dataset.year, dataset.categories) == (1, 2017, ("object",))
    video = dataset[0]
    assert isinstance(video, Video)
    assert (video.name, video.size, len(video)) == ("cows", (24, 32), 4)
    assert video.frames == ("00000", "00001", "00002", "00003")
    assert video.objects == (1, 3) and video.categories == (0, 0)
    for frame, ids in ((0, FIRST), (1, LATER)):
        got = video.annotation(frame)
        assert got.masks.dtype == bool and got.annotated.all() and got.ignore is None
        assert (got.masks[0] == (ids == 1)).all() and (got.masks[1] == (ids == 3)).all()
    assert video.annotation(1).visible.tolist() == [True, True]
    image = video.image(2)
    assert image.shape == (24, 32, 3) and image.dtype == np.uint8
    assert abs(int(image[5, 5, 1]) - 62) <= 2 and image[5, 5, 0] < 30


def test_frames_without_masks_and_objects_out_of_sight(tmp_path: Path) -> None:
    write_2017(tmp_path, "cows")
    video = Davis("all", root=str(tmp_path))[0]
    assert video.annotated.tolist() == [[True, True], [True, True], [False, False], [True, True]]
    unknown = video.annotation(2)
    assert not unknown.annotated.any() and not unknown.masks.any() and unknown.ignore is None
    gone = video.annotation(3)
    assert gone.annotated.all() and gone.visible.tolist() == [True, False]
    # Void pixels are ignored, and belong to no object.
    assert gone.ignore is not None and gone.ignore[20:].all() and not gone.ignore[:20].any()
    with pytest.raises(IndexError, match=r"cows: index 4 is outside 0\.\.3"):
        video.annotation(4)
    with pytest.raises(IndexError, match="cows: index -1"):
        video.image(-1)


def test_late_ids(tmp_path: Path) -> None:
    write_2017(tmp_path, "cows")
    video = Davis("all", root=str(tmp_path), objects="all")[0]
    assert video.objects == (1, 2, 3)
    assert video.annotation(0).visible.tolist() == [True, False, True]
    assert video.annotation(1).visible.all()


def test_ids_beyond_a_byte(tmp_path: Path) -> None:
    write_2017(tmp_path, "cows")
    path = str(tmp_path / "Annotations/cows/00000.png")
    assert cv2.imwrite(path, np.where(FIRST == 3, 300, FIRST.astype(np.uint16)))
    video = Davis("all", root=str(tmp_path))[0]
    assert video.objects == (1, 300)
    assert video.annotation(0).visible.all()
    assert video.annotation(1).visible.tolist() == [True, False]


def test_2016_is_one_object(tmp_path: Path) -> None:
    write_2016(tmp_path, "bear")
    dataset = Davis("all", root=str(tmp_path))
    assert dataset.year == 2016
    video = dataset[0]
    assert video.objects == (1,)
    assert video.annotation(2).masks[0].sum() == 36 and video.annotation(2).ignore is None


def test_years_that_cannot_be_told(tmp_path: Path) -> None:
    write_2016(tmp_path, "bear")
    write_2017(tmp_path, "cows")
    with pytest.raises(ValueError, match=r"as in DAVIS 2016, but .*cows.* holds ids.*year=2016"):
        Davis("all", root=str(tmp_path))
    with pytest.raises(ValueError, match=r"a mask of DAVIS 2016 holds 0 and 255.*0, 1, 3"):
        Davis("all", root=str(tmp_path), year=2016)
    # All of 255 with a palette may be an object or void.
    alone = tmp_path / "alone"
    write_2016(alone, "dog")
    first = next((alone / "Annotations/dog").iterdir())
    for path in (alone / "Annotations/dog").iterdir():
        write_ids(path, np.array(Image.open(path)))
    with pytest.raises(ValueError, match="no first mask tells DAVIS 2016"):
        Davis("all", root=str(alone))
    assert Davis("all", root=str(alone), year=2016)[0].annotation(0).visible.all()
    with pytest.raises(ValueError, match=f"{first.parent}.*has no object.*objects=all"):
        Davis("all", root=str(alone), year=2017)


def test_lists_of_splits(tmp_path: Path) -> None:
    for name in ("cows", "dogs", "goat"):
        write_2017(tmp_path, name, "480p")
    write_lists(tmp_path, "2017", train="cows\ndogs\n\n", val="goat\n", test_dev="dogs")
    root = str(tmp_path)
    assert [v.name for v in Davis("train", root=root)] == ["cows", "dogs"]
    val = Davis("val", root=root)
    assert [v.name for v in val] == ["goat"] and val.unsplit is None and len(val.files) == 4
    assert [v.name for v in Davis("test", root=root)] == ["dogs"]
    assert len(Davis("all", root=root)) == 3
    with pytest.raises(ValueError, match="split_seed=0 is for data without splits"):
        Davis("val", root=root, split_seed=0)
    (tmp_path / "ImageSets/2017/val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no split 'val'. Found: test-dev.txt, train.txt"):
        Davis("val", root=root)
    with pytest.raises(ValueError, match=r"Unknown split 'vale'\. Did you mean 'val'"):
        Davis("vale", root=root)


def test_lists_of_paths(tmp_path: Path) -> None:
    write_2016(tmp_path, "bear")
    write_2016(tmp_path, "camel")
    lines = [
        f"/JPEGImages/480p/camel/{n:05d}.jpg /Annotations/480p/camel/{n:05d}.png\n" for n in (0, 1)
    ]
    write_lists(tmp_path, "480p", train="".join(lines))
    assert [v.name for v in Davis("train", root=str(tmp_path))] == ["camel"]


def test_without_lists_a_seed_splits(tmp_path: Path) -> None:
    for number in range(12):
        write_2017(tmp_path, f"s{number}", shade=60 + 8 * number)
    root = str(tmp_path)
    every = Davis("val", root=root)
    assert len(every) == 12 and every.unsplit is not None
    with pytest.raises(ValueError, match="so images of split 'val' may be training images"):
        check_held_out(every, "val")
    parts = [
        {v.name for v in Davis(split, root=root, split_seed=0)}
        for split in ("train", "val", "test")
    ]
    assert sum(map(len, parts)) == 12 and not parts[0] & parts[1] and all(parts)
    check_held_out(Davis("val", root=root, split_seed=0), "val")
    train = Davis("train", root=root, split_seed=0)
    check_held_out(Davis("val", root=root, split_seed=0), "val", train)
    with pytest.raises(ValueError, match="40 of 48 images of split 'val' are training images"):
        check_held_out(every, "val", train)


def test_mose(tmp_path: Path) -> None:
    write_2017(tmp_path / "train", "a1", void=False)
    write_2017(tmp_path / "valid", "b2")
    for number in (1, 3):
        (tmp_path / f"valid/Annotations/b2/{number:05d}.png").unlink()
    train = make_video_dataset("mose", root=str(tmp_path))
    assert isinstance(train, Mose) and train[0].objects == (1, 2, 3) and train.unsplit is None
    val = Mose("val", root=str(tmp_path))[0]
    assert val.objects == (1, 3) and val.annotated.any(axis=1).tolist() == [True] + [False] * 3
    with pytest.raises(FileNotFoundError, match=r"no split 'test'\. Found: train, valid"):
        Mose("test", root=str(tmp_path))
    inner = Mose("val", root=str(tmp_path / "train"))
    assert inner.unsplit is not None and Mose("all", root=str(tmp_path / "train")).unsplit is None
    assert Mose("train", root=str(tmp_path), objects="first")[0].objects == (1, 3)


def missing_frame(root: Path) -> None:
    (root / "JPEGImages/cows/00001.jpg").unlink()


def cut_frame(root: Path) -> None:
    path = root / "JPEGImages/cows/00001.jpg"
    path.write_bytes(path.read_bytes()[:-30])


def small_frame(root: Path) -> None:
    write_frame(root / "JPEGImages/cows/00002.jpg", height=20)


def small_mask(root: Path) -> None:
    write_ids(root / "Annotations/cows/00001.png", FIRST[:, :-2])


def cut_mask(root: Path) -> None:
    path = root / "Annotations/cows/00001.png"
    path.write_bytes(path.read_bytes()[:-20])


def colour_mask(root: Path) -> None:
    Image.new("RGB", (32, 24)).save(root / "Annotations/cows/00000.png")


def no_masks(root: Path) -> None:
    for path in (root / "Annotations/cows").iterdir():
        path.unlink()


def no_frames(root: Path) -> None:
    for path in (root / "JPEGImages/cows").iterdir():
        path.unlink()
    (root / "JPEGImages/cows").rmdir()


def two_stems(root: Path) -> None:
    write_frame(root / "JPEGImages/cows/00001.png")


def outside(root: Path) -> None:
    write_frame(root.parent / "secret.jpg")
    (root / "JPEGImages/cows/00009.jpg").symlink_to(root.parent / "secret.jpg")


def no_object(root: Path) -> None:
    write_ids(root / "Annotations/cows/00000.png", np.zeros_like(FIRST))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_frame, "mask has no frame .*00001.png"),
        (cut_frame, "frame file cannot be read: .*truncated.*00001.jpg"),
        (small_frame, "frame differs in size from the first frame .*32 x 20, not 32 x 24"),
        (small_mask, "mask differs in size from the first frame .*30 x 24"),
        (cut_mask, "mask file cannot be read: .*truncated"),
        (colour_mask, "expected one channel of uint8"),
        (no_masks, "video has no mask"),
        (no_frames, "folder is missing .*JPEGImages/cows"),
        (two_stems, "two files have this stem"),
        (outside, "file name leaves its folder"),
        (no_object, "first annotated frame of 'cows' has no object"),
    ],
)
def test_faults_stop_before_a_frame_is_decoded(tmp_path: Path, damage, message: str) -> None:
    root = tmp_path / "davis"
    write_2017(root, "bees")
    write_2017(root, "cows")
    damage(root)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        Davis("all", root=str(root))
    assert "cows" in str(caught.value) and len(str(caught.value).splitlines()) == 1
    if damage is not colour_mask:
        with pytest.warns(UserWarning, match="skipped 1 records"):
            dataset = Davis("all", root=str(root), on_error="skip")
        assert [v.name for v in dataset] == ["bees"] and sum(dataset.skipped.values()) == 1


def test_files_that_change_after_construction(tmp_path: Path) -> None:
    write_2017(tmp_path, "cows")
    video = Davis("all", root=str(tmp_path))[0]
    small_mask(tmp_path)
    small_frame(tmp_path)
    with pytest.raises(ValueError, match="00001.png: frame 1 of video 'cows': the file is 30 x 24"):
        video.annotation(1)
    with pytest.raises(ValueError, match="00002.jpg: frame 2 of video 'cows': the file is 32 x 20"):
        video.image(2)
    missing_frame(tmp_path)
    with pytest.raises(FileNotFoundError, match="frame 1 of video 'cows': the file is missing"):
        video.image(1)


def test_more_pixels_than_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_2017(tmp_path, "cows")
    monkeypatch.setattr("sam_gym.data.images._MAX_PIXELS", 24 * 32 - 1)
    with pytest.raises(ValueError, match="32 x 24 pixels are more than OpenCV reads"):
        Davis("all", root=str(tmp_path), year=2017)


def test_arrays_are_fresh(tmp_path: Path) -> None:
    write_2017(tmp_path, "cows")
    video = Davis("all", root=str(tmp_path))[0]
    video.annotation(0).masks[:] = True
    video.annotated[:] = False
    assert video.annotation(0).masks.sum() == 72 and video.annotated.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cv2.countNonZero(video.image(0)[..., 1]) == 24 * 32


# COCO JSON ---------------------------------------------------------------------------------------


def coco_data(root: Path, tracks: bool = True) -> dict[str, Any]:
    """Two videos; the frames of "7" are out of order, and the last one is no keyframe.

    Track 1 (tool) leaves in frame 1; track 5 (organ) appears there.
    """
    images, annotations = [], []

    def add(image_id: int, category: int, track: int, mask: np.ndarray, **changes: Any) -> None:
        own = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category}
        own |= {"segmentation": code(mask, compressed=bool(track % 2)), "iscrowd": 0}
        annotations.append(own | ({"track_id": track} if tracks else {}) | changes)

    for image_id, video, order in ((4, 7, 10), (3, 7, 2), (5, 7, 11), (9, "b", 0), (8, "b", 1)):
        write_frame(root / f"images/{image_id}.jpg", 50 + image_id)
        image = {"id": image_id, "file_name": f"{image_id}.jpg", "height": 24, "width": 32}
        images.append(image | {"video_id": video, "order_in_video": order, "path": "/else/x.jpg"})
    images[2]["is_det_keyframe"] = False
    add(3, 20, 1, FIRST == 1)
    add(3, 20, 2, FIRST == 3)
    add(4, 20, 2, LATER == 3)
    add(4, 30, 5, LATER == 2)
    add(4, 30, 6, LATER == 1, iscrowd=1)
    add(5, 20, 1, LATER == 1)
    add(9, 30, 1, FIRST == 1)
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 30, "name": "organ"}, {"id": 20, "name": "tool"}],
    }


def write_coco(root: Path, data: dict[str, Any] | None = None, tracks: bool = True) -> str:
    made = coco_data(root, tracks)
    write_json(root / "instances_train.json", made if data is None else data)
    return str(root)


def test_coco_videos(tmp_path: Path) -> None:
    dataset = make_video_dataset("coco-video", root=write_coco(tmp_path))
    assert isinstance(dataset, CocoVideo) and dataset.categories == ("tool", "organ")
    assert [v.name for v in dataset] == ["7", "b"] and len(dataset.files) == 5
    video = dataset[0]
    assert isinstance(video, Video)
    assert video.frames == ("3", "4", "5") and video.objects == (1, 2, 5)
    assert video.categories == (0, 0, 1)
    assert abs(int(video.image(1)[5, 5, 1]) - 54) <= 2
    first, second, third = (video.annotation(frame) for frame in range(3))
    assert first.visible.tolist() == [True, True, False] and first.annotated.all()
    assert (first.masks[0] == (FIRST == 1)).all() and (second.masks[2] == (LATER == 2)).all()
    assert second.visible.tolist() == [False, True, True]
    # A crowd is ignored; a frame that is no keyframe is not annotated, whatever the JSON has.
    assert second.ignore is not None and (second.ignore == (LATER == 1)).all()
    assert not third.annotated.any() and not third.visible.any()
    assert video.annotated.tolist() == [[True] * 3, [True] * 3, [False] * 3]
    # A frame without annotations is known to be empty.
    assert dataset[1].annotated.all() and not dataset[1].annotation(1).visible.any()


def test_coco_videos_of_some_categories(tmp_path: Path) -> None:
    dataset = CocoVideo(root=write_coco(tmp_path), categories="tool")
    assert dataset.categories == ("tool",) and [v.name for v in dataset] == ["7"]
    assert dataset[0].objects == (1, 2) and dataset[0].annotation(1).ignore is None


def test_coco_videos_without_tracks(tmp_path: Path) -> None:
    root = write_coco(tmp_path, tracks=False)
    unions = CocoVideo(root=root, objects="categories")[0]
    assert unions.categories == (0, 1) and unions.objects == (1, 2)
    assert (unions.annotation(0).masks[0] == (FIRST > 0)).all()
    # The two tools of frame 0 are components; one goes on in frame 1, where an organ appears.
    parts = CocoVideo(root=root)[0]
    assert parts.categories == (0, 0, 1) and len(parts) == 3
    shown = [parts.annotation(frame).visible.tolist() for frame in range(3)]
    assert shown == [[True, True, False], [False, True, True], [False] * 3]
    assert parts.annotated.tolist() == [[True] * 3, [True] * 3, [False] * 3]
    # Of a square of 6 pixels, the ellipse takes two pixels in each corner.
    first = parts.annotation(0).masks[0]
    assert first.sum() == 28 and not (first & (FIRST != 1)).any()


def test_components_keep_their_ids() -> None:
    def counts(mask: np.ndarray) -> bytes:
        return code(mask)["counts"].encode()

    speck = boxes(_1=(2, 2))
    speck[20, 20:23] = 1
    frames = [speck, boxes(_1=(4, 2), _2=(14, 20)), np.zeros_like(speck), boxes(_1=(14, 18))]
    union = Track(3, {frame: counts(ids > 0) for frame, ids in enumerate(frames)})
    found = link_components(union, (HEIGHT, WIDTH))
    assert [sorted(track.masks) for track in found] == [[0, 1], [1, 3]]
    assert all(track.category == 3 for track in found)


def test_coco_with_some_tracks(tmp_path: Path) -> None:
    data = coco_data(tmp_path)
    del data["annotations"][2]["track_id"]
    root = write_coco(tmp_path, data)
    with pytest.raises(ValueError, match="1 of 7 annotations have no track_id.*objects=components"):
        CocoVideo(root=root)
    with pytest.raises(ValueError, match="annotation 3: track_id is not a whole number"):
        CocoVideo(root=root, objects="tracks")
    assert CocoVideo(root=root, objects="components")[0].objects == (1, 2, 3)


def change(table: str, position: int, **values: Any) -> Any:
    def apply(data: dict[str, Any]) -> None:
        for key, value in values.items():
            if value is ...:
                del data[table][position][key]
            else:
                data[table][position][key] = value

    return apply


def empty_categories(data: dict[str, Any]) -> None:
    data["categories"] = []


def other_size(data: dict[str, Any]) -> None:
    data["annotations"][1]["segmentation"]["size"] = [32, 24]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (empty_categories, "instances_train.json: categories is empty"),
        (change("images", 1, video_id=...), "image 3: video_id is neither .* None"),
        (change("images", 1, order_in_video=...), "image 3: order_in_video is not .* None"),
        (change("images", 1, order_in_video="2"), "image 3: order_in_video is not a whole number"),
        (change("images", 1, order_in_video=10), "image 3: order_in_video is repeated .*got 10"),
        (change("images", 1, file_name=...), "image 3: file name is not a non-empty string"),
        (change("images", 1, file_name="../x.jpg"), "image 3: file name leaves its folder"),
        (change("images", 1, file_name="none.jpg"), "image 3: frame file is missing"),
        (change("images", 1, height=...), "image 3: height is not a positive whole number"),
        (change("images", 1, id=4), "image 4: id is taken"),
        (change("images", 1, is_det_keyframe="no"), "image 3: is_det_keyframe is neither"),
        (change("annotations", 1, image_id=77), "annotation 2: image_id is not among"),
        (change("annotations", 1, image_id=...), "annotation 2: image_id is neither"),
        (change("annotations", 1, category_id=77), "annotation 2: category_id is not among"),
        (change("annotations", 1, segmentation=None), "annotation 2: annotation has no segment"),
        (change("annotations", 1, segmentation="x"), "annotation 2: segmentation is neither"),
        (change("annotations", 1, track_id=1), "annotation 2: track_id is repeated in the frame"),
        (change("annotations", 3, track_id=2), "annotation 4: track_id has two categories"),
        (change("annotations", 1, id=1), "annotation 1: id is taken"),
        (other_size, r"annotation 2: RLE size is not .*got \[32, 24\], expected \[24, 32\]"),
        (change("images", 4, height=20), "video 'b': frames of the video differ in size"),
    ],
)
def test_coco_faults(tmp_path: Path, damage: Any, message: str, monkeypatch: Any) -> None:
    data = coco_data(tmp_path)
    damage(data)
    root = write_coco(tmp_path, data)
    monkeypatch.setattr("sam_gym.data.images._decode", None)  # no pixel is decoded
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        CocoVideo(root=root)
    assert len(str(caught.value).splitlines()) == 1
    if damage is not empty_categories:
        with pytest.warns(UserWarning, match="instances_train.json: skipped [123] records"):
            assert len(CocoVideo(root=root, on_error="skip")) >= 1


def test_coco_frames_are_checked(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    write_frame(tmp_path / "images/4.jpg", height=20)
    with pytest.raises(ValueError, match="video '7': frame differs in size"):
        CocoVideo(root=root)
    with pytest.warns(UserWarning, match="skipped 1 records: 1 x frame differs in size"):
        assert [v.name for v in CocoVideo(root=root, on_error="skip")] == ["b"]


def test_coco_files_of_other_kinds(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no annotation file for split 'train'"):
        CocoVideo(root=str(tmp_path))
    write_json(tmp_path / "instances_train.json", [1])
    with pytest.raises(ValueError, match="not a COCO video file: no list 'images'"):
        CocoVideo(root=str(tmp_path))
    (tmp_path / "instances_train.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        CocoVideo(root=str(tmp_path))


def test_one_file_for_every_split(tmp_path: Path) -> None:
    write_coco(tmp_path)
    file = str(tmp_path / "instances_train.json")
    dataset = CocoVideo("val", root=str(tmp_path), annotations=file)
    assert len(dataset) == 2 and dataset.unsplit is not None
    assert CocoVideo("all", root=str(tmp_path), annotations=file).unsplit is None
    with pytest.raises(ValueError, match="split_seed=3 is for data without splits"):
        CocoVideo("train", root=str(tmp_path), split_seed=3)
    part = CocoVideo("train", root=str(tmp_path), annotations=file, split_seed=0)
    assert part.unsplit is None and len(part) in (1, 2)


# YouTube-VIS -------------------------------------------------------------------------------------


def vis_data(root: Path, split: str = "train") -> dict[str, Any]:
    names = [f"a0/{frame:05d}.jpg" for frame in (0, 5, 10)]
    for name in names:
        write_frame(root / split / "JPEGImages" / name)
    track = [code(FIRST == 1, False), None, code(LATER == 1)]
    own = {"video_id": 3, "category_id": 1, "iscrowd": 0, "height": 24, "width": 32}
    return {
        "videos": [{"id": 3, "file_names": names, "length": 3, "height": 24, "width": 32}],
        "annotations": [
            own | {"id": 11, "segmentations": track},
            own | {"id": 12, "segmentations": [None, code(LATER == 2), None], "category_id": 2},
            own | {"id": 13, "segmentations": [code(LATER == 3), None, None], "iscrowd": 1},
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "dog"}],
    }


def test_youtube_vis(tmp_path: Path) -> None:
    write_json(tmp_path / "train.json", vis_data(tmp_path))
    dataset = make_video_dataset("youtube-vis", root=str(tmp_path))
    assert isinstance(dataset, YoutubeVis) and dataset.categories == ("person", "dog")
    (video,) = dataset
    assert (video.name, video.frames) == ("a0", ("00000", "00005", "00010"))
    assert video.objects == (11, 12) and video.categories == (0, 1)
    shown = [video.annotation(frame).visible.tolist() for frame in range(3)]
    assert shown == [[True, False], [False, True], [True, False]] and video.annotated.all()
    assert (video.annotation(0).masks[0] == (FIRST == 1)).all()
    assert (video.annotation(2).masks[0] == (LATER == 1)).all()
    ignore = video.annotation(0).ignore
    assert ignore is not None and (ignore == (LATER == 3)).all()
    dogs = YoutubeVis(root=str(tmp_path), categories=["dog"])
    assert dogs[0].objects == (12,) and dogs[0].annotation(0).ignore is None


@pytest.mark.parametrize("place", ["valid.json", "valid/instances.json", "instances_val.json"])
def test_places_of_youtube_vis(tmp_path: Path, place: str) -> None:
    write_json(tmp_path / place, vis_data(tmp_path, "valid"))
    assert len(YoutubeVis("val", root=str(tmp_path))) == 1
    with pytest.raises(FileNotFoundError, match=r"no split 'test'\. .*Looked for test\.json"):
        YoutubeVis("test", root=str(tmp_path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (empty_categories, "categories is empty"),
        (lambda data: data.pop("annotations"), "has no annotations; the val and test splits"),
        (change("videos", 0, file_names=[]), "video 3: file_names is not a list"),
        (change("videos", 0, length=4), "video 3: length is not the number of file_names"),
        (change("videos", 0, file_names=["a0/00000.jpg"] * 3), "video 3: a frame is listed twice"),
        (change("videos", 0, file_names=["a0/00000.jpg", "a0/00005.jpg", "x"]), "file is missing"),
        (change("videos", 0, width=0), "video 3: width is not a positive"),
        (change("annotations", 0, segmentations=[None]), "annotation 11: segmentations is not"),
        (change("annotations", 0, video_id=4), "annotation 11: video_id is not among"),
        (change("annotations", 0, category_id=4), "annotation 11: category_id is not among"),
        (change("annotations", 0, id="x"), "annotation x: id is not a whole number"),
        (change("annotations", 0, segmentations=[code(FIRST[:3] == 1)] * 3), "RLE size is not"),
    ],
)
def test_youtube_vis_faults(tmp_path: Path, damage: Any, message: str) -> None:
    data = vis_data(tmp_path)
    damage(data)
    write_json(tmp_path / "train.json", data)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        YoutubeVis(root=str(tmp_path))


# SA-V --------------------------------------------------------------------------------------------


def write_sav_val(root: Path) -> None:
    """Nine frames, of which every fourth is annotated; object 1 is not annotated in the first."""
    for frame in range(9):
        write_frame(root / f"JPEGImages_24fps/sav_1/{frame:05d}.jpg", 40 + 10 * frame)
    for number, frames in ((0, (0, 4, 8)), (1, (4, 8))):
        for frame in frames:
            mask = boxes(_1=(2 + frame, 4 + 12 * number)) * (frame < 8)
            write_ids(root / f"Annotations_6fps/sav_1/{number:03d}/{frame:05d}.png", mask)
    (root / "sav_val.txt").write_text("sav_1\n")


def test_sav_folders(tmp_path: Path) -> None:
    write_sav_val(tmp_path / "sav_val")
    dataset = make_video_dataset("sav", "val", root=str(tmp_path))
    assert isinstance(dataset, Sav) and len(dataset.files) == 9
    (video,) = dataset
    assert isinstance(video, Video) and video.objects == (0, 1) and len(video) == 9
    assert video.annotated[[0, 4, 8]].tolist() == [[True, False], [True, True], [True, True]]
    assert video.annotated.sum() == 5
    first, last = video.annotation(0), video.annotation(8)
    assert first.annotated.tolist() == [True, False] and first.visible.tolist() == [True, False]
    assert last.annotated.all() and not last.visible.any()
    few = Sav("val", root=str(tmp_path / "sav_val"), annotated_only=True)[0]
    assert few.frames == ("00000", "00004", "00008") and few.annotated.sum() == 5
    assert abs(int(few.image(1)[5, 5, 1]) - 80) <= 2
    with pytest.raises(FileNotFoundError, match=r"no split 'test'\. Found: sav_val.txt"):
        Sav("test", root=str(tmp_path / "sav_val"))


def test_sav_folders_with_faults(tmp_path: Path) -> None:
    write_sav_val(tmp_path)
    write_ids(tmp_path / "Annotations_6fps/sav_1/000/00009.png", FIRST)
    with pytest.raises(ValueError, match="video 'sav_1': mask has no frame .*00009"):
        Sav("val", root=str(tmp_path))
    (tmp_path / "Annotations_6fps/sav_1/000").rename(tmp_path / "Annotations_6fps/sav_1/car")
    with pytest.raises(ValueError, match="folder of an object is not a number .*car"):
        Sav("val", root=str(tmp_path))


def sav_masklets() -> dict[str, Any]:
    empty = code(np.zeros((24, 32), bool))
    return {
        "video_id": "sav_000001",
        "video_frame_count": 9.0,
        "video_height": 24.0,
        "video_width": 32.0,
        "masklet_id": [0, 1],
        "masklet": [
            [code(FIRST == 1), None],
            [code(LATER == 1), code(LATER == 2)],
            [empty, code(LATER == 3)],
        ],
    }


def write_sav_train(root: Path, data: dict[str, Any] | None = None) -> None:
    folder = root / "sav_000"
    folder.mkdir(parents=True)
    writer = cv2.VideoWriter(
        str(folder / "sav_000001.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 24, (32, 24)
    )
    for frame in range(9):
        writer.write(np.full((24, 32, 3), 20 + 25 * frame, np.uint8))
    writer.release()
    write_json(folder / "sav_000001_manual.json", sav_masklets() if data is None else data)
    write_json(folder / "sav_000001_auto.json", sav_masklets())


def test_sav_masklets(tmp_path: Path) -> None:
    write_sav_train(tmp_path)
    dataset = Sav("train", root=str(tmp_path))
    (video,) = dataset
    assert isinstance(video, Video) and video.name == "sav_000001" and len(video) == 9
    assert video.objects == (0, 1) and video.size == (24, 32)
    assert video.annotated[[0, 4, 8]].tolist() == [[True, False], [True, True], [True, True]]
    assert video.annotated.sum() == 5
    assert (video.annotation(4).masks[1] == (LATER == 2)).all()
    assert video.annotation(8).annotated.all() and video.annotation(8).visible.tolist() == [0, 1]
    # In any order, every frame is the one of its number.
    for frame in (0, 1, 8, 3, 4, 4):
        assert abs(float(video.image(frame).mean()) - (20 + 25 * frame)) < 6
    copied = pickle.loads(pickle.dumps(video))
    assert abs(float(copied.image(2).mean()) - 70) < 6
    both = Sav("train", root=str(tmp_path), masklets="both", annotated_only=True)[0]
    assert both.objects == (0, 1, 2, 3) and both.frames == ("00000", "00004", "00008")
    assert abs(float(both.image(1).mean()) - 120) < 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masklet": None}, "masklet is not a list of lists"),
        ({"masklet": [[None]]}, "masklet has not one entry per object"),
        ({"masklet_id": [0, 0]}, "masklet_id repeats an id"),
        ({"masklet_id": ["a", 1]}, "masklet_id is not a list of whole numbers"),
        ({"video_height": 20}, "RLE size is not"),
        ({"video_frame_count": 8}, "masklet has more frames than the video"),
        ({"video_width": None}, "video_width is not a positive whole number"),
    ],
)
def test_sav_masklets_with_faults(tmp_path: Path, changes: Any, message: str) -> None:
    write_sav_train(tmp_path, sav_masklets() | changes)
    dataset = Sav("train", root=str(tmp_path))
    with pytest.raises(ValueError, match=f"sav_000001_manual.json: .*{message}"):
        _ = dataset[0]


def test_sav_videos_that_end_early(tmp_path: Path) -> None:
    write_sav_train(tmp_path, sav_masklets() | {"video_frame_count": 20})
    video = Sav("train", root=str(tmp_path))[0]
    with pytest.raises(ValueError, match="frame 12 cannot be decoded: .* at frame 9; .* says 20"):
        video.image(12)
    assert abs(float(video.image(1).mean()) - 45) < 6
    (tmp_path / "sav_000/sav_000001_manual.json").unlink()
    with pytest.raises(ValueError, match="manual masklets are missing"):
        Sav("train", root=str(tmp_path))


# All ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VIDEO_DATASETS.names())
def test_specs_say_what_the_factories_take(name: str) -> None:
    spec = VIDEO_DATASETS.get(name)
    assert spec.name == name and spec.description.endswith(".")
    assert ("length" in spec.parameters) == spec.procedural
    assert ("root" in spec.parameters) == spec.reads_files
    if spec.reads_files:
        with pytest.raises(FileNotFoundError, match="does not exist"):
            spec.make("val", root="/nowhere")
        with pytest.raises(ValueError, match="reads files: pass its folder"):
            make_video_dataset(name)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="Unknown video dataset 'davi'. Did you mean 'davis'"):
        make_video_dataset("davi")
    with pytest.raises(ValueError, match="Unknown option of dataset 'davis' 'yaer'.*'year'"):
        make_video_dataset("davis", root=".", yaer=2016)
