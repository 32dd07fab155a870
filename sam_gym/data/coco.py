"""Instance segmentation in COCO JSON."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pycocotools import mask as rle

from sam_gym.data.base import MissingSplit, Sample, check_index, select_categories
from sam_gym.data.io import OnError, Records, Reject, read_image, read_json, resolve
from sam_gym.utils.registry import check_choice


@dataclass
class _Image:
    """An image record; masks are stored as `counts` of compressed RLE, the smallest form."""

    id: int | str
    file_name: str
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

    Construction validates every record of the JSON and rasterises every selected mask to RLE (about
    30 us each). Image files are checked when they are read. Images without a usable instance of the
    selected categories are left out. Nothing is cached.

    Args:
        split: selects `root/instances_{split}.json`; ignored if `annotations` is given.
        root: folder of the dataset.
        annotations: path of another annotation file.
        images: folder of the image files in `root`; names in the JSON cannot leave it.
        categories: names to select, as a sequence or comma-separated; None: all.
        min_area: minimum area of an instance in pixels; smaller instances are ignored pixels.
        balance: "category" draws a category, then an image that contains it; "image" draws an
            image and no category.
        on_error: handling of invalid records: "raise", or "skip" to count them in `skipped`, with
            one warning.
        include_crowd: treat crowd regions as instances instead of ignored pixels.

    Attributes:
        name: "coco".
        categories: names that `Sample.categories` indexes: the selected ones in the order given,
            or all of the file by id; categories without instances are never drawn.
        skipped: number of skipped records, by reason; includes masks that cover no pixel.

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
        images: str = "images",
        categories: str | Sequence[str] | None = None,
        min_area: float = 0.0,
        balance: Literal["category", "image"] = "category",
        on_error: OnError = "raise",
        include_crowd: bool = False,
    ) -> None:
        check_choice("balance", balance, ("category", "image"))
        path = annotations or _annotation_file(root, split)
        data = _load(path)
        self._file = os.path.basename(path)
        self._folder = os.path.join(root, images)
        self._balance = balance
        records = Records(self._file, on_error)

        names = _categories(data["categories"], records)
        self.categories = select_categories(categories, list(names.values()))
        index_of = {name: index for index, name in enumerate(self.categories)}

        by_id = _images(data["images"], self._folder, records)
        seen: set[int | str] = set()
        for position, record in enumerate(data["annotations"]):
            with records.validate(_annotation_name(record, position)):
                image, category_id, crowd = _annotation(record, by_id, names, seen)
                category = index_of.get(names[category_id])
                if category is None:
                    continue
                counts = _encode(record.get("segmentation"), image.height, image.width)
                area = rle.area({"size": [image.height, image.width], "counts": counts})
                if area == 0:
                    records.skipped["mask covers no pixel"] += 1
                elif area < min_area or (crowd and not include_crowd):
                    image.ignored.append(counts)
                else:
                    image.masks.append(counts)
                    image.categories.append(category)

        self._images = [image for image in by_id.values() if image.masks]
        self._holders: list[list[int]] = [[] for _ in self.categories]
        for index, image in enumerate(self._images):
            for category in set(image.categories):
                self._holders[category].append(index)
        self._drawable = [c for c, holders in enumerate(self._holders) if holders]
        self.skipped: dict[str, int] = dict(records.skipped)
        self._check_not_empty(selected=categories is not None, min_area=min_area)
        records.warn()

    def __len__(self) -> int:
        return len(self._images)

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
        path = os.path.join(self._folder, image.file_name)
        pixels = read_image(path, record)
        height, width = pixels.shape[:2]
        if (height, width) != (image.height, image.width):
            raise ValueError(
                f"{path}: {record}: the file is {width} x {height} pixels, the JSON says "
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

    def _check_not_empty(self, *, selected: bool, min_area: float) -> None:
        why = f" ({sum(self.skipped.values())} records were skipped)" if self.skipped else ""
        limits = f"that is not a crowd, of at least {min_area:g} pixels{why}"
        for name, holders in zip(self.categories, self._holders, strict=True):
            if selected and not holders:
                raise ValueError(
                    f"{self._file}: category {name!r} has no instance {limits}. "
                    "Leave it out of categories=, or lower min_area=."
                )
        if not self._images:
            raise ValueError(
                f"{self._file}: no image has an instance {limits}. "
                "Check that this is the annotation file you meant."
            )


def _annotation_file(root: str, split: str) -> str:
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root}: the root folder does not exist. Check root=.")
    path = os.path.join(root, f"instances_{split}.json")
    if not os.path.isfile(path):
        found = sorted(glob.glob("instances_*.json", root_dir=root))
        raise MissingSplit(
            f"{path}: no annotation file for split {split!r}. "
            f"Found: {', '.join(found) or 'no instances_*.json'}. "
            "Pass another split=, or the file as annotations=."
        )
    return path


def _load(path: str) -> Any:
    """Load the annotation file; check for COCO's three tables."""
    data = read_json(path, "annotation file", "annotations")
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
    if not isinstance(value, int | str):
        raise Reject(f"{key} is neither number nor string", f"got {value!r}")
    return value


