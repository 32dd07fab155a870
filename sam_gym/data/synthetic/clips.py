"""`clips`: procedural videos of named objects that move and hide each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import cv2
import numpy as np

from sam_gym.data.base import FrameAnnotation, check_index, select_categories
from sam_gym.data.synthetic.base import Procedural
from sam_gym.data.synthetic.materials import TILE, Material, patterned
from sam_gym.data.synthetic.scenes import draw_ground, grain_tile, paint_surface, rasterise
from sam_gym.data.synthetic.shapes import SHAPES, Contours, blob
from sam_gym.utils.settings import Count, Natural, whole

#: Side of the ground, relative to the frame; beyond it, the ground is reflected.
_GROUND = 1.6
#: Fraction of the frame that an object covers at least once; what never does is clutter.
_SHOWN = 0.006
#: Masks are measured at this fraction of the size, in at most so many frames.
_PREVIEW, _PREVIEWED = 0.25, 32


@dataclass(frozen=True)
class MotionPath:
    """How something moves, by frame; lengths in units of the frame's side.

    Attributes:
        places: float64 (T, 2), x and y of its centre.
        poses: float64 (T, 2, 2), rotation, size and squeeze.
    """

    places: np.ndarray
    poses: np.ndarray


@dataclass(frozen=True)
class _Sprite:
    """Something that is drawn once and moved.

    Attributes:
        pixels: uint8 (S, S, 4), RGB multiplied by alpha, and alpha.
        shadow: uint8 (S, S), its shadow, soft.
        category: of an object; None: clutter.
        path: how it moves.
    """

    pixels: np.ndarray
    shadow: np.ndarray
    category: int | None
    path: MotionPath


@dataclass(frozen=True)
class _Placed:
    """Where a sprite lies in each frame.

    Attributes:
        maps: float64 (T, 2, 3), from its pixels to those of its window.
        low: int64 (T, 2), x and y of the window's first pixel.
        high: int64 (T, 2), behind the last one.
    """

    maps: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def window(self, frame: int) -> tuple[slice, slice] | None:
        """Return rows and columns of the window in a frame; None: it is outside."""
        (left, top), (right, bottom) = self.low[frame].tolist(), self.high[frame].tolist()
        return (slice(top, bottom), slice(left, right)) if left < right and top < bottom else None


def _fold(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Reflect values at two borders, as a ball between walls."""
    span = high - low
    return low + np.abs((values - high) % (2 * span) - span)


def waves(rng: np.random.Generator, frames: int, size: float) -> np.ndarray:
    """Return a smooth motion around zero of an amplitude up to `size`: float64 (T,)."""
    phase = 2 * np.pi * (np.arange(frames) / rng.uniform(12, 40) + rng.random())
    return rng.uniform(0, size) * np.sin(phase)


def random_path(rng: np.random.Generator, frames: int, start: int) -> MotionPath:
    """Draw a path that is inside of the frame at `start`.

    A third stays near, a third crosses the frame, and a third leaves it and returns.
    """
    kind = int(rng.integers(3))
    speed = (rng.uniform(0, 0.012), rng.uniform(0.01, 0.035), rng.uniform(0.03, 0.07))[kind]
    margin = (0.0, 0.2, 0.4)[kind]
    direction = rng.uniform(0, 2 * np.pi)
    times = (np.arange(frames) - start)[:, None]
    velocity = speed * np.array([np.cos(direction), np.sin(direction)])
    places = _fold(rng.uniform(0.15, 0.85, 2) + times * velocity, -margin, 1 + margin)
    places += np.stack([waves(rng, frames, 0.05) for _ in range(2)], axis=1)

    angles = rng.normal(0, 0.35) + (rng.random() < 0.7) * rng.normal(0, 0.04) * times[:, 0]
    angles += waves(rng, frames, 0.3)
    scales = np.exp(waves(rng, frames, 0.35) + rng.normal(0, 0.01) * np.clip(times[:, 0], -30, 30))
    scales /= scales.max()
    squeeze = np.exp(waves(rng, frames, 0.15))
    cos, sin = np.cos(angles), np.sin(angles)
    turns = np.stack([np.stack([cos, -sin], axis=1), np.stack([sin, cos], axis=1)], axis=1)
    stretches = np.stack([scales * squeeze, scales / squeeze], axis=1)
    return MotionPath(places, turns * stretches[:, None])


