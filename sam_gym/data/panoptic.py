"""COCO panoptic: segments as colours of PNG files, and JSON that gives them categories."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from sam_gym.data.base import MissingSplit, Unsplit
from sam_gym.data.coco import TABLES, read_image_records
from sam_gym.data.coco_records import (
    load_tables,
    read_categories,
    record_name,
    reference,
    used_ids,
)
from sam_gym.data.images import decode_colours
from sam_gym.data.io import Decode, OnError, Records, Reject, flag, number_as_text, whole_number
from sam_gym.data.semantic import (
    CROWD,
    UNLABELLED,
    LabelledImage,
    Labels,
    SemanticDataset,
    Target,
    check_folders,
)
from sam_gym.data.splits import seeded_part

#: Segment of a file: id -> category, and whether it is a crowd.
_Segments = dict[int, tuple[int, bool]]


class CocoPanoptic(SemanticDataset):
    """COCO panoptic segmentation: `panoptic_SPLIT.json` and the PNG files of the same name.

    The id of a pixel's segment is R + 256 * G + 65536 * B; 0 is unlabelled. The JSON gives each
    segment its category. Segments are the objects, except for crowds (iscrowd=1), whose class is
    known; a category of surfaces has one segment per image. Categories are sorted by id; their
    groups are the supercategories.

    Args:
        split: selects `root/panoptic_{split}.json`, or a part of `annotations` with `split_seed`.
        root: folder of the dataset.
        annotations: path of another JSON file in the root. **Every split is all its images**,
            unless `split_seed` is given.
        split_seed: seed that splits the images of `annotations` (80% train, 10% val, 10% test).
        images: folder of the image files in `root`.
        segments: folder of the PNG files in `root` (None: the JSON's name without its suffix).
        target, min_area, on_error: see `SemanticDataset`.

    Raises:
        FileNotFoundError: the JSON, a folder or a file is missing.
        ValueError: the file is not panoptic JSON, a record is invalid; or see `SemanticDataset`.
    """

    name = "coco-panoptic"
    decode: Decode = staticmethod(decode_colours)

    def __init__(
        self,
        split: str = "train",
        *,
        root: str,
        annotations: str | None = None,
        split_seed: int | None = None,
        images: str = "images",
        segments: str | None = None,
        target: Target = "instances",
        min_area: int = 0,
        on_error: OnError = "raise",
    ) -> None:
        check_folders(root, (), "")
        if split_seed is not None and annotations is None:
            raise ValueError(
                f"split_seed={split_seed!r} splits the file that annotations= names: pass both, or "
                "neither to read panoptic_train.json and panoptic_val.json."
            )
        path = os.path.join(root, annotations or f"panoptic_{split}.json")
        if annotations is None and not os.path.isfile(path):
            found = sorted(glob.glob("panoptic_*.json", root_dir=root))
            raise MissingSplit(
                f"{path}: no annotation file for split {split!r}. "
                f"Found: {', '.join(found) or 'no panoptic_*.json'}. "
                f"Choose another split, or pass the file as {flag('annotations', 'FILE')}."
            )
        data = load_tables(path, TABLES, "COCO panoptic file")
        folder = segments or os.path.relpath(os.path.splitext(path)[0], root)
        check_folders(
            root, (images, folder), "Panoptic data has the images, the JSON and a folder of PNGs."
        )
        for record in data["annotations"]:
            if isinstance(record, dict) and not isinstance(record.get("segments_info"), list):
                raise ValueError(
                    f"{path}: not a panoptic file: its annotations have no list 'segments_info'. "
                    "Read instances_*.json as dataset 'coco'."
                )
        records = Records(os.path.basename(path), on_error)
        found_segments = [
            own
            for record in data["annotations"]
            if isinstance(record, dict)
            for own in record["segments_info"]
        ]
        used = used_ids(found_segments, "category_id")
        names = read_categories(data["categories"], used, records)
        index_of = {key: index for index, key in enumerate(names)}
        groups = {
            number_as_text(record.get("name")): record.get("supercategory")
            for record in data["categories"]
            if isinstance(record, dict)
        }
        annotated = used_ids(data["annotations"], "image_id")
        by_id = read_image_records(data["images"], os.path.join(root, images), annotated, records)
        self.unsplit = None
        part = {image.file_name for image in by_id.values()}
        if split_seed is not None:
            part = seeded_part(part, split, split_seed, path)
        elif annotations is not None:
            self.unsplit = Unsplit(
                f"{path}: annotations= names one file for every split",
                "Leave it out and name the files panoptic_train.json and panoptic_val.json",
            )
        found_images: dict[str, LabelledImage] = {}
        for position, record in enumerate(data["annotations"]):
            with records.validate(record_name("annotation", record, position)):
                image = by_id.get(reference(record, "image_id", by_id))
                if image is None:
                    raise Reject("image_id is not among the images", f"got {record['image_id']!r}")
                if image.file_name in found_images:
                    raise Reject("image has two annotations", f"image {image.id!r}")
                about = _segments(record["segments_info"], index_of)
                if not isinstance(record.get("file_name"), str):
                    raise Reject("file_name is not text", f"got {record.get('file_name')!r}")
                if image.file_name in part:
                    found_images[image.file_name] = LabelledImage(
                        image.file_name,
                        os.path.join(images, image.file_name),
                        (os.path.join(folder, record["file_name"]),),
                        about,
                    )
        super().__init__(
            root,
            list(found_images.values()),
            classes=tuple(names.values()),
            category_groups=[str(groups[name] or name) for name in names.values()],
            target=target,
            min_area=min_area,
            on_error=on_error,
            skipped=records.skipped,
        )

    def parse(self, image: LabelledImage, files: Sequence[np.ndarray]) -> Labels:
        red, green, blue = np.moveaxis(files[0].astype(np.int32), -1, 0)
        ids, inverse = np.unique(red + 256 * green + 65536 * blue, return_inverse=True)
        segments: _Segments = image.about
        unknown = [value for value in ids.tolist() if value and value not in segments]
        if unknown:
            raise Reject("a segment is not in the JSON", f"id {unknown[0]}")
        crowd = (UNLABELLED, True)
        own = [segments.get(value, crowd) for value in ids.tolist()]
        classes = np.array([category for category, _ in own], np.int16)
        numbers = [CROWD if is_crowd else n for n, (_, is_crowd) in enumerate(own, start=1)]
        shape = files[0].shape[:2]
        objects = np.array(numbers, np.int32)[inverse].reshape(shape)
        return Labels(classes[inverse].reshape(shape), objects)


def _segments(records: Sequence[Any], index_of: dict[int | str, int]) -> _Segments:
    """Return the segments of an annotation; raises `Reject`."""
    segments: _Segments = {}
    for record in records:
        number = whole_number(record.get("id")) if isinstance(record, dict) else None
        if number is None or not 0 < number < 2**24:
            raise Reject("id of a segment is not a whole number of 24 bits", f"got {record!r:.80}")
        if number in segments:
            raise Reject("id is taken by an earlier segment", f"id {number}")
        category = reference(record, "category_id", index_of)
        if category not in index_of:
            raise Reject("category_id is not among the categories", f"got {category!r}")
        if record.get("iscrowd", 0) not in (0, 1):
            raise Reject("iscrowd is neither 0 nor 1", f"got {record['iscrowd']!r}")
        segments[number] = index_of[category], record.get("iscrowd") == 1
    return segments


def segment_colours(ids: np.ndarray) -> np.ndarray:
    """Return the colours that stand for ids of segments (H, W), R + 256 * G + 65536 * B.

    Returns:
        uint8 (H, W, 3), RGB.
    """
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=2).astype(np.uint8)
