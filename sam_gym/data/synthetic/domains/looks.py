"""What the procedural domains are drawn with: textures, palettes, outlines, lines, camera.

Arrays of floats are float32. Lengths are in pixels, `size` is the side of the square image.
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
    """x (1, size) and y (size, 1) of the pixels; not to be written to."""
    line = np.arange(size, dtype=np.float32)
    line.setflags(write=False)
    return line[None], line[:, None]


@lru_cache(maxsize=2)
def _grain_tiles(size: int) -> np.ndarray:
    """Unit noise that `grain` is cut from: (3, 2 * size, 2 * size)."""
    rng = np.random.default_rng(20260103)
    tiles = rng.standard_normal((3, 2 * size, 2 * size), dtype=np.float32)
    tiles.setflags(write=False)
    return tiles


def grain(rng: np.random.Generator, size: int, channels: int = 1) -> np.ndarray:
    """White noise of unit variance: (size, size), not to be written to, or (size, size, 3)."""
    # Drawing normal numbers would take a good part of the time that an image may take.
    tiles = _grain_tiles(size)
    cuts = []
    for channel in rng.permutation(3)[:channels]:
        top, left = rng.integers(0, size + 1, 2)
        cuts.append(tiles[channel, top : top + size, left : left + size])
    return cuts[0] if channels == 1 else cv2.merge(cuts)


def noise(rng: np.random.Generator, size: int, rows: int, columns: int | None = None) -> np.ndarray:
    """Smooth noise around zero, of about unit variance, with so many bumps: (size, size)."""
    grid = rng.standard_normal((rows, columns or rows), dtype=np.float32)
    return 1.3 * cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)


def clouds(
    rng: np.random.Generator, size: int, coarse: int = 4, octaves: int = 4, keep: float = 0.6
) -> np.ndarray:
    """Fractal noise around zero, of about unit variance: (size, size).

    Args:
        coarse: bumps of the first octave.
        octaves: each has twice the bumps of the one before,
        keep: and this times its strength.
    """
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        total += keep**octave * noise(rng, size, coarse * 2**octave)
    return total / np.sqrt(sum(keep ** (2 * octave) for octave in range(octaves)))


def ramp(rng: np.random.Generator, size: int) -> np.ndarray:
    """A linear slope in a random direction, -1 to 1 across the image: (size, size)."""
    angle, line = rng.uniform(0, 2 * np.pi), np.linspace(-1, 1, size, dtype=np.float32)
    return line[None] * np.float32(np.cos(angle)) + line[:, None] * np.float32(np.sin(angle))


def palette(*colors: Sequence[float]) -> np.ndarray:
    """A table uint8 (256, 3) through the given RGB colours at equal steps."""
    stops = np.linspace(0, 255, len(colors))
    channels = [np.interp(np.arange(256), stops, channel) for channel in np.transpose(colors)]
    return np.stack(channels, axis=1).astype(np.uint8)


def paint(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Look values of 0 to 255 up in a palette: uint8 (H, W, 3)."""
    return cv2.applyColorMap(to_uint8(values), table[:, None])


def tint(grey: np.ndarray, color: Sequence[float] | np.ndarray) -> np.ndarray:
    """Grey (H, W) times a colour: (H, W, 3)."""
    # numpy's broadcasting over a last axis of three is ten times slower.
    return cv2.merge([grey * np.float32(channel) for channel in color])


def shade(image: np.ndarray, factor: np.ndarray) -> None:
    """Multiply (H, W, 3) by (H, W) in place."""
    image *= cv2.merge([factor] * 3)


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Rounded down and cut off to 0..255."""
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
    """Contours of the unit square, turned, scaled and moved to `center`, (x, y) in pixels."""
    c, s = np.cos(angle), np.sin(angle)
    turn = np.array([[c, s], [-s, c]]) * scale
    if flip:
        turn = np.diag([-1.0, 1.0]) @ turn
    return [contour @ turn + np.asarray(center) for contour in contours]


def patch(
    contours: Sequence[np.ndarray], size: int, union: bool = False, margin: float = 0.0
) -> tuple[Window, np.ndarray]:
    """How much of each pixel contours cover, 0 to 1, in the window that holds them.

    Args:
        contours: (n, 2) each, (x, y) in pixels; what is beyond the image is cut off.
        size: of the image.
        union: whether overlapping contours add up; else they are holes in each other.
        margin: pixels that the window has around the contours.

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
    """`patch` on a whole image: (size, size)."""
    return whole(*patch(contours, size, union), size)


def whole(window: Window, part: np.ndarray, size: int) -> np.ndarray:
    """An image that is `part` in the window and zero elsewhere: (size, size)."""
    image = np.zeros((size, size), part.dtype)
    image[window] = part
    return image


Lines = list[tuple[np.ndarray, float]]


def strokes(lines: Lines, size: int) -> np.ndarray:
    """How much of each pixel lines cover, 0 to 1: (size, size).

    Args:
        lines: points (n, 2), (x, y) in pixels, and the width of each line.
    """
    # Widths of whole pixels would be too coarse for thin lines.
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
    """A line that wanders: points (n, 2).

    Args:
        start: its first point.
        angle: the direction in which it sets out.
        wobble: standard deviation of the direction, in radians, new at each step.
        bend: standard deviation of the change of direction at each step, which adds up.
        curl: its mean.
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
    """A line with side branches, which may have branches again; each is thinner and shorter.

    Args:
        trunk: points (n, 2); its end is the thin end.
        forks: least and most branches of a line.
        levels: how often branches branch.
        spread: least and most angle to the parent, in radians.
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
    """Lay something over a float image in place.

    Args:
        image: (H, W) or (H, W, 3).
        alpha: (H, W), how much of it to replace, 0 to 1.
        other: what is laid over it: an image, a grey value, or a colour.
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
    """Masks bool (H, W) of things drawn back to front, each hidden by those after it."""
    masks: list[np.ndarray] = []
    for alpha in reversed(alphas):
        mask = alpha > 0.5
        for nearer in masks:
            mask &= ~nearer
        masks.append(mask)
    return masks[::-1]


def shift(image: np.ndarray, dx: float, dy: float) -> np.ndarray:
    """Moved right and down; what comes in is zero."""
    matrix = np.array([[1, 0, dx], [0, 1, dy]], np.float32)
    return cv2.warpAffine(image, matrix, image.shape[1::-1])


def places(
    rng: np.random.Generator, size: int, number: int, apart: float, margin: float = 0.12
) -> np.ndarray:
    """At most `number` points (n, 2) at least `apart` pixels from each other, and off the rim."""
    chosen: list[np.ndarray] = []
    for point in rng.uniform(margin * size, (1 - margin) * size, (8 * number, 2)):
        if all(np.hypot(*(point - other)) >= apart for other in chosen):
            chosen.append(point)
            if len(chosen) == number:
                break
    return np.array(chosen)
