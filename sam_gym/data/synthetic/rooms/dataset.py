"""`rooms`: procedural rooms with objects made of parts."""

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

#: Minimum visible area of an object, as a fraction of a square of the image's height, and as a
#: fraction of its area without occlusion.
MIN_AREA, MIN_VISIBLE = 0.012, 0.35
#: Maximum fraction of an object that counts as a part, and minimum area of a part in pixels at a
#: height of 256.
PART_SHARE, PART_AREA = 0.85, 25
#: Minimum and maximum number of objects in a square room.
NUM_OBJECTS = (4, 9)

#: Pixels per metre at the wall at a height of 256.
_SCALE = 64


@dataclass(eq=False)
class _Object:
    """An object in a room.

    Attributes:
        category: name of its category.
        build: its geometry.
        at: position, (x, y) in pixels.
        scale: pixels per metre.
        near: drawing order; greater values are in front.
        base: object that it stands on, if not the floor.
    """

    category: str
    build: Build
    at: np.ndarray
    scale: float
    near: float
    base: _Object | None = None

    def __post_init__(self) -> None:
        points, _ = self.build.outlines
        self.low = self.at + self.scale * points.min(axis=0)
        self.high = self.at + self.scale * points.max(axis=0)

    @cached_property
    def outlines(self) -> list[np.ndarray]:
        """Return the polygon of each face, int32 (n, 2), in fixed-point pixels."""
        points, ends = self.build.outlines
        fixed = fixed_point(self.at + self.scale * points)
        return [fixed[start:stop] for start, stop in pairwise([0, *ends])]

    def overlap(self, other: _Object) -> float:
        """Return the overlap of the bounding boxes, as a fraction of the smaller one."""
        sides = np.minimum(self.high, other.high) - np.maximum(self.low, other.low)
        if sides.min() <= 0:
            return 0.0
        areas = [float(np.prod(item.high - item.low)) for item in (self, other)]
        return float(np.prod(sides)) / min(areas)

    def silhouette(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the corner (x, y) of its window, maybe outside the image, and uint8 (h, w)."""
        corner = np.floor(self.low).astype(int) - 1
        width, height = np.ceil(self.high).astype(int) + 2 - corner
        covered = np.zeros((height, width), np.uint8)
        away = fixed_point(corner)
        for outline in self.outlines:
            cv2.fillPoly(covered, [outline - away], 1, cv2.LINE_8, SUBPIXEL_BITS)
        return corner, covered


class Room:
    """A room: walls, floor and objects.

    Args:
        rng: random generator.
        height, width: size of the image, in pixels.
        categories: names of the categories.
    """

    def __init__(
        self, rng: np.random.Generator, height: int, width: int, categories: Sequence[str]
    ) -> None:
        self.rng, self.height, self.width, self.categories = rng, height, width, categories
        self.unit = height / 256
        self.light = float(rng.choice([-1.0, 1.0]))
        self.shell = Shell(rng, height, width, self.light)
        self.objects: list[_Object] = []
        least, most = (round(n * width / height) for n in NUM_OBJECTS)
        # Some find no place, and some are occluded.
        self._furnish(int(rng.integers(least + 1, most + 3)), most)
        self._clear()

    def _furnish(self, number: int, most: int) -> None:
        rng = self.rng
        order: list[str] = []
        while len(order) < number:
            order += rng.permutation(self.categories).tolist()
        for name in order[:number]:
            if len(self.objects) == most:
                break
            for _ in range(3):
                if self._put(name):
                    break
        self.objects.sort(key=lambda item: item.near)

    def _put(self, name: str) -> bool:
        """Add an object of a category; return whether there was a place for it."""
        rng = self.rng
        kind = FURNITURE.get(name)
        place = kind.places[rng.integers(len(kind.places))]
        bases = [item for item in self.objects if item.build.surface is not None]
        if place == "top" and not bases:
            return False
        # Objects to the left of the viewer show their right side.
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
            item = _Object(name, build, at, size * scale, near, base)
            if all(item.overlap(other) < 0.4 for other in self.objects if other is not base):
                self.objects.append(item)
                return True
        return False

    def _on_floor(self, x: float) -> tuple[np.ndarray, float, float]:
        """Return position, scale and drawing order of an object on the floor."""
        floor, horizon = self.shell.floor, self.shell.horizon
        y = floor + (self.height - floor) * self.rng.uniform(0.08, 1.0)
        scale = _SCALE * self.unit * (y - horizon) / (floor - horizon)
        return np.array([x, y]), scale, y

    def _at_wall(self, x: float) -> tuple[np.ndarray, float, float]:
        y = self.rng.uniform(0.4, 0.78) * self.shell.floor
        return np.array([x, y]), _SCALE * self.unit, -self.rng.random()

    def _top_of(self, base: _Object) -> tuple[np.ndarray, float, float]:
        assert base.build.surface is not None
        left, right, high, deep = base.build.surface
        spot = base.build.project([(self.rng.uniform(left, right), high, deep)])[0]
        return base.at + base.scale * spot, base.scale, base.near + 1e-3

    def _clear(self) -> None:
        """Remove objects that are too small or occluded, and objects on top of them."""
        seen = np.zeros((self.height, self.width), np.int32)
        areas = []
        for number, item in enumerate(self.objects, start=1):
            corner, covered = item.silhouette()
            areas.append(int(covered.sum()))
            low = np.maximum(corner, 0)
            high = np.minimum(corner + covered.shape[::-1], (self.width, self.height))
            if (high <= low).any():
                continue
            inside = covered[low[1] - corner[1] : high[1] - corner[1]][
                :, low[0] - corner[0] : high[0] - corner[0]
            ]
            seen[low[1] : high[1], low[0] : high[0]][inside > 0] = number
        visible = np.bincount(seen.ravel(), minlength=len(self.objects) + 1)[1:]
        least = MIN_AREA * self.height**2
        kept: list[_Object] = []
        for item, area, left in zip(self.objects, areas, visible, strict=True):
            stands = item.base is None or item.base in kept
            if stands and left >= max(least, MIN_VISIBLE * area):
                kept.append(item)
        self.objects = kept

    def sample(self, source: str) -> Sample:
        """Draw the room; `Sample.categories` indexes the categories of the room."""
        canvas = Canvas(self.height, self.width)
        floor = self.shell.draw(canvas)
        ground = len(canvas.coats)
        owners = [-1] * ground
        for number, item in enumerate(self.objects):
            self._shadow(canvas, item)
            pieces = []
            depth = 1 + 4 * number / len(self.objects)
            for rank, coat in enumerate(item.build.coats):
                pieces.append(canvas.piece(coat, depth + 0.25 * rank**0.5))
            owners += [number] * len(pieces)
            for (piece, bright), outline in zip(item.build.faces, item.outlines, strict=True):
                canvas.fill(pieces[piece], outline, bright)
        masks, parts = self._masks(canvas.labels, np.array(owners))
        names = self.categories
        return Sample(
            image=canvas.develop(self.rng, floor, ground, self.light),
            masks=masks,
            categories=np.array([names.index(t.category) for t in self.objects], np.int64),
            source=source,
            parts=parts,
        )

    def _masks(self, labels: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return masks of objects and parts, bool (N, H, W) and (P, H, W), from pieces' owners."""
        owner_map = owners[labels]
        masks = owner_map == np.arange(len(self.objects))[:, None, None]
        areas = np.bincount(labels.ravel(), minlength=len(owners))
        wholes = np.bincount(owner_map.ravel() + 1, minlength=len(self.objects) + 1)[1:]
        pieces = np.flatnonzero((owners >= 0) & (areas >= PART_AREA * self.unit**2))
        pieces = pieces[areas[pieces] < PART_SHARE * wholes[owners[pieces]]]
        return masks, labels == pieces.astype(labels.dtype)[:, None, None]

    def _shadow(self, canvas: Canvas, item: _Object) -> None:
        """Draw the shadow at the foot of an object on the floor."""
        if item.base is not None or item.near < 0 or item.build.foot is None:
            return
        x0, x1, z0, z1 = item.build.foot
        x0, x1 = (x0 - 0.3, x1) if self.light > 0 else (x0, x1 + 0.3)
        foot = item.build.project(
            [(x0, 0, z0 - 0.06), (x1, 0, z0 - 0.06), (x1, 0, z1), (x0, 0, z1)]
        )
        outline = [fixed_point(item.at + item.scale * foot)]
        cv2.fillPoly(canvas.shadow, outline, 235, cv2.LINE_8, SUBPIXEL_BITS)


class Rooms(Procedural):
    """Procedural rooms with objects whose parts have different colours.

    Twelve categories; four to nine objects per room, on the floor, on the walls and on each other,
    with perspective, texture, shading, shadow and occlusion. Instances are whole objects, so a
    segmenter that returns doors, cushions and books in everything mode is wrong (SAOM, arXiv
    2403.10780); `Sample.parts` has the masks of such parts. Walls, windows, floor and rugs are not
    annotated. The same index of a split and seed always gives the same image.

    Args:
        split: "train", "val" or "test"; disjoint by seed.
        categories: names of the categories to draw, as a sequence or comma-separated (None: all).
            With few categories, a room may have fewer than four objects.
        length: number of different images (None: 2^31 - 1, practically endless).
        size: height and width of the images, in pixels.
        seed: seed of all images.

    Raises:
        ValueError: the split or a category is unknown, or the length, size or seed is out of range.
    """

    name, noun = "rooms", "room"
    #: All categories; an instance has those of its images.
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
        self.width = size

    def __getitem__(self, index: int) -> Sample:
        room = furnished_room(self.words(index), self.size, self.width, self.categories)
        return room.sample(self.source(index))


class RoomsPanoramas(Rooms):
    """Wide `rooms` with proportionally more objects.

    The same index of a split and seed always gives the same panorama.

    Args:
        split: "train", "val" or "test"; disjoint by seed.
        categories: as in `Rooms`.
        length: number of different panoramas (None: 2^31 - 1, practically endless).
        height, width: size of a panorama, in pixels.
        seed: seed of all panoramas.

    Raises:
        ValueError: the split or a category is unknown, or a number is out of range.
    """

    name, noun = "rooms-panoramas", "panorama"

    def __init__(
        self,
        split: str = "train",
        *,
        categories: str | Sequence[str] | None = None,
        length: int | None = None,
        height: int = 256,
        width: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__(split, categories=categories, length=length, size=height, seed=seed)
        if not height <= width <= 8 * height:
            raise ValueError(f"width must be from {height} to {8 * height} pixels, got {width}.")
        self.width = width


def furnished_room(
    words: Sequence[int], height: int, width: int, categories: Sequence[str]
) -> Room:
    """Make the room of a seed; with few categories it may have fewer objects than `NUM_OBJECTS`."""
    least = round(NUM_OBJECTS[0] * width / height)
    for attempt in count():
        room = Room(np.random.default_rng([*words, attempt]), height, width, categories)
        if len(room.objects) >= least or (attempt >= 8 and room.objects):
            return room
    raise AssertionError("unreachable")
