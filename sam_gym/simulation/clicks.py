"""Simulated clicks of interactive segmentation, and point grids."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np


class Click(NamedTuple):
    """A click in pixels of the image; a positive one marks the object."""

    x: int
    y: int
    positive: bool


def interior_distance(region: np.ndarray, border: bool = True) -> np.ndarray:
    """Return the L2 distance of each pixel of a region to its border or that of the image.

    Args:
        region: bool (H, W).
        border: whether the border of the image is a border of the region; without it, a region
            that covers the image is infinitely far from everything.

    Returns:
        float32 (H, W), 0 outside the region; distances up to 1,000 are correctly rounded.
    """
    padded = np.pad(region.astype(np.uint8), int(border))
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    if border:
        distance = distance[1:-1, 1:-1]
    elif region.all():
        return np.full(region.shape, np.inf, np.float32)
    # The last bit depends on where OpenCV's output lies in memory, and would choose between pixels
    # that are equally far inside. Squared distances are integers.
    np.square(distance, out=distance)
    np.rint(distance, out=distance)
    return np.sqrt(distance, out=distance)


def error_click(
    target: np.ndarray,
    prediction: np.ndarray,
    clicked: np.ndarray | None = None,
    ignore: np.ndarray | None = None,
) -> Click | None:
    """Return the standard simulated click: the innermost pixel of the wider error region.

    The larger of the maximal distances to the border decides between the false negatives
    (positive click) and the false positives (negative click); a tie is negative. The rule of
    Sofiiuk et al., "Reviving Iterative Training with Mask Guidance" (RITM, 2021), after
    Xu et al. 2016.

    Args:
        target: bool (H, W), ground truth.
        prediction: bool (H, W).
        clicked: bool (H, W), earlier clicks; never clicked twice.
        ignore: bool (H, W), pixels that do not count.

    Returns:
        The click, or None if no wrong pixel is left.
    """
    missed, extra = target & ~prediction, prediction & ~target
    if ignore is not None:
        missed, extra = missed & ~ignore, extra & ~ignore
    missed_distance, extra_distance = interior_distance(missed), interior_distance(extra)
    if clicked is not None:
        missed_distance[clicked] = 0.0
        extra_distance[clicked] = 0.0
    positive = bool(missed_distance.max() > extra_distance.max())
    distance = missed_distance if positive else extra_distance
    index = int(distance.argmax())
    if distance.flat[index] <= 0.0:
        return None
    y, x = divmod(index, target.shape[1])
    return Click(x, y, positive)


def cell_centres(
    cells: np.ndarray, columns: int, sides: tuple[float, float], dtype: type = np.float64
) -> np.ndarray:
    """Return the centres of cells of a grid that are numbered row by row.

    Args:
        cells: int64 (...), numbers of cells.
        columns: cells in a row of the grid.
        sides: (width, height) of a cell in pixels.
        dtype: of the arithmetic and the result.

    Returns:
        (..., 2), (x, y) in pixels.
    """
    row, column = np.divmod(cells, columns)
    places = np.stack([column, row], axis=-1).astype(dtype) + dtype(0.5)
    return places * np.array(sides, dtype) - dtype(0.5)


def point_grid(rows: int, columns: int, height: int, width: int) -> np.ndarray:
    """Return the cell centres of a grid: float32 (rows * columns, 2), (x, y) in pixels."""
    cells = np.arange(rows * columns)
    return cell_centres(cells, columns, (width / columns, height / rows), np.float32)


def relative_grid(columns: int, rows: int) -> np.ndarray:
    """Return the cell centres of a grid over the unit square: float64 (rows * columns, 2), (x, y).

    Rounded as segment_anything's `build_point_grid`, whose points everything mode repeats exactly.
    """
    x, y = (np.linspace(0.5 / n, 1 - 0.5 / n, n) for n in (columns, rows))
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
