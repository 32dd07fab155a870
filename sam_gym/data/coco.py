"""Instance segmentation in COCO JSON."""

from __future__ import annotations

import glob
import math
import os
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pycocotools import mask as rle

from sam_gym.data.base import MissingSplit, Sample, Unsplit, check_index, select_categories
from sam_gym.data.io import (
    OnError,
    Records,
    Reject,
    check_all,
    check_image,
    flag,
    number_as_text,
    read_image,
    read_json,
    resolve,
    whole_number,
)
from sam_gym.data.splits import seeded_part
from sam_gym.utils.registry import check_choice

#: Fraction of crowd regions above which they are reported. In COCO it is 1%; tools that write every
#: brush mask with iscrowd 1 reach much more.
MANY_CROWDS = 0.05


@dataclass
class _Image:
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
        path = annotations or _annotation_file(root, split)
        data = _load(path)
        self._file = os.path.basename(path)
        self._folder = os.path.join(root, images)
        self._balance = balance
        records = Records(self._file, on_error)

        names = _categories(data["categories"], _used(data["annotations"], "category_id"), records)
        self.categories = select_categories(categories, list(names.values()))
        index_of = {name: index for index, name in enumerate(self.categories)}

        selected = {str(key) for key, name in names.items() if name in index_of}
        annotated = _used(data["annotations"], "image_id", selected)
        by_id = _images(data["images"], self._folder, annotated, records)
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
                counts = _encode(record.get("segmentation"), height, width, records)
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


def _annotation_file(root: str, split: str) -> str:
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root}: the root folder does not exist. Check the path.")
    path = os.path.join(root, f"instances_{split}.json")
    if not os.path.isfile(path):
        found = sorted(glob.glob("instances_*.json", root_dir=root))
        raise MissingSplit(
            f"{path}: no annotation file for split {split!r}. "
            f"Found: {', '.join(found) or 'no instances_*.json'}. "
            f"Choose another split, or pass the file as {flag('annotations', 'FILE')}."
        )
    return path


def _load(path: str) -> Any:
    """Load the annotation file; check for COCO's three tables."""
    data = read_json(path, "annotation file")
    for key in ("images", "annotations", "categories"):
        table = data.get(key) if isinstance(data, dict) else None
        if not isinstance(table, list):
            raise ValueError(
                f"{path}: not a COCO instances file: no list {key!r} at the top "
                f"(got {type(table).__name__!r}). Pass a file with images, annotations, categories."
            )
    return data


def _id(record: Any, key: str) -> int | str:
    if not isinstance(record, dict):
        raise Reject("record is not an object", f"got {type(record).__name__!r}")
    value = record.get(key)
    number = value if isinstance(value, str) else whole_number(value)
    if number is None:
        raise Reject(f"{key} is neither whole number nor string", f"got {value!r}")
    return number


def _new_id(record: Any, seen: Container[int | str]) -> int | str:
    value = _id(record, "id")
    if value in seen:
        raise Reject("id is taken by an earlier record", f"id {value!r}")
    return value


def _reference(record: Any, key: str, table: Container[int | str]) -> int | str:
    """Return the id in `table` to which a record refers; one may be text, the other a number."""
    value = _id(record, key)
    if value in table:
        return value
    digits = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20
    other = int(value) if digits else str(value)
    return other if other in table else value


def _record_name(kind: str, record: Any, position: int) -> str:
    has_id = isinstance(record, dict) and "id" in record
    return f"{kind} {record['id']}" if has_id else f"{kind} at position {position}"


def _annotation_name(record: Any, position: int) -> str:
    name = _record_name("annotation", record, position)
    if isinstance(record, dict) and "image_id" in record:
        name += f" of image {record['image_id']}"
    return name


def _used(annotations: list[Any], key: str, categories: set[str] | None = None) -> set[str]:
    """Return the ids of categories or images that have annotations of some categories, as text."""
    return {
        str(number_as_text(record.get(key)))
        for record in annotations
        if isinstance(record, dict)
        and (categories is None or str(number_as_text(record.get("category_id"))) in categories)
    }


