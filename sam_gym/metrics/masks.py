"""Metrics of masks and of clicks per object."""

from __future__ import annotations

import cv2
import numpy as np
import torch


def iou(prediction: np.ndarray, target: np.ndarray, ignore: np.ndarray | None = None) -> float:
    """Return the intersection over union of two masks; 1 if both are empty.

    Args:
        prediction: bool (H, W).
        target: bool (H, W).
        ignore: bool (H, W), pixels that do not count.
    """
    if ignore is not None:
        prediction, target = prediction & ~ignore, target & ~ignore
    union = np.count_nonzero(prediction | target)
    return np.count_nonzero(prediction & target) / union if union else 1.0


def batch_iou(
    prediction: torch.Tensor, target: torch.Tensor, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the IoU of batches of masks, as a tensor on their device; 0 where both are empty.

    Args:
        prediction: bool (..., H, W).
        target: bool (..., H, W), broadcast against `prediction`.
        valid: bool (..., H, W), pixels that count; None: all.

    Returns:
        float32 (...).
    """
    if valid is not None:
        prediction, target = prediction & valid, target & valid
    overlap = (prediction & target).sum(dim=(-2, -1))
    return overlap / (prediction | target).sum(dim=(-2, -1)).clamp(min=1)


def dice(prediction: np.ndarray, target: np.ndarray, ignore: np.ndarray | None = None) -> float:
    """Return the Dice coefficient; 1 if both masks are empty. Arguments as for `iou`."""
    overlap = iou(prediction, target, ignore)
    return 2.0 * overlap / (1.0 + overlap)


def number_of_clicks(ious: np.ndarray, threshold: float) -> np.ndarray:
    """Return NoC, the number of clicks until an IoU is reached; K if it never is.

    Args:
        ious: (N, K), IoU after each of K clicks.
        threshold: the IoU to reach, for example 0.9.

    Returns:
        int (N,), from 1 to K.
    """
    reached = np.asarray(ious) >= threshold
    return np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, reached.shape[1])


def number_of_failures(ious: np.ndarray, threshold: float) -> int:
    """Return NoF, the number of objects that never reach an IoU; `ious` is (N, K)."""
    return int((~(np.asarray(ious) >= threshold).any(axis=1)).sum())


def mean_and_ci95(values: np.ndarray) -> tuple[float, float | None]:
    """Return the mean and the half-width of its 95% confidence interval (Student's t).

    Both are rounded to four digits; a single value has no interval (None).
    """
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return round(float(values.mean()), 4), None
    half = stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / np.sqrt(len(values))
    return round(float(values.mean()), 4), round(float(half), 4)


def with_interval(mean: float, half: float | None) -> str:
    """Format a mean and the half-width of its interval, which may be None."""
    return f"{mean:.3f}" + ("" if half is None else f" ± {half:.3f}")


def boundary(mask: np.ndarray, dilation_ratio: float = 0.02) -> np.ndarray:
    """Return the pixels of a mask within a distance of its outline: bool (H, W).

    Cheng et al. 2021, "Boundary IoU": the pixels removed by an erosion of `dilation_ratio` of the
    image diagonal (at least one pixel); the border of the image counts as outline.

    Args:
        mask: bool (H, W).
        dilation_ratio: the distance, as a fraction of the diagonal.
    """
    height, width = mask.shape
    reach = max(1, round(dilation_ratio * float(np.hypot(height, width))))
    result = np.zeros_like(mask)
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    if w and h:
        # The mask is empty beyond its box, inside and outside of the image.
        window = (slice(y, y + h), slice(x, x + w))
        padded = np.pad(mask[window].astype(np.uint8), 1)
        kernel = np.ones((2 * reach + 1,) * 2, np.uint8)
        eroded = cv2.erode(padded, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
        result[window] = mask[window] & (eroded[1:-1, 1:-1] == 0)
    return result


def boundary_iou(
    prediction: np.ndarray,
    target: np.ndarray,
    ignore: np.ndarray | None = None,
    dilation_ratio: float = 0.02,
) -> float:
    """Return the IoU of the boundaries of two masks (see `boundary`); arguments as for `iou`.

    The boundary of an object no wider than twice the distance is the whole object, and its boundary
    IoU equals its IoU. Report the fraction of such objects.
    """
    if ignore is not None:
        prediction, target = prediction & ~ignore, target & ~ignore
    return iou(boundary(prediction, dilation_ratio), boundary(target, dilation_ratio))
