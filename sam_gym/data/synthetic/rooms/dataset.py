"""`rooms`: procedural rooms full of things that are made of parts, seeded, no files needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, pairwise

import cv2
import numpy as np

from sam_gym.data.base import Sample, select_categories
from sam_gym.data.synthetic.base import Procedural
from sam_gym.data.synthetic.rooms.drawing import SUBPIXEL_BITS, Build, Canvas, fixed_point
from sam_gym.data.synthetic.rooms.furniture import FURNITURE
from sam_gym.data.synthetic.rooms.walls import Shell

#: Least visible area of a thing, as a share of a square of the height of the image,
#: and of what of it would be visible if it stood alone.
LEAST_AREA, LEAST_VISIBLE = 0.012, 0.35
#: Greatest share of a thing that counts as a part of it, and least area of a part in pixels
#: at a height of 256.
PART_SHARE, PART_AREA = 0.85, 25
#: Least and most things in a square room.
THINGS = (4, 9)

#: Pixels per metre at the wall at a height of 256.
_SCALE = 64


@dataclass(eq=False)
class _Thing:
    """Something in a room.

    Attributes:
        category: its name.
        build: its form.
        at: where it stands or hangs, (x, y) in pixels.
        scale: pixels per metre.
        near: things of greater values hide those of lesser ones.
        base: what it stands on, if not the floor.
    """

    category: str
    build: Build
    at: np.ndarray
    scale: float
    near: float
    base: _Thing | None = None

    def __post_init__(self) -> None:
        points, _ = self.build.outlines
        self.low = self.at + self.scale * points.min(axis=0)
        self.high = self.at + self.scale * points.max(axis=0)

    @cached_property
    def outlines(self) -> list[np.ndarray]:
        """The polygon of each face, int32 (n, 2), in fixed-point pixels."""
        points, ends = self.build.outlines
        fixed = fixed_point(self.at + self.scale * points)
        return [fixed[start:stop] for start, stop in pairwise([0, *ends])]

    def overlap(self, other: _Thing) -> float:
        """How much of the smaller one's bounding box lies in the other's."""
        sides = np.minimum(self.high, other.high) - np.maximum(self.low, other.low)
        if sides.min() <= 0:
            return 0.0
        areas = [float(np.prod(thing.high - thing.low)) for thing in (self, other)]
        return float(np.prod(sides)) / min(areas)

    def silhouette(self) -> tuple[np.ndarray, np.ndarray]:
        """(x, y) of the corner of its window, which may leave the image, and uint8 (h, w)."""
        corner = np.floor(self.low).astype(int) - 1
        width, height = np.ceil(self.high).astype(int) + 2 - corner
        covered = np.zeros((height, width), np.uint8)
        away = fixed_point(corner)
        for outline in self.outlines:
            cv2.fillPoly(covered, [outline - away], 1, cv2.LINE_8, SUBPIXEL_BITS)
        return corner, covered


class Room:
    """One room: its walls and floor, and what is in it.

    Args:
        rng: draws everything.
        height, width: of the image, in pixels.
        categories: names of the things that there may be.
    """

    def __init__(
        self, rng: np.random.Generator, height: int, width: int, categories: Sequence[str]
    ) -> None:
        self.rng, self.height, self.width, self.categories = rng, height, width, categories
        self.unit = height / 256
        self.light = float(rng.choice([-1.0, 1.0]))
        self.shell = Shell(rng, height, width, self.light)
        self.things: list[_Thing] = []
        least, most = (round(n * width / height) for n in THINGS)
        # Some find no place, and some turn out to be hidden.
        self._furnish(int(rng.integers(least + 1, most + 3)), most)
        self._clear()

    def _furnish(self, number: int, most: int) -> None:
        rng = self.rng
        order: list[str] = []
        while len(order) < number:
            order += rng.permutation(self.categories).tolist()
        for name in order[:number]:
            if len(self.things) == most:
                break
            for _ in range(3):
                if self._put(name):
                    break
        self.things.sort(key=lambda thing: thing.near)

    def _put(self, name: str) -> bool:
        """Put something somewhere; returns whether there was a place for it."""
        rng = self.rng
        kind = FURNITURE.get(name)
        place = kind.places[rng.integers(len(kind.places))]
        bases = [thing for thing in self.things if thing.build.surface is not None]
        if place == "top" and not bases:
            return False
        # What is left of the viewer shows its right side.
        side = float(rng.choice([-1.0, 1.0]))
        build = Build(rng, side * rng.uniform(0.15, 0.9), self.light, place)
        kind.make(rng, build)
        size, base = rng.uniform(0.92, 1.12), None
        for _ in range(5):
            if place == "top":
                base = bases[rng.integers(len(bases))]
                at, scale, near = self._top_of(base)
            else:
                x = self.width * (0.5 - side * rng.uniform(0, 0.44))
                at, scale, near = self._at_wall(x) if place == "wall" else self._on_floor(x)
            thing = _Thing(name, build, at, size * scale, near, base)
            if all(thing.overlap(other) < 0.4 for other in self.things if other is not base):
                self.things.append(thing)
                return True
        return False

    def _on_floor(self, x: float) -> tuple[np.ndarray, float, float]:
        """Point, scale and nearness of something on the floor."""
        floor, horizon = self.shell.floor, self.shell.horizon
        y = floor + (self.height - floor) * self.rng.uniform(0.08, 1.0)
        scale = _SCALE * self.unit * (y - horizon) / (floor - horizon)
        return np.array([x, y]), scale, y

    def _at_wall(self, x: float) -> tuple[np.ndarray, float, float]:
        y = self.rng.uniform(0.4, 0.78) * self.shell.floor
        return np.array([x, y]), _SCALE * self.unit, -self.rng.random()

    def _top_of(self, base: _Thing) -> tuple[np.ndarray, float, float]:
        assert base.build.surface is not None
        left, right, high, deep = base.build.surface
        spot = base.build.project([(self.rng.uniform(left, right), high, deep)])[0]
        return base.at + base.scale * spot, base.scale, base.near + 1e-3

    def _clear(self) -> None:
        """Take out what is too small or too hidden, and what stands on it."""
        seen = np.zeros((self.height, self.width), np.int32)
        areas = []
        for number, thing in enumerate(self.things, start=1):
            corner, covered = thing.silhouette()
            areas.append(int(covered.sum()))
            low = np.maximum(corner, 0)
            high = np.minimum(corner + covered.shape[::-1], (self.width, self.height))
            if (high <= low).any():
                continue
            inside = covered[low[1] - corner[1] : high[1] - corner[1]][
                :, low[0] - corner[0] : high[0] - corner[0]
            ]
            seen[low[1] : high[1], low[0] : high[0]][inside > 0] = number
        visible = np.bincount(seen.ravel(), minlength=len(self.things) + 1)[1:]
        least = LEAST_AREA * self.height**2
        kept: list[_Thing] = []
        for thing, area, left in zip(self.things, areas, visible, strict=True):
            stands = thing.base is None or thing.base in kept
            if stands and left >= max(least, LEAST_VISIBLE * area):
                kept.append(thing)
        self.things = kept

    def sample(self, source: str) -> Sample:
        """The room as a sample, whose categories index those of the room."""
        canvas = Canvas(self.height, self.width)
        floor = self.shell.draw(canvas)
        ground = len(canvas.coats)
        owners = [-1] * ground
        for number, thing in enumerate(self.things):
            self._shadow(canvas, thing)
            pieces = []
            depth = 1 + 4 * number / len(self.things)
            for rank, coat in enumerate(thing.build.coats):
                pieces.append(canvas.piece(coat, depth + 0.25 * rank**0.5))
            owners += [number] * len(pieces)
            for (piece, bright), outline in zip(thing.build.faces, thing.outlines, strict=True):
                canvas.fill(pieces[piece], outline, bright)
        masks, parts = self._masks(canvas.labels, np.array(owners))
        names = self.categories
        return Sample(
            image=canvas.develop(self.rng, floor, ground, self.light),
            masks=masks,
            categories=np.array([names.index(t.category) for t in self.things], np.int64),
            source=source,
            parts=parts,
        )

    def _masks(self, labels: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Masks of things and of parts, bool (N, H, W) and (P, H, W); `owners` is by piece."""
        objects = owners[labels]
        masks = objects == np.arange(len(self.things))[:, None, None]
        areas = np.bincount(labels.ravel(), minlength=len(owners))
        wholes = np.bincount(objects.ravel() + 1, minlength=len(self.things) + 1)[1:]
        pieces = np.flatnonzero((owners >= 0) & (areas >= PART_AREA * self.unit**2))
        pieces = pieces[areas[pieces] < PART_SHARE * wholes[owners[pieces]]]
        return masks, labels == pieces.astype(labels.dtype)[:, None, None]

    def _shadow(self, canvas: Canvas, thing: _Thing) -> None:
        """The shadow at the foot of something that stands on the floor."""
        if thing.base is not None or thing.near < 0 or thing.build.foot is None:
            return
        x0, x1, z0, z1 = thing.build.foot
        x0, x1 = (x0 - 0.3, x1) if self.light > 0 else (x0, x1 + 0.3)
        foot = thing.build.project(
            [(x0, 0, z0 - 0.06), (x1, 0, z0 - 0.06), (x1, 0, z1), (x0, 0, z1)]
        )
        outline = [fixed_point(thing.at + thing.scale * foot)]
        cv2.fillPoly(canvas.shadow, outline, 235, cv2.LINE_8, SUBPIXEL_BITS)