def _new_id(record: Any, seen: Any) -> int | str:
    value = _id(record, "id")
    if value in seen:
        raise Reject("id is taken by an earlier record", f"id {value!r}")
    return value


def _record_name(kind: str, record: Any, position: int) -> str:
    has_id = isinstance(record, dict) and "id" in record
    return f"{kind} {record['id']}" if has_id else f"{kind} at position {position}"


def _annotation_name(record: Any, position: int) -> str:
    name = _record_name("annotation", record, position)
    if isinstance(record, dict) and "image_id" in record:
        name += f" of image {record['image_id']}"
    return name


def _categories(table: list[Any], records: Records) -> dict[int | str, str]:
    """Return category names by id, sorted by id."""
    names: dict[int | str, str] = {}
    for position, record in enumerate(table):
        with records.validate(_record_name("category", record, position)):
            category_id = _new_id(record, names)
            name = record.get("name")
            if not isinstance(name, str) or not name:
                raise Reject("name is not a non-empty string", f"got {name!r}")
            if name in names.values():
                raise Reject("name is taken by an earlier category", f"name {name!r}")
            names[category_id] = name
    return dict(sorted(names.items(), key=lambda item: (isinstance(item[0], str), item[0])))


def _images(table: list[Any], folder: str, records: Records) -> dict[int | str, _Image]:
    images: dict[int | str, _Image] = {}
    for position, record in enumerate(table):
        with records.validate(_record_name("image", record, position)):
            image_id = _new_id(record, images)
            for key in ("height", "width"):
                size = record.get(key)
                if not isinstance(size, int) or size <= 0:
                    raise Reject(f"{key} is not a positive whole number", f"got {size!r}")
            path = resolve(folder, record.get("file_name"))
            if not os.path.isfile(path):
                raise Reject("image file is missing", f"looked for {path}", FileNotFoundError)
            images[image_id] = _Image(
                image_id, record["file_name"], record["height"], record["width"]
            )
    return images


def _annotation(
    record: Any, images: dict[int | str, _Image], names: dict[int | str, str], seen: set[int | str]
) -> tuple[_Image, int | str, bool]:
    """Return image, category id and crowd flag of an annotation; add its id to `seen`."""
    seen.add(_new_id(record, seen))
    image_id, category_id = _id(record, "image_id"), _id(record, "category_id")
    crowd = record.get("iscrowd", 0)
    if image_id not in images:
        raise Reject("image_id is not among the images", f"got {image_id!r}")
    if category_id not in names:
        raise Reject("category_id is not among the categories", f"got {category_id!r}")
    if crowd not in (0, 1):
        raise Reject("iscrowd is neither 0 nor 1", f"got {crowd!r}")
    return images[image_id], category_id, bool(crowd)


def _encode(segmentation: Any, height: int, width: int) -> bytes:
    """Return the `counts` of a segmentation as compressed RLE.

    The input is validated first: pycocotools silently decodes malformed input to garbage.
    """
    if isinstance(segmentation, list):
        if not segmentation:
            raise Reject("segmentation has no polygon")
        polygons = [_polygon(polygon, height, width) for polygon in segmentation]
        return bytes(rle.merge(rle.frPyObjects(polygons, height, width))["counts"])
    if isinstance(segmentation, dict) and {"size", "counts"} <= segmentation.keys():
        size = segmentation["size"]
        if size != [height, width]:
            raise Reject(
                "RLE size is not [height, width] of the image",
                f"got {size!r}, expected {[height, width]}",
            )
        runs = _runs(segmentation["counts"])
        if runs.sum() != height * width:
            raise Reject(
                "RLE counts do not sum to height x width",
                f"got {runs.sum()}, expected {height * width}",
            )
        return bytes(rle.frPyObjects({"size": size, "counts": runs}, height, width)["counts"])
    raise Reject("segmentation is neither polygon nor RLE", f"got {type(segmentation).__name__!r}")


def _polygon(values: Any, height: int, width: int) -> np.ndarray:
    """Validate a polygon: float64 (2 * N,), alternating x and y, in pixels."""
    if not isinstance(values, list) or len(values) < 6 or len(values) % 2:
        got = f"{len(values)} numbers" if isinstance(values, list) else repr(values)
        raise Reject("polygon is not a list of x, y of at least 3 points", f"got {got}")
    polygon = _numbers(values, "polygon")
    # Points slightly outside are common. pycocotools walks along each edge, so a point far outside
    # costs unbounded memory. The comparison also rejects NaN.
    limits = np.tile([width, height], len(polygon) // 2)
    if not ((polygon >= -limits) & (polygon <= 2 * limits)).all():
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
    if runs.dtype.kind != "i" or not ((runs >= 0) & (runs < 2**32)).all():
        raise Reject("RLE counts are not non-negative whole numbers")
    return runs


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


def _numbers(values: list[Any], what: str) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.empty(0, dtype=object)
    if array.ndim != 1 or array.dtype.kind not in "if":
        raise Reject(f"{what} holds something other than numbers")
    return array
