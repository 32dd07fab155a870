"""All masks of an image as arrays and run lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor

from sam_gym.utils.registry import check_choice

#: Formats of the mask of a record.
OUTPUTS = ("binary_mask", "uncompressed_rle", "coco_rle")


@dataclass(frozen=True)
class Masks:
    """N masks of one image.

    Attributes:
        size: (H, W) of the image.
        counts: N arrays int32, run lengths down the columns, alternating between background and
            mask, background first (COCO's uncompressed RLE).
        boxes: float32 (N, 4), first and last pixel of each mask: (x0, y0, x1, y1).
        predicted_iou: float32 (N,).
        stability: float32 (N,), IoU of the masks at a higher and a lower threshold.
        points: float32 (N, 2), the click of each mask, (x, y) in pixels of the image.
        crop_boxes: float32 (N, 4), the crop of each mask: (x0, y0, x1, y1).
        probabilities: float32 (N, number of classes).
        names: class names; empty without a class head.
    """

    size: tuple[int, int]
    counts: list[np.ndarray]
    boxes: np.ndarray
    predicted_iou: np.ndarray
    stability: np.ndarray
    points: np.ndarray
    crop_boxes: np.ndarray
    probabilities: np.ndarray
    names: tuple[str, ...] = ()

    @classmethod
    def none(cls, size: tuple[int, int], names: Sequence[str] = ()) -> Masks:
        """Return zero masks."""
        box, one = np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
        points, probabilities = (np.zeros((0, width), np.float32) for width in (2, len(names)))
        return cls(size, [], box, one, one, points, box, probabilities, tuple(names))

    @classmethod
    def joined(cls, parts: Sequence[Masks]) -> Masks:
        """Concatenate masks of one image."""
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS
        }
        counts = [own for part in parts for own in part.counts]
        return replace(parts[0], counts=counts, **arrays)

    def __len__(self) -> int:
        return len(self.counts)

    def take(self, index: np.ndarray) -> Masks:
        """Return the masks of an index, int64 (K,)."""
        arrays: dict[str, Any] = {name: getattr(self, name)[index] for name in _ARRAYS}
        return replace(self, counts=[self.counts[i].copy() for i in index], **arrays)

    @property
    def areas(self) -> np.ndarray:
        """Pixels of each mask: int64 (N,)."""
        return np.array([own[1::2].sum() for own in self.counts], np.int64)

    @property
    def classes(self) -> np.ndarray:
        """Most likely class of each mask: int64 (N,); -1 without a class head."""
        if not self.names:
            return np.full(len(self), -1)
        return self.probabilities.argmax(axis=1)

    @property
    def class_scores(self) -> np.ndarray:
        """Probability of the most likely class of each mask: float32 (N,); 0 without a head."""
        return self.probabilities.max(axis=1, initial=0.0)

    def mask(self, index: int) -> np.ndarray:
        """Decode one mask: bool (H, W)."""
        return from_counts(self.counts[index], self.size)

    def binary(self) -> np.ndarray:
        """Decode all masks: bool (N, H, W)."""
        every = np.zeros((len(self), *self.size), bool)
        for own, counts in zip(every, self.counts, strict=True):
            own[:] = from_counts(counts, self.size)
        return every

    def coco(self) -> list[dict[str, Any]]:
        """Return all masks as COCO's compressed RLE, with counts as text for JSON."""
        coded = [{"size": list(self.size), "counts": own.tolist()} for own in self.counts]
        packed = rle.frPyObjects(coded, *self.size) if coded else []
        return [{"size": p["size"], "counts": p["counts"].decode("ascii")} for p in packed]

    def placed(self, corner: tuple[int, int], size: tuple[int, int]) -> Masks:
        """Return the same masks in a larger image that contains this one.

        Args:
            corner: (x, y) of the first pixel of this image in the larger one.
            size: (H, W) of the larger image.
        """
        if size == self.size:
            return self
        offset = np.array(corner, np.float32)
        return replace(
            self,
            size=size,
            counts=[placed_counts(own, self.size, corner, size) for own in self.counts],
            boxes=self.boxes + np.tile(offset, 2),
            points=self.points + offset,
        )

    def records(self, output: str = "binary_mask") -> list[dict[str, Any]]:
        """Return one dictionary per mask, as `SamAutomaticMaskGenerator` does.

        Args:
            output: format of `segmentation`, one of `OUTPUTS`.
        """
        check_choice("output", output, OUTPUTS)
        segmentations: list[Any]
        if output == "coco_rle":
            segmentations = self.coco()
        elif output == "uncompressed_rle":
            segmentations = [
                {"size": list(self.size), "counts": own.tolist()} for own in self.counts
            ]
        else:
            segmentations = [self.mask(index) for index in range(len(self))]
        areas, classes, scores = self.areas, self.classes, self.class_scores
        records = []
        for i, segmentation in enumerate(segmentations):
            record = {
                "segmentation": segmentation,
                "area": int(areas[i]),
                "bbox": _with_extent(self.boxes[i]),
                "predicted_iou": float(self.predicted_iou[i]),
                "point_coords": [self.points[i].tolist()],
                "stability_score": float(self.stability[i]),
                "crop_box": _with_extent(self.crop_boxes[i]),
            }
            if self.names:
                record["category"] = self.names[classes[i]]
                record["category_score"] = float(scores[i])
            records.append(record)
        return records


_ARRAYS = tuple(
    field.name for field in fields(Masks) if field.name not in ("size", "counts", "names")
)


class Collected:
    """Collects masks of one image in a few growing buffers.

    Small arrays between large temporary ones would fragment the heap, and memory would grow with
    every decoder call.
    """

    def __init__(self, size: tuple[int, int], names: Sequence[str] = ()) -> None:
        self._none = Masks.none(size, names)
        self._buffers = {name: bytearray() for name in (*_ARRAYS, "counts", "lengths")}

    def add(self, masks: Masks) -> None:
        """Append masks."""
        if not len(masks):
            return
        lengths = np.array([len(own) for own in masks.counts], np.int64)
        arrays = {name: getattr(masks, name) for name in _ARRAYS}
        arrays |= {"counts": np.concatenate(masks.counts), "lengths": lengths}
        for name, array in arrays.items():
            self._buffers[name] += array.tobytes()

    def masks(self) -> Masks:
        """Return all masks."""
        lengths = np.frombuffer(self._buffers["lengths"], np.int64)
        if not len(lengths):
            return self._none
        counts = np.split(np.frombuffer(self._buffers["counts"], np.int32), lengths.cumsum()[:-1])
        arrays: dict[str, Any] = {}
        for name in _ARRAYS:
            shape = (len(lengths), *getattr(self._none, name).shape[1:])
            arrays[name] = np.frombuffer(self._buffers[name], np.float32).reshape(shape)
        return replace(self._none, counts=counts, **arrays)


def _with_extent(box: np.ndarray) -> list[int]:
    """Convert (x0, y0, x1, y1) to [x0, y0, x1 - x0, y1 - y0]."""
    return [int(v) for v in (*box[:2], *(box[2:] - box[:2]))]


def run_lengths(columns: Tensor) -> list[np.ndarray]:
    """Compute run lengths of masks on their device; only the lengths are copied to the host.

    Args:
        columns: bool (N, W, H), transposed masks.

    Returns:
        N arrays int32, as of `Masks.counts`.
    """
    flat = columns.flatten(1)
    flips = torch.empty_like(flat)
    flips[:, 0] = flat[:, 0]
    torch.ne(flat[:, 1:], flat[:, :-1], out=flips[:, 1:])
    number, length = flat.shape
    if flips.device.type == "cpu":
        # numpy finds nonzero elements several times faster than torch.
        places = np.flatnonzero(flips.numpy())
    else:
        places = flips.flatten().nonzero()[:, 0].cpu().numpy()
    bounds = np.searchsorted(places, np.arange(number + 1) * length)
    counts = []
    for index, (first, last) in enumerate(pairwise(bounds)):
        own = places[first:last] - index * length
        counts.append(np.diff(own, prepend=0, append=length).astype(np.int32))
    return counts


def to_counts(mask: np.ndarray) -> np.ndarray:
    """Return the run lengths of a mask bool (H, W), as of `Masks.counts`."""
    return run_lengths(torch.from_numpy(np.ascontiguousarray(mask.T))[None])[0]


def placed_counts(
    counts: np.ndarray, small: tuple[int, int], corner: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """Return the run lengths of a mask in a larger image that contains its own.

    Args:
        counts: as of `Masks.counts`.
        small: (h, w) of its own image.
        corner: (x, y) of the first pixel of this image in the larger one.
        size: (H, W) of the larger image.
    """
    (x, y), rows = corner, small[0]
    ends = counts.astype(np.int64).cumsum()
    starts, ends = ends[:-1:2], ends[1::2]
    starts, ends = starts[ends > starts], ends[ends > starts]
    # A run of pixels is one piece in each of its columns.
    first = starts // rows
    pieces = (ends - 1) // rows - first + 1
    run = np.repeat(np.arange(len(starts)), pieces)
    column = first[run] + np.arange(len(run)) - np.repeat(pieces.cumsum() - pieces, pieces)
    top = np.maximum(starts[run] - column * rows, 0)
    bottom = np.minimum(ends[run] - column * rows, rows)
    origin = (column + x) * size[0] + y
    return _counts_of(origin + top, origin + bottom, size[0] * size[1])


def united_counts(every: Sequence[np.ndarray]) -> np.ndarray:
    """Return the run lengths of the union of masks of one image, as of `Masks.counts`."""
    ends = [counts.astype(np.int64).cumsum() for counts in every]
    starts = np.concatenate([own[:-1:2] for own in ends])
    stops = np.concatenate([own[1::2] for own in ends])
    order = np.argsort(starts, kind="stable")
    return _counts_of(starts[order], np.maximum.accumulate(stops[order]), int(ends[0][-1]))


def _counts_of(starts: np.ndarray, ends: np.ndarray, length: int) -> np.ndarray:
    """Return run lengths int32 of runs [start, end), sorted, which may touch or overlap.

    Ends do not decrease.
    """
    begins = np.append(True, starts[1:] > ends[:-1])[: len(starts)]
    flips = np.column_stack([starts[begins], ends[np.append(begins[1:], True)[: len(ends)]]])
    places = flips.ravel()
    places = places[places < length]
    return np.diff(places, prepend=0, append=length).astype(np.int32)


def from_counts(counts: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Decode run lengths to a mask bool (H, W)."""
    inside = np.arange(len(counts)) % 2 == 1
    return cast(np.ndarray, np.repeat(inside, counts).reshape(size[::-1]).T)
