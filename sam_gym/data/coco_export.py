"""Export a COCO file to the formats of other tools: polygons, YOLO, label images, COCO panoptic."""

from __future__ import annotations

import io
import json
import os
import posixpath
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as rle

from sam_gym.data.base import BACKGROUND_CLASS, IGNORED
from sam_gym.data.coco import TABLES
from sam_gym.data.coco_records import (
    encode_segmentation,
    is_crowd,
    load_tables,
    new_id,
    positive_size,
    read_categories,
    record_name,
    reference,
    used_ids,
)
from sam_gym.data.coco_writer import polygons
from sam_gym.data.io import Records, Reject, resolve, write_png
from sam_gym.data.labelmaps import CLASSES
from sam_gym.data.panoptic import segment_colours
from sam_gym.data.videos.writer import davis_palette
from sam_gym.utils.files import write_atomic, write_json
from sam_gym.utils.text import safe_name


@dataclass(frozen=True)
class ExportedObject:
    """An annotation.

    Attributes:
        record: of the file.
        category: id of its category.
        code: compressed RLE of its mask, which has a pixel.
        area: its pixels.
    """

    record: dict[str, Any]
    category: int | str
    code: dict[str, Any]
    area: int

    @property
    def mask(self) -> np.ndarray:
        """The mask: bool (H, W)."""
        return rle.decode(self.code).astype(bool)


@dataclass(frozen=True)
class ExportedImage:
    """An image with its annotations.

    Attributes:
        id: of its record.
        file_name: of its record, with slashes.
        stem: name of its files in the export, without suffix: no two images have the same.
        size: (H, W).
        objects: its annotations, in the order of the file.
    """

    id: int | str
    file_name: str
    stem: str
    size: tuple[int, int]
    objects: list[ExportedObject] = field(default_factory=list)

    @property
    def copied_name(self) -> str:
        """Name of its copy in the folder `images` of the export."""
        return self.stem + posixpath.splitext(self.file_name)[1]

    def painted(self) -> list[ExportedObject]:
        """Return the annotations in the order of painting: smaller ones lie on larger ones."""
        return sorted(self.objects, key=lambda own: -own.area)


@dataclass(frozen=True)
class CocoFile:
    """The content of a COCO file, checked.

    Attributes:
        info: `info` of the file.
        categories: name by id, sorted by id.
        images: in the order of the file.
        empty: number of annotations without a pixel, which are left out.
    """

    info: dict[str, Any]
    categories: dict[int | str, str]
    images: list[ExportedImage]
    empty: int

    @classmethod
    def read(cls, path: str) -> CocoFile:
        """Read a COCO file: polygons, uncompressed RLE or compressed RLE.

        Raises:
            FileNotFoundError: it is missing.
            ValueError: it is not COCO JSON, or a record is invalid.
        """
        data = load_tables(path, TABLES, "COCO file")
        records = Records(os.path.basename(path), "raise", can_skip=False)
        used = used_ids(data["annotations"], "category_id")
        names = read_categories(data["categories"], used, records)
        images: dict[int | str, ExportedImage] = {}
        taken: set[str] = set()
        for position, record in enumerate(data["images"]):
            with records.validate(record_name("image", record, position)):
                image_id = new_id(record, images)
                size = positive_size(record, "height"), positive_size(record, "width")
                name = record.get("file_name")
                if not isinstance(name, str) or not name:
                    raise Reject("file_name is not a non-empty string", f"got {name!r}")
                name = posixpath.normpath(name.replace("\\", "/"))
                stem = _free(safe_name(posixpath.splitext(name)[0]), taken)
                images[image_id] = ExportedImage(image_id, name, stem, size)
        empty = 0
        for position, record in enumerate(data["annotations"]):
            with records.validate(record_name("annotation", record, position)):
                image_id = reference(record, "image_id", images)
                category = reference(record, "category_id", names)
                if image_id not in images:
                    raise Reject("image_id is not among the images", f"got {image_id!r}")
                if category not in names:
                    raise Reject("category_id is not among the categories", f"got {category!r}")
                height, width = images[image_id].size
                counts = encode_segmentation(record.get("segmentation"), height, width, records)
                code = {"size": [height, width], "counts": counts}
                area = int(rle.area(code)) if counts else 0
                if area:
                    own = ExportedObject(record, category, code, area)
                    images[image_id].objects.append(own)
                empty += not area
        info = data.get("info")
        return cls(info if isinstance(info, dict) else {}, names, list(images.values()), empty)

    def tables(self, copied: bool, **parts: Any) -> dict[str, Any]:
        """Return JSON with the file's info, images and categories, and other parts.

        Args:
            copied: whether the images have the names of their copies.
            **parts: further tables; they replace those of the same name.
        """
        images = [
            {
                "id": image.id,
                "file_name": image.copied_name if copied else image.file_name,
                "height": image.size[0],
                "width": image.size[1],
            }
            for image in self.images
        ]
        categories = [{"id": key, "name": name} for key, name in self.categories.items()]
        return {"info": self.info, "images": images, "categories": categories} | parts


