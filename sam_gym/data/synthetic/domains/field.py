"""Procedural domains of outdoor cameras and sensors."""

from __future__ import annotations

import numpy as np

from sam_gym.data.synthetic.domains import looks as look
from sam_gym.data.synthetic.domains import shapes as shape
from sam_gym.data.synthetic.domains.kinds import Drawing, domain

_EARTHS = ((58, 48, 30), (120, 104, 66), (176, 160, 116), (92, 98, 52), (46, 58, 34))


@domain("camouflage")
def camouflage(rng: np.random.Generator, size: int) -> Drawing:
    """Draw camouflaged animals; objects are the animals."""
    unit = size / 256
    _, ys = look.coordinates(size)
    coarse, keep = int(rng.integers(10, 18)), rng.uniform(0.6, 0.95)
    bands = rng.random() < 0.4
    earths = rng.permutation(_EARTHS)[:4] * rng.uniform(0.8, 1.2, (4, 1))
    table = look.palette(*sorted(earths.tolist(), key=sum))

    def pattern(bumps: int) -> np.ndarray:
        value = look.clouds(rng, size, bumps, 4, keep)
        return np.sin(3 * value + 0.08 * ys / unit) if bands else value

    image = look.paint(127 + 48 * pattern(coarse), table).astype(np.float32)
    alphas, number = [], int(rng.integers(1, 4))
    for center in look.places(rng, size, number, 0.36 * size, 0.22):
        scale = rng.uniform(0.17, 0.48 if number == 1 else 0.3) * size
        outline = shape.beast(rng) if rng.random() < 0.75 else [shape.lump(rng, 0.35)]
        placed = look.pose(outline, center, scale, rng.normal(0, 0.4), rng.random() < 0.5)
        window, alpha = look.patch(placed, size, union=True, margin=8 * unit)
        # The coat differs slightly from the ground in brightness and scale, and is shaded.
        tone = rng.uniform(16, 40) * (1 if rng.random() < 0.5 else -1)
        bumps = round(coarse * (1.6 if rng.random() < 0.5 else 0.65))
        coat = look.paint(127 + tone + 45 * pattern(bumps)[window], table).astype(np.float32)
        look.shade(coat, 0.7 + 0.42 * look.blur(alpha, scale / 9))
        shadow = look.shift(look.blur(alpha, 3 * unit), 2 * unit, 4 * unit)
        look.shade(image[window], 1 - 0.35 * shadow)
        look.mix(image[window], look.blur(alpha, 0.8), coat)
        alphas.append(look.whole(window, alpha, size))
    image += look.tint(10 * look.grain(rng, size), (1, 1, 1))
    look.shade(image, 1 + 0.15 * look.ramp(rng, size))
    return look.to_uint8(image), look.visible(alphas)


_IRON = look.palette(
    (4, 2, 20), (50, 8, 92), (130, 24, 108), (205, 58, 64), (246, 140, 22), (252, 230, 120)
)


