"""YouTube-VIS: instance tracks in one JSON file (also OVIS, UVO)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sam_gym.data.base import SPLITS, Unsplit, select_categories
from sam_gym.data.coco_records import (
    encode_segmentation,
    is_crowd,
    is_missing,
    load_tables,
    new_id,
    positive_size,
    read_categories,
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
    check_folder,
    check_frames,
    missing_split,
    split_by_seed,
)
from sam_gym.utils.registry import check_choice

#: Split -> names of its files and folders.
_NAMES = {"train": ("train",), "val": ("valid", "val"), "test": ("test",)}


@dataclass
class _Video:
    """A video record, and the tracks that were read."""

    id: int | str
    name: str
    paths: list[str]
    size: tuple[int, int]
    tracks: dict[int, Track] = field(default_factory=dict)
    ignored: dict[int, list[bytes]] = field(default_factory=dict)


class YoutubeVis(VideoReader[RleVideo]):
    """Instance tracks in YouTube-VIS JSON: `videos`, `annotations` and `categories`.

    `segmentations[t]` of an annotation is RLE, polygons, or null where the object is out of sight:
    every frame is annotated. Crowds (`iscrowd`) are ignored pixels. Ids of objects are those of
    annotations. Frames lie in `root/SPLIT/JPEGImages`, `root/JPEGImages` or `root/SPLIT`.

    Construction validates every record and rasterises every selected mask to RLE before it checks
    the files of frames (about 0.1 ms each). Videos without a selected object are left out.

    Args:
        split: selects the file: `root/SPLIT.json`, `root/SPLIT/instances.json`,
            `root/instances_SPLIT.json` or `root/annotations/instances_SPLIT.json`, where SPLIT may
            be `valid` for "val".
        root: folder of the dataset.
        annotations: path of another file. **Every split is all its videos**, unless `split_seed` is
            given.
        split_seed: seed that splits the videos of `annotations` (80% train, 10% val, 10% test).
        images: folder of the frames in `root`; None: as above. Names in the JSON cannot leave it.
        categories: names to select, as a sequence or comma-separated; None: all.
        on_error: handling of invalid records: "raise", or "skip" to count them in `skipped`, with
            one warning. A video with an invalid frame is skipped as a whole.

    Raises:
        FileNotFoundError: the root, the JSON or a frame is missing.
        ValueError: the file is not YouTube-VIS JSON, has no masks, a record is invalid, an option
            or a category is unknown, or no video is left.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        root: str,
        annotations: str | None = None,
        split_seed: int | None = None,
        images: str | None = None,
        categories: str | Sequence[str] | None = None,
        on_error: OnError = "raise",
    ) -> None:
        check_choice("split", split, (*SPLITS, ALL) if annotations else SPLITS)
        check_folder(root)
        path = annotations or _json_of(root, split)
        folder = os.path.join(root, images) if images is not None else _frames_of(root, split)
        data = _load(path)
        file = os.path.basename(path)
        records = Records(file, on_error)

        names = read_categories(
            data["categories"], used_ids(data["annotations"], "category_id"), records
        )
        if not names:
            raise ValueError(f"{path}: categories is empty. Add the categories of the objects.")
        selected = select_categories(categories, list(names.values()))
        index_of = {name: index for index, name in enumerate(selected)}

        videos: dict[int | str, _Video] = {}
        for position, record in enumerate(data["videos"]):
            with records.validate(record_name("video", record, position)):
                video_id = new_id(record, videos)
                videos[video_id] = _video(video_id, record, folder)
        seen: set[int | str] = set()
        for position, record in enumerate(data["annotations"]):
            with records.validate(record_name("annotation", record, position)):
                seen.add(new_id(record, seen))
                _add_track(record, videos, names, index_of, records)

        unsplit = None
        if annotations is not None and split != ALL:
            unsplit = Unsplit(
                f"{path}: annotations= names one file for every split",
                "Leave it out and name the files train.json and valid.json",
            )
        used = {str(v.id): v for v in videos.values() if v.tracks}
        kept, unsplit = split_by_seed(list(used), split, split_seed, path, unsplit)
        read = []
        chosen = [used[key] for key in kept]
        checked = check_all(lambda video: check_frames(video.paths, "frame", video.size), chosen)
        for video, result in zip(chosen, checked, strict=True):
            with records.validate(f"video {video.id}"):
                if isinstance(result, Reject):
                    raise result
                read.append(
                    RleVideo(video.name, video.paths, video.size, video.tracks, video.ignored)
                )
        super().__init__("youtube-vis", selected, read, records, unsplit, path)


