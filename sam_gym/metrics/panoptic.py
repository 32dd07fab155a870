"""Metrics of everything mode: masks matched with the objects of an image.

Masks and objects are COCO run-length codes (`pycocotools.mask.encode`), so that thousands of masks
of a panorama fit in memory.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sam_gym.data.coco_writer import CocoWriter, mask_annotation

#: A mask is a part if at least `PART_INSIDE` of it lies in an object of which it covers less than
#: `PART_COVERS`.
PART_INSIDE, PART_COVERS = 0.8, 0.5

#: COCO's compressed run-length code: {"size": [H, W], "counts": bytes}.
Rle = dict[str, Any]


def encoded(masks: np.ndarray) -> list[Rle]:
    """Return the run-length codes of masks, bool (N, H, W)."""
    from pycocotools import mask as coco_mask

    if not len(masks):
        return []
    columns = np.asfortranarray(np.moveaxis(masks, 0, -1).astype(np.uint8))
    return list(coco_mask.encode(columns))


@dataclass(frozen=True)
class Overlaps:
    """Intersections of M masks and N objects of an image, in pixels.

    Attributes:
        shared: float64 (M, N), area of each intersection.
        masks: float64 (M,), areas without ignored pixels.
        objects: float64 (N,), areas.
    """

    shared: np.ndarray
    masks: np.ndarray
    objects: np.ndarray

    @classmethod
    def of(
        cls, masks: Sequence[Rle], objects: Sequence[Rle], ignore: np.ndarray | None = None
    ) -> Overlaps:
        """Compute the intersections of the masks and objects of one image.

        Args:
            masks: M masks.
            objects: N objects.
            ignore: bool (H, W), pixels outside of objects that do not count, or None.
        """
        from pycocotools import mask as coco_mask

        areas = [
            np.array([coco_mask.area(rle) for rle in side], float) for side in (masks, objects)
        ]
        if not len(masks):
            return cls(np.zeros((0, len(objects))), *areas)
        left_out = [] if ignore is None else encoded(ignore[None])
        others = [*objects, *left_out]
        if not others:
            return cls(np.zeros((len(masks), 0)), *areas)
        # With iscrowd, pycocotools divides the intersection by the area of the mask alone.
        shares = coco_mask.iou(list(masks), others, [True] * len(others))
        shared = np.asarray(shares) * areas[0][:, None]
        counted = areas[0] - shared[:, len(objects) :].sum(axis=1)
        return cls(shared[:, : len(objects)], counted, areas[1])

    def take(self, index: np.ndarray) -> Overlaps:
        """Return the overlaps of some masks, int64 (K,)."""
        return replace(self, shared=self.shared[index], masks=self.masks[index])

    @property
    def iou(self) -> np.ndarray:
        """IoU of each mask with each object: float64 (M, N)."""
        union = self.masks[:, None] + self.objects[None] - self.shared
        return self.shared / np.maximum(union, 1)

    @property
    def is_part(self) -> np.ndarray:
        """Whether each mask is a part of an object: bool (M,), see `PART_INSIDE`."""
        inside = self.shared / np.maximum(self.masks[:, None], 1)
        covers = self.shared / np.maximum(self.objects[None], 1)
        return ((inside >= PART_INSIDE) & (covers < PART_COVERS)).any(axis=1)


def _pairs(ious: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Match masks and objects one to one for the maximum total IoU (K, N)."""
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(ious, maximize=True)


def matched_ious(overlaps: np.ndarray) -> np.ndarray:
    """Return the IoU of each object with its mask under the optimal one-to-one matching.

    Args:
        overlaps: float (K, N), IoU of K masks with N objects.

    Returns:
        float64 (N,), 0 where an object has no mask.
    """
    matched = np.zeros(overlaps.shape[1])
    masks, objects = _pairs(overlaps)
    matched[objects] = overlaps[masks, objects]
    return matched


@dataclass(frozen=True)
class Matched:
    """The mask of each of N objects under the one-to-one matching of maximum total IoU.

    Attributes:
        masks: int64 (N,), index of the mask; -1: none.
        iou: float64 (N,), 0 without a mask.
        accuracy: float64 (N,), fraction of the object that its mask covers (pixel accuracy).
    """

    masks: np.ndarray
    iou: np.ndarray
    accuracy: np.ndarray


def match(overlaps: Overlaps) -> Matched:
    """Match masks and objects one to one."""
    count = len(overlaps.objects)
    chosen, iou, accuracy = np.full(count, -1), np.zeros(count), np.zeros(count)
    ious = overlaps.iou
    rows, columns = _pairs(ious)
    hit = ious[rows, columns] > 0
    rows, columns = rows[hit], columns[hit]
    chosen[columns] = rows
    iou[columns] = ious[rows, columns]
    accuracy[columns] = overlaps.shared[rows, columns] / overlaps.objects[columns]
    return Matched(chosen, iou, accuracy)


def panoptic_quality(
    overlaps: Sequence[Overlaps], matches: Sequence[Matched] | None = None
) -> float:
    """Return class-agnostic PQ (Kirillov et al. 2019) over images.

    Sum of the IoU of matches above 0.5, divided by TP + FP / 2 + FN / 2. A mask with more than half
    of its pixels outside of all objects is not a false positive: that area is not annotated.

    Args:
        overlaps: of each image.
        matches: of each image (default: computed by `match`).
    """
    quality = hits = others = 0.0
    for own, found in zip(overlaps, matches or map(match, overlaps), strict=True):
        hit = found.iou > 0.5
        void = (own.shared.sum(axis=1) < 0.5 * own.masks) | (own.masks < 1)
        void[found.masks[hit]] = False
        quality += float(found.iou[hit].sum())
        hits += int(hit.sum())
        others += len(own.objects) + np.count_nonzero(~void) - 2 * int(hit.sum())
    return quality / (hits + 0.5 * others) if hits else 0.0


def mean_over_classes(values: np.ndarray, categories: np.ndarray) -> float:
    """Return the mean over classes of the mean over their objects.

    Args:
        values: float (N,), one per object.
        categories: int (N,).
    """
    return float(np.mean([values[categories == k].mean() for k in np.unique(categories)]))


def average_recall(
    masks: Sequence[Sequence[Rle]],
    scores: Sequence[np.ndarray],
    objects: Sequence[Sequence[Rle]],
    limits: Sequence[int] = (100, 1000),
) -> list[float]:
    """Return COCO's class-agnostic average recall over IoU 0.5 to 0.95, by COCOeval.

    Args:
        masks: of each image.
        scores: float (M,) of each image; masks beyond a limit are dropped by score.
        objects: of each image, at least one.
        limits: maximum numbers of masks per image, ascending.

    Returns:
        One recall per limit, in [0, 1].
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truths = CocoWriter({"object": 1})
    for image_id, own in enumerate(objects, start=1):
        annotations = (mask_annotation(rle, category="object") for rle in own)
        truths.add(image_id, "", own[0]["size"], annotations)
    found = [
        mask_annotation(rle, image_id=image_id, category_id=1, score=float(score))
        for image_id, (own, scored) in enumerate(zip(masks, scores, strict=True), start=1)
        for rle, score in zip(own, scored, strict=True)
    ]
    if not found:
        return [0.0] * len(limits)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = truths.content
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(found), "segm")
        judge.params.useCats = 0
        judge.params.maxDets = list(limits)
        judge.evaluate()
        judge.accumulate()
    recall = judge.eval["recall"]  # (IoU thresholds, classes, areas, limits)
    return [float(recall[:, 0, 0, k].mean()) for k in range(len(limits))]