@domain("thermal")
def thermal(rng: np.random.Generator, size: int) -> Drawing:
    """Draw a thermal image with glow and reflections; objects include their cool parts."""
    unit = size / 256
    _, ys = look.coordinates(size)
    horizon = rng.uniform(0.15, 0.5) * size
    heat = 40 + 26 * (ys > horizon) + 9 * look.clouds(rng, size, 3, 3)
    for _ in range(int(rng.integers(1, 4))):  # walls and posts warmed by the sun
        x, wide = rng.uniform(0, size), rng.uniform(5, 45) * unit
        window, wall = look.patch([shape.box(x, 0, x + wide, horizon + 0.1 * size)], size)
        heat[window] += rng.uniform(-14, 45) * wall
    alphas = []
    for depth in np.sort(rng.uniform(0.25, 0.98, int(rng.integers(2, 6)))).tolist():
        kind = int(rng.integers(3))
        scale = (0.08 + 0.2 * depth) * size * rng.uniform(0.7, 1.15)
        foot = horizon + depth * (size - horizon)
        center = (rng.uniform(0.1, 0.9) * size, foot - scale * (0.4 if kind else 1.0))
        outline = (shape.person, shape.car, shape.beast)[kind](rng)
        flip = bool(rng.random() < 0.5)
        placed = look.pose(outline, center, scale, 0.0, flip)
        window, alpha = look.patch(placed, size, union=True, margin=20 * unit)
        body = heat.copy()
        cool = rng.uniform(65, 115)  # clothes, tails, glass
        for number, part in enumerate(placed):
            warm = rng.uniform(110, 190) if number < 2 or kind == 2 else cool
            if kind == 1:
                warm = 165 if number > 1 else rng.uniform(40, 100)
            where, inside = look.patch([part], size)
            look.mix(body[where], inside, warm)
        if kind == 1:
            engine = look.pose([shape.ellipse(0.75, 0.05, 0.4, 0.2)], center, scale, 0.0, flip)
            where, inside = look.patch(engine, size, margin=20 * unit)
            body[where] += 80 * look.blur(inside, 6 * unit)
        mirrored = [contour * [1, -1] + [0, 2 * foot] for contour in placed]
        where, below = look.patch(mirrored, size, union=True, margin=15 * unit)
        heat[where] += rng.uniform(10, 30) * look.blur(below, 5 * unit)
        heat[window] += rng.uniform(10, 35) * look.blur(alpha, 7 * unit)
        look.mix(heat[window], alpha, body[window])
        alphas.append(look.whole(window, alpha, size))
    heat = look.blur(heat, rng.uniform(1.2, 2.4) * unit) + 4 * look.grain(rng, size)
    return look.paint(heat, _IRON), look.visible(alphas)


_ROOFS = ((150, 74, 54), (120, 116, 116), (86, 80, 84), (176, 160, 140), (200, 196, 190))


@domain("aerial")
def aerial(rng: np.random.Generator, size: int) -> Drawing:
    """Draw roofs from above; objects are full footprints, including parts under trees."""
    unit = size / 256
    lawn = look.clouds(rng, size, 5, 5, 0.7)
    image = look.tint(95 + 16 * lawn + 8 * look.grain(rng, size), (0.92, 1.05, 0.68))
    dirt = np.clip(0.5 + 0.8 * look.noise(rng, size, 4), 0, 1) * rng.uniform(0, 0.8)
    look.mix(image, dirt, (150, 132, 104))

    turn, plot = rng.uniform(0, np.pi), rng.uniform(62, 105) * unit
    grid = plot * np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    middle = size / 2 + rng.uniform(-0.5, 0.5, 2) * plot
    streets = [
        (np.array(ends) @ grid + middle, rng.uniform(8, 15) * unit)
        for ends in (
            [(-9, 0.5), (9, 0.5)], [(-9, -1.5), (9, -1.5)], [(-9, 2.5), (9, 2.5)],
            [(0.5, -9), (0.5, 9)],
        )
    ]  # fmt: skip
    road = look.strokes(streets, size)
    look.mix(image, road, look.tint(118 + 6 * look.grain(rng, size), (1, 1, 1.02)))

    light = rng.uniform(0, 2 * np.pi)
    sun = np.array([np.cos(light), np.sin(light)])
    cast = 5 * unit * sun
    masks, centers, taken = [], [middle], road > 0.5
    for place in np.mgrid[-3:4, -3:4].reshape(2, -1).T:
        center = (place + rng.normal(0, 0.07, 2)) @ grid + middle
        outside = (center < -10 * unit).any() or (center > size + 10 * unit).any()
        if outside or rng.random() < 0.15:
            continue
        angle = turn + rng.integers(4) * np.pi / 2 + rng.normal(0, 0.05)
        bars = look.pose(shape.footprint(rng), center, plot * rng.uniform(0.26, 0.4), angle)
        window, roof = look.patch(bars, size, union=True, margin=8 * unit)
        inside = roof > 0.5
        if np.count_nonzero(inside & taken[window]) > 0.03 * np.count_nonzero(inside):
            continue
        taken[window] |= inside
        look.shade(image[window], 1 - 0.5 * look.blur(look.shift(roof, *cast), unit))
        color = np.array(_ROOFS[rng.integers(len(_ROOFS))]) * rng.uniform(0.8, 1.15)
        for bar in bars:
            _gable(image, bar, color, sun)
        masks.append(look.whole(window, inside, size))
        centers.append(center)

    leaves = look.tint(70 + 25 * lawn, (0.75, 1.15, 0.6))
    points = rng.uniform(0, size, (int(rng.integers(5, 14)), 2))
    beside = np.array(centers) + rng.normal(0, 0.28 * plot, (len(centers), 2))
    for point in np.concatenate([points, beside]):
        radius = rng.uniform(5, 14) * unit
        crown = [point + radius * shape.lump(rng, 0.25)]
        window, tree = look.patch(crown, size, margin=6 * unit)
        look.shade(image[window], 1 - 0.45 * look.shift(tree, *cast))
        look.mix(image[window], tree, leaves[window] * rng.uniform(0.7, 1.1))
    image = look.blur(image, rng.uniform(0.4, 0.9)) + 5 * look.grain(rng, size, 3)
    return look.to_uint8(image), masks