def _json_of(root: str, split: str) -> str:
    found = []
    for name in _NAMES[split]:
        for file in (
            f"{name}.json",
            f"{name}/instances.json",
            f"instances_{name}.json",
            f"annotations/instances_{name}.json",
        ):
            found.append(file)
            if os.path.isfile(os.path.join(root, file)):
                return os.path.join(root, file)
    there = sorted(name for name in os.listdir(root) if name.endswith(".json"))
    remedy = f"Looked for {', '.join(found)}. Pass the file as {flag('annotations', 'FILE')}."
    raise missing_split(root, split, there, remedy)


def _frames_of(root: str, split: str) -> str:
    names = _NAMES.get(split, ())
    folders = [*(f"{n}/JPEGImages" for n in names), "JPEGImages", *names]
    for folder in folders:
        if os.path.isdir(os.path.join(root, folder)):
            return os.path.join(root, folder)
    looked = ", ".join(folders)
    raise FileNotFoundError(
        f"{root}: no folder of frames. Looked for {looked}. "
        f"Check the path, or pass the folder in it as {flag('images', 'FOLDER')}."
    )


def _load(path: str) -> dict[str, list[Any]]:
    """Load the JSON; say so if it is published without masks."""
    data = load_tables(path, ("videos", "categories"), "YouTube-VIS file")
    annotations = data.get("annotations")
    if annotations is None:
        raise ValueError(
            f"{path}: the file has no annotations; the val and test splits are published without. "
            "Split the training videos by a seed: pass annotations= and split_seed= (Python), or "
            f"{flag('annotations', 'train.json')} {flag('split_seed', '0')}."
        )
    if not isinstance(annotations, list):
        raise ValueError(
            f"{path}: annotations is not a list (got {type(annotations).__name__!r}). "
            "Fetch or export it again."
        )
    return data


def _video(video_id: int | str, record: dict[str, Any], folder: str) -> _Video:
    size = positive_size(record, "height"), positive_size(record, "width")
    names = record.get("file_names")
    if not isinstance(names, list) or not names:
        raise Reject("file_names is not a list of frames", f"got {type(names).__name__!r}")
    length = record.get("length", len(names))
    if whole_number(length) != len(names):
        raise Reject("length is not the number of file_names", f"{length!r}, {len(names)} names")
    paths = [resolve(folder, name) for name in names]
    if len(set(paths)) < len(paths):
        raise Reject("a frame is listed twice")
    common = os.path.dirname(names[0].replace("\\", "/"))
    return _Video(video_id, common or str(video_id), paths, size)


def _add_track(
    record: dict[str, Any],
    videos: dict[int | str, _Video],
    names: dict[int | str, str],
    index_of: dict[str, int],
    records: Records,
) -> None:
    """Add the track of an annotation to its video; raises `Reject`."""
    video_id = reference(record, "video_id", videos)
    category_id = reference(record, "category_id", names)
    if video_id not in videos:
        raise Reject("video_id is not among the videos", f"got {video_id!r}")
    if category_id not in names:
        raise Reject("category_id is not among the categories", f"got {category_id!r}")
    number = whole_number(record["id"])
    if number is None:
        raise Reject("id is not a whole number", f"got {record['id']!r}")
    video, segmentations = videos[video_id], record.get("segmentations")
    if not isinstance(segmentations, list) or len(segmentations) != len(video.paths):
        got = len(segmentations) if isinstance(segmentations, list) else type(segmentations)
        raise Reject(
            "segmentations is not a list with one entry per frame",
            f"got {got}, the video has {len(video.paths)} frames",
        )
    category = index_of.get(names[category_id])
    masks = {}
    for frame, segmentation in enumerate(segmentations):
        counts = None
        if not is_missing(segmentation):
            counts = encode_segmentation(segmentation, *video.size, records)
        if counts is not None:
            masks[frame] = counts
    if category is None:
        return
    if is_crowd(record):
        for frame, counts in masks.items():
            video.ignored.setdefault(frame, []).append(counts)
    else:
        video.tracks[number] = Track(category, masks)
