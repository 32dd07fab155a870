"""Time of zero-shot segmentation against the loop of the SAM-Cityscapes code."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from segment_anything import SamPredictor

from benchmarks.semantic.zero_shot import decode_points, full_size
from benchmarks.throughput.reference import plain_sam
from sam_gym.backbones import Backbone
from sam_gym.metrics.masks import iou
from sam_gym.utils.transfer import synchronise

Points = Sequence[Sequence[tuple[int, int]]]
_SIDES = ("ours", "reference")


def compare_speed(
    backbone: Backbone, images: Sequence[np.ndarray], points: Points, batch_size: int, repeats: int
) -> dict[str, Any]:
    """Time both sides in alternation on the same images and points, with the same weights.

    The reference calls `SamPredictor.set_image` for every class, as the published code does.

    Args:
        backbone: the SAM.
        images: uint8 (H, W, 3) each, RGB.
        points: (x, y) of the points of each image.
        batch_size: images per encoder call of ours.
        repeats: of both sides; times are medians.

    Returns:
        Seconds per image of each side, their ratio, and the agreement of the masks: mean and
        minimum IoU.
    """
    predictor = SamPredictor(plain_sam(backbone))
    sides: dict[str, Callable[[], list[np.ndarray]]] = {
        "ours": lambda: _ours(backbone, images, points, batch_size),
        "reference": lambda: _reference(predictor, images, points),
    }
    seconds: dict[str, list[float]] = {side: [] for side in _SIDES}
    masks: dict[str, list[np.ndarray]] = {}
    for _ in range(repeats):
        # Alternating, so that load of the machine affects both.
        for side, segment in sides.items():
            synchronise(backbone.device)
            started = time.perf_counter()
            masks[side] = segment()
            synchronise(backbone.device)
            seconds[side].append(time.perf_counter() - started)
    same = [iou(own, other) for own, other in zip(*masks.values(), strict=True)]
    ours, reference = (float(np.median(seconds[side])) / len(images) for side in _SIDES)
    return {
        "images": len(images),
        "points": len(same),
        "repeats": repeats,
        "ours_seconds": ours,
        "reference_seconds": reference,
        "ratio": reference / ours,
        "mean_iou_of_masks": float(np.mean(same)),
        "min_iou_of_masks": float(np.min(same)),
    }


def _ours(
    backbone: Backbone, images: Sequence[np.ndarray], points: Points, batch_size: int
) -> list[np.ndarray]:
    masks: list[np.ndarray] = []
    for first in range(0, len(images), batch_size):
        batch = images[first : first + batch_size]
        logits = decode_points(backbone, batch, points[first : first + batch_size])
        for image, own in zip(batch, logits, strict=True):
            full = full_size(backbone, own, image.shape[:2])
            masks += [mask > backbone.mask_threshold for mask in full]
    return masks


def _reference(
    predictor: SamPredictor, images: Sequence[np.ndarray], points: Points
) -> list[np.ndarray]:
    masks = []
    for image, own in zip(images, points, strict=True):
        for point in own:
            predictor.set_image(image)
            found, scores, _ = predictor.predict(
                np.array([point]), np.array([1]), multimask_output=True
            )
            masks.append(found[scores.argmax()])
    return masks