def _free(stem: str, taken: set[str]) -> str:
    """Return a stem that is not taken, on file systems that ignore case too; take it."""
    number, found = 1, stem
    while found.casefold() in taken:
        number += 1
        found = f"{stem}-{number}"
    taken.add(found.casefold())
    return found


# Formats -----------------------------------------------------------------------------------------


def export_polygons(file: CocoFile, out: Path, copied: bool) -> None:
    """Write `annotations.json`, COCO with polygons that pycocotools fills with the same pixels."""
    annotations = [
        {"id": number, "image_id": image.id, "category_id": own.category}
        | {"segmentation": polygons(own.mask), "area": own.area}
        | {"bbox": rle.toBbox(own.code).tolist(), "iscrowd": int(is_crowd(own.record))}
        | {key: own.record[key] for key in ("score", "instance") if key in own.record}
        for number, (image, own) in enumerate(_all(file), start=1)
    ]
    write_json(out / "annotations.json", file.tables(copied, annotations=annotations))


def _all(file: CocoFile) -> Iterator[tuple[ExportedImage, ExportedObject]]:
    return ((image, own) for image in file.images for own in image.objects)


def export_yolo(file: CocoFile, out: Path, copied: bool) -> None:
    """Write YOLO segmentation: `labels/STEM.txt` for each image, and `data.yaml`.

    A line is an object: the index of its category and the outline of its mask, x and y as fractions
    of the image. The outline runs through the centres of pixels. Where the format is read as
    Ultralytics reads it (corners are truncated to whole pixels and filled with OpenCV's
    `fillPoly`), it fills the same pixels; but regions of one object are joined by lines of one
    pixel, since a line holds one polygon. Crowds are left out.
    """
    index_of = {key: index for index, key in enumerate(file.categories)}
    (out / "labels").mkdir(exist_ok=True)
    for image in file.images:
        height, width = image.size
        lines = []
        for own in image.objects:
            if not is_crowd(own.record):
                outline = (joined_outline(own.mask) + 0.5) / (width, height)
                numbers = " ".join(f"{value:.7g}" for value in outline.ravel())
                lines.append(f"{index_of[own.category]} {numbers}\n")
        write_atomic(out / "labels" / f"{image.stem}.txt", "".join(lines))
    rows = [f"  {index_of[key]}: {json.dumps(name)}" for key, name in file.categories.items()]
    head = ["# The images are not split: name your own folder for val.", "path: ."]
    text = "\n".join([*head, "train: images", "val: images", "names:", *rows])
    write_atomic(out / "data.yaml", f"{text}\n")


def joined_outline(mask: np.ndarray) -> np.ndarray:
    """Return the outline of a mask, with holes and several regions, as one polygon.

    Outlines of regions and holes are joined where their corners are nearest, by a line there and
    back.

    Args:
        mask: bool (H, W), with a pixel.

    Returns:
        int64 (N, 2), at least three centres of pixels (x, y).
    """
    from scipy.spatial import KDTree  # here, since it takes long to import

    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    contours = [contour[:, 0] for contour in found]
    bounds = np.cumsum([0, *map(len, contours)])
    points, after = np.concatenate(contours), np.arange(1, bounds[-1] + 1)
    after[bounds[1:] - 1] = bounds[:-1]
    of_contour = np.repeat(np.arange(len(contours)), np.diff(bounds))
    corner, follows = list(range(len(points))), after.tolist()
    # Prim's algorithm: of each corner that waits, the nearest corner of the path.
    waits = np.ones(len(points), bool)
    distance, nearest = np.full(len(points), np.inf), np.zeros(len(points), np.int64)
    newest = 0
    for _ in contours[1:]:
        waits[of_contour == newest] = False
        waiting = np.flatnonzero(waits)
        near, index = KDTree(contours[newest]).query(points[waiting])
        closer = near < distance[waiting]
        distance[waiting[closer]] = near[closer]
        nearest[waiting[closer]] = bounds[newest] + index[closer]
        enter = int(waiting[distance[waiting].argmin()])
        leave, newest = int(nearest[enter]), int(of_contour[enter])
        first, last = int(bounds[newest]), int(bounds[newest + 1]) - 1
        before = enter - 1 if enter > first else last
        # There, around, and back, by copies of both corners.
        again, back = len(corner), len(corner) + 1
        corner += [enter, leave]
        follows += [back, follows[leave]]
        follows[before], follows[leave] = again, enter
        if before == enter:  # a contour of one corner
            follows[enter] = again
    path = [0]
    while follows[path[-1]] != 0:
        path.append(follows[path[-1]])
    outline = points[[corner[own] for own in path]].astype(np.int64)
    return np.concatenate([outline, outline[-1:].repeat(max(0, 3 - len(outline)), axis=0)])


