"""Where a point prompt is placed in the ground truth of an object or class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from sam_gym.simulation.clicks import interior_distance

PointName = Literal["seed", "inner", "random"]
#: bool (H, W), not empty; generator -> (x, y) in pixels.
PointRule = Callable[[np.ndarray, np.random.Generator], tuple[int, int]]


def seed_point(mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Return the point of the SAM-Cityscapes code: the maximum of scipy's distance transform.

    The transform does not know the border of the image, so many points lie on it. Of a mask that
    covers the image, scipy's maximum is the last pixel.
    """
    del rng
    if mask.all():
        return mask.shape[1] - 1, mask.shape[0] - 1
    return _maximum(interior_distance(mask, border=False))


def inner_point(mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Return the pixel that is farthest from the border of the mask and of the image."""
    del rng
    return _maximum(interior_distance(mask))


def random_point(mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Return a random pixel of the mask."""
    inside = np.flatnonzero(mask)
    return _place(int(inside[rng.integers(len(inside))]), mask.shape[1])


POINTS: dict[str, PointRule] = {"seed": seed_point, "inner": inner_point, "random": random_point}


def _maximum(distance: np.ndarray) -> tuple[int, int]:
    return _place(int(distance.argmax()), distance.shape[1])


def _place(index: int, width: int) -> tuple[int, int]:
    y, x = divmod(index, width)
    return x, y