class Rooms(Procedural):
    """Procedural rooms with things that are made of parts in colours of their own.

    Twelve categories; four to nine things in a room, on the floor, on the walls and on each other,
    with perspective, texture, shading, shadow and occlusion. The instances are whole things, so a
    segmenter that is asked for everything in the image and returns doors, cushions and books is
    wrong (SAOM, arXiv 2403.10780); `Sample.parts` holds what it would return. Walls, windows,
    floor and rugs are not annotated. Sample `i` of a split and seed is always the same image.

    Args:
        split: "train", "val" or "test"; disjoint by seed.
        categories: names of things that may be in the rooms, as a sequence or as one string with
            commas (None: all twelve). Of few categories there may be less than four things.
        length: how many different images there are (None: 2^31 - 1, in effect endless).
        size: height and width of the images, in pixels.
        seed: of all images.

    Raises:
        ValueError: unknown split or category, or a length, size or seed out of range.
    """

    name, noun = "rooms", "room"
    #: All that there are; `Rooms.categories` of an instance are those of its images.
    categories: tuple[str, ...] = FURNITURE.names()

    def __init__(
        self,
        split: str = "train",
        *,
        categories: str | Sequence[str] | None = None,
        length: int | None = None,
        size: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(split, length, size, seed=seed)
        self.categories = select_categories(categories, Rooms.categories)

    def __getitem__(self, index: int) -> Sample:
        room = furnished_room(self.words(index), self.size, self.size, self.categories)
        return room.sample(self.source(index))


def furnished_room(
    words: Sequence[int], height: int, width: int, categories: Sequence[str]
) -> Room:
    """The room of a seed; among few categories it may hold less than there are in others."""
    least = round(THINGS[0] * width / height)
    for attempt in count():
        room = Room(np.random.default_rng([*words, attempt]), height, width, categories)
        if len(room.things) >= least or (attempt >= 8 and room.things):
            return room
    raise AssertionError("unreachable")
