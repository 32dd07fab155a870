"""Surface materials of procedural scenes."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from functools import lru_cache, partial

import cv2
import numpy as np

#: Fills an area: `(rng, height, width) -> uint8 (height, width, 3)`.
Material = Callable[[np.random.Generator, int, int], np.ndarray]

#: Side of a pattern tile in pixels: the largest area that a material can fill.
TILE = 320

_CONTRASTS = (12.0, 35.0, 80.0)
_RAMP = np.linspace(0.0, 1.0, 256)[:, None]
_KINDS = ("clouds", "grain", "stripes", "checks", "lattice", "cells")

#: Category -> its typical hue in degrees and pattern.
LOOKS: dict[str, tuple[float, str]] = {
    "cross": (345.0, "grain"),
    "fish": (208.0, "lattice"),
    "gear": (245.0, "grain"),
    "house": (30.0, "checks"),
    "leaf": (88.0, "stripes"),
    "mug": (300.0, "stripes"),
    "mushroom": (10.0, "clouds"),
    "ring": (182.0, "cells"),
    "star": (54.0, "clouds"),
    "tree": (145.0, "cells"),
}


@lru_cache(maxsize=1)
def _pattern_tiles() -> np.ndarray:
    """Return grey patterns, from which materials are cropped: uint8 (48, 320, 320)."""
    rng = np.random.default_rng(20260101)
    ys, xs = np.mgrid[0:TILE, 0:TILE].astype(np.float32)

    def noise(cells: int) -> np.ndarray:
        grid = rng.random((cells, cells), dtype=np.float32)
        return cv2.resize(grid, (TILE, TILE), interpolation=cv2.INTER_CUBIC)

    def wave(period: float) -> np.ndarray:
        angle, bend = rng.uniform(0, np.pi), rng.uniform(0, 12)
        phase = xs * np.cos(angle) + ys * np.sin(angle) + bend * noise(6)
        return 0.5 + 0.5 * np.sin(2 * np.pi * phase / period)

    tiles = []
    for _ in range(8):
        tiles.append(sum(noise(4 * 2**k) / 2**k for k in range(5)))
        tiles.append(noise(int(rng.integers(40, 160))))
        tiles.append(wave(rng.uniform(6, 26)))
        tiles.append(
            np.sign(wave(rng.uniform(8, 30)) - 0.5) * np.sign(wave(rng.uniform(8, 30)) - 0.5)
        )
        tiles.append((wave(rng.uniform(8, 24)) * wave(rng.uniform(8, 24)) > 0.45) + 0.3 * noise(80))
        seeds = rng.integers(0, TILE, (int(rng.integers(30, 200)), 2))
        dots = np.full((TILE, TILE), 255, np.uint8)
        dots[seeds[:, 1], seeds[:, 0]] = 0
        tiles.append(np.minimum(cv2.distanceTransform(dots, cv2.DIST_L2, 3), 14.0))
    stack = np.stack(tiles).astype(np.float32)
    low = stack.min(axis=(1, 2), keepdims=True)
    high = stack.max(axis=(1, 2), keepdims=True)
    return np.round(255 * (stack - low) / (high - low)).astype(np.uint8)


def _cut(rng: np.random.Generator, height: int, width: int, kind: str | None) -> np.ndarray:
    """Crop a pattern: uint8 (height, width)."""
    tiles = _pattern_tiles()
    number = int(rng.integers(len(tiles)))
    if kind is not None:
        number = number - number % len(_KINDS) + _KINDS.index(kind)
    zoom = int(rng.integers(1, 3)) if max(height, width) <= TILE // 2 else 1
    h, w = -(-height // zoom), -(-width // zoom)
    top, left = rng.integers(0, TILE - h + 1), rng.integers(0, TILE - w + 1)
    pattern = tiles[number, top : top + h, left : left + w]
    if zoom > 1:
        return cv2.resize(pattern, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(pattern)


def _blend(pattern: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Blend two colours by a pattern: uint8 (height, width, 3)."""
    table = np.clip(first + (second - first) * _RAMP, 0, 255).astype(np.uint8)
    return cv2.applyColorMap(pattern, table[:, None])


def patterned(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return the default material: two random colours blended by a random pattern."""
    pattern = _cut(rng, height, width, None)
    vivid = rng.uniform(0.2, 1.0)
    first = vivid * rng.uniform(10, 245, 3) + (1 - vivid) * rng.uniform(20, 235)
    second = first + rng.normal(0, _CONTRASTS[rng.integers(3)], 3)
    return _blend(pattern, first, second)


def category_look(category: str, rng: np.random.Generator) -> Material | None:
    """Return the typical look of a category, or None with probability 1/3."""
    if rng.random() < 1 / 3:
        return None
    hue, kind = LOOKS[category]
    return partial(_typical, hue=(hue + rng.normal(0, 8)) / 360.0, kind=kind)


def _typical(
    rng: np.random.Generator, height: int, width: int, hue: float, kind: str
) -> np.ndarray:
    saturation, value = rng.uniform(0.4, 0.95), rng.uniform(0.45, 0.95)
    first = np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value))
    second = np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value * rng.uniform(0.5, 0.85)))
    return _blend(_cut(rng, height, width, kind), 255 * first, 255 * second)


def ground(surface: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Reduce the contrast of a surface, so that it can serve as background."""
    keep = rng.uniform(0.35, 1.0)
    mean = np.array(cv2.mean(surface)[:3])
    calm = (1 - keep) * (0.6 * mean + 0.4 * mean.mean())
    table = np.clip(keep * np.arange(256)[:, None] + calm, 0, 255)
    return cv2.LUT(surface, table.astype(np.uint8)[None])
