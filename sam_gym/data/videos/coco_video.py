"""COCO JSON of videos: image records have `video_id` and `order_in_video`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import cv2
import numpy as np
from pycocotools import mask as rle

from sam_gym.data.base import SPLITS, Unsplit, select_categories
from sam_gym.data.coco_records import (
    annotation_file,
    encode_segmentation,
    is_crowd,
    is_missing,
    load_tables,
    new_id,
    positive_size,
    read_categories,
    record_id,
    record_name,
    reference,
    used_ids,
)
from sam_gym.data.io import OnError, Records, Reject, check_all, flag, resolve, whole_number
from sam_gym.data.splits import ALL
from sam_gym.data.videos.reader import (
    RleVideo,
    Track,
    VideoReader,
    check_frames,
    decode,
    split_by_seed,
)
from sam_gym.utils.registry import check_choice

Objects = Literal["tracks", "categories", "components"]

#: Opening before components are told apart.
_ELLIPSE = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))


@dataclass
class _Frame:
    """An image record, and the masks on it."""

    id: int | str
    video: str
    order: int
    path: str
    size: tuple[int, int]
    annotated: bool
    #: Category, track id (None: none), and counts of each mask.
    masks: list[tuple[int, int | None, bytes]] = field(default_factory=list)
    ignored: list[bytes] = field(default_factory=list)


class _ComponentVideo(RleVideo):
    """A video whose masks are split into components when it is opened."""

    @cached_property
    def opened(self) -> RleVideo:
        """The video with one track per component."""
        tracks: dict[int, Track] = {}
        for union in self._tracks:
            for track in link_components(union, self.size):
                tracks[len(tracks) + 1] = track
        if not tracks:
            raise ValueError(
                f"video {self.name!r}: no mask is left after an opening by 5 x 5 pixels. Drop the "
                f"video, or pass {flag('objects', 'categories')}."
            )
        annotated = np.asarray(self._annotated.any(axis=1))
        return RleVideo(self.name, self.paths, self.size, tracks, self._ignored, annotated)


class CocoVideo(VideoReader[RleVideo]):
    """COCO JSON of videos, as of the "SAM2 video training" repository.

    Image records have `video_id` and `order_in_video`, beside `id`, `file_name`, `height` and
    `width`; annotations have `image_id`, `category_id` and a `segmentation` of RLE or polygons.
    Frames are in the order of `order_in_video`, which may have gaps. With `is_det_keyframe` false,
    a frame is not annotated; every other frame is, and an object without a mask is out of sight.
    Crowds are ignored pixels. `file_name` counts; `path` does not. Videos without a mask of the
    selected categories in an annotated frame are left out.

    Construction validates the JSON first, then the files of frames (about 0.1 ms each).

    Args:
        split: selects `root/instances_{split}.json`, or a part of `annotations` with `split_seed`.
        root: folder of the dataset.
        annotations: path of another annotation file. **Every split is all its videos**, unless
            `split_seed` is given.
        split_seed: seed that splits the videos of `annotations` (80% train, 10% val, 10% test).
        images: folder of the frames in `root`; names in the JSON cannot leave it.
        categories: names to select, as a sequence or comma-separated; None: all.
        objects: definition of an object. "tracks": the masks of one `track_id` in a video.
            "categories": the union of the masks of a category. "components": each 8-connected
            component of such a union, after an opening by a 5 x 5 ellipse as in that repository,
            which drops specks and thin parts; components keep the id of the one that they overlap
            most. Components are found when a video is first returned. None: "tracks" if there are
            track ids, else "components".
        on_error: handling of invalid records: "raise", or "skip" to count them in `skipped`, with
            one warning.

    Raises:
        FileNotFoundError: the root, the annotation file or a frame is missing.
        ValueError: the file is not such JSON, categories is empty, a record is invalid (a missing
            field, a repeated order, an unknown id, RLE of another size), an option or a category is
            unknown, or no video is left.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        root: str,
        annotations: str | None = None,
        split_seed: int | None = None,
        images: str = "images",
        categories: str | Sequence[str] | None = None,
        objects: Objects | None = None,
        on_error: OnError = "raise",
    ) -> None:
        check_choice("split", split, (*SPLITS, ALL) if annotations else SPLITS)
        path = annotations or annotation_file(root, split)
        data = load_tables(path, ("images", "annotations", "categories"), "COCO video file")
        if not data["categories"]:
            raise ValueError(f"{path}: categories is empty. Add the categories of the annotations.")
        records = Records(os.path.basename(path), on_error)
        names = read_categories(
            data["categories"], used_ids(data["annotations"], "category_id"), records
        )
        selected = select_categories(categories, list(names.values()))
        objects = objects or _told(data["annotations"], path)

        frames: dict[int | str, _Frame] = {}
        orders: set[tuple[str, int]] = set()
        folder = os.path.join(root, images)
        for position, record in enumerate(data["images"]):
            with records.validate(record_name("image", record, position)):
                frame = _frame(record, frames, folder)
                if (frame.video, frame.order) in orders:
                    raise Reject("order_in_video is repeated in the video", f"got {frame.order}")
                orders.add((frame.video, frame.order))
                frames[frame.id] = frame
        index_of = {name: index for index, name in enumerate(selected)}
        tracks: dict[tuple[str, int], int | str] = {}
        seen: set[int | str] = set()
        for position, record in enumerate(data["annotations"]):
            with records.validate(record_name("annotation", record, position)):
                seen.add(new_id(record, seen))
                _add_mask(record, frames, names, index_of, objects, tracks, records)

        videos: dict[str, list[_Frame]] = {}
        for frame in frames.values():
            videos.setdefault(frame.video, []).append(frame)
        for own in videos.values():
            own.sort(key=lambda frame: frame.order)
        unsplit = None
        if annotations is not None and split != ALL:
            unsplit = Unsplit(
                f"{path}: annotations= names one file for every split",
                "Leave it out and name the files instances_train.json and instances_val.json",
            )
        holding = [
            name
            for name, own in videos.items()
            if any(frame.annotated and frame.masks for frame in own)
        ]
        kept, unsplit = split_by_seed(holding, split, split_seed, path, unsplit)
        chosen = [videos[name] for name in kept]
        checked = check_all(_check_files, chosen)
        read = []
        for own, result in zip(chosen, checked, strict=True):
            with records.validate(f"video {own[0].video!r}"):
                if isinstance(result, Reject):
                    raise result
                read.append(_video(own, objects))
        super().__init__("coco-video", selected, read, records, unsplit, path)

    def __getitem__(self, index: int) -> RleVideo:
        video = super().__getitem__(index)
        return video.opened if isinstance(video, _ComponentVideo) else video


