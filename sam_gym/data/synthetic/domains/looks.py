"""Drawing tools of the procedural domains: textures, palettes, outlines, lines.

Float arrays are float32. Lengths are in pixels; `size` is the side of the square image.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import cv2
import numpy as np

#: (x, y) in pixels.
Point = Sequence[float] | np.ndarray
#: Rows and columns of a part of an image.
Window = tuple[slice, slice]

_SUBPIXEL_BITS = 4


@lru_cache(maxsize=4)
def coordinates(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return read-only x (1, size) and y (size, 1) of the pixels."""
    line = np.arange(size, dtype=np.float32)
    line.setflags(write=False)
    return line[None], line[:, None]


@lru_cache(maxsize=2)
def _grain_tiles(size: int) -> np.ndarray:
    """Return unit noise, from which `grain` crops: (3, 2 * size, 2 * size)."""
    rng = np.random.default_rng(20260103)
    tiles = rng.standard_normal((3, 2 * size, 2 * size), dtype=np.float32)
    tiles.setflags(write=False)
    return tiles


def grain(rng: np.random.Generator, size: int, channels: int = 1) -> np.ndarray:
    """Return white noise of unit variance: (size, size), read-only, or (size, size, 3)."""
    # Crop precomputed noise: sampling it would take most of the time of an image.
    tiles = _grain_tiles(size)
    cuts = []
    for channel in rng.permutation(3)[:channels]:
        top, left = rng.integers(0, size + 1, 2)
        cuts.append(tiles[channel, top : top + size, left : left + size])
    return cuts[0] if channels == 1 else cv2.merge(cuts)


def noise(rng: np.random.Generator, size: int, rows: int, columns: int | None = None) -> np.ndarray:
    """Return smooth noise of about unit variance from `rows` x `columns` values: (size, size)."""
    grid = rng.standard_normal((rows, columns or rows), dtype=np.float32)
    return 1.3 * cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)


def clouds(
    rng: np.random.Generator, size: int, coarse: int = 4, octaves: int = 4, keep: float = 0.6
) -> np.ndarray:
    """Return fractal noise of about unit variance: (size, size).

    Args:
        rng: random generator.
        size: side of the image.
        coarse: rows of the first octave's noise.
        octaves: number of octaves, each with twice the rows of the one before.
        keep: amplitude of an octave relative to the one before.
    """
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        total += keep**octave * noise(rng, size, coarse * 2**octave)
    return total / np.sqrt(sum(keep ** (2 * octave) for octave in range(octaves)))