def _gable(image: np.ndarray, bar: np.ndarray, color: np.ndarray, sun: np.ndarray) -> None:
    """Draw a gable roof on the rectangle `bar` (4, 2), with one slope in the light."""
    edges = np.roll(bar, -1, axis=0) - bar
    a, b, c, d = np.roll(bar, -int(np.argmin(np.hypot(*edges.T))), axis=0)
    start, end = (a + b) / 2, (c + d) / 2
    lit = 0.3 * float((b - a) @ sun) / max(float(np.hypot(*(b - a))), 1e-6)
    for corners, light in (((a, start, end, d), 1 + lit), ((start, b, c, end), 1 - lit)):
        window, slope = look.patch([np.stack(corners)], image.shape[0])
        look.mix(image[window], slope, color * light)


@domain("night")
def night(rng: np.random.Generator, size: int) -> Drawing:
    """Draw a street at night, lit from one side; objects include their dark sides."""
    unit = size / 256
    xs, ys = look.coordinates(size)
    horizon = rng.uniform(0.3, 0.5) * size
    scene = 30 + 14 * (ys > horizon) + 7 * look.clouds(rng, size, 4)
    for _ in range(int(rng.integers(1, 4))):
        x, top = rng.uniform(-0.1, 1) * size, rng.uniform(0, 0.3) * size
        wall = [shape.box(x, top, x + rng.uniform(25, 80) * unit, horizon)]
        window, alpha = look.patch(wall, size)
        look.mix(scene[window], alpha, rng.uniform(22, 44))

    lamp_x, lamp_y = rng.uniform(0.05, 0.95) * size, rng.uniform(0.02, 0.3) * size
    from_lamp = np.hypot(xs - lamp_x, ys - lamp_y)
    near = np.exp(-from_lamp / (rng.uniform(0.25, 0.5) * size))
    glare = 260 * np.exp(-from_lamp / (10 * unit))
    glare += 60 * near * np.exp(-np.abs(ys - lamp_y) / (1.5 * unit))
    alphas = []
    for depth in np.sort(rng.uniform(0.2, 0.97, int(rng.integers(2, 6)))).tolist():
        kind = int(rng.integers(3))
        scale = (0.1 + 0.2 * depth) * size * rng.uniform(0.8, 1.1)
        foot = horizon + depth * (size - horizon)
        x, y = rng.uniform(0.1, 0.9) * size, foot - scale * (0.5 if kind else 0.98)
        outline = (shape.person, shape.car, shape.beast)[kind](rng)
        placed = look.pose(outline, (x, y), scale, 0.0, rng.random() < 0.5)
        window, alpha = look.patch(placed, size, union=True, margin=0.25 * scale)
        albedo = np.full((size, size), rng.uniform(12, 90), np.float32)
        for part in placed[1:]:
            where, patch = look.patch([part], size)
            look.mix(albedo[where], 0.6 * patch, rng.uniform(8, 90))
        shadow = look.blur(look.shift(alpha, 0, 0.12 * scale), 4 * unit)
        scene[window] *= 1 - 0.25 * shadow
        # The far side of a body fades into the background.
        slope = (1.3 if lamp_x > x else -1.3) / scale
        facing = np.clip(0.55 + slope * (xs[:, window[1]] - x), 0, 1)
        body = albedo[window] * (0.15 + 1.1 * facing)
        look.mix(scene[window], alpha * (0.55 + 0.45 * facing), body)
        if kind == 1:
            beam = (x + rng.choice([-0.95, 0.95]).item() * scale, y + 0.08 * scale)
            reach = rng.uniform(4, 11) * unit
            halo = np.exp(-np.hypot(xs - beam[0], ys - beam[1]) / reach)
            glare += rng.uniform(120, 320) * halo
        alphas.append(look.whole(window, alpha, size))
    scene *= 0.35 + 2.2 * near
    warm = (1.1, 0.95, 0.7) if rng.random() < 0.6 else (0.8, 0.95, 1.15)
    image = look.tint(scene, (0.8, 0.9, 1.15)) + look.tint(glare, warm)
    image += rng.uniform(9, 18) * look.grain(rng, size, 3)
    return look.to_uint8(image), look.visible(alphas)


