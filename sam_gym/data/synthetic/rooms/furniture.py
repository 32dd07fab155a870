"""Furniture of procedural rooms, built of contrasting pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sam_gym.data.synthetic.rooms.drawing import Build, Coat, oval, rectangle
from sam_gym.utils.registry import Registry

#: Adds the pieces of an object to a `Build`, in metres.
Maker = Callable[[np.random.Generator, Build], None]


@dataclass(frozen=True)
class Furniture:
    """A category of furniture.

    Attributes:
        make: builds an object.
        places: valid locations: "floor", "wall", or on "top" of another object.
    """

    make: Maker
    places: tuple[str, ...]


#: Category name -> its furniture.
FURNITURE: Registry[Furniture] = Registry("furniture")


def furniture(name: str, *places: str) -> Callable[[Maker], Maker]:
    """Register the decorated function as the builder of category `name`."""

    def add(make: Maker) -> Maker:
        FURNITURE.add(name, Furniture(make, places))
        return make

    return add


@furniture("table", "floor")
def table(rng: np.random.Generator, build: Build) -> None:
    top, legs = build.coat("wood", "white", "paint"), build.coat("wood", "metal", "white", "dark")
    half, deep, high = rng.uniform(0.5, 0.85), rng.uniform(0.5, 0.8), rng.uniform(0.55, 0.8)
    thick, board = rng.uniform(0.05, 0.08), rng.uniform(0.06, 0.1)
    for z in (deep - 0.08, 0.04):
        for x in (-half + 0.05, half - 0.05 - thick):
            build.box(legs, (x, x + thick), (0, high - board), (z, z + 0.05))
    if rng.random() < 0.4:
        cloth = build.coat("cloth", "white", patterned=0.7)
        build.box(top, (-half, half), (high - board, high), (0, deep))
        build.box(cloth, (-0.4 * half, 0.4 * half), (high - 0.25, high + 0.005), (-0.01, deep))
    else:
        build.box(top, (-half, half), (high - board, high), (0, deep))
    build.stand_on((-half, half), (0, deep))
    build.surface = (-half + 0.1, half - 0.1, high, 0.4 * deep)


@furniture("chair", "floor")
def chair(rng: np.random.Generator, build: Build) -> None:
    frame, seat = build.coat("wood", "metal", "dark", "white"), build.coat("cloth", "paint")
    back = build.coat("cloth", "wood", "paint", patterned=0.4)
    half, deep, high = rng.uniform(0.24, 0.31), rng.uniform(0.42, 0.52), rng.uniform(0.44, 0.52)
    tall, thick = high + rng.uniform(0.42, 0.62), 0.055
    left, right = (-half, -half + thick), (half - thick, half)
    for x in (left, right):
        build.box(frame, x, (0, tall if rng.random() < 0.5 else high), (deep - thick, deep))
    if rng.random() < 0.5:
        build.box(back, (-half, half), (high + 0.12, tall), (deep - thick, deep))
    else:
        for y in np.linspace(high + 0.12, tall - 0.12, 3):
            build.box(back, (-half, half), (y, y + 0.1), (deep - thick, deep))
    build.box(seat, (-half, half), (high - 0.09, high), (0, deep))
    for x in (left, right):
        build.box(frame, x, (0, high - 0.09), (0, thick))
    build.stand_on((-half, half), (0, deep))


@furniture("lamp", "floor", "top")
def lamp(rng: np.random.Generator, build: Build) -> None:
    shade = build.coat("white", "cloth", "gold", patterned=0.3)
    pole, foot = build.coat("metal", "dark", "gold"), build.coat("wood", "dark", "clay", "paint")
    high = rng.uniform(1.1, 1.6) if build.place == "floor" else rng.uniform(0.6, 0.85)
    wide = rng.uniform(0.2, 0.3)
    build.turned(foot, 0, 0, [(0, 0.75 * wide), (0.05, 0.72 * wide), (0.1, 0.3 * wide)])
    build.turned(pole, 0, 0, [(0.1, 0.035), (high - 0.3, 0.035)])
    narrow = wide * rng.uniform(0.45, 0.9)
    build.turned(shade, 0, 0, [(high - 0.38, wide), (high, narrow)], top=1.25)
    build.stand_on((-0.7 * wide, 0.7 * wide), (-0.1, 0.1))


@furniture("shelf", "floor")
def shelf(rng: np.random.Generator, build: Build) -> None:
    frame, inside = build.coat("wood", "white", "dark"), build.coat("wood", "white", "paint")
    half, deep, rows = rng.uniform(0.35, 0.6), rng.uniform(0.25, 0.35), int(rng.integers(3, 5))
    step, thick = rng.uniform(0.34, 0.4), 0.055
    high = rows * step + thick
    build.box(frame, (-half, half), (0, high), (0, deep))
    for row in range(rows):
        low = row * step + thick
        hole = (-half + thick, half - thick), (low, low + step - thick)
        build.box(inside, *hole)
        x, end = -half + thick + 0.01, half - thick
        books = rng.uniform(0.5, 1.0) * 2 * half - half
        while (width := rng.uniform(0.06, 0.13)) + x < min(end, books):
            tall = rng.uniform(0.6, 0.92) * (step - thick)
            cover = build.coat("cloth", "paint", "dark", "white")
            book = build.box(cover, (x, x + width), (low, low + tall))
            band = low + rng.uniform(0.6, 0.8) * tall
            build.flat(book, rectangle(x, x + width, band, band + 0.03), 1.35)
            x += width + 0.006
        if end - x > 0.26 and rng.random() < 0.7:
            radius = rng.uniform(0.07, 0.1)
            vase = build.coat("clay", "paint", "white")
            forms = [(low, 0.6 * radius), (low + 0.09, radius), (low + 0.2, 0.45 * radius)]
            build.turned(vase, x + 0.14, 0, forms, top=0.6)
    build.stand_on((-half, half), (0, deep))


@furniture("bed", "floor")
def bed(rng: np.random.Generator, build: Build) -> None:
    frame, sheet = build.coat("wood", "dark", "white", "paint"), build.coat("white", "paint")
    blanket = build.coat("cloth", patterned=0.6)
    pillow = build.coat("white", "cloth", patterned=0.3)
    half, deep, high = rng.uniform(0.85, 1.05), rng.uniform(0.8, 1.1), rng.uniform(0.28, 0.36)
    board, soft, head = rng.uniform(0.75, 1.0), rng.uniform(0.18, 0.25), build.rng.choice([-1, 1])

    def along(start: float, stop: float) -> tuple[float, float]:
        """Return a range of x along the bed, from its head."""
        a, b = head * (half - 2 * half * start), head * (half - 2 * half * stop)
        return (min(a, b), max(a, b))

    far_first = head * build.turn > 0
    ends = [(along(-0.05, 0.0), board), (along(1.0, 1.05), high + 0.18)]
    hidden, seen = ends if not far_first else ends[::-1]
    build.box(frame, hidden[0], (0, hidden[1]), (0, deep))
    build.box(frame, along(0, 1), (0.08, high), (0, deep))
    build.box(sheet, along(0, 1), (high, high + soft), (0, deep))
    for z in (0.72 * deep, 0.3 * deep):
        x = sum(along(0.03, 0.22)) / 2
        build.soft(pillow, (x, high + soft + 0.05, z), (0.2, 0.13), 3.2)
    build.box(blanket, along(0.32, 1), (high - 0.06, high + soft + 0.03), (-0.02, deep))
    build.box(frame, seen[0], (0, seen[1]), (0, deep))
    build.stand_on((-half, half), (0, deep))


@furniture("plant", "floor", "top")
def plant(rng: np.random.Generator, build: Build) -> None:
    pot = build.coat("clay", "white", "paint", patterned=0.2)
    leaves, others = build.coat("green"), build.coat("green")
    wide, high = rng.uniform(0.16, 0.24), rng.uniform(0.24, 0.34)
    build.turned(pot, 0, 0, [(0, 0.7 * wide), (0.8 * high, wide), (high, 1.08 * wide)], top=0.5)
    count = int(rng.integers(6, 11))
    reach = rng.uniform(0.45, 0.75) if build.place == "floor" else rng.uniform(0.28, 0.4)
    slim = rng.uniform(0.055, 0.11)
    for number in rng.permutation(count):
        angle = np.pi * (0.06 + 0.88 * number / (count - 1)) + rng.normal(0, 0.08)
        far = reach * rng.uniform(0.75, 1.1) * (0.7 + 0.45 * np.sin(angle))
        center = (0.5 * far * np.cos(angle), high + 0.53 * far * np.sin(angle), 0.0)
        coat = leaves if number % 2 else others
        build.soft(coat, center, (0.5 * far, slim), 1.5, angle)
    build.stand_on((-0.7 * wide, 0.7 * wide), (-0.08, 0.08))


@furniture("sofa", "floor")
def sofa(rng: np.random.Generator, build: Build) -> None:
    base, arms = build.coat("cloth", "dark", "paint"), build.coat("cloth", "wood", "paint")
    cushions = build.coat("cloth", "white", patterned=0.4)
    back = build.coat("cloth", "paint", patterned=0.3)
    seats = int(rng.integers(2, 4))
    half, deep, high = 0.3 * seats + rng.uniform(0, 0.1), 0.6, rng.uniform(0.34, 0.42)
    tall, arm = high + rng.uniform(0.32, 0.45), rng.uniform(0.13, 0.18)
    build.box(back, (-half, half), (0.1, tall), (deep - 0.14, deep))
    far, near = ((half, half + arm), (-half - arm, -half))[:: -1 if build.turn > 0 else 1]
    build.box(arms, far, (0.08, high + 0.2), (0, deep))
    build.box(base, (-half, half), (0.08, high - 0.08), (0, deep - 0.12))
    wide = 2 * half / seats
    for seat in range(seats)[:: 1 if build.turn > 0 else -1]:  # the far one first
        x = -half + seat * wide
        build.box(cushions, (x + 0.01, x + wide - 0.01), (high - 0.08, high + 0.06), (0, 0.46))
    if rng.random() < 0.8:
        pillow = build.coat("cloth", "white", patterned=0.6)
        x = rng.choice([-1, 1]) * (half - 0.2)
        build.soft(pillow, (x, high + 0.2, 0.3), (0.17, 0.15), 3.5, rng.normal(0, 0.25))
    build.box(arms, near, (0.08, high + 0.2), (0, deep))
    feet = build.coat("wood", "dark", "metal")
    for x in (-half - arm + 0.03, half + arm - 0.1):
        build.box(feet, (x, x + 0.07), (0, 0.08))
    build.stand_on((-half - arm, half + arm), (0, deep))


@furniture("cabinet", "floor")
def cabinet(rng: np.random.Generator, build: Build) -> None:
    body, doors = build.coat("wood", "white", "paint"), build.coat("wood", "white", "paint")
    knobs, feet = build.coat("metal", "gold", "dark"), build.coat("dark", "wood")
    columns, rows = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    wide, tall = rng.uniform(0.38, 0.46), rng.uniform(0.26, 0.4) * (2 if rows == 1 else 1)
    half, deep, gap = columns * wide / 2 + 0.05, rng.uniform(0.35, 0.5), 0.035
    high = 0.1 + rows * tall + 0.06
    for x in (-half + 0.02, half - 0.1):
        build.box(feet, (x, x + 0.08), (0, 0.1))
    build.box(body, (-half, half), (0.1, high), (0, deep))
    for row in range(rows):
        for column in range(columns):
            x, y = -half + 0.05 + column * wide, 0.13 + row * tall
            build.box(doors, (x + gap / 2, x + wide - gap / 2), (y, y + tall - gap))
            if rows > 1:
                build.box(
                    knobs, (x + 0.32 * wide, x + 0.68 * wide), (y + 0.58 * tall, y + 0.7 * tall)
                )
            else:
                side = x + (0.85 if column % 2 == 0 else 0.15) * wide
                build.soft(knobs, (side, y + 0.55 * tall, 0), (0.045, 0.045))
    build.stand_on((-half, half), (0, deep))
    if high < 1.1:
        build.surface = (-half + 0.1, half - 0.1, high, 0.4 * deep)


@furniture("picture", "wall")
def picture(rng: np.random.Generator, build: Build) -> None:
    frame, mount = build.coat("wood", "gold", "white"), build.coat("white", "paint")
    sky, land = build.coat("paint", "cloth"), build.coat("green", "cloth", "wood")
    half, high, thick = rng.uniform(0.3, 0.55), rng.uniform(0.55, 0.9), rng.uniform(0.05, 0.08)
    build.box(frame, (-half, half), (0, high))
    edge = thick
    if rng.random() < 0.5:
        build.box(mount, (-half + thick, half - thick), (thick, high - thick))
        edge += rng.uniform(0.05, 0.09)
    x0, x1, y0, y1 = -half + edge, half - edge, edge, high - edge
    build.box(sky, (x0, x1), (y0, y1))
    if rng.random() < 0.75:
        waves = np.sin(np.linspace(0, rng.uniform(3, 8), 9) + rng.uniform(0, 6))
        hills = np.stack([np.linspace(x0, x1, 9), y0 + (y1 - y0) * (0.4 + 0.16 * waves)], axis=1)
        build.flat(build.piece(land), np.concatenate([[[x1, y0], [x0, y0]], hills]))
    sun = build.coat("gold", "white", "cloth")
    radius = rng.uniform(0.06, 0.12) * (y1 - y0) + 0.02
    build.soft(sun, (rng.uniform(x0 + 0.12, x1 - 0.12), y1 - 1.6 * radius, 0), (radius, radius))


@furniture("clock", "wall", "top")
def clock(rng: np.random.Generator, build: Build) -> None:
    rim, face = build.coat("wood", "metal", "gold", "paint", "dark"), build.coat("white", "cloth")
    hands = build.coat("dark", "cloth")
    radius = rng.uniform(0.3, 0.42) if build.place == "wall" else rng.uniform(0.22, 0.28)
    square = rng.choice([2.0, 2.0, 5.0])
    build.soft(rim, (0.0, radius, 0.0), (radius, radius), square)
    inner = rng.uniform(0.74, 0.84) * radius
    dial, middle, tick = build.piece(face), np.array([0.0, radius]), 0.055 * inner
    build.flat(dial, oval(inner, inner, square) + middle)
    for angle in np.linspace(0, 2 * np.pi, 12, endpoint=False):
        at = middle + 0.85 * inner * np.array([np.sin(angle), np.cos(angle)])
        build.flat(dial, rectangle(-tick, tick, -tick, tick) + at, 0.35)
    both = build.piece(hands)
    for length, thick in ((0.55, 0.12), (0.8, 0.085)):
        angle = rng.uniform(0, 2 * np.pi)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        hand = np.array(
            [[-thick, -0.15], [thick, -0.15], [0.5 * thick, length], [-0.5 * thick, length]]
        )
        build.flat(both, inner * hand @ turn + middle)
    build.stand_on((-0.5 * radius, 0.5 * radius))


@furniture("television", "top", "wall")
def television(rng: np.random.Generator, build: Build) -> None:
    case, screen = build.coat("dark"), build.coat("paint", "cloth")
    stand = build.coat("metal", "white", "wood")
    half, tall, foot = rng.uniform(0.38, 0.5), rng.uniform(0.45, 0.58), rng.uniform(0.08, 0.14)
    if build.place == "wall":
        foot = 0.0
    else:
        build.box(stand, (-0.5 * half, 0.5 * half), (0, 0.05), (-0.08, 0.08))
        build.box(stand, (-0.06, 0.06), (0.04, foot))
    build.box(case, (-half, half), (foot, foot + tall), (0, 0.05))
    x0, x1, y0, y1 = -half + 0.05, half - 0.05, foot + 0.07, foot + tall - 0.05
    shown = build.box(screen, (x0, x1), (y0, y1))
    gleam = [[x0, y1], [x0 + 0.5 * half, y1], [x0 + 0.15 * half, y0], [x0, y0]]
    build.flat(shown, np.array(gleam), 1.18)
    figure = build.coat("cloth", "green", "gold", "white")
    x, size = rng.uniform(x0 + 0.15, x1 - 0.15), 0.2 * tall
    build.soft(figure, (x, (y0 + y1) / 2 - 0.2 * size, 0), (size, 1.3 * size))
    build.stand_on((-0.5 * half, 0.5 * half))


@furniture("bear", "floor", "top")
def bear(rng: np.random.Generator, build: Build) -> None:
    fur, paws = build.coat("fur", "cloth"), build.coat("fur", "white", "cloth")
    belly, dark = build.coat("fur", "white", "paint", patterned=0.3), build.coat("dark")
    big = rng.uniform(0.85, 1.2) if build.place == "floor" else rng.uniform(0.6, 0.8)

    def ball(of: Coat | int, x: float, y: float, rx: float, ry: float, angle: float = 0.0) -> int:
        return build.soft(of, (big * x, big * y, 0.0), (big * rx, big * ry), 2.0, angle)

    body = ball(fur, 0, 0.26, 0.2, 0.25)
    for side in (-1, 1):
        ball(body, 0.17 * side, 0.72, 0.075, 0.075)
        ball(fur, 0.23 * side, 0.33, 0.07, 0.16, 0.7 * side)
    ball(belly, 0, 0.24, 0.125, 0.16)
    for side in (-1, 1):
        ball(fur, 0.17 * side, 0.09, 0.11, 0.1)
        ball(paws, 0.19 * side, 0.08, 0.065, 0.065)
    ball(body, 0, 0.6, 0.19, 0.17)
    ball(paws, 0, 0.55, 0.09, 0.07)
    eyes = build.piece(dark)
    for x, y, r in ((-0.075, 0.645, 0.024), (0.075, 0.645, 0.024), (0, 0.58, 0.032)):
        ball(eyes, x, y, r, r)
    if rng.random() < 0.6:
        bow = build.coat("cloth")
        knot = build.piece(bow)
        for side in (-1, 1):
            build.flat(knot, big * np.array([[0, 0.45], [0.11 * side, 0.51], [0.11 * side, 0.39]]))
    build.stand_on((-0.25 * big, 0.25 * big), (-0.05, 0.1))
