"""Outlines of objects in the procedural domains, in a unit square.

Coordinates are (x, y) in [-1, 1], y down. An outline is the union of a list of contours, unless
its docstring names holes. Proportions vary.
"""

from __future__ import annotations

import numpy as np

from sam_gym.data.synthetic.shapes import box, ellipse, polygon, radial

_AROUND = np.linspace(0.0, 2 * np.pi, 48, endpoint=False)


def limb(x0: float, y0: float, x1: float, y1: float, w0: float, w1: float) -> np.ndarray:
    """Return a tapered bar between two points, of widths `w0` and `w1` at its ends."""
    along = np.array([x1 - x0, y1 - y0])
    side = np.array([-along[1], along[0]]) / (2 * max(float(np.hypot(*along)), 1e-6))
    start, end = np.array([x0, y0]), np.array([x1, y1])
    return np.stack([start - w0 * side, start + w0 * side, end + w1 * side, end - w1 * side])


def circle(corners: int) -> np.ndarray:
    """Return the unit circle as a polygon."""
    return radial(np.ones(corners))


def lump(rng: np.random.Generator, rough: float = 0.3, waves: int = 6) -> np.ndarray:
    """Return an irregular closed outline of about unit radius.

    Args:
        rough: how far it is from a circle.
        waves: most bumps around it.
    """
    bumps = np.arange(2, waves + 1)[:, None]
    heights = rough * rng.uniform(0, 1, bumps.shape) / np.sqrt(bumps)
    waved = heights * np.cos(bumps * _AROUND + rng.uniform(0, 2 * np.pi, bumps.shape))
    return radial(np.clip(0.75 + waved.sum(axis=0), 0.25, 1.2))


def beast(rng: np.random.Generator) -> list[np.ndarray]:
    """Return an animal from the side, with four legs or none (a fish, a slug)."""
    long, high = rng.uniform(0.5, 0.65), rng.uniform(0.22, 0.34)
    parts = [ellipse(0, 0, long, high)]
    neck = rng.uniform(-0.75, 0.1)
    head = (long + 0.22, neck)
    parts += [
        limb(long - 0.18, 0, *head, 1.2 * high, 0.7 * high),
        ellipse(head[0] + 0.06, head[1], rng.uniform(0.15, 0.22), rng.uniform(0.1, 0.15)),
    ]
    tail = rng.uniform(-0.5, 0.4)
    parts.append(limb(-long + 0.1, -0.05, -long - 0.4, tail, 0.5 * high, rng.uniform(0.04, 0.2)))
    if rng.random() < 0.75:
        foot = rng.uniform(0.65, 0.95)
        for x in (-0.75 * long, -0.45 * long, 0.45 * long, 0.75 * long):
            lean = rng.uniform(-0.15, 0.15)
            parts.append(limb(x, 0.1, x + lean, foot, 0.17, 0.1))
    if rng.random() < 0.5:
        ear = rng.uniform(0.12, 0.3)
        parts.append(limb(head[0], head[1], head[0] - 0.08, head[1] - ear - 0.08, 0.12, 0.03))
    return parts


def person(rng: np.random.Generator) -> list[np.ndarray]:
    """Return a person: head and trunk first, then two arms and two legs."""
    stride, swing = rng.uniform(0.05, 0.3), rng.uniform(-0.3, 0.3)
    hip = rng.uniform(0.02, 0.14)
    return [
        ellipse(0, -0.84, 0.115, 0.15),
        polygon((-0.2, -0.68), (0.2, -0.68), (0.15, hip + 0.08), (-0.15, hip + 0.08)),
        limb(-0.17, -0.62, -0.27 - swing / 3, 0.05, 0.13, 0.08),
        limb(0.17, -0.62, 0.27 + swing, rng.uniform(-0.2, 0.05), 0.13, 0.08),
        limb(-0.08, hip, -stride, 1.0, 0.18, 0.11),
        limb(0.08, hip, stride * rng.uniform(0.3, 1.0), 1.0, 0.18, 0.11),
    ]


