"""Drawing of rooms: surface coats, objects made of pieces, and the canvas.

Objects are built in metres: x to the right, y up from the base, z away from the viewer. They are
projected in parallel, from slightly above and from the side.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import cv2
import numpy as np

#: Projection of a metre of depth: up and, at `turn=1`, sideways, in metres of the image.
RISE, ASIDE = 0.38, 0.45

SUBPIXEL_BITS = 4

#: x to the right, y up, z away from the viewer, in metres.
Point = tuple[float, float, float]

#: Kind of paint -> ranges of hue, saturation and value.
PAINTS: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "wood": ((0.04, 0.11), (0.35, 0.75), (0.30, 0.82)),
    "white": ((0.05, 0.18), (0.00, 0.12), (0.84, 0.98)),
    "metal": ((0.50, 0.65), (0.00, 0.10), (0.35, 0.78)),
    "dark": ((0.00, 1.00), (0.05, 0.40), (0.10, 0.26)),
    "cloth": ((0.00, 1.00), (0.25, 0.82), (0.32, 0.92)),
    "paint": ((0.00, 1.00), (0.15, 0.70), (0.45, 0.95)),
    "clay": ((0.02, 0.09), (0.40, 0.75), (0.45, 0.80)),
    "green": ((0.22, 0.41), (0.40, 0.85), (0.26, 0.66)),
    "fur": ((0.05, 0.12), (0.25, 0.65), (0.35, 0.88)),
    "gold": ((0.10, 0.14), (0.45, 0.80), (0.60, 0.90)),
}

#: Patterns of two colours; "floor" follows the perspective of the floor.
PATTERNS = ("none", "stripes", "bands", "checks", "dots", "plaid", "bricks", "blotches", "floor")
#: Grain of a surface.
TEXTURES = ("smooth", "rough", "wood", "weave")

#: Minimum RGB distance between the coats of an object.
_CONTRAST = 95.0

_TEXTURE_OF = {"wood": 2, "cloth": 3, "fur": 1, "clay": 1, "green": 1}


@dataclass(frozen=True)
class Coat:
    """The surface of a piece.

    Attributes:
        color: float (3,), RGB.
        second: second colour of the pattern.
        pattern: index in `PATTERNS`.
        texture: index in `TEXTURES`.
        strength: strength of the texture.
    """

    color: np.ndarray
    second: np.ndarray
    pattern: int = 0
    texture: int = 0
    strength: float = 0.06


def mix_color(rng: np.random.Generator, kind: str) -> np.ndarray:
    """Draw a random colour of a kind of paint: float (3,)."""
    limits = zip(PAINTS[kind], rng.random(3).tolist(), strict=True)
    hsv = [low + (high - low) * share for (low, high), share in limits]
    return 255 * np.array(colorsys.hsv_to_rgb(*hsv))


class Build:
    """An object being built: its pieces, and their faces from back to front.

    Args:
        rng: random generator.
        turn: visible side, from -1 (left) to 1 (right).
        light: direction of the light: -1 (left) or 1 (right).
        place: location: "floor", "wall", or on "top" of another object.

    Attributes:
        faces: piece and brightness of each face, back to front.
        coats: coat of each piece.
        foot: (x0, x1, z0, z1) of the area that touches the floor.
        surface: (x0, x1, height, depth) of a surface for small objects, or None.
    """

    def __init__(self, rng: np.random.Generator, turn: float, light: float, place: str) -> None:
        self.rng, self.turn, self.light, self.place = rng, turn, light, place
        self.faces: list[tuple[int, float]] = []
        self.coats: list[Coat] = []
        self.foot: tuple[float, float, float, float] | None = None
        self.surface: tuple[float, float, float, float] | None = None
        self._mixed: list[list[float]] = []
        self._points: list[Point] = []
        self._ends: list[int] = []

    def coat(self, *kinds: str, patterned: float = 0.0) -> Coat:
        """Make a coat that contrasts with the others of this object.

        Args:
            kinds: kinds of paint; one of them is chosen.
            patterned: probability of a pattern in a second colour.
        """
        rng = self.rng
        best, best_distance, texture = np.zeros(3), -1.0, 0
        for _ in range(12):
            kind = kinds[rng.integers(len(kinds))]
            color = mix_color(rng, kind)
            # Compare with the last five coats only: a shelf has more books than colours.
            rgb = color.tolist()
            distance = min((math.dist(rgb, other) for other in self._mixed[-5:]), default=1e3)
            if distance > best_distance:
                best, best_distance, texture = color, distance, _TEXTURE_OF.get(kind, 0)
            if distance >= _CONTRAST:
                break
        self._mixed.append(best.tolist())
        pattern = int(rng.integers(1, 6)) if rng.random() < patterned else 0
        second = best if pattern == 0 else np.clip(best + rng.normal(0, 70, 3), 10, 250)
        return Coat(best, second, pattern, texture, rng.uniform(0.03, 0.12))

    def piece(self, coat: Coat) -> int:
        """Add a piece without faces; return its index."""
        self.coats.append(coat)
        return len(self.coats) - 1

    def project(self, points: Sequence[Point]) -> np.ndarray:
        """Project points (n, 3) to points (n, 2) of the image, in metres, y down."""
        return np.array(points) @ np.array([[1, 0], [0, -1], [ASIDE * self.turn, -RISE]])

    @cached_property
    def outlines(self) -> tuple[np.ndarray, list[int]]:
        """Return the projected points (n, 2) of all faces, and the end of each face in them."""
        return self.project(self._points), self._ends

    def face(self, piece: int, points: Sequence[Point], bright: float = 1.0) -> None:
        """Add a polygon to a piece, in front of all earlier ones."""
        self.faces.append((piece, bright))
        self._points += points
        self._ends.append(len(self._points))

    def flat(self, piece: int, outline: np.ndarray, bright: float = 1.0, z: float = 0.0) -> None:
        """Add a face parallel to the image: corners (x, y) (n, 2), y up."""
        self.face(piece, [(x, y, z) for x, y in outline.tolist()], bright)

    def box(
        self,
        of: Coat | int,
        x: tuple[float, float],
        y: tuple[float, float],
        z: tuple[float, float] = (0.0, 0.0),
    ) -> int:
        """Add a box as a new piece with a coat, or to a piece; return the piece."""
        piece = of if isinstance(of, int) else self.piece(of)
        (x0, x1), (y0, y1), (z0, z1) = x, y, z
        if z1 > z0:
            side = x1 if self.turn > 0 else x0
            lit = 0.9 if self.turn * self.light > 0 else 0.68
            self.face(piece, [(side, y0, z0), (side, y1, z0), (side, y1, z1), (side, y0, z1)], lit)
            self.face(piece, [(x0, y1, z0), (x1, y1, z0), (x1, y1, z1), (x0, y1, z1)], 1.14)
        self.face(piece, [(x0, y0, z0), (x1, y0, z0), (x1, y1, z0), (x0, y1, z0)], 0.96)
        return piece

    def turned(
        self,
        coat: Coat,
        x: float,
        z: float,
        profile: Sequence[tuple[float, float]],
        top: float = 1.12,
    ) -> int:
        """Add a turned piece: heights and radii from foot to top, and the top's brightness."""
        piece = self.piece(coat)
        ys, radii = np.array(profile, float).T
        arc = np.linspace(0, np.pi, 9)
        foot = np.stack([radii[0] * np.cos(arc), ys[0] - RISE * radii[0] * np.sin(arc)], axis=1)
        for start, stop, bright in self._strips():
            left = np.stack([start * radii, ys], axis=1)
            right = np.stack([stop * radii, ys], axis=1)[::-1]
            base = foot[(foot[:, 0] >= start * radii[0]) & (foot[:, 0] <= stop * radii[0])]
            self.flat(piece, np.concatenate([left, right, base]) + np.array([x, 0]), bright, z)
        self.flat(piece, oval(radii[-1], RISE * radii[-1]) + np.array([x, ys[-1]]), top, z)
        return piece

    def _strips(self) -> list[tuple[float, float, float]]:
        """Return the shading strips of a turned piece, from dark to light, back to front."""
        edges = (-1.0, -0.55, -0.1, 0.35, 0.72)
        shades = (0.66, 0.8, 0.94, 1.06, 1.0)
        if self.light > 0:
            return [(start, 1.0, bright) for start, bright in zip(edges, shades, strict=True)]
        return [(-1.0, -start, bright) for start, bright in zip(edges, shades, strict=True)]

    def soft(
        self,
        of: Coat | int,
        center: tuple[float, float, float],
        half: tuple[float, float],
        square: float = 2.0,
        angle: float = 0.0,
    ) -> int:
        """Add a soft piece, an oval (square=2) to a cushion (square=4); return the piece."""
        piece = of if isinstance(of, int) else self.piece(of)
        c, s = np.cos(angle), np.sin(angle)
        form = oval(*half, square) @ np.array([[c, s], [-s, c]])
        lift = np.array([0.13 * self.light * half[0], 0.15 * half[1]])
        for shrink, bright in ((1.0, 0.74), (0.86, 0.9), (0.68, 1.02), (0.42, 1.1)):
            outline = shrink * form + (1 - shrink) / 0.58 * lift + center[:2]
            self.flat(piece, outline, bright, center[2])
        return piece

    def stand_on(self, x: tuple[float, float], z: tuple[float, float] = (0.0, 0.0)) -> None:
        self.foot = (*x, *z)


