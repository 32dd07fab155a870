"""Records of COCO's JSON tables: ids, references, categories and segmentations."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Container, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as rle

from sam_gym.data.base import MissingSplit
from sam_gym.data.io import Records, Reject, flag, number_as_text, read_json, whole_number


def annotation_file(root: str, split: str) -> str:
    """Return the path of `root/instances_{split}.json`.

    Raises:
        FileNotFoundError: the root is missing.
        MissingSplit: the file is missing.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root}: the root folder does not exist. Check the path.")
    path = os.path.join(root, f"instances_{split}.json")
    if not os.path.isfile(path):
        found = sorted(glob.glob("*.json", root_dir=root))
        raise MissingSplit(
            f"{path}: no annotation file for split {split!r}. "
            f"Found: {', '.join(found) or 'no JSON file'}. "
            f"Choose another split, or pass the file as {flag('annotations', 'FILE')}."
        )
    return path


def load_tables(path: str, tables: Sequence[str], kind: str) -> dict[str, list[Any]]:
    """Load a JSON file that holds lists of records.

    Args:
        path: the file.
        tables: names of the lists at the top.
        kind: what the file is, for messages, for example "COCO instances file".

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is not JSON, or lacks a table.
    """
    data = read_json(path, "annotation file")
    for key in tables:
        table = data.get(key) if isinstance(data, dict) else None
        if not isinstance(table, list):
            raise ValueError(
                f"{path}: not a {kind}: no list {key!r} at the top "
                f"(got {type(table).__name__!r}). Pass a file with {', '.join(tables)}."
            )
    return data


def record_id(record: Any, key: str) -> int | str:
    """Return the id of a record under `key`; raise `Reject` for another type."""
    if not isinstance(record, dict):
        raise Reject("record is not an object", f"got {type(record).__name__!r}")
    value = record.get(key)
    number = value if isinstance(value, str) else whole_number(value)
    if number is None:
        raise Reject(f"{key} is neither whole number nor string", f"got {value!r}")
    return number


def new_id(record: Any, seen: Container[int | str]) -> int | str:
    """Return the id of a record; raise `Reject` if it is in `seen`."""
    value = record_id(record, "id")
    if value in seen:
        raise Reject("id is taken by an earlier record", f"id {value!r}")
    return value


def reference(record: Any, key: str, table: Container[int | str]) -> int | str:
    """Return the id in `table` to which a record refers; one may be text, the other a number."""
    value = record_id(record, key)
    if value in table:
        return value
    digits = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20
    other = int(value) if digits else str(value)
    return other if other in table else value


def record_name(kind: str, record: Any, position: int) -> str:
    """Name a record in messages: by its id, or by its position in the table."""
    has_id = isinstance(record, dict) and "id" in record
    return f"{kind} {record['id']}" if has_id else f"{kind} at position {position}"


def used_ids(annotations: list[Any], key: str, categories: set[str] | None = None) -> set[str]:
    """Return the ids of categories or images that have annotations of some categories, as text."""
    return {
        str(number_as_text(record.get(key)))
        for record in annotations
        if isinstance(record, dict)
        and (categories is None or str(number_as_text(record.get("category_id"))) in categories)
    }


def read_categories(table: list[Any], used: set[str], records: Records) -> dict[int | str, str]:
    """Return category names by id, sorted by id.

    Of categories with the same name, only one may have annotations; the others are dropped. They
    group categories, as the first one of Roboflow's files.
    """
    ids: dict[str, int | str] = {}
    seen: set[int | str] = set()
    for position, record in enumerate(table):
        with records.validate(record_name("category", record, position)):
            category_id = new_id(record, seen)
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


def is_crowd(record: dict[str, Any]) -> bool:
    """Return the crowd flag of an annotation; raise `Reject` if it is neither 0 nor 1."""
    crowd = record.get("iscrowd")
    if not is_missing(crowd) and crowd not in (0, 1, "0", "1"):
        raise Reject("iscrowd is neither 0 nor 1", f"got {crowd!r}")
    return crowd in (1, "1")


def positive_size(record: dict[str, Any], key: str) -> int:
    """Return a height or width; raise `Reject` if it is not a positive whole number."""
    size = whole_number(record.get(key))
    if size is None or size <= 0:
        raise Reject(f"{key} is not a positive whole number", f"got {record.get(key)!r}")
    return size


def is_missing(value: Any) -> bool:
    """Return whether a value is null, or NaN, which pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def encode_segmentation(
    segmentation: Any, height: int, width: int, records: Records
) -> bytes | None:
    """Return the `counts` of a segmentation as compressed RLE; None without any polygon or RLE.

    The input is validated first: pycocotools silently decodes malformed input to garbage.
    """
    if not segmentation or is_missing(segmentation):
        return None
    if isinstance(segmentation, dict):
        if not segmentation.get("counts", True):
            return None
        return bytes(checked_rle(segmentation, height, width)["counts"])
    if not isinstance(segmentation, list):
        kind = type(segmentation).__name__
        raise Reject("segmentation is neither polygon nor RLE", f"got {kind!r}")
    if isinstance(segmentation[0], dict):
        parts: Any = [checked_rle(part, height, width) for part in segmentation]
    else:
        # VGG Image Annotator writes one polygon without a list around it.
        if isinstance(segmentation[0], int | float):
            segmentation = [segmentation]
        parts = _polygons(segmentation, height, width, records)
        if not parts:
            return None
        parts = rle.frPyObjects(parts, height, width)
    return bytes(rle.merge(parts)["counts"])


def checked_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
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
    polygon = numbers(values, "polygon")
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
        runs = numbers(counts, "RLE counts")
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


def numbers(values: Any, what: str) -> np.ndarray:
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