def car(rng: np.random.Generator) -> list[np.ndarray]:
    """Return a car from the side: body, cabin, wheels."""
    roof, front, back = rng.uniform(-0.55, -0.4), rng.uniform(0.3, 0.5), rng.uniform(-0.9, -0.5)
    return [
        polygon((-1, -0.02), (-0.95, -0.1), (0.9, -0.05), (1, 0.1), (1, 0.32), (-1, 0.32)),
        polygon((back, -0.05), (back + 0.2, roof), (front - 0.25, roof), (front + 0.1, -0.05)),
        ellipse(-0.58, 0.32, 0.2, 0.2),
        ellipse(0.6, 0.32, 0.2, 0.2),
    ]


def wrench(rng: np.random.Generator) -> list[np.ndarray]:
    """Return a spanner: handle, ring, jaw."""
    thick = rng.uniform(0.16, 0.24)
    jaw = rng.uniform(0.22, 0.3)
    return [
        limb(-0.65, 0, 0.65, 0, thick, thick),
        ellipse(-0.75, 0, 0.25, 0.25),
        polygon(
            (0.5, -0.1), (0.7, -jaw), (1, -jaw), (1, -0.1), (0.78, -0.08), (0.78, 0.08),
            (1, 0.1), (1, jaw), (0.7, jaw), (0.5, 0.1),
        ),
    ]  # fmt: skip


def knife(rng: np.random.Generator) -> list[np.ndarray]:
    """Return a knife: handle and blade."""
    wide = rng.uniform(0.12, 0.2)
    return [
        box(-1, -0.6 * wide, -0.25, 0.6 * wide),
        polygon((-0.3, -wide), (0.75, -wide), (1, 0.3 * wide), (0.6, wide), (-0.3, wide)),
    ]


def bottle(rng: np.random.Generator) -> list[np.ndarray]:
    """Return a bottle: body, shoulder, neck, cap."""
    wide, neck = rng.uniform(0.28, 0.42), rng.uniform(0.1, 0.15)
    return [
        box(-wide, -0.3, wide, 1.0),
        polygon((-wide, -0.3), (-neck, -0.62), (neck, -0.62), (wide, -0.3)),
        box(-neck, -0.85, neck, -0.6),
        box(-1.3 * neck, -1.0, 1.3 * neck, -0.83),
    ]


def shears(rng: np.random.Generator) -> list[np.ndarray]:
    """Return scissors: two blades and two filled grips."""
    gape = rng.uniform(0.12, 0.35)
    return [
        limb(-0.35, 0.12, 1.0, -gape, 0.16, 0.03),
        limb(-0.35, -0.12, 1.0, gape, 0.16, 0.03),
        ellipse(-0.64, 0.26, 0.32, 0.2),
        ellipse(-0.64, -0.26, 0.32, 0.2),
    ]


def pistol(rng: np.random.Generator) -> list[np.ndarray]:
    """Return a pistol: barrel, grip, guard."""
    tall = rng.uniform(0.2, 0.28)
    return [
        box(-0.9, -0.5, 1.0, -0.5 + 1.6 * tall),
        limb(-0.55, -0.3, -0.78, 0.85, 0.42, 0.45),
        ellipse(-0.18, 0.02, 0.24, 0.2),
    ]


def footprint(rng: np.random.Generator) -> list[np.ndarray]:
    """Return the footprint of a house, a bar, an L, a T or a U, as overlapping bars."""
    wide, deep = rng.uniform(0.7, 1.0), rng.uniform(0.32, 0.55)
    bars = [box(-wide, -deep, wide, deep)]
    kind = rng.integers(4)
    wing = rng.uniform(0.3, 0.45)
    reach = rng.uniform(0.75, 1.1)
    if kind == 1:
        bars.append(box(-wide, -deep, -wide + 2 * wing, reach))
    elif kind == 2:
        bars.append(box(-wing, -deep, wing, reach))
    elif kind == 3:
        bars.append(box(-wide, -deep, -wide + 1.2 * wing, reach))
        bars.append(box(wide - 1.2 * wing, -deep, wide, reach))
    return bars