def link_components(union: Track, size: tuple[int, int]) -> list[Track]:
    """Split the masks of a track into components, and link these from frame to frame.

    A mask is opened by a 5 x 5 ellipse and split into 8-connected components. Components of a frame
    and the objects so far, each as it was last seen, are matched one to one for the greatest total
    IoU. A component without an overlapping object starts a new object.

    Args:
        union: the masks.
        size: (height, width).

    Returns:
        The objects in the order of their appearance.
    """
    from scipy.optimize import linear_sum_assignment  # here, since it takes long to import

    found: list[Track] = []
    last: list[dict[str, Any]] = []
    for frame, counts in sorted(union.masks.items()):
        mask = decode([counts], size)[0].astype(np.uint8)
        opened = cv2.dilate(cv2.erode(mask, _ELLIPSE), _ELLIPSE)
        count, labels = cv2.connectedComponents(opened, connectivity=8)
        if count < 2:
            continue
        each = labels[..., None] == np.arange(1, count)
        codes = rle.encode(np.asfortranarray(each, np.uint8))
        owners = [-1] * len(codes)
        if last:
            overlaps = np.asarray(rle.iou(codes, last, [False] * len(last)))
            for own, other in zip(*linear_sum_assignment(overlaps, maximize=True), strict=True):
                if overlaps[own, other] > 0:
                    owners[own] = int(other)
        for code, owner in zip(codes, owners, strict=True):
            if owner < 0:
                owner = len(found)
                found.append(Track(union.category, unknown=set(union.unknown)))
                last.append(code)
            found[owner].masks[frame] = bytes(code["counts"])
            last[owner] = code
    return found