def ramp(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a linear gradient in a random direction, -1 to 1 across the image: (size, size)."""
    angle, line = rng.uniform(0, 2 * np.pi), np.linspace(-1, 1, size, dtype=np.float32)
    return line[None] * np.float32(np.cos(angle)) + line[:, None] * np.float32(np.sin(angle))


def palette(*colors: Sequence[float]) -> np.ndarray:
    """Return a colour table uint8 (256, 3) that interpolates the given RGB colours."""
    stops = np.linspace(0, 255, len(colors))
    channels = [np.interp(np.arange(256), stops, channel) for channel in np.transpose(colors)]
    return np.stack(channels, axis=1).astype(np.uint8)


def paint(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Map values of 0 to 255 to a palette: uint8 (H, W, 3)."""
    return cv2.applyColorMap(to_uint8(values), table[:, None])


def tint(grey: np.ndarray, color: Sequence[float] | np.ndarray) -> np.ndarray:
    """Multiply grey (H, W) by a colour: (H, W, 3)."""
    # numpy's broadcasting over a last axis of three is ten times slower.
    return cv2.merge([grey * np.float32(channel) for channel in color])


def shade(image: np.ndarray, factor: np.ndarray) -> None:
    """Multiply (H, W, 3) by (H, W) in place."""
    image *= cv2.merge([factor] * 3)


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Clip to 0..255 and truncate."""
    return np.clip(image, 0, 255).astype(np.uint8)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), sigma)


def pose(
    contours: Sequence[np.ndarray],
    center: Point,
    scale: float,
    angle: float = 0.0,
    flip: bool = False,
) -> list[np.ndarray]:
    """Rotate, scale and translate contours of the unit square to `center`, (x, y) in pixels."""
    c, s = np.cos(angle), np.sin(angle)
    turn = np.array([[c, s], [-s, c]]) * scale
    if flip:
        turn = np.diag([-1.0, 1.0]) @ turn
    return [contour @ turn + np.asarray(center) for contour in contours]


def patch(
    contours: Sequence[np.ndarray], size: int, union: bool = False, margin: float = 0.0
) -> tuple[Window, np.ndarray]:
    """Return the pixel coverage of contours, 0 to 1, in their bounding window.

    Args:
        contours: (n, 2) each, (x, y) in pixels; clipped to the image.
        size: side of the image.
        union: take the union of overlapping contours; else fill by the even-odd rule.
        margin: margin of the window around the contours, in pixels.

    Returns:
        The window of the image (never empty), and float32 of its shape.
    """
    points = np.concatenate(contours)
    low = np.clip(np.floor(points.min(axis=0) - margin - 1), 0, size - 1).astype(int)
    high = np.clip(np.ceil(points.max(axis=0) + margin + 2), low + 1, size).astype(int)
    alpha = np.zeros((high[1] - low[1], high[0] - low[0]), np.uint8)
    fixed = [np.round((contour - low) * 2**_SUBPIXEL_BITS).astype(np.int32) for contour in contours]
    for group in [[contour] for contour in fixed] if union else [fixed]:
        cv2.fillPoly(alpha, group, 255, cv2.LINE_AA, _SUBPIXEL_BITS)
    window = (slice(low[1], high[1]), slice(low[0], high[0]))
    return window, alpha * np.float32(1 / 255)


def fill(contours: Sequence[np.ndarray], size: int, union: bool = False) -> np.ndarray:
    """Return the pixel coverage of contours on the whole image: (size, size)."""
    return whole(*patch(contours, size, union), size)


def whole(window: Window, part: np.ndarray, size: int) -> np.ndarray:
    """Return an image that is `part` in the window and zero elsewhere: (size, size)."""
    image = np.zeros((size, size), part.dtype)
    image[window] = part
    return image


Lines = list[tuple[np.ndarray, float]]


def strokes(lines: Lines, size: int) -> np.ndarray:
    """Return the pixel coverage of lines, 0 to 1: (size, size).

    Args:
        lines: points (n, 2), (x, y) in pixels, and the width of each line.
        size: side of the image.
    """
    # Supersampled: integer widths are too coarse for thin lines.
    alpha = np.zeros((3 * size, 3 * size), np.uint8)
    for points, width in lines:
        fixed = np.round((3 * points + 1) * 2**_SUBPIXEL_BITS).astype(np.int32)
        cv2.polylines(alpha, [fixed], False, 255, max(1, round(3 * width)), shift=_SUBPIXEL_BITS)
    return cv2.resize(alpha, (size, size), interpolation=cv2.INTER_AREA) * np.float32(1 / 255)


def walk(
    rng: np.random.Generator,
    start: Point,
    angle: float,
    length: float,
    wobble: float,
    step: float = 4.0,
    bend: float = 0.0,
    curl: float = 0.0,
) -> np.ndarray:
    """Return a random walk: points (n, 2).

    Args:
        rng: random generator.
        start: first point.
        angle: initial direction, in radians.
        length: length of the line.
        wobble: standard deviation of independent noise on the direction, in radians.
        step: length of a step.
        bend: standard deviation of the cumulative change of direction per step.
        curl: mean of that change.
    """
    count = max(2, round(length / step))
    heading = angle + np.cumsum(rng.normal(curl, bend, count)) + rng.normal(0, wobble, count)
    steps = step * np.stack([np.cos(heading), np.sin(heading)], axis=1)
    return np.concatenate([[start], start + np.cumsum(steps, axis=0)])


def branches(
    rng: np.random.Generator,
    trunk: np.ndarray,
    width: float,
    *,
    forks: tuple[int, int],
    wobble: float,
    bend: float = 0.0,
    levels: int = 2,
    spread: tuple[float, float] = (0.4, 1.2),
) -> Lines:
    """Return a line with recursive side branches; each is thinner and shorter than its parent.

    Args:
        rng: random generator.
        trunk: points (n, 2) of the line, from its thick to its thin end.
        width: width at the thick end.
        forks: minimum and maximum number of branches per line.
        wobble, bend: of the branches, as in `walk`.
        levels: depth of the recursion.
        spread: minimum and maximum angle to the parent, in radians.
    """
    step = float(np.linalg.norm(trunk[1] - trunk[0]))
    cuts = np.linspace(0, len(trunk) - 1, min(2 + levels, len(trunk))).round().astype(int)
    lines: Lines = [
        (trunk[a : b + 1], width * (1 - 0.6 * a / len(trunk))) for a, b in pairwise(cuts)
    ]
    if levels == 0 or len(trunk) < 4:
        return lines
    for _ in range(int(rng.integers(forks[0], forks[1] + 1))):
        at = int(rng.integers(len(trunk) // 6, max(len(trunk) - 2, len(trunk) // 6 + 1)))
        ahead = trunk[min(at + 2, len(trunk) - 1)] - trunk[at]
        angle = np.arctan2(ahead[1], ahead[0]) + rng.choice([-1, 1]) * rng.uniform(*spread)
        length = step * len(trunk) * rng.uniform(0.25, 0.6)
        side = walk(rng, trunk[at], angle, length, wobble, step, bend)
        thinner = width * (1 - 0.45 * at / len(trunk)) * rng.uniform(0.5, 0.8)
        lines += branches(
            rng,
            side,
            thinner,
            forks=(0, forks[1] - 1) if forks[1] else (0, 0),
            wobble=wobble,
            bend=bend,
            levels=levels - 1,
            spread=spread,
        )
    return lines


def mix(image: np.ndarray, alpha: np.ndarray, other: np.ndarray | Sequence[float] | float) -> None:
    """Alpha-blend a float image with another, in place.

    Args:
        image: (H, W) or (H, W, 3).
        alpha: (H, W), weight of `other`, 0 to 1.
        other: an image, a grey value, or a colour.
    """
    if image.ndim == 2:
        image += alpha * (np.asarray(other, np.float32) - image)
        return
    image *= cv2.merge([1 - alpha] * 3)
    paint_over = np.asarray(other, np.float32)
    image += (
        tint(alpha, paint_over) if paint_over.ndim == 1 else cv2.merge([alpha] * 3) * paint_over
    )


def visible(alphas: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the visible masks bool (H, W) of objects drawn back to front."""
    masks: list[np.ndarray] = []
    for alpha in reversed(alphas):
        mask = alpha > 0.5
        for nearer in masks:
            mask &= ~nearer
        masks.append(mask)
    return masks[::-1]


def shift(image: np.ndarray, dx: float, dy: float) -> np.ndarray:
    """Translate an image right and down; fill with zeros."""
    matrix = np.array([[1, 0, dx], [0, 1, dy]], np.float32)
    return cv2.warpAffine(image, matrix, image.shape[1::-1])


def places(
    rng: np.random.Generator, size: int, number: int, apart: float, margin: float = 0.12
) -> np.ndarray:
    """Return up to `number` points (n, 2), at least `apart` pixels apart, off the margin."""
    chosen: list[np.ndarray] = []
    for point in rng.uniform(margin * size, (1 - margin) * size, (8 * number, 2)):
        if all(np.hypot(*(point - other)) >= apart for other in chosen):
            chosen.append(point)
            if len(chosen) == number:
                break
    return np.array(chosen)