def export_labels(file: CocoFile, out: Path, copied: bool) -> None:
    """Write label images, which `sam_gym.data.labelmaps.LabelMaps` reads.

    `labels/STEM.png` (8 bits, with a palette) holds the number of each pixel's category, as
    `classes.json` lists them; 0 is background. `instances/STEM.png` (16 bits) holds the number of
    its object, from 1. Smaller objects lie on larger ones.

    Raises:
        ValueError: the categories are too many for 8 bits, or the objects of an image for 16 bits.
    """
    names = [name for name in file.categories.values() if name != BACKGROUND_CLASS]
    if len(names) >= IGNORED:
        raise ValueError(
            f"{len(names)} categories, and a label image holds at most {IGNORED - 1}. Choose "
            "another format."
        )
    names = [BACKGROUND_CLASS, *names]
    palette = davis_palette().ravel().tolist()
    for folder in ("labels", "instances"):
        (out / folder).mkdir(exist_ok=True)
    for image in file.images:
        if len(image.objects) >= 2**16:
            raise ValueError(
                f"{image.file_name}: {len(image.objects)} objects, and a label image holds at most "
                f"{2**16 - 1}. Choose another format."
            )
        labels, objects = np.zeros(image.size, np.uint8), np.zeros(image.size, np.uint16)
        for number, own in enumerate(image.painted(), start=1):
            name = file.categories[own.category]
            labels[own.mask] = names.index(name)
            objects[own.mask] = number if name != BACKGROUND_CLASS else 0
        picture = Image.fromarray(labels)
        picture.putpalette(palette)
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        write_atomic(out / "labels" / f"{image.stem}.png", buffer.getvalue())
        write_png(out / "instances" / f"{image.stem}.png", objects)
    write_json(out / CLASSES, {"classes": names, "background": BACKGROUND_CLASS})


def export_panoptic(file: CocoFile, out: Path, copied: bool) -> None:
    """Write COCO panoptic: `panoptic.json`, and `panoptic/STEM.png` for each image.

    The id of a pixel's segment is R + 256 * G + 65536 * B; 0 is unlabelled. Each object is a
    segment; smaller ones lie on larger ones, and what is covered entirely is left out. Area and box
    are those of the visible pixels. All categories are things.
    """
    (out / "panoptic").mkdir(exist_ok=True)
    records = []
    for image in file.images:
        ids = np.zeros(image.size, np.int64)
        order = image.painted()
        for number, own in enumerate(order, start=1):
            ids[own.mask] = number
        visible = np.bincount(ids.ravel(), minlength=len(order) + 1)[1:]
        segments = []
        for number, own in enumerate(order, start=1):
            if visible[number - 1]:
                code = rle.encode(np.asfortranarray(ids == number, np.uint8))
                segments.append(
                    {"id": number, "category_id": own.category, "area": int(visible[number - 1])}
                    | {"bbox": rle.toBbox(code).tolist(), "iscrowd": int(is_crowd(own.record))}
                )
        write_png(out / "panoptic" / f"{image.stem}.png", segment_colours(ids))
        name = f"{image.stem}.png"
        records.append({"image_id": image.id, "file_name": name, "segments_info": segments})
    categories = [
        {"id": key, "name": name, "supercategory": name, "isthing": 1}
        for key, name in file.categories.items()
    ]
    tables = file.tables(copied, categories=categories, annotations=records)
    write_json(out / "panoptic.json", tables)


#: Format -> writes a file into a folder, and is told whether the images were copied into it.
FORMATS: dict[str, Callable[[CocoFile, Path, bool], None]] = {
    "polygons": export_polygons,
    "yolo": export_yolo,
    "labels": export_labels,
    "panoptic": export_panoptic,
}


def copy_images(images: Sequence[ExportedImage], source: str, out: Path) -> None:
    """Copy images into the folder `images` of an export, under their `copied_name`.

    Args:
        images: of the file.
        source: folder to which their names are relative.
        out: folder of the export.

    Raises:
        FileNotFoundError: an image is missing; nothing is copied.
        ValueError: a name leaves the folder; nothing is copied.
    """
    paths = {}
    for image in images:
        try:
            paths[image.copied_name] = resolve(source, image.file_name)
        except Reject as reject:
            raise ValueError(f"image {image.id}: {reject.reason} ({reject.detail}).") from None
        if not os.path.isfile(paths[image.copied_name]):
            raise FileNotFoundError(
                f"{paths[image.copied_name]}: no such image. Pass the folder to which file_name "
                "is relative; unpack tar files first, each into a folder of its name."
            )
    (out / "images").mkdir(exist_ok=True)
    for name, path in paths.items():
        shutil.copyfile(path, out / "images" / name)