_AMBER = look.palette((6, 3, 0), (92, 48, 8), (196, 122, 30), (255, 226, 150))


@domain("sonar")
def sonar(rng: np.random.Generator, size: int) -> Drawing:
    """Draw a side-scan sonar image; an object is an echo with its acoustic shadow."""
    unit = size / 256
    xs, ys = look.coordinates(size)
    away = 1 if rng.random() < 0.5 else -1
    ripples, height = rng.uniform(0, 2 * np.pi), rng.uniform(2, 18)
    phase = (xs * np.float32(np.cos(ripples)) + ys * np.float32(np.sin(ripples))) / (3.5 * unit)
    bed = 88 + 18 * look.clouds(rng, size, 3)
    bed += height * np.sin(phase + 2.5 * look.noise(rng, size, 4))
    for _ in range(int(rng.integers(0, 4))):  # dark mud
        mud = [rng.uniform(0, size, 2) + rng.uniform(15, 50) * unit * shape.lump(rng)]
        window, alpha = look.patch(mud, size, margin=12 * unit)
        bed[window] *= 1 - rng.uniform(0.3, 0.65) * look.blur(alpha, 4 * unit)
    masks = []
    for center in look.places(rng, size, int(rng.integers(1, 5)), 0.32 * size, 0.16):
        scale, deep = rng.uniform(0.05, 0.15) * size, rng.uniform(0.25, 0.7)
        lying = rng.random() < 0.5
        outline = shape.lump(rng, 0.35) if lying else shape.box(-1, -deep, 1, deep)
        placed = look.pose([outline], center, scale, rng.uniform(0, np.pi))
        echo = look.fill(placed, size)
        length, skew = away * scale * rng.uniform(1.0, 2.6), rng.normal(0, 0.12)
        sweep = np.linspace(0, 1, 2 + int(abs(length) / 2))
        thrown = [placed[0] + [step * length, step * skew * length] for step in sweep]
        window, shadow = look.patch(thrown, size, union=True, margin=6 * unit)
        bed[window] *= 1 - rng.uniform(0.5, 0.85) * look.blur(shadow, 1.6 * unit)
        strength = rng.uniform(0.45, 0.95) * np.clip(0.8 + 0.4 * look.noise(rng, size, 24), 0, 1)
        look.mix(bed, echo * strength, 185)
        masks.append((echo > 0.5) | look.whole(window, shadow > 0.5, size))
    for point in rng.uniform(0, size, (int(rng.integers(4, 20)), 2)):  # stones too small to count
        window, stone = look.patch([point + rng.uniform(1.2, 4) * unit * shape.lump(rng)], size)
        bed[window] += 70 * stone
    ship = (0.02 if away > 0 else 0.98) * size
    bed *= 1 - 0.8 * np.exp(-0.5 * ((xs - ship) / (4 * unit)) ** 2)
    speckle = 0.8 * np.hypot(look.grain(rng, size), look.grain(rng, size))
    pings = 1 + 0.08 * rng.standard_normal((size, 1), dtype=np.float32)
    return look.paint(look.blur(bed * pings * speckle, 0.6), _AMBER), masks