def rectangle(x0: float, x1: float, y0: float, y1: float) -> np.ndarray:
    """Return the outline (4, 2) of a rectangle."""
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])


def oval(half_width: float, half_height: float, square: float = 2.0) -> np.ndarray:
    """Return the outline (28, 2) of an oval (square=2) or rounded rectangle (square>2)."""
    around = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    form = np.stack([np.cos(around), np.sin(around)], axis=1)
    if square != 2.0:
        form = np.sign(form) * np.abs(form) ** (2 / square)
    return form * (half_width, half_height)


def fixed_point(points: np.ndarray) -> np.ndarray:
    """Convert points in pixels to OpenCV's fixed-point numbers."""
    return np.round(points * 2**SUBPIXEL_BITS).astype(np.int32)


@lru_cache(maxsize=3)
def _tiles(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return patterns and textures to crop, uint8 (K, height + 256, width + 256) each.

    Patterns range from 0 (first colour) to 255 (second); textures are grey around 128.
    """
    rng = np.random.default_rng(20260104)
    unit = height / 256
    h, w = height + 256, width + 256
    ys, xs = np.mgrid[0:h, 0:w].astype(np.float32) / np.float32(unit)

    def noise(rows: float, columns: float) -> np.ndarray:
        grid = rng.standard_normal((max(2, int(rows)), max(2, int(columns))), dtype=np.float32)
        return cv2.resize(grid, (w, h), interpolation=cv2.INTER_CUBIC)

    def every(line: np.ndarray, period: float, share: float) -> np.ndarray:
        return (line % period < share * period).astype(np.float32)

    stripes, bands = every(xs, 11, 0.45), every(ys, 9, 0.4)
    dots = np.hypot(xs % 12 - 6, (ys + 6 * (xs // 12 % 2)) % 12 - 6) < 3.2
    bricks = np.maximum(every(ys, 10, 0.14), every(xs + 12 * (ys // 10 % 2), 24, 0.07))
    blotches = noise(h / unit / 14, w / unit / 14) > 0.3
    plaid = 0.5 * every(xs + 3, 14, 0.5) + 0.5 * every(ys, 14, 0.5)
    patterns = [
        np.zeros_like(xs),
        stripes,
        bands,
        np.abs(every(xs, 16, 0.5) - every(ys, 16, 0.5)),
        dots,
        plaid,
        bricks,
        blotches,
    ]
    waves = noise(h / unit / 30, w / unit / 90)
    textures = [
        noise(h / unit / 24, w / unit / 24),
        0.6 * noise(h / 2.5, w / 2.5) + 0.6 * noise(h / unit / 9, w / unit / 9),
        np.sin(ys * 1.1 + 6 * waves) + 0.7 * noise(h / 1.6, w / unit / 26),
        np.sin(xs * 2.2) * np.sin(ys * 2.2) + 0.7 * noise(h / 2, w / 2),
    ]
    return (
        (255 * np.stack(patterns)).astype(np.uint8),
        np.clip(128 + 45 * np.stack(textures), 0, 255).astype(np.uint8),
    )


@lru_cache(maxsize=3)
def _grain(height: int, width: int) -> np.ndarray:
    """Return unit noise to crop camera grain from: float32 (height + 128, width + 128, 3)."""
    rng = np.random.default_rng(20260105)
    return rng.standard_normal((height + 128, width + 128, 3), dtype=np.float32)


def _cut(rng: np.random.Generator, tiles: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crop each tile at a random place: (K, height, width)."""
    pieces = []
    for tile in tiles:
        top, left = (int(rng.integers(n + 1)) for n in (len(tile) - height, tile.shape[1] - width))
        pieces.append(tile[top : top + height, left : left + width])
    return np.stack(pieces)


class Canvas:
    """An image being drawn, and the visible piece of each pixel.

    Args:
        height, width: size in pixels.

    Attributes:
        image: uint8 (H, W, 3), RGB; plain coats until `develop`.
        labels: uint16 (H, W), the visible piece.
        coats: coat of each piece.
        depths: depth of each piece; greater is nearer.
    """

    def __init__(self, height: int, width: int) -> None:
        self.image = np.zeros((height, width, 3), np.uint8)
        self.labels = np.zeros((height, width), np.uint16)
        self.coats: list[Coat] = []
        self.depths: list[float] = []
        self.shadow = np.zeros((height, width), np.uint8)

    def piece(self, coat: Coat, depth: float) -> int:
        """Add a piece; return its index."""
        self.coats.append(coat)
        self.depths.append(depth)
        return len(self.coats) - 1

    def fill(self, piece: int, points: np.ndarray, bright: float = 1.0) -> None:
        """Fill a polygon (n, 2) of a piece: (x, y) in pixels, or int32 from `fixed_point`."""
        fixed = [points if points.dtype == np.int32 else fixed_point(points)]
        color = np.clip(self.coats[piece].color * bright, 0, 255).tolist()
        cv2.fillPoly(self.image, fixed, color, cv2.LINE_AA, SUBPIXEL_BITS)
        cv2.fillPoly(self.labels, fixed, piece, cv2.LINE_8, SUBPIXEL_BITS)

    def develop(
        self, rng: np.random.Generator, floor: np.ndarray, ground: int, light: float
    ) -> np.ndarray:
        """Add patterns, grain, shadow, light and camera effects; return uint8 (H, W, 3).

        Args:
            rng: random generator.
            floor: uint8 (H, W), the pattern "floor".
            ground: number of background pieces, which come first.
            light: direction of the light: -1 (left) or 1 (right).
        """
        height, width = self.labels.shape
        unit = height / 256
        flat = self.labels.ravel()
        tiles, textures = _tiles(height, width)
        patterns = np.concatenate([_cut(rng, tiles, height, width), floor[None]])
        colors = np.array([np.maximum(coat.color, 12) for coat in self.coats], np.float32)
        ratios = np.array([coat.second for coat in self.coats], np.float32) / colors
        strengths = np.array([coat.strength for coat in self.coats], np.float32)
        kinds = np.array([coat.pattern for coat in self.coats])
        grains = np.array([coat.texture for coat in self.coats])
        pixels = np.arange(flat.size)

        share = patterns.reshape(len(patterns), -1)[kinds[flat], pixels] * np.float32(1 / 255)
        cut = _cut(rng, textures, height, width).reshape(len(textures), -1)
        grain = (cut[grains[flat], pixels].astype(np.float32) - 128) * np.float32(1 / 45)
        shade = (1 + strengths[flat] * grain).reshape(height, width)
        shade *= self._occlusion(unit) * self._cast(unit, ground, light)
        shade *= self._falloff(rng, light)
        change, cast = np.minimum(ratios, 4) - 1, rng.uniform(0.9, 1.08, 3).astype(np.float32)
        # numpy's broadcasting over a last axis of three is ten times slower.
        factors = [
            shade * (cast[c] + cast[c] * (share * change[:, c][flat]).reshape(height, width))
            for c in range(3)
        ]
        image = self.image * cv2.merge(factors)
        if rng.random() < 0.35:
            image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 0.8) * unit)
        top, left = rng.integers(0, 129, 2)
        noise = _grain(height, width)[top : top + height, left : left + width]
        image += np.float32(rng.uniform(1.5, 7)) * noise
        return np.clip(image, 0, 255).astype(np.uint8)

    def _occlusion(self, unit: float) -> np.ndarray:
        """Return the occlusion at edges of nearer pieces (unsharp masking of depth): (H, W)."""
        depth = np.array(self.depths, np.float32)[self.labels]
        reach = 2 * round(4 * unit) + 1
        behind = cv2.blur(depth, (reach, reach)) - depth
        return 1 - 0.26 * np.clip(1.5 * behind, 0, 1)

    def _cast(self, unit: float, ground: int, light: float) -> np.ndarray:
        """Return the shadows of objects on floor and walls: (H, W)."""
        objects = (self.labels >= ground).astype(np.uint8) * 255
        shift = np.array([[1, 0, -9 * light * unit], [0, 1, 5 * unit]], np.float32)
        thrown = cv2.warpAffine(objects, shift, objects.shape[::-1])
        dark = cv2.blur(cv2.max(thrown // 2, self.shadow), (2 * round(4 * unit) + 1,) * 2)
        dark[self.labels >= ground] = 0
        return 1 - np.float32(0.5 / 255) * dark

    def _falloff(self, rng: np.random.Generator, light: float) -> np.ndarray:
        """Return the falloff of the light from its side and from above: (H, W)."""
        height, width = self.labels.shape
        across = light * np.linspace(-1, 1, width, dtype=np.float32)[None]
        down = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
        far = np.float32(rng.uniform(0.04, 0.2))
        return 1 + far * across - np.float32(rng.uniform(-0.05, 0.12)) * down