def _categories(table: list[Any], used: set[str], records: Records) -> dict[int | str, str]:
    """Return category names by id, sorted by id.

    Of categories with the same name, only one may have annotations; the others are dropped. They
    group categories, as the first one of Roboflow's files.
    """
    ids: dict[str, int | str] = {}
    seen: set[int | str] = set()
    for position, record in enumerate(table):
        with records.validate(_record_name("category", record, position)):
            category_id = _new_id(record, seen)
            seen.add(category_id)
            name = number_as_text(record.get("name"))
            if not isinstance(name, str) or not name:
                raise Reject("name is not a non-empty string", f"got {name!r}")
            if name not in ids or str(ids[name]) not in used:
                ids[name] = category_id
            elif str(category_id) in used:
                raise Reject("name is taken by an earlier category", f"name {name!r}")
    names = {category_id: name for name, category_id in ids.items()}
    return dict(sorted(names.items(), key=lambda item: (isinstance(item[0], str), item[0])))


def _images(
    table: list[Any], folder: str, annotated: set[str], records: Records
) -> dict[int | str, _Image]:
    """Return images by id, without those whose file cannot be used.

    Args:
        table: records of the images.
        folder: folder of the files.
        annotated: ids, as text, of the images whose files are checked beyond their existence.
        records: of the file.
    """
    images: dict[int | str, _Image] = {}
    for position, record in enumerate(table):
        with records.validate(_record_name("image", record, position)):
            image_id = _new_id(record, images)
            height, width = _size(record, "height"), _size(record, "width")
            path = resolve(folder, record.get("file_name"))
            if not os.path.isfile(path):
                raise Reject("image file is missing", f"looked for {path}", FileNotFoundError)
            images[image_id] = _Image(image_id, record["file_name"], path, height, width)
    read = [image for image_id, image in images.items() if str(image_id) in annotated]
    checked = check_all(lambda image: check_image(image.path, (image.height, image.width)), read)
    for image, result in zip(read, checked, strict=True):
        with records.validate(f"image {image.id}"):
            if isinstance(result, Reject):
                del images[image.id]
                raise result
    return images


def _size(record: dict[str, Any], key: str) -> int:
    size = whole_number(record.get(key))
    if size is None or size <= 0:
        raise Reject(f"{key} is not a positive whole number", f"got {record.get(key)!r}")
    return size