class Clip:
    """A generated video: frames and masks are drawn when they are asked for; see `Clips`."""

    def __init__(
        self,
        name: str,
        words: Sequence[int],
        *,
        frames: int,
        size: int,
        max_objects: int,
        categories: Sequence[str],
        material: Material,
    ) -> None:
        self.name = name
        self.size = (size, size)
        self.frames = tuple(f"{frame:05d}" for frame in range(frames))
        attempt = 0
        while not self._compose([*words, attempt], max_objects, categories, material):
            attempt += 1
        objects = [sprite for sprite in self._sprites if sprite.category is not None]
        self.objects = tuple(range(1, len(objects) + 1))
        self.categories = tuple(s.category for s in objects if s.category is not None)
        self.annotated = np.ones((frames, len(objects)), bool)
        self._drawn: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.frames)

    def image(self, frame: int) -> np.ndarray:
        """Draw the frame at an index: uint8 (H, W, 3), RGB."""
        return self._draw(frame)[0].copy()

    def annotation(self, frame: int) -> FrameAnnotation:
        """Draw the masks of the frame at an index, from the same drawing as its image."""
        return FrameAnnotation(self._draw(frame)[1].copy(), self.annotated[frame].copy())

    def _compose(
        self, words: Sequence[int], max_objects: int, categories: Sequence[str], material: Material
    ) -> bool:
        """Draw ground, sprites, camera and light; return whether an object starts in sight."""
        rng = np.random.default_rng(words)
        size, frames = self.size[0], len(self)
        tile = draw_ground(rng, TILE, material)
        side = round(_GROUND * size)
        self._ground = cv2.resize(tile, (side, side), interpolation=cv2.INTER_CUBIC)
        self._light = float(rng.uniform(0, 2 * np.pi))
        self._shadow = float(rng.uniform(0.0, 0.5))

        # With few kinds, most objects have a distractor of their own category.
        kinds = rng.choice(len(categories), min(int(rng.integers(1, 4)), len(categories)), False)
        sprites: list[_Sprite] = []
        for number in range(int(rng.integers(min(2, max_objects), max_objects + 1))):
            if rng.random() < 0.35:
                path = random_path(rng, frames, int(rng.integers(frames)))
                sprites.append(self._sprite(rng, blob(rng), 0.06, 0.16, None, None, path, material))
            category = int(rng.choice(kinds))
            path = random_path(rng, frames, 0 if number < 2 else int(rng.integers(frames)))
            twins = [sprite for sprite in sprites if sprite.category == category]
            if twins and rng.random() < 0.35:
                sprites.append(replace(twins[0], path=path))
                continue
            word = categories[category]
            outline = SHAPES.get(word)(rng)
            sprites.append(self._sprite(rng, outline, 0.15, 0.3, category, word, path, material))
        order = rng.permutation(len(sprites))
        self._sprites = [sprites[number] for number in order]

        pan = np.stack([waves(rng, frames, 0.2) + waves(rng, frames, 0.05) for _ in range(2)], 1)
        self._pan = pan + rng.normal(0, rng.uniform(0, 0.004), pan.shape)
        self._zoom = np.exp(waves(rng, frames, 0.08))
        self._gains = np.exp(waves(rng, frames, 0.25)) * (1 + rng.normal(0, 0.01, frames))
        ramps = np.linspace(-1, 1, size) * rng.uniform(-0.25, 0.25, (2, 1))
        vignette = (1.0 + ramps[0][None] + ramps[1][:, None])[..., None]
        self._vignette = (vignette * rng.uniform(0.85, 1.1, 3)).astype(np.float32)
        self._blur = float(rng.uniform(0.4, 1.1)) if rng.random() < 0.3 else 0.0
        self._grain = float(rng.uniform(2, 13))
        self._corners = rng.integers(0, 512 - size + 1, (frames, 2))

        self._places = [self._placed(sprite, size) for sprite in self._sprites]
        areas = self._preview()
        shown = areas.max(axis=0) >= _SHOWN
        self._sprites = [
            sprite if is_shown else replace(sprite, category=None)
            for sprite, is_shown in zip(self._sprites, shown, strict=True)
        ]
        is_object = np.array([sprite.category is not None for sprite in self._sprites])
        return bool((areas[0, is_object] >= _SHOWN).any())

    def _sprite(
        self,
        rng: np.random.Generator,
        outline: list[Contours],
        smallest: float,
        largest: float,
        category: int | None,
        word: str | None,
        path: MotionPath,
        material: Material,
    ) -> _Sprite:
        scale = self.size[0] * rng.uniform(smallest, largest)
        squash = scale * rng.uniform(0.8, 1.0, 2) * [rng.choice([-1.0, 1.0]), 1.0]
        reach = np.abs(np.concatenate([c for part in outline for c in part]) * squash).max()
        middle = int(np.ceil(1.2 * reach)) + 2  # with room for the shadow
        side = 2 * middle + 1
        moved = [[contour * squash + middle for contour in part] for part in outline]
        alphas = rasterise(moved, (side, side))
        whole = alphas.max(axis=0)
        surface = paint_surface(rng, alphas, word, material, self._light).clip(0, 255)
        pixels = np.dstack([surface * (whole[..., None] / np.float32(255)), whole])
        blur = max(2, side // 12)
        shadow = cv2.blur(whole, (2 * blur + 1,) * 2)
        return _Sprite(pixels.round().astype(np.uint8), shadow, category, path)

    def _placed(self, sprite: _Sprite, size: int) -> _Placed:
        """Place a sprite in all frames of some size."""
        far = len(sprite.pixels) - 1
        # The camera turns nothing: it moves and scales around the middle of the frame.
        centers = 0.5 + self._zoom[:, None] * (sprite.path.places - self._pan - 0.5)
        poses = sprite.path.poses * (self._zoom * size / self.size[0])[:, None, None]
        shifts = size * centers - poses @ [far / 2, far / 2]
        corners = poses @ [[0, far, 0, far], [0, 0, far, far]] + shifts[..., None]
        low = np.maximum(np.floor(corners.min(axis=2)), 0).astype(int)
        high = np.minimum(np.ceil(corners.max(axis=2)) + 1, size).astype(int)
        return _Placed(np.concatenate([poses, (shifts - low)[..., None]], axis=2), low, high)

    def _preview(self) -> np.ndarray:
        """Return the visible area of each sprite in some frames, the first among them.

        Returns:
            float64 (F, S), fractions of the frame.
        """
        size = round(_PREVIEW * self.size[0])
        previewed = [self._placed(sprite, size) for sprite in self._sprites]
        areas = []
        for frame in range(0, len(self), max(1, -(-len(self) // _PREVIEWED))):
            owner = np.full((size, size), -1)
            for number, placed in enumerate(previewed):
                if window := placed.window(frame):
                    alpha = _warped(
                        self._sprites[number].pixels[..., 3], placed.maps[frame], window
                    )
                    owner[window][alpha > 127] = number
            areas.append(np.bincount(owner[owner >= 0], minlength=len(previewed)) / size**2)
        return np.stack(areas)

    def _draw(self, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw a frame: uint8 (H, W, 3) and bool (N, H, W); the last one is kept."""
        check_index(self.name, frame, len(self))
        if self._drawn is None or self._drawn[0] != frame:
            self._drawn = (frame, *self._drawing(frame))
        return self._drawn[1:]

    def _drawing(self, frame: int) -> tuple[np.ndarray, np.ndarray]:
        size, zoom = self.size[0], self._zoom[frame]
        shift = len(self._ground) / 2 + size * (self._pan[frame] - 0.5 / zoom)
        back = np.column_stack([np.eye(2) / zoom, shift])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        ground = cv2.warpAffine(
            self._ground, back, (size, size), flags=flags, borderMode=cv2.BORDER_REFLECT_101
        )
        image = ground.astype(np.float32)
        masks: list[np.ndarray] = []
        for sprite, placed in zip(self._sprites, self._places, strict=True):
            if sprite.category is not None:
                masks.append(np.zeros((size, size), bool))
            window = placed.window(frame)
            if window is None:
                continue
            pixels = _warped(sprite.pixels, placed.maps[frame], window)
            alpha = np.ascontiguousarray(pixels[..., 3])
            kept = 1 - alpha * np.float32(1 / 255)
            if self._shadow > 0.1:
                kept *= 1 - self._cast_shadow(sprite, placed.maps[frame], window)
            view = image[window]
            view *= cv2.merge([kept] * 3)
            view += pixels[..., :3]
            covered = alpha > 127
            for mask in masks:
                mask[window] &= ~covered
            if sprite.category is not None:
                masks[-1][window] = covered
        return self._finish(image, frame), np.stack(masks)

    def _cast_shadow(
        self, sprite: _Sprite, matrix: np.ndarray, window: tuple[slice, slice]
    ) -> np.ndarray:
        """Return how much darker the window of a sprite is: float32 (h, w)."""
        reach = max(2.0, (window[0].stop - window[0].start) / 12)
        moved = matrix.copy()
        moved[:, 2] -= reach * np.array([np.cos(self._light), np.sin(self._light)])
        return _warped(sprite.shadow, moved, window) * np.float32(self._shadow / 255)

    def _finish(self, image: np.ndarray, frame: int) -> np.ndarray:
        """Add light, blur and grain; return uint8 (H, W, 3)."""
        image *= self._vignette
        if self._blur:
            image = cv2.GaussianBlur(image, (0, 0), self._blur)
        top, left = self._corners[frame]
        grain = grain_tile()[top : top + self.size[0], left : left + self.size[1]]
        gain = float(self._gains[frame])
        return cv2.addWeighted(image, gain, grain, self._grain, 0.0, dtype=cv2.CV_8U)


def _warped(pixels: np.ndarray, matrix: np.ndarray, window: tuple[slice, slice]) -> np.ndarray:
    """Map pixels into a window of its size."""
    shape = (window[1].stop - window[1].start, window[0].stop - window[0].start)
    return cv2.warpAffine(pixels, matrix, shape, flags=cv2.INTER_LINEAR)


class Clips(Procedural):
    """Procedural videos of the objects of `scenes`.

    Objects drift, cross the frame, or leave it and return; they turn, grow and shrink, pass in
    front of each other and behind unnamed clutter. An image has objects of one to three categories,
    so that most have a distractor of their category, a third of which look the same. The camera
    moves, the light changes, and every frame has its own grain. Some objects appear late; at least
    one is in sight in the first frame. What never covers 0.6% of a frame is clutter without a mask.
    Images and masks come from one drawing. The same index always gives the same video, up to what
    versions of OpenCV round differently.

    Args:
        split: "train", "val" or "test"; disjoint by seed.
        categories: names of the categories to draw, as a sequence or comma-separated (None: all).
        frames: number of frames of a video.
        length: number of different videos (None: 2^31 - 1, practically endless).
        size: height and width of the frames, in pixels.
        max_objects: maximum number of objects of a video.
        seed: seed of all videos.
        material: replaces the random patterns (for trainers that mix in photographs).

    Raises:
        ValueError: the split or a category is unknown, or a number is out of range.
    """

    name, noun = "clips", "video"
    #: All categories; an instance has those of its videos.
    categories: tuple[str, ...] = SHAPES.names()

    def __init__(
        self,
        split: str = "train",
        *,
        categories: str | Sequence[str] | None = None,
        frames: Count = 24,
        length: int | None = None,
        size: int = 256,
        max_objects: Annotated[int, whole(1, 8)] = 5,
        seed: Natural = 0,
        material: Material = patterned,
    ) -> None:
        super().__init__(split, length, size, largest=TILE, seed=seed)
        self.categories = select_categories(categories, Clips.categories)
        self._frames, self._max_objects, self._material = frames, max_objects, material

    def __getitem__(self, index: int) -> Clip:
        return Clip(
            self.source(index),
            self.words(index),
            frames=self._frames,
            size=self.size,
            max_objects=self._max_objects,
            categories=self.categories,
            material=self._material,
        )
