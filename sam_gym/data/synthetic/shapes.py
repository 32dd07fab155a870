"""Outlines of procedural objects: each category has a few parts in a unit square.

Coordinates are (x, y) in [-1, 1], y down. A part is a list of closed contours, filled by the
even-odd rule: a contour inside another one is a hole. Proportions vary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sam_gym.utils.registry import Registry

Contours = list[np.ndarray]
Outline = Callable[[np.random.Generator], list[Contours]]

#: Category name -> outline function; drawn back to front.
SHAPES: Registry[Outline] = Registry("shape")


def ellipse(cx: float, cy: float, rx: float, ry: float, start: float = 0.0, stop: float = 360.0):
    angles = np.radians(np.linspace(start, stop, 28, endpoint=stop - start < 360.0))
    return np.stack([cx + rx * np.cos(angles), cy + ry * np.sin(angles)], axis=1)


def box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])


def polygon(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points)


def radial(radii: np.ndarray, phase: float = 0.0) -> np.ndarray:
    """Return a closed outline with the given radii at equal angles around the origin."""
    angles = phase + np.linspace(0.0, 2 * np.pi, len(radii), endpoint=False)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def blob(rng: np.random.Generator) -> list[Contours]:
    """Return a smooth shape of no category, for clutter."""
    angles = np.linspace(0.0, 2 * np.pi, 32, endpoint=False)
    radii = np.full(32, 0.8)
    for k in range(2, 5):
        radii = radii + rng.uniform(0.0, 0.3) / k * np.cos(k * angles + rng.uniform(0, 2 * np.pi))
    return [[radial(radii) * [1.0, rng.uniform(0.4, 1.0)]]]


@SHAPES.register("star")
def star(rng: np.random.Generator) -> list[Contours]:
    spikes = int(rng.integers(5, 8))
    radii = np.tile([1.0, rng.uniform(0.42, 0.55)], spikes)
    return [[radial(radii, -np.pi / 2)], [ellipse(0, 0, 0.24, 0.24)]]


@SHAPES.register("ring")
def ring(rng: np.random.Generator) -> list[Contours]:
    hole = rng.uniform(0.42, 0.58)
    gem = rng.uniform(0.2, 0.3)
    band = [ellipse(0, 0.1, 0.88, 0.88), ellipse(0, 0.1, hole, hole)]
    return [band, [polygon((-gem, -0.78), (0, -1.0), (gem, -0.78), (0, -0.5))]]


@SHAPES.register("cross")
def cross(rng: np.random.Generator) -> list[Contours]:
    thick, bar = rng.uniform(0.24, 0.34), rng.uniform(-0.35, 0.0)
    return [[box(-thick, -1.0, thick, 1.0)], [box(-0.85, bar - thick, 0.85, bar + thick)]]


@SHAPES.register("gear")
def gear(rng: np.random.Generator) -> list[Contours]:
    teeth = int(rng.integers(8, 12))
    wheel = radial(np.tile([1.0, 1.0, 0.76, 0.76], teeth))
    hole = rng.uniform(0.2, 0.3)
    return [
        [wheel, ellipse(0, 0, hole, hole)],
        [ellipse(0, 0, hole + 0.2, hole + 0.2), ellipse(0, 0, hole, hole)],
    ]


@SHAPES.register("leaf")
def leaf(rng: np.random.Generator) -> list[Contours]:
    width = rng.uniform(0.45, 0.62)
    t = np.linspace(0.0, 1.0, 20)
    half = width * np.sin(np.pi * t) ** 1.2
    left = np.stack([-half, 1.6 * t - 1.0], axis=1)
    right = np.stack([half, 1.6 * t - 1.0], axis=1)[::-1]
    stem = box(-0.08, 0.45, 0.08, 1.0)
    vein = polygon((-0.05, 0.6), (0, -0.85), (0.05, 0.6))
    return [[stem], [np.concatenate([left, right])], [vein]]


@SHAPES.register("mushroom")
def mushroom(rng: np.random.Generator) -> list[Contours]:
    stalk, brim = rng.uniform(0.2, 0.34), rng.uniform(-0.05, 0.2)
    foot = stalk + rng.uniform(0.0, 0.12)
    parts = [
        [polygon((-stalk, brim - 0.1), (stalk, brim - 0.1), (foot, 1.0), (-foot, 1.0))],
        [ellipse(0, brim, 0.98, 0.95 + brim, 180, 359.9)],
    ]
    spots = [ellipse(x, brim - 0.35 - abs(y), 0.14, 0.12) for x, y in ((-0.45, 0), (0.1, 0.2))]
    return [*parts, [*spots, ellipse(0.55, brim - 0.25, 0.12, 0.1)]]


@SHAPES.register("house")
def house(rng: np.random.Generator) -> list[Contours]:
    eaves, door = rng.uniform(-0.25, 0.0), rng.uniform(-0.4, 0.1)
    return [
        [box(-0.78, eaves, 0.78, 1.0)],
        [polygon((-1.0, eaves), (0, -1.0), (1.0, eaves))],
        [box(door, 0.4, door + 0.32, 1.0)],
        [box(0.3, eaves + 0.18, 0.6, eaves + 0.48)],
    ]


@SHAPES.register("fish")
def fish(rng: np.random.Generator) -> list[Contours]:
    height = rng.uniform(0.4, 0.6)
    return [
        [polygon((0.4, 0), (1.0, -0.5), (0.86, 0), (1.0, 0.5))],
        [polygon((-0.35, -0.8 * height), (0.1, -height - 0.3), (0.3, -0.6 * height))],
        [ellipse(-0.25, 0, 0.75, height)],
        [ellipse(-0.68, -0.1, 0.1, 0.1)],
    ]


@SHAPES.register("mug")
def mug(rng: np.random.Generator) -> list[Contours]:
    width, grip = rng.uniform(0.5, 0.62), rng.uniform(0.34, 0.44)
    handle = [ellipse(width - 0.3, 0.15, grip, 0.5), ellipse(width - 0.3, 0.15, grip - 0.18, 0.3)]
    left = [contour - [0.2, 0.0] for contour in handle]
    return [
        left,
        [polygon((-0.9, -0.7), (width - 0.4, -0.7), (width - 0.5, 0.95), (-0.8, 0.95))],
        [ellipse((width - 1.3) / 2, -0.7, (width + 0.5) / 2, 0.2)],
    ]


@SHAPES.register("tree")
def tree(rng: np.random.Generator) -> list[Contours]:
    trunk, width = rng.uniform(0.1, 0.18), rng.uniform(0.62, 0.8)
    tiers = [
        [polygon((-w, y + 0.75), (0, y), (w, y + 0.75))]
        for w, y in ((width, -0.15), (0.8 * width, -0.58), (0.58 * width, -1.0))
    ]
    return [[box(-trunk, 0.4, trunk, 1.0)], *tiers]