def _told(annotations: list[Any], path: str) -> Objects:
    """Return what objects are, as the track ids tell."""
    has = [not is_missing(r.get("track_id")) for r in annotations if isinstance(r, dict)]
    if any(has) and not all(has):
        raise ValueError(
            f"{path}: {has.count(False)} of {len(has)} annotations have no track_id. Add it, or "
            f"pass {flag('objects', 'components')} or {flag('objects', 'categories')}."
        )
    return "tracks" if any(has) else "components"


def _frame(record: Any, frames: dict[int | str, _Frame], folder: str) -> _Frame:
    """Return the frame of an image record; raises `Reject`."""
    image_id = new_id(record, frames)
    video = str(record_id(record, "video_id"))
    order = whole_number(record.get("order_in_video"))
    if order is None:
        raise Reject(
            "order_in_video is not a whole number", f"got {record.get('order_in_video')!r}"
        )
    size = positive_size(record, "height"), positive_size(record, "width")
    path = resolve(folder, record.get("file_name"))
    if not os.path.isfile(path):
        raise Reject("frame file is missing", f"looked for {path}", FileNotFoundError)
    keyframe = record.get("is_det_keyframe")
    if not is_missing(keyframe) and keyframe not in (True, False):
        raise Reject("is_det_keyframe is neither true nor false", f"got {keyframe!r}")
    return _Frame(image_id, video, order, path, size, is_missing(keyframe) or bool(keyframe))


def _add_mask(
    record: dict[str, Any],
    frames: dict[int | str, _Frame],
    names: dict[int | str, str],
    index_of: dict[str, int],
    objects: Objects,
    tracks: dict[tuple[str, int], int | str],
    records: Records,
) -> None:
    """Add the mask of an annotation to its frame; raises `Reject`."""
    image_id = reference(record, "image_id", frames)
    category_id = reference(record, "category_id", names)
    if image_id not in frames:
        raise Reject("image_id is not among the images", f"got {image_id!r}")
    if category_id not in names:
        raise Reject("category_id is not among the categories", f"got {category_id!r}")
    frame, crowd = frames[image_id], is_crowd(record)
    counts = encode_segmentation(record.get("segmentation"), *frame.size, records)
    if counts is None:
        raise Reject("annotation has no segmentation")
    category = index_of.get(names[category_id])
    if crowd:
        if category is not None:
            frame.ignored.append(counts)
        return
    track_id = None
    if objects == "tracks":
        track_id = whole_number(record.get("track_id"))
        if track_id is None:
            raise Reject("track_id is not a whole number", f"got {record.get('track_id')!r}")
        if tracks.setdefault((frame.video, track_id), category_id) != category_id:
            raise Reject("track_id has two categories", f"track {track_id}, {category_id!r}")
        if any(own == track_id for _, own, _ in frame.masks):
            raise Reject("track_id is repeated in the frame", f"track {track_id}")
    if category is not None:
        frame.masks.append((category, track_id, counts))


def _check_files(frames: list[_Frame]) -> None:
    """Check the files of a video; raises `Reject`."""
    if len({frame.size for frame in frames}) > 1:
        raise Reject("frames of the video differ in size")
    check_frames([frame.path for frame in frames], "frame", frames[0].size)


def _video(frames: list[_Frame], objects: Objects) -> RleVideo:
    size = frames[0].size
    parts: dict[int, tuple[int, dict[int, list[bytes]]]] = {}
    for number, frame in enumerate(frames):
        for category, track_id, counts in frame.masks if frame.annotated else ():
            key = category if track_id is None else track_id
            own = parts.setdefault(key, (category, {}))[1]
            own.setdefault(number, []).append(counts)
    tracks = {}
    for number, (key, (category, by_frame)) in enumerate(sorted(parts.items()), start=1):
        masks = {frame: _merged(counts, size) for frame, counts in by_frame.items()}
        tracks[key if objects == "tracks" else number] = Track(category, masks)
    kind = _ComponentVideo if objects == "components" else RleVideo
    return kind(
        frames[0].video,
        [frame.path for frame in frames],
        size,
        tracks,
        {number: frame.ignored for number, frame in enumerate(frames) if frame.ignored},
        np.array([frame.annotated for frame in frames]),
    )


def _merged(counts: list[bytes], size: tuple[int, int]) -> bytes:
    """Return the union of masks."""
    if len(counts) == 1:
        return counts[0]
    return bytes(rle.merge([{"size": list(size), "counts": own} for own in counts])["counts"])