def _missing(value: Any) -> bool:
    """Return whether a value is null, or NaN, which pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _annotation(
    record: Any, images: dict[int | str, _Image], names: dict[int | str, str], seen: set[int | str]
) -> tuple[_Image, int | str, bool]:
    """Return image, category id and crowd flag of an annotation; add its id to `seen`."""
    seen.add(_new_id(record, seen))
    image_id = _reference(record, "image_id", images)
    category_id = _reference(record, "category_id", names)
    crowd = record.get("iscrowd")
    if image_id not in images:
        raise Reject("image_id is not among the images", f"got {image_id!r}")
    if category_id not in names:
        raise Reject("category_id is not among the categories", f"got {category_id!r}")
    if not _missing(crowd) and crowd not in (0, 1, "0", "1"):
        raise Reject("iscrowd is neither 0 nor 1", f"got {crowd!r}")
    return images[image_id], category_id, crowd in (1, "1")


def _ignore_box(record: Any, images: dict[int | str, _Image]) -> None:
    """Ignore the pixels in the box of a skipped annotation, if its image and box are known."""
    try:
        image = images.get(_reference(record, "image_id", images))
        box = _numbers(record.get("bbox"), "bbox")
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


def _encode(segmentation: Any, height: int, width: int, records: Records) -> bytes | None:
    """Return the `counts` of a segmentation as compressed RLE; None without any polygon or RLE.

    The input is validated first: pycocotools silently decodes malformed input to garbage.
    """
    if not segmentation or _missing(segmentation):
        return None
    if isinstance(segmentation, dict):
        if not segmentation.get("counts", True):
            return None
        return bytes(_rle(segmentation, height, width)["counts"])
    if not isinstance(segmentation, list):
        kind = type(segmentation).__name__
        raise Reject("segmentation is neither polygon nor RLE", f"got {kind!r}")
    if isinstance(segmentation[0], dict):
        parts: Any = [_rle(part, height, width) for part in segmentation]
    else:
        # VGG Image Annotator writes one polygon without a list around it.
        if isinstance(segmentation[0], int | float):
            segmentation = [segmentation]
        parts = _polygons(segmentation, height, width, records)
        if not parts:
            return None
        parts = rle.frPyObjects(parts, height, width)
    return bytes(rle.merge(parts)["counts"])


def _rle(segmentation: Any, height: int, width: int) -> Any:
    """Return an RLE, compressed or not, as compressed RLE."""
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        kind = type(segmentation).__name__
        raise Reject("segmentation is neither polygon nor RLE", f"got {kind!r}")
    size = [height, width]
    if segmentation["size"] != size:
        raise Reject(
            "RLE size is not [height, width] of the image",
            f"got {segmentation['size']!r}, expected {size}",
        )
    runs = _runs(segmentation["counts"])
    if runs.sum() != height * width:
        raise Reject(
            "RLE counts do not sum to height x width",
            f"got {runs.sum()}, expected {height * width}",
        )
    return rle.frPyObjects({"size": size, "counts": runs}, height, width)


def _polygons(rings: list[Any], height: int, width: int, records: Records) -> list[np.ndarray]:
    """Return the valid polygons of an object.

    Polygons of fewer than 3 points are dropped, and so are invalid ones with on_error="skip" if a
    valid one remains.
    """
    polygons: list[np.ndarray] = []
    invalid: list[Reject] = []
    specks = 0
    for ring in rings:
        if _is_speck(ring):
            specks += 1
            continue
        try:
            polygons.append(_polygon(ring, height, width))
        except Reject as reject:
            if records.on_error == "raise":
                raise
            invalid.append(reject)
    if invalid and not polygons:
        raise invalid[0]
    if polygons:
        records.skipped.update(reject.reason for reject in invalid)
        if specks:
            records.skipped["polygon of fewer than 3 points"] += specks
    return polygons


def _is_speck(ring: Any) -> bool:
    """Return whether a polygon is too short to have an area, as tracing tools write it."""
    return (
        isinstance(ring, list) and len(ring) < 6 and all(isinstance(v, int | float) for v in ring)
    )


def _polygon(values: Any, height: int, width: int) -> np.ndarray:
    """Validate a polygon: float64 (2 * N,), alternating x and y, in pixels."""
    wrong = "polygon is not a list of x, y of at least 3 points"
    if not isinstance(values, list):
        raise Reject(wrong, f"got {values!r}")
    polygon = _numbers(values, "polygon")
    if len(polygon) < 6 or len(polygon) % 2:
        raise Reject(wrong, f"got {len(polygon)} numbers")
    # Points slightly outside are common. pycocotools walks along each edge, so a point far outside
    # costs unbounded memory.
    limits = np.tile([width, height], len(polygon) // 2)
    if not ((polygon >= -limits) & (polygon <= 2 * limits)).all():
        if np.isnan(polygon).any():
            raise Reject("polygon holds NaN")
        raise Reject(
            "polygon lies far outside the image",
            f"coordinates {polygon.min():g} to {polygon.max():g}, image {width} x {height}",
        )
    return polygon.astype(np.float64)


def _runs(counts: Any) -> np.ndarray:
    """Return the run lengths, int64 (N,), of uncompressed or compressed RLE counts."""
    if isinstance(counts, str):
        runs = _decompress(counts)
    elif isinstance(counts, list):
        runs = _numbers(counts, "RLE counts")
    else:
        raise Reject("RLE counts are neither list nor string", f"got {type(counts).__name__!r}")
    # The limit keeps sums within int64 and runs within pycocotools' uint32.
    if not runs.size or not ((runs >= 0) & (runs < 2**32) & (runs == np.floor(runs))).all():
        raise Reject("RLE counts are not non-negative whole numbers")
    return runs.astype(np.int64)


def _decompress(counts: str) -> np.ndarray:
    """Decode COCO's compressed RLE to run lengths: 5 bits per character, runs as differences."""
    codes = np.frombuffer(counts.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int64) - 48
    more = (codes & 32) > 0
    if not codes.size or codes.min() < 0 or codes.max() > 63 or more[-1]:
        raise Reject("RLE counts are not COCO's compressed form", f"got {counts[:40]!r}")
    ends = np.flatnonzero(~more)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:
        raise Reject("RLE counts are not COCO's compressed form", f"got {counts[:40]!r}")
    shifts = 5 * (np.arange(codes.size) - np.repeat(starts, lengths))
    runs = np.add.reduceat((codes & 31) << shifts, starts)
    runs[(codes[ends] & 16) > 0] -= 1 << 5 * lengths[(codes[ends] & 16) > 0]
    # Runs are stored as differences to the run two before, from the fourth run on.
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def _numbers(values: Any, what: str) -> np.ndarray:
    """Return a list of numbers as an array; they may be text, as pycocotools reads them too."""
    try:
        array = np.asarray(values)
        if array.dtype.kind == "U":
            array = array.astype(np.float64)
    except ValueError:
        array = np.empty(0, dtype=object)
    if array.ndim != 1 or array.dtype.kind not in "if":
        raise Reject(f"{what} holds something other than numbers")
    return array
