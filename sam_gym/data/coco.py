"""Instance segmentation in COCO JSON."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pycocotools import mask as rle

from sam_gym.data.base import Sample, Unsplit, check_index, select_categories
from sam_gym.data.coco_records import (
    annotation_file,
    encode_segmentation,
    is_crowd,
    load_tables,
    new_id,
    numbers,
    positive_size,
    read_categories,
    record_name,
    reference,
    used_ids,
)
from sam_gym.data.io import (
    OnError,
    Records,
    Reject,
    check_all,
    check_image,
    flag,
    read_image,
    resolve,
)
from sam_gym.data.splits import seeded_part
from sam_gym.utils.registry import check_choice

#: Fraction of crowd regions above which they are reported. In COCO it is 1%; tools that write every
#: brush mask with iscrowd 1 reach much more.
MANY_CROWDS = 0.05
TABLES = ("images", "annotations", "categories")


@dataclass
class ImageRecord:
    """An image record; masks are stored as `counts` of compressed RLE, the smallest form."""

    id: int | str
    file_name: str
    path: str
    height: int
    width: int
    masks: list[bytes] = field(default_factory=list)
    categories: list[int] = field(default_factory=list)
    ignored: list[bytes] = field(default_factory=list)

    def decode(self, counts: list[bytes]) -> np.ndarray:
        """Decode masks: bool (N, height, width)."""
        size = [self.height, self.width]
        masks = rle.decode([{"size": size, "counts": c} for c in counts])
        return np.ascontiguousarray(masks.transpose(2, 0, 1)).astype(bool)


class Coco:
    """A dataset in COCO format: polygons, uncompressed RLE and compressed RLE.

    Construction validates every record of the JSON, compares it with the headers of the image files
    (about 0.1 ms each), and rasterises every selected mask to RLE (about 30 us each). Images are
    upright, see `sam_gym.data.io.read_image`. Images without a usable instance of the
    selected categories are left out. Nothing is cached.

    Polygons of fewer than 3 points are dropped and their object is kept. An object without any
    pixel or without a segmentation is skipped. Both are counted in `skipped`, with one warning. The
    pixels in the `bbox` of a skipped object are ignored.

    Args:
        split: selects `root/instances_{split}.json`, or a part of `annotations` with `split_seed`.
        root: folder of the dataset.
        annotations: path of another annotation file. **Every split is all its images**, unless
            `split_seed` is given.
        split_seed: seed that splits the images of `annotations` (80% train, 10% val, 10% test).
        images: folder of the image files in `root`; names in the JSON cannot leave it.
        categories: names to select, as a sequence or comma-separated; None: all.
        min_area: minimum area of an instance in pixels; smaller instances are ignored pixels.
        balance: "category" draws a category, then an image that contains it; "image" draws an
            image and no category.
        on_error: handling of invalid records: "raise", or "skip" to count them in `skipped`, with
            one warning. An object of which some polygons are invalid is kept without these.
        include_crowd: treat crowd regions as instances instead of ignored pixels.

    Attributes:
        name: "coco".
        categories: names that `Sample.categories` indexes: the selected ones in the order given,
            or all of the file by id; categories without instances are never drawn.
        skipped: number of skipped records and polygons, by reason.
        crowds: number of crowd regions of the selected categories that are ignored pixels; with one
            warning if they are more than 5% of the masks.
        unsplit: why every split is all images; None if they differ.

    Raises:
        FileNotFoundError: the root, the annotation file or an image file is missing.
        ValueError: the file is not COCO JSON, a record is invalid, an option or a category is
            unknown, a selected category has no instance, or no image is left.
    """

    name = "coco"

    def __init__(
        self,
        split: str = "train",
        *,
        root: str,
        annotations: str | None = None,
        split_seed: int | None = None,
        images: str = "images",
        categories: str | Sequence[str] | None = None,
        min_area: float = 0.0,
        balance: Literal["category", "image"] = "category",
        on_error: OnError = "raise",
        include_crowd: bool = False,
    ) -> None:
        check_choice("balance", balance, ("category", "image"))
        if split_seed is not None and annotations is None:
            raise ValueError(
                f"split_seed={split_seed!r} splits the file that annotations= names: pass both, or "
                "neither to read instances_train.json and instances_val.json."
            )
        path = annotations or annotation_file(root, split)
        data = load_tables(path, TABLES, "COCO instances file")
        self._file = os.path.basename(path)
        self._folder = os.path.join(root, images)
        self._balance = balance
        records = Records(self._file, on_error)

        names = read_categories(
            data["categories"], used_ids(data["annotations"], "category_id"), records
        )
        self.categories = select_categories(categories, list(names.values()))
        index_of = {name: index for index, name in enumerate(self.categories)}

        selected = {str(key) for key, name in names.items() if name in index_of}
        annotated = used_ids(data["annotations"], "image_id", selected)
        by_id = read_image_records(data["images"], self._folder, annotated, records)
        seen: set[int | str] = set()
        crowds: Counter[int] = Counter()
        for position, record in enumerate(data["annotations"]):
            usable = False
            with records.validate(_annotation_name(record, position)):
                image, category_id, crowd = _annotation(record, by_id, names, seen)
                category = index_of.get(names[category_id])
                if category is None:
                    continue
                height, width = image.height, image.width
                counts = encode_segmentation(record.get("segmentation"), height, width, records)
                area = counts and rle.area({"size": [height, width], "counts": counts})
                usable = bool(area)
                if counts is None:
                    records.skipped["no segmentation"] += 1
                elif not area:
                    records.skipped["mask covers no pixel"] += 1
                elif crowd and not include_crowd:
                    image.ignored.append(counts)
                    crowds[category] += 1
                elif area < min_area:
                    image.ignored.append(counts)
                else:
                    image.masks.append(counts)
                    image.categories.append(category)
            if not usable:
                _ignore_box(record, by_id)

        self.unsplit: Unsplit | None = None
        if split_seed is not None:
            files = [image.file_name for image in by_id.values()]
            part = seeded_part(files, split, split_seed, path)
            by_id = {key: image for key, image in by_id.items() if image.file_name in part}
        elif annotations is not None:
            self.unsplit = Unsplit(
                f"{path}: annotations= names one file for every split",
                "Leave it out and name the files instances_train.json and instances_val.json",
            )
        self._images = [image for image in by_id.values() if image.masks]
        self._holders: list[list[int]] = [[] for _ in self.categories]
        for index, image in enumerate(self._images):
            for category in set(image.categories):
                self._holders[category].append(index)
        self._drawable = [c for c, holders in enumerate(self._holders) if holders]
        self.skipped: dict[str, int] = dict(records.skipped)
        self.crowds = crowds.total()
        self._check_not_empty(categories is not None, min_area, crowds, str(records))
        instances = sum(len(image.masks) for image in self._images)
        many = self.crowds > MANY_CROWDS * (self.crowds + instances)
        records.warn(
            f"crowd regions (iscrowd=1) are ignored pixels: {self.crowds}; "
            f"{flag('include_crowd', 'True')} makes them instances"
            if many
            else ""
        )

    def __len__(self) -> int:
        return len(self._images)

    @property
    def files(self) -> list[str]:
        """Paths of the image files."""
        return [os.path.join(self._folder, image.file_name) for image in self._images]

    def __getitem__(self, index: int) -> Sample:
        """Return the image at `index` with its instances.

        `ignore` marks crowd regions and instances below `min_area` of the selected categories,
        except for pixels of kept instances, some of which lie in a crowd.

        Raises:
            IndexError: `index` is outside `range(len(self))`.
            FileNotFoundError: the image file is missing.
            ValueError: the image file is corrupt, or its size differs from the JSON.
        """
        check_index(self._file, index, len(self))
        image = self._images[index]
        record = f"image {image.id} of {self._file}"
        pixels = read_image(image.path, record, (image.height, image.width))
        height, width = pixels.shape[:2]
        if (height, width) != (image.height, image.width):
            raise ValueError(
                f"{image.path}: {record}: the file is {width} x {height} pixels, the JSON says "
                f"{image.width} x {image.height}. Restore the original file, or drop the image."
            )
        masks = image.decode(image.masks)
        ignore: np.ndarray | None = None
        if image.ignored:
            ignored = image.decode(image.ignored)
            ignore = np.logical_and(ignored.any(axis=0), ~masks.any(axis=0))
        return Sample(
            image=pixels,
            masks=masks,
            categories=np.array(image.categories, dtype=np.int64),
            source=f"{os.path.splitext(self._file)[0]}/{image.file_name}",
            ignore=ignore,
        )

    def draw(self, rng: np.random.Generator) -> tuple[int, int | None]:
        """Draw an image and, with balance="category", the category to segment.

        "category" draws uniformly among categories with instances, then uniformly among the
        images that contain it, so that rare categories are as frequent as common ones.
        """
        if self._balance == "image":
            return int(rng.integers(len(self))), None
        category = self._drawable[rng.integers(len(self._drawable))]
        holders = self._holders[category]
        return holders[rng.integers(len(holders))], category

    def _check_not_empty(
        self, selected: bool, min_area: float, crowds: Counter[int], skipped: str
    ) -> None:
        limits = f"that is not a crowd, of at least {min_area:g} pixels"
        why = f" ({skipped})" if skipped else ""
        for category, holders in enumerate(self._holders):
            if selected and not holders:
                raise ValueError(
                    f"{self._file}: category {self.categories[category]!r} has no instance "
                    f"{limits}{why}. {_crowd_remedy(crowds[category])}"
                    f"Leave it out of the categories, or lower {flag('min_area')}."
                )
        if not self._images:
            raise ValueError(
                f"{self._file}: no image has an instance {limits}{why}. "
                f"{_crowd_remedy(crowds.total())}"
                "Check that this is the annotation file you meant, with polygons or RLE."
            )


def _crowd_remedy(crowds: int) -> str:
    if not crowds:
        return ""
    option = flag("include_crowd", "True")
    return f"Crowd regions (iscrowd=1): {crowds}; {option} makes them instances. "


def _annotation_name(record: Any, position: int) -> str:
    name = record_name("annotation", record, position)
    if isinstance(record, dict) and "image_id" in record:
        name += f" of image {record['image_id']}"
    return name


def read_image_records(
    table: list[Any], folder: str, annotated: set[str], records: Records
) -> dict[int | str, ImageRecord]:
    """Return images by id, without those whose file cannot be used.

    Args:
        table: records of the images.
        folder: folder of the files.
        annotated: ids, as text, of the images whose files are checked beyond their existence.
        records: of the file.
    """
    images: dict[int | str, ImageRecord] = {}
    for position, record in enumerate(table):
        with records.validate(record_name("image", record, position)):
            image_id = new_id(record, images)
            height, width = positive_size(record, "height"), positive_size(record, "width")
            path = resolve(folder, record.get("file_name"))
            if not os.path.isfile(path):
                raise Reject("image file is missing", f"looked for {path}", FileNotFoundError)
            images[image_id] = ImageRecord(image_id, record["file_name"], path, height, width)
    read = [image for image_id, image in images.items() if str(image_id) in annotated]
    checked = check_all(lambda image: check_image(image.path, (image.height, image.width)), read)
    for image, result in zip(read, checked, strict=True):
        with records.validate(f"image {image.id}"):
            if isinstance(result, Reject):
                del images[image.id]
                raise result
    return images


def _annotation(
    record: Any,
    images: dict[int | str, ImageRecord],
    names: dict[int | str, str],
    seen: set[int | str],
) -> tuple[ImageRecord, int | str, bool]:
    """Return image, category id and crowd flag of an annotation; add its id to `seen`."""
    seen.add(new_id(record, seen))
    image_id = reference(record, "image_id", images)
    category_id = reference(record, "category_id", names)
    crowd = is_crowd(record)
    if image_id not in images:
        raise Reject("image_id is not among the images", f"got {image_id!r}")
    if category_id not in names:
        raise Reject("category_id is not among the categories", f"got {category_id!r}")
    return images[image_id], category_id, crowd


def _ignore_box(record: Any, images: dict[int | str, ImageRecord]) -> None:
    """Ignore the pixels in the box of a skipped annotation, if its image and box are known."""
    try:
        image = images.get(reference(record, "image_id", images))
        box = numbers(record.get("bbox"), "bbox")
    except Reject:
        return
    if image is None or box.shape != (4,) or not (abs(box) < 1e9).all() or (box[2:] < 0).any():
        return
    size = np.array([image.width, image.height])
    start = np.floor(box[:2])
    end = np.clip(np.maximum(np.ceil(box[:2] + box[2:]), start + 1), 0, size)
    start = np.clip(start, 0, size)
    if (start < end).all():
        (left, top), (right, bottom) = start, end
        corners = [[left, top, right, top, right, bottom, left, bottom]]
        (code,) = rle.frPyObjects(corners, image.height, image.width)
        image.ignored.append(bytes(code["counts"]))
