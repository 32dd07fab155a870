"""Procedural domains of microscopes, clinics and inspection."""

from __future__ import annotations

import cv2
import numpy as np

from sam_gym.data.synthetic.domains import looks as look
from sam_gym.data.synthetic.domains import shapes as shape
from sam_gym.data.synthetic.domains.kinds import Drawing, domain


@domain("cracks", thin=True)
def cracks(rng: np.random.Generator, size: int) -> Drawing:
    """Draw asphalt and concrete; objects are cracks, not joints or stains."""
    unit = size / 256
    rough = rng.uniform(8, 26)
    grey = rng.uniform(90, 170) + 14 * look.clouds(rng, size, 3) + rough * look.grain(rng, size)
    if rng.random() < 0.5:
        grey += 1.6 * rough * (look.blur(look.grain(rng, size), 0.8))
    for _ in range(int(rng.integers(0, 3))):
        stain = look.fill(look.pose([shape.lump(rng)], rng.uniform(0, size, 2), 50 * unit), size)
        grey *= 1 - rng.uniform(0.1, 0.3) * look.blur(stain, 5 * unit)
    if rng.random() < 0.45:
        start, angle = rng.uniform(0, size, 2), rng.uniform(0, np.pi)
        reach = 2 * size * np.array([np.cos(angle), np.sin(angle)])
        joint = np.stack([start - reach, start + reach])
        look.mix(grey, 0.6 * look.strokes([(joint, rng.uniform(3, 7) * unit)], size), 50.0)
    masks = []
    for x, y in look.places(rng, size, int(rng.integers(1, 4)), 0.3 * size, 0.15):
        angle, half = rng.uniform(0, np.pi), rng.uniform(0.3, 0.6) * size
        wobble, width = rng.uniform(0.35, 0.7), rng.uniform(2.0, 4.2) * unit
        start = np.array([x, y]) - half * np.array([np.cos(angle), np.sin(angle)])
        trunk = look.walk(rng, start, angle, 2 * half, wobble, 4 * unit, 0.08)
        lines = look.branches(rng, trunk, width, forks=(0, 4), wobble=wobble, bend=0.08)
        alpha = look.strokes(lines, size)
        strength = np.clip(0.75 + 0.25 * look.noise(rng, size, 8), 0.4, 1.0)
        look.mix(grey, look.blur(alpha, 0.6) * strength, grey.mean() * rng.uniform(0.2, 0.5))
        masks.append(alpha > 0.5)
    image = look.tint(grey, 1 + rng.normal(0, 0.03, 3))
    return look.to_uint8(image), masks


@domain("vessels", thin=True)
def vessels(rng: np.random.Generator, size: int) -> Drawing:
    """Draw a retina; an object is a blood vessel with its branches, from the optic disc on."""
    unit = size / 256
    red = 190 + 18 * look.clouds(rng, size, 2, 3) + 30 * look.ramp(rng, size) * rng.random()
    image = look.tint(red, [1.0, rng.uniform(0.42, 0.55), rng.uniform(0.16, 0.28)])
    side = rng.choice([-1, 1])
    disc = size * np.array([0.5 + side * rng.uniform(0.2, 0.32), rng.uniform(0.42, 0.58)])
    glow = look.fill([disc + rng.uniform(17, 24) * unit * shape.ellipse(0, 0, 1, 1.1)], size)
    look.mix(image, 0.8 * look.blur(glow, 2 * unit), (250, 225, 150))
    fovea = size * np.array([0.5 - side * 0.15, disc[1] / size])
    spot = look.fill([fovea + 24 * unit * shape.ellipse(0, 0, 1, 1)], size)
    look.shade(image, 1 - 0.4 * look.blur(spot, 10 * unit))
    for point in rng.uniform(0, size, (int(rng.integers(0, 14)), 2)):  # exudates
        window, dot = look.patch([point + rng.uniform(1.5, 5) * unit * shape.lump(rng)], size)
        look.mix(image[window], 0.7 * dot, (240, 210, 120))

    toward = np.pi if side > 0 else 0.0
    arcs = [toward + 0.9, toward - 0.9, toward + 2.4, toward - 2.4, toward + 0.25]
    masks, blood = [], np.zeros((size, size), np.float32)
    for number, angle in enumerate(arcs[: int(rng.integers(3, 6))]):
        curl = (-1 if number % 2 == 0 else 1) * rng.uniform(0.012, 0.03) * (number < 2)
        trunk = look.walk(
            rng,
            disc,
            angle + rng.normal(0, 0.15),
            rng.uniform(0.55, 0.85) * size,
            0.18,
            5 * unit,
            0.06,
            curl,
        )
        width = rng.uniform(2.6, 4.6) * unit
        lines = look.branches(
            rng, trunk, width, forks=(3, 4), wobble=0.25, bend=0.12, levels=2, spread=(0.4, 1.0)
        )
        alpha = look.strokes(lines, size)
        blood = np.maximum(blood, alpha * np.float32(rng.uniform(0.7, 1.1)))
        masks.append(alpha > 0.5)
    image *= 1 - look.tint(look.blur(blood, 0.7), (0.22, 0.5, 0.4))
    rim = look.fill([0.5 * size + 0.49 * size * shape.circle(90)], size)
    eye = rim > 0.5
    image += 5 * look.grain(rng, size, 3)
    look.shade(image, rim)
    return look.to_uint8(image), [mask & eye for mask in masks]


