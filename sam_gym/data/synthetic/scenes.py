"""`scenes`: procedural images of named objects."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np

from sam_gym.data.base import Sample, select_categories
from sam_gym.data.synthetic.base import SPLITS, Procedural
from sam_gym.data.synthetic.materials import TILE, Material, category_look, ground, patterned
from sam_gym.data.synthetic.shapes import SHAPES, Contours, blob

_SUBPIXEL_BITS = 4


@lru_cache(maxsize=1)
def grain_tile() -> np.ndarray:
    """Return unit noise, from which camera grain is cropped: float32 (512, 512, 3)."""
    return np.random.default_rng(20260102).standard_normal((512, 512, 3), dtype=np.float32)


def draw_ground(rng: np.random.Generator, size: int, material: Material) -> np.ndarray:
    """Draw textured ground with up to two straight borders: uint8 (size, size, 3)."""
    image = ground(material(rng, size, size), rng)
    for _ in range(int(rng.integers(0, 3))):
        center, angle = rng.uniform(0, size, 2), rng.uniform(0, 2 * np.pi)
        normal = np.array([np.cos(angle), np.sin(angle)])
        along = np.array([-normal[1], normal[0]])
        far = 2.0 * size
        corners = [
            center + along * far,
            center - along * far,
            center - along * far + normal * far,
            center + along * far + normal * far,
        ]
        region = np.zeros((size, size), np.uint8)
        cv2.fillPoly(region, [np.array(corners, np.int32)], 255)
        other = ground(material(rng, size, size), rng)
        np.copyto(image, other, where=region[..., None] > 0)
    return image


def rasterise(parts: list[Contours], shape: tuple[int, int]) -> np.ndarray:
    """Draw the parts of an outline, in pixels, with soft edges: uint8 (P, H, W)."""
    alphas = np.zeros((len(parts), *shape), np.uint8)
    for alpha, part in zip(alphas, parts, strict=True):
        fixed = [np.round(contour * 2**_SUBPIXEL_BITS).astype(np.int32) for contour in part]
        cv2.fillPoly(alpha, fixed, 255, cv2.LINE_AA, _SUBPIXEL_BITS)
    return alphas


def paint_surface(
    rng: np.random.Generator,
    alphas: np.ndarray,
    category: str | None,
    material: Material,
    light: float,
) -> np.ndarray:
    """Paint the texture and shading of an object.

    Args:
        rng: draws look and patterns.
        alphas: uint8 (P, H, W), its parts, back to front.
        category: whose typical look it may have; None: clutter.
        material: fills what has no typical look.
        light: direction of the light, in radians.

    Returns:
        float32 (H, W, 3), beyond 0 to 255 in places.
    """
    whole = alphas.max(axis=0)
    height, width = whole.shape
    look = category_look(category, rng) if category is not None else None
    fill = (look or material)(rng, height, width)
    if rng.random() < 0.7:
        for alpha in alphas[1:]:
            x, y, w, h = cv2.boundingRect(alpha)
            if w and h:
                area = (slice(y, y + h), slice(x, x + w))
                own = look if look is not None and rng.random() < 0.5 else material
                fill[area] = np.where(alpha[area][..., None] > 127, own(rng, h, w), fill[area])
    ramp_x = np.linspace(-1, 1, width, dtype=np.float32) * np.float32(np.cos(light))
    ramp_y = np.linspace(-1, 1, height, dtype=np.float32) * np.float32(np.sin(light))
    rim = rng.uniform(0.15, 0.6)
    bevel = cv2.blur(whole, (7, 7)) * np.float32(rim / 255.0) + np.float32(1.0 - rim)
    shade = (1.0 + 0.22 * (ramp_x[None] + ramp_y[:, None])) * bevel
    return fill * shade[..., None]


class _Canvas:
    """A scene being drawn: its image, and the visible mask of each object and part."""

    def __init__(self, rng: np.random.Generator, size: int, material: Material) -> None:
        self.rng, self.size, self.material = rng, size, material
        self.image = draw_ground(rng, size, material).astype(np.float32)
        self.masks: list[np.ndarray] = []
        self.parts: list[np.ndarray] = []
        self.areas: list[int] = []
        self.light = rng.uniform(0, 2 * np.pi)
        self.shadow = float(rng.uniform(0.0, 0.5))

    def draw(self, parts: list[Contours], scale: float, category: str | None) -> bool:
        """Draw an object at a free place; return whether there was one.

        Args:
            parts: its outline, back to front, in the unit square.
            scale: half the size of the unit square, in pixels.
            category: its category (None: clutter, whose mask counts as a part).
        """
        rng, size = self.rng, self.size
        angle = rng.normal(0, 0.35)
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        squash = np.diag(rng.uniform(0.8, 1.0, 2) * [rng.choice([-1.0, 1.0]), 1.0])
        pose = squash @ turn * scale
        outline = [[contour @ pose for contour in part] for part in parts]
        points = np.concatenate([contour for part in outline for contour in part])
        low, high = points.min(axis=0) - 1.0, points.max(axis=0) + 1.0

        for _ in range(6):
            center = rng.uniform(0.08 * size, 0.92 * size, 2)
            x0, y0 = np.maximum(np.floor(center + low), 0).astype(int)
            x1, y1 = np.minimum(np.ceil(center + high), size).astype(int)
            if x1 - x0 < 12 or y1 - y0 < 12:
                continue
            if self._paint(outline, center, (slice(y0, y1), slice(x0, x1)), category):
                return True
        return False

    def _paint(self, outline, center, window, category: str | None) -> bool:
        shape = (window[0].stop - window[0].start, window[1].stop - window[1].start)
        origin = np.array([window[1].start, window[0].start])
        alphas = rasterise([[c + center - origin for c in part] for part in outline], shape)
        whole = alphas.max(axis=0)
        covered = whole > 127
        area = int(np.count_nonzero(covered))
        if area < 0.004 * self.size**2 or not self._leaves_others_visible(window, covered):
            return False

        self._cast_shadow(window, whole)
        surface = paint_surface(self.rng, alphas, category, self.material, self.light)
        view = self.image[window]
        view += (whole * np.float32(1 / 255.0))[..., None] * (surface - view)
        for mask in (*self.masks, *self.parts):
            mask[window] &= ~covered
        if category is not None:
            self.masks.append(self._full(window, covered))
            self.areas.append(area)
            hidden = np.zeros_like(covered)
            for alpha in alphas[::-1]:
                part = (alpha > 127) & ~hidden
                hidden |= part
                self.parts.append(self._full(window, part))
        else:
            self.parts.append(self._full(window, covered))
        return True

    def _leaves_others_visible(self, window, covered: np.ndarray) -> bool:
        return all(
            np.count_nonzero(mask) - np.count_nonzero(mask[window] & covered) > 0.45 * area
            for mask, area in zip(self.masks, self.areas, strict=True)
        )

    def _cast_shadow(self, window, whole: np.ndarray) -> None:
        if self.shadow < 0.1:
            return
        reach = max(2, whole.shape[0] // 12)
        dx, dy = (round(reach * f) for f in (-np.cos(self.light), -np.sin(self.light)))
        # The shadow extends beyond the window of the object.
        rows, columns = (
            slice(max(s.start - 2 * reach, 0), min(s.stop + 2 * reach, self.size)) for s in window
        )
        shape = (columns.stop - columns.start, rows.stop - rows.start)
        offset = (window[1].start - columns.start + dx, window[0].start - rows.start + dy)
        shift = np.array([[1, 0, offset[0]], [0, 1, offset[1]]], np.float32)
        soft = cv2.blur(cv2.warpAffine(whole, shift, shape), (2 * reach + 1,) * 2)
        dark = np.float32(1.0) - np.float32(self.shadow / 255.0) * soft
        self.image[rows, columns] *= dark[..., None]

    def _full(self, window, covered: np.ndarray) -> np.ndarray:
        mask = np.zeros((self.size, self.size), bool)
        mask[window] = covered
        return mask

    def clutter(self) -> None:
        """Draw thin strokes that belong to no object."""
        rng = self.rng
        for _ in range(int(rng.integers(0, 5))):
            points = rng.uniform(0, self.size, (3, 2)).round().astype(np.int32)
            color = tuple(float(c) for c in rng.uniform(0, 255, 3))
            cv2.polylines(self.image, [points], False, color, int(rng.integers(1, 3)), cv2.LINE_AA)

    def finish(self) -> np.ndarray:
        """Add camera effects (vignetting, colour cast, blur, noise); return uint8 (H, W, 3)."""
        rng, size = self.rng, self.size
        ramps = np.linspace(-1, 1, size, dtype=np.float32) * rng.uniform(-0.25, 0.25, (2, 1))
        light = (1.0 + ramps[0][None] + ramps[1][:, None]).astype(np.float32)
        image = self.image * light[..., None] * rng.uniform(0.85, 1.1, 3).astype(np.float32)
        if rng.random() < 0.3:
            image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.1))
        top, left = rng.integers(0, 512 - size + 1, 2)
        image += np.float32(rng.uniform(2, 13)) * grain_tile()[top : top + size, left : left + size]
        return np.clip(image, 0, 255).astype(np.uint8)


class Scenes(Procedural):
    """Procedural images of named objects made of parts.

    Ten categories; three to seven objects of two to four categories per image, with texture,
    shading, shadow, occlusion, clutter, blur and noise. Two thirds of the objects look typical of
    their category; the others have a random look, as clutter and ground have. Colour alone reveals
    neither the category nor the boundary of an object. The same index always gives the same image.

    Args:
        split: "train", "val" or "test"; disjoint by seed.
        categories: names of the categories to draw, as a sequence or comma-separated (None: all).
        length: number of different images (None: 2^31 - 1, practically endless).
        size: height and width of the images, in pixels.
        material: replaces the random patterns (for trainers that mix in photographs).

    Raises:
        ValueError: the split or a category is unknown, or the length or size is out of range.
    """

    name, noun = "scenes", "scene"
    #: All categories; an instance has those of its images.
    categories: tuple[str, ...] = SHAPES.names()

    def __init__(
        self,
        split: str = "train",
        *,
        categories: str | Sequence[str] | None = None,
        length: int | None = None,
        size: int = 256,
        material: Material = patterned,
    ) -> None:
        super().__init__(split, length, size, largest=TILE)
        self.categories = select_categories(categories, Scenes.categories)
        self.material = material

    def __getitem__(self, index: int) -> Sample:
        self.check_index(index)
        rng = np.random.default_rng([SPLITS[self.split], index])
        canvas = _Canvas(rng, self.size, self.material)
        canvas.clutter()
        kinds = min(int(rng.integers(2, 5)), len(self.categories))
        present = rng.choice(len(self.categories), kinds, replace=False)
        categories: list[int] = []
        for number in range(int(rng.integers(3, 8))):
            if rng.random() < 0.35:
                canvas.draw(blob(rng), self.size * rng.uniform(0.06, 0.16), category=None)
            category = int(present[number] if number < min(2, kinds) else rng.choice(present))
            word = self.categories[category]
            outline = SHAPES.get(word)(rng)
            if canvas.draw(outline, self.size * rng.uniform(0.13, 0.27), category=word):
                categories.append(category)
        return Sample(
            image=canvas.finish(),
            masks=np.stack(canvas.masks),
            categories=np.array(categories, np.int64),
            source=self.source(index),
            parts=np.stack(canvas.parts),
        )
