"""Training data of `micro`: scenes and optional photographs, as images with prompt targets.

Every item is a pure function of (seed, index), so that training resumes on the same stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from torch.utils.data import Dataset as TorchDataset

from sam_gym.data.base import Sample
from sam_gym.data.synthetic.materials import patterned
from sam_gym.data.synthetic.scenes import Scenes
from sam_gym.simulation.clicks import interior_distance

SIZE = 256
#: Semantic labels are taken every `LABEL_STRIDE` pixels; `NO_LABEL` where nothing is known.
LABEL_STRIDE = 8
NO_LABEL = 255
#: The colour that normalises to zero, with which SAM pads an image to a square.
PADDING = (124, 116, 104)


@dataclass(frozen=True)
class PromptTarget:
    """One training target: a mask and the positions of the first clicks.

    Attributes:
        mask: bool (256, 256).
        clicks: int (n, 2), (x, y) of positive first clicks, n >= 1 (one per object of a union).
    """

    mask: np.ndarray
    clicks: np.ndarray


@dataclass(frozen=True)
class TrainItem:
    """An image of the stream: uint8 (256, 256, 3), its targets, its labels (uint8 (32, 32))."""

    image: np.ndarray
    targets: tuple[PromptTarget, ...]
    labels: np.ndarray


def random_click(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """A pixel of `mask`, half the time near its middle: int (2,), (x, y)."""
    if rng.random() < 0.5:
        distance = interior_distance(mask)
        chosen = np.flatnonzero(distance > 0.5 * distance.max())
    else:
        chosen = np.flatnonzero(mask)
    y, x = divmod(int(chosen[rng.integers(len(chosen))]), mask.shape[1])
    return np.array([x, y])


class PhotoMixer:
    """Generates training samples from annotated photographs: crops, colour jitter, pasted objects.

    Args:
        photos: samples held in memory.
    """

    def __init__(self, photos: Sequence[Sample]) -> None:
        self.photos = [_shrunk(photo) for photo in photos if len(photo.masks)]
        self._big = [
            [k for k, mask in enumerate(photo.masks) if 0.02 < mask.mean() < 0.7]
            for photo in self.photos
        ]
        self._with_big = [k for k, big in enumerate(self._big) if big]

    def material(self, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
        """Return a texture for a scene: a piece of a photograph or a random pattern."""
        if rng.random() < 0.5:
            return patterned(rng, height, width)
        image = self.photos[rng.integers(len(self.photos))].image
        zoom = rng.uniform(0.5, 2.0)
        h = min(max(8, int(height * zoom)), image.shape[0])
        w = min(max(8, int(width * zoom)), image.shape[1])
        top = rng.integers(image.shape[0] - h + 1)
        left = rng.integers(image.shape[1] - w + 1)
        piece = image[top : top + h, left : left + w]
        return cv2.resize(piece, (width, height), interpolation=cv2.INTER_LINEAR)

    def crop(
        self, rng: np.random.Generator, *, focus_only: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Crop one photograph around one of its objects.

        Returns:
            The image, and bool (N, 256, 256), the masks of all objects in the crop or of that one.
        """
        number = self._with_big[rng.integers(len(self._with_big))]
        photo = self.photos[number]
        height, width = photo.image.shape[:2]
        focus = photo.masks[self._big[number][rng.integers(len(self._big[number]))]]
        x, y, w, h = cv2.boundingRect(focus.astype(np.uint8))
        side = int(np.clip(max(w, h) * rng.uniform(1.0, 3.0), 64, max(height, width)))
        crop_h, crop_w = min(side, height), min(side, width)
        top = _window(rng, y, h, crop_h, height)
        left = _window(rng, x, w, crop_w, width)
        scale = SIZE / max(crop_h, crop_w)
        size = (max(1, round(crop_w * scale)), max(1, round(crop_h * scale)))
        view = (slice(top, top + crop_h), slice(left, left + crop_w))
        content = _recolour(rng, cv2.resize(photo.image[view], size, interpolation=cv2.INTER_AREA))
        image = np.full((SIZE, SIZE, 3), PADDING, np.uint8)
        image[: size[1], : size[0]] = content
        shown = [focus] if focus_only else photo.masks
        kept = [m[view] for m in shown if np.count_nonzero(m[view]) > 0.002 * side**2]
        masks = np.zeros((len(kept), SIZE, SIZE), bool)
        for full, mask in zip(masks, kept, strict=True):
            full[: size[1], : size[0]] = cv2.resize(mask.astype(np.uint8) * 255, size) > 127
        if rng.random() < 0.5:
            image[:, : size[0]] = image[:, : size[0]][:, ::-1]
            masks[:, :, : size[0]] = masks[:, :, : size[0]][:, :, ::-1]
        return image, masks

    def paste(self, rng: np.random.Generator, image: np.ndarray, masks: np.ndarray):
        """Paste an object of another photograph over an image, and cut it out of the masks."""
        other, focus = self.crop(rng, focus_only=True)
        if not len(focus):
            return image, masks
        mask = focus[0]
        shrink = rng.uniform(0.5, 1.1)
        move = np.array(
            [[shrink, 0, rng.uniform(-40, 100)], [0, shrink, rng.uniform(-40, 100)]], np.float32
        )
        alpha = cv2.warpAffine(mask.astype(np.float32), move, (SIZE, SIZE))
        alpha = cv2.GaussianBlur(alpha, (0, 0), 0.7)[..., None]
        moved = cv2.warpAffine(other, move, (SIZE, SIZE))
        pasted = alpha[..., 0] > 0.5
        if pasted.sum() < 400:
            return image, masks
        image = (alpha * moved + (1 - alpha) * image).astype(np.uint8)
        return image, np.concatenate([masks & ~pasted, pasted[None]])

    def compose(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return an image and its masks: a crop, or objects pasted over a crop or a pattern."""
        image, masks = self.crop(rng)
        kind = rng.random()
        if kind < 0.45:
            return image, masks
        if kind < 0.6:
            image, masks = patterned(rng, SIZE, SIZE), masks[:0]
        for _ in range(int(rng.integers(1, 3))):
            image, masks = self.paste(rng, image, masks)
        return image, masks


def _shrunk(photo: Sample, longest: int = 400) -> Sample:
    """Shrink a photograph, so that crops are cheap."""
    height, width = photo.image.shape[:2]
    scale = longest / max(height, width)
    if scale >= 1.0:
        return photo
    size = (round(width * scale), round(height * scale))
    masks = [cv2.resize(mask.astype(np.uint8) * 255, size) > 127 for mask in photo.masks]
    image = cv2.resize(photo.image, size, interpolation=cv2.INTER_AREA)
    return Sample(image, np.stack(masks), photo.categories, photo.source)


def _window(rng: np.random.Generator, start: int, extent: int, crop: int, total: int) -> int:
    """Draw the start of a crop that contains the object if it fits."""
    low, high = start + extent - crop, start
    first = int(rng.integers(min(low, high), max(low, high) + 1))
    return int(np.clip(first, 0, total - crop))


def _areas(masks: np.ndarray) -> np.ndarray:
    return np.array([np.count_nonzero(mask) for mask in masks])


def _recolour(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    if rng.random() < 0.15:
        image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    gain = rng.uniform(0.7, 1.3) * rng.uniform(0.88, 1.12, 3)
    table = np.clip(np.arange(256)[:, None] * gain + rng.uniform(-25, 25), 0, 255)
    return cv2.LUT(image, table.astype(np.uint8)[None])


class MicroStream(TorchDataset[TrainItem]):
    """The training stream; item `i` is always the same.

    Args:
        seed: of the whole stream.
        length: number of items.
        photos: annotated photographs to mix in, or none.
        targets_per_image: prompt targets per image.
        photo_fraction: fraction of items that are photographs, if there are any.
    """

    def __init__(
        self,
        seed: int,
        length: int,
        photos: Sequence[Sample] = (),
        targets_per_image: int = 4,
        photo_fraction: float = 0.35,
    ) -> None:
        self.seed, self.length, self.targets_per_image = seed, length, targets_per_image
        self.mixer = PhotoMixer(photos) if photos else None
        self.photo_fraction = photo_fraction if photos else 0.0
        self.plain = Scenes("train", size=SIZE)
        self.textured = (
            Scenes("train", size=SIZE, material=self.mixer.material) if self.mixer else self.plain
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> TrainItem:
        rng = np.random.default_rng([self.seed, 7, index])
        while True:
            item = self._photo(rng) if rng.random() < self.photo_fraction else self._scene(rng)
            if item is not None:
                return item

    def _photo(self, rng: np.random.Generator) -> TrainItem | None:
        assert self.mixer is not None
        image, masks = self.mixer.compose(rng)
        areas = _areas(masks)
        masks, areas = masks[areas > 120], areas[areas > 120]
        if not len(masks):
            return None
        # Small things outnumber large ones in photographs; people annotate the large ones.
        weight = np.sqrt(areas) / np.sqrt(areas).sum()
        targets = [
            self._union(rng, masks[rng.permutation(len(masks))[:2]])
            if len(masks) > 1 and rng.random() < 0.1
            else _whole(rng, masks[rng.choice(len(masks), p=weight)])
            for _ in range(self.targets_per_image)
        ]
        labels = np.full((SIZE // LABEL_STRIDE,) * 2, NO_LABEL, np.uint8)
        return TrainItem(image, tuple(targets), labels)

    def _scene(self, rng: np.random.Generator) -> TrainItem | None:
        scenes = self.textured if rng.random() < 0.35 else self.plain
        sample = scenes[int(rng.integers(len(scenes)))]
        image, masks, parts = sample.image, sample.masks, sample.parts
        assert parts is not None
        labels = np.zeros((SIZE, SIZE), np.uint8)
        for mask, category in zip(masks, sample.categories, strict=True):
            labels[mask] = 1 + category
        if rng.random() < 0.3:
            side = int(SIZE * rng.uniform(0.45, 0.9))
            top, left = rng.integers(0, SIZE - side + 1, 2)
            view = (slice(top, top + side), slice(left, left + side))

            def enlarge(stack: np.ndarray) -> np.ndarray:
                return np.stack(
                    [
                        cv2.resize(m[view].astype(np.uint8), (SIZE, SIZE), interpolation=0) > 0
                        for m in stack
                    ]
                )

            image = cv2.resize(image[view], (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
            masks, parts = enlarge(masks), enlarge(parts)
            small = labels[view]
            labels = np.asarray(cv2.resize(small, (SIZE, SIZE), interpolation=cv2.INTER_NEAREST))
        visible = _areas(masks) > 120
        masks, categories = masks[visible], sample.categories[visible]
        parts = parts[_areas(parts) > 200]
        if not len(masks):
            return None
        targets = []
        for _ in range(self.targets_per_image):
            kind = rng.random()
            alike = masks[categories == categories[rng.integers(len(categories))]]
            if kind < 0.2 and len(alike) > 1:
                targets.append(self._union(rng, alike))
            elif kind < 0.35 and len(parts):
                targets.append(_whole(rng, parts[rng.integers(len(parts))]))
            else:
                targets.append(_whole(rng, masks[rng.integers(len(masks))]))
        half = LABEL_STRIDE // 2
        return TrainItem(image, tuple(targets), labels[half::LABEL_STRIDE, half::LABEL_STRIDE])

    def _union(self, rng: np.random.Generator, masks: np.ndarray) -> PromptTarget:
        seen = [mask for mask in masks if mask.any()]
        clicks = np.stack([random_click(rng, mask) for mask in seen])
        return PromptTarget(np.any(masks, axis=0), rng.permutation(clicks))


def _whole(rng: np.random.Generator, mask: np.ndarray) -> PromptTarget:
    return PromptTarget(mask, random_click(rng, mask)[None])