@domain("cells")
def cells(rng: np.random.Generator, size: int) -> Drawing:
    """Draw stained tissue; an object is a whole cell, not only its dark nucleus."""
    unit = size / 256
    stroma = look.clouds(rng, size, 6, 4, 0.8)
    fibres = cv2.warpAffine(
        look.noise(rng, size, 60, 8),
        cv2.getRotationMatrix2D((size / 2, size / 2), rng.uniform(0, 180), 1.5),
        (size, size),
    )
    stain = rng.uniform(0.75, 1.1)
    image = np.empty((size, size, 3), np.float32)
    image[:] = (236, 190, 216)
    image += look.tint(10 * stroma + 12 * fibres, (0.6, 1.2, 0.7))

    xs, ys = look.coordinates(size)
    nearest = np.full((size, size), np.inf, np.float32)
    owner = np.zeros((size, size), np.int32)
    clusters = rng.uniform(0.2 * size, 0.8 * size, (int(rng.integers(1, 4)), 2))
    big = rng.uniform(16, 30) * unit
    centers: list[np.ndarray] = []
    for _ in range(int(rng.integers(10, 28))):
        point = clusters[rng.integers(len(clusters))] + rng.normal(0, 2.0 * big, 2)
        inside = (point > 0.04 * size).all() and (point < 0.96 * size).all()
        if inside and all(np.hypot(*(point - other)) > big for other in centers):
            centers.append(point)
    nuclei = np.zeros((size, size), np.float32)
    for number, (x, y) in enumerate(centers, start=1):
        radius = big * rng.uniform(1.0, 1.5)
        window, body = look.patch([radius * shape.lump(rng, 0.28, 5) + (x, y)], size)
        dx, dy = xs[:, window[1]] - x, ys[window[0]] - y
        distance = np.hypot(dx, dy) / radius
        closer = (body > 0.5) & (distance < nearest[window])
        nearest[window][closer] = distance[closer]
        owner[window][closer] = number
        off = rng.normal(0, 0.2 * radius, 2)
        core = np.hypot((dx - off[0]) / rng.uniform(0.8, 1.2), dy - off[1])
        core = np.clip((rng.uniform(0.28, 0.45) * radius - core) / unit, 0, 1) * closer
        nuclei[window] = np.maximum(nuclei[window] * ~closer, core)
    plasma = owner > 0
    walls = cv2.morphologyEx(owner.astype(np.float32), cv2.MORPH_GRADIENT, np.ones((3, 3))) > 0
    shades = rng.uniform(0.5, 1.5, len(centers) + 1).astype(np.float32)[owner] * plasma
    image -= look.tint(stain * look.blur(shades, unit), (10, 34, 14))
    image -= look.tint(look.blur(walls.astype(np.float32), 0.8), (8, 26, 8))
    chromatin = 1 + 0.25 * look.noise(rng, size, size // 5)
    look.mix(image, look.blur(nuclei, 0.7) * 0.85, look.tint(chromatin, (110, 62, 140)))
    image = look.blur(image, rng.uniform(0.5, 1.1)) + 4 * look.grain(rng, size, 3)
    return look.to_uint8(image), [owner == n for n in range(1, len(centers) + 1)]


_LUGGAGE = (shape.wrench, shape.knife, shape.bottle, shape.shears, shape.pistol)


@domain("xray")
def xray(rng: np.random.Generator, size: int) -> Drawing:
    """Draw luggage in an X-ray scanner; objects overlap, and each mask is complete."""
    unit = size / 256
    metal, soft = np.array([1.5, 0.85, 0.4]), np.array([0.18, 0.55, 1.2])
    bag = look.fill(
        look.pose([shape.box(-1, -0.8, 1, 0.8)], (size / 2, size / 2), 0.47 * size), size
    )
    organic = 0.12 * bag
    for _ in range(int(rng.integers(5, 10))):  # clothes and wires are not objects
        cloth = look.pose([shape.lump(rng, 0.4)], rng.uniform(0.1, 0.9, 2) * size, 1.0)
        outline = cloth[0] + (cloth[0] - cloth[0].mean(0)) * rng.uniform(20, 60) * unit
        organic += rng.uniform(0.08, 0.3) * look.fill([outline], size)
    wires: look.Lines = []
    for _ in range(int(rng.integers(1, 5))):
        wire = look.walk(rng, rng.uniform(0, size, 2), rng.uniform(0, 7), size, 0.2, 6 * unit, 0.25)
        wires.append((wire, 1.6 * unit))
    density = look.tint(look.blur(organic, 2 * unit), soft)
    density += look.tint(0.5 * look.strokes(wires, size), metal)
    masks = []
    for _ in range(int(rng.integers(3, 7))):
        outline_of = _LUGGAGE[rng.integers(len(_LUGGAGE))]
        scale = rng.uniform(0.16, 0.34) * size
        placed = look.pose(
            outline_of(rng),
            rng.uniform(0.22, 0.78, 2) * size,
            scale,
            rng.uniform(0, 2 * np.pi),
            rng.random() < 0.5,
        )
        thick = np.zeros((size, size), np.float32)
        for part in placed:
            window, alpha = look.patch([part], size)
            thick[window] += rng.uniform(0.15, 0.75) * alpha
        if outline_of is shape.shears:  # holes of the grips
            for part in placed[2:]:
                inner = part.mean(0) + 0.65 * (part - part.mean(0))
                window, alpha = look.patch([inner], size)
                thick[window] *= 1 - alpha
        substance = soft if outline_of is shape.bottle else metal
        window, outer = look.patch(placed, size, union=True)
        density[window] += look.tint(thick[window], substance * rng.uniform(0.5, 1.2))
        masks.append(look.whole(window, outer > 0.5, size))
    image = 250 * np.exp(-look.blur(density, 0.7)) + 4 * look.grain(rng, size, 3)
    return look.to_uint8(image), masks


@domain("defects")
def defects(rng: np.random.Generator, size: int) -> Drawing:
    """Draw brushed metal and cloth; an object is a flaw: the region of its marks, with gaps."""
    unit = size / 256
    base = rng.uniform(100, 165)
    if rng.random() < 0.5:
        streaks = look.noise(rng, size, size // 2, 5) + 0.6 * look.noise(rng, size, 24, 3)
        surface = base + 9 * streaks + 4 * look.grain(rng, size)
        color = np.array([0.96, 1.0, 1.06])
    else:
        period = rng.uniform(5, 10) * unit
        phase = 2 * np.pi * np.arange(size, dtype=np.float32) / period
        sag = 0.8 * look.noise(rng, size, 4)
        weave = np.sin(phase[None] + sag) * np.sin(phase[:, None] - sag)
        surface = base + 24 * weave + 9 * look.grain(rng, size)
        color = np.array([[1.08, 1.0, 0.86], [0.86, 0.95, 1.1], [1, 1, 1]][rng.integers(3)])
    surface += 10 * look.clouds(rng, size, 2, 2) + 12 * look.ramp(rng, size)
    masks = []
    for center in look.places(rng, size, int(rng.integers(1, 4)), 0.33 * size, 0.16):
        kind, reach = rng.integers(3), rng.uniform(0.08, 0.26) * size
        sign = rng.choice([-1, 1]) * rng.uniform(22, 52)
        marks = np.zeros((size, size), np.float32)
        if kind == 0:  # a bundle of scratches
            angle = rng.uniform(0, np.pi)
            lines = []
            for _ in range(int(rng.integers(4, 9))):
                start = center + rng.normal(0, 0.35 * reach, 2)
                length = reach * rng.uniform(0.8, 1.8)
                go = np.array([np.cos(angle), np.sin(angle)]) * length / 2
                line = look.walk(
                    rng, start - go, angle + rng.normal(0, 0.12), length, 0.05, 5 * unit
                )
                lines.append((line, rng.uniform(0.8, 2.2) * unit))
            marks = look.strokes(lines, size)
        elif kind == 1:  # a cluster of pits
            pits = [
                center
                + rng.normal(0, 0.5 * reach, 2)
                + rng.uniform(1.5, 5.5) * unit * shape.lump(rng)
                for _ in range(int(rng.integers(6, 16)))
            ]
            marks = look.fill(pits, size, union=True)
        else:  # a stain with holes in it
            marks = look.fill(look.pose([shape.lump(rng, 0.45)], center, reach), size)
            marks *= np.clip(0.6 + 0.8 * look.noise(rng, size, int(4 * size / reach)), 0, 1)
        surface += sign * look.blur(marks, 0.7 * unit)
        found = cv2.findNonZero((marks > 0.3).astype(np.uint8))
        if found is None:
            continue
        region = np.zeros((size, size), np.uint8)
        cv2.fillConvexPoly(region, cv2.convexHull(found), 1)
        masks.append(region > 0)
    return look.to_uint8(look.tint(surface, color)), masks
