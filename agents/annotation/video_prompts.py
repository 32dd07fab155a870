"""Prompts of objects in videos, read from COCO JSON."""

from __future__ import annotations

import posixpath
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pycocotools import mask as rle

from sam_gym.data.coco_records import (
    encode_segmentation,
    is_crowd,
    is_missing,
    load_tables,
    new_id,
    read_categories,
    record_id,
    record_name,
    reference,
    used_ids,
)
from sam_gym.data.io import Records, Reject, whole_number
from sam_gym.utils.text import safe_name

PromptChoice = Literal["auto", "mask", "box", "point"]


@dataclass(frozen=True)
class ObjectPrompt:
    """A prompt of an object in a frame.

    Attributes:
        object: what tells objects of a video apart.
        category: name of its category.
        frame: number of the frame, or its name without suffix.
        arguments: of `TrackingSession.prompt`; a mask is an RLE, decoded by `decoded`.
    """

    object: Hashable
    category: str
    frame: int | str
    arguments: Mapping[str, Any] = field(repr=False)

    def decoded(self) -> dict[str, Any]:
        """Arguments of `TrackingSession.prompt`."""
        arguments = dict(self.arguments)
        if "mask" in arguments:
            arguments["mask"] = rle.decode(arguments["mask"]).astype(bool)
        return arguments


def read_prompts(
    path: str, choice: PromptChoice = "auto"
) -> tuple[list[str], dict[str, list[ObjectPrompt]]]:
    """Read the prompts of videos from COCO JSON, of images or of videos.

    An image record tells its video and frame by `video_id` (the name of the video) and
    `order_in_video` (the number of the frame, from 0), or else by `file_name`, VIDEO/FRAME.jpg. An
    annotation prompts by its `segmentation`, else its `bbox`, else its `point_coords` (positive
    clicks (x, y), all of them by default, else as `point_labels` say). Annotations of one
    `track_id` in a video are one object; without it, each is an object. In a frame, an object has
    one mask or box, which clicks may follow.

    Args:
        path: the file.
        choice: which of them prompts; "auto": the first that an annotation has.

    Returns:
        Names of the categories; name of the video -> its prompts.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is not such JSON, a record is invalid, or nothing is prompted.
    """
    data = load_tables(path, ("images", "annotations", "categories"), "COCO file")
    records = Records(posixpath.basename(path), "raise", can_skip=False)
    names = read_categories(
        data["categories"], used_ids(data["annotations"], "category_id"), records
    )
    places: dict[int | str, tuple[str, int | str, dict[str, Any]]] = {}
    folders: dict[str, str] = {}
    for position, record in enumerate(data["images"]):
        with records.validate(record_name("image", record, position)):
            image_id = new_id(record, places)
            video, frame, folder = _place(record)
            if folder and folders.setdefault(video, folder) != folder:
                raise Reject("two folders have one name", f"{folders[video]} and {folder}")
            places[image_id] = video, frame, record
    prompts: dict[str, list[ObjectPrompt]] = {}
    categories: dict[tuple[str, Hashable], str] = {}
    prompted: set[tuple[str, int | str, Hashable]] = set()
    for position, record in enumerate(data["annotations"]):
        with records.validate(record_name("annotation", record, position)):
            image_id = reference(record, "image_id", places)
            category_id = reference(record, "category_id", names)
            if image_id not in places:
                raise Reject("image_id is not among the images", f"got {image_id!r}")
            if category_id not in names:
                raise Reject("category_id is not among the categories", f"got {category_id!r}")
            if is_crowd(record):
                continue
            video, frame, image = places[image_id]
            track = record.get("track_id")
            key: Hashable = f"annotation {position}" if is_missing(track) else track
            if not is_missing(track) and whole_number(track) is None:
                raise Reject("track_id is not a whole number", f"got {track!r}")
            name = names[category_id]
            if categories.setdefault((video, key), name) != name:
                raise Reject("track_id has two categories", f"track {track}")
            arguments = _arguments(record, image, choice, records)
            if (video, frame, key) in prompted and "points" not in arguments:
                raise Reject("track_id has an earlier prompt in the frame", f"track {track}")
            prompted.add((video, frame, key))
            prompts.setdefault(video, []).append(ObjectPrompt(key, name, frame, arguments))
    if not prompts:
        raise ValueError(f"{path}: there is no annotation. Annotate objects to track.")
    return list(names.values()), prompts


def _place(record: dict[str, Any]) -> tuple[str, int | str, str]:
    """Return the video and the frame of an image record, and the folder that `file_name` tells, or
    "" if `video_id` counts; raises `Reject`."""
    if not is_missing(record.get("video_id")):
        order = whole_number(record.get("order_in_video"))
        if order is None or order < 0:
            raise Reject(
                "order_in_video is not the number of a frame", f"got {record.get('order_in_video')}"
            )
        return safe_name(str(record_id(record, "video_id"))), order, ""
    name = record.get("file_name")
    folder, file = posixpath.split(str(name).replace("\\", "/"))
    if not isinstance(name, str) or not folder or not file:
        raise Reject("file_name is not VIDEO/FRAME, and there is no video_id", f"got {name!r}")
    video, frame = posixpath.basename(folder), posixpath.splitext(file)[0]
    return safe_name(video), frame, posixpath.normpath(folder)


def _arguments(
    record: dict[str, Any], image: dict[str, Any], choice: PromptChoice, records: Records
) -> dict[str, Any]:
    """Return the prompt of an annotation; raises `Reject`."""
    segmentation = record.get("segmentation")
    if choice in ("auto", "mask") and segmentation and not is_missing(segmentation):
        height, width = (whole_number(image.get(side)) for side in ("height", "width"))
        if not height or not width:
            raise Reject("the image of a mask has no height and width")
        size = [height, width]
        counts = encode_segmentation(segmentation, height, width, records)
        if counts is None or not rle.area({"size": size, "counts": counts}):
            raise Reject("segmentation has no pixel")
        return {"mask": {"size": size, "counts": counts}}
    if choice in ("auto", "box") and not is_missing(record.get("bbox")):
        x, y, width, height = _numbers(record["bbox"], "bbox", (4,))
        if width <= 0 or height <= 0:
            raise Reject("bbox is empty", f"got {record['bbox']!r}")
        return {"box": [x, y, x + width, y + height]}
    if choice in ("auto", "point") and not is_missing(record.get("point_coords")):
        points = _numbers(record["point_coords"], "point_coords", (-1, 2))
        labels = record.get("point_labels")
        if is_missing(labels):
            labels = [1] * len(points)
        if not isinstance(labels, list) or len(labels) != len(points):
            raise Reject("point_labels does not have one entry per point", f"got {labels!r}")
        if not all(label in (0, 1) for label in labels):
            raise Reject("point_labels must be 0 or 1", f"got {labels!r}")
        return {"points": points.tolist(), "labels": labels}
    wanted = {"auto": "segmentation, bbox or point_coords", "mask": "segmentation"}
    wanted |= {"box": "bbox", "point": "point_coords"}
    raise Reject(f"annotation has no {wanted[choice]}")


def _numbers(value: Any, name: str, shape: Sequence[int]) -> np.ndarray:
    """Return finite numbers as an array of a shape; raises `Reject`."""
    try:
        numbers = np.asarray(value, np.float64).reshape(shape)
    except (TypeError, ValueError):
        numbers = np.array([np.nan])
    if not numbers.size or not np.isfinite(numbers).all():
        raise Reject(f"{name} is not a list of finite numbers", f"got {value!r}")
    return numbers
