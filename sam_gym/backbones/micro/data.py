"""Training stream of `micro`: scenes and optional photographs, as images with prompt targets.

Every item is a pure function of (seed, index), so that training resumes on the same stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from torch.utils.data import Dataset as TorchDataset

from sam_gym.backbones.micro.photos import MIN_AREA, SIZE, PhotoMixer, mask_areas
from sam_gym.data.synthetic.scenes import Scenes
from sam_gym.simulation.clicks import interior_distance

#: Sides of scenes: those that environments show, and the largest.
SCENE_SIZES = (256, 320)
#: Semantic labels are taken every `LABEL_STRIDE` pixels; `NO_LABEL` where nothing is known.
LABEL_STRIDE = 8
NO_LABEL = 255


@dataclass(frozen=True)
class PromptTarget:
    """One training target: a mask and the positions of the first clicks.

    Attributes:
        mask: bool (SIZE, SIZE).
        clicks: int (n, 2), (x, y) of positive first clicks, n >= 1 (one per object of a union).
    """

    mask: np.ndarray
    clicks: np.ndarray


@dataclass(frozen=True)
class TrainItem:
    """An image of the stream.

    Attributes:
        image: uint8 (SIZE, SIZE, 3).
        targets: what is prompted for.
        labels: uint8 (SIZE / LABEL_STRIDE, SIZE / LABEL_STRIDE), categories of scenes.
        ignore: bool (SIZE, SIZE), pixels outside of the targets that do not count.
    """

    image: np.ndarray
    targets: tuple[PromptTarget, ...]
    labels: np.ndarray
    ignore: np.ndarray


def random_click(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """A pixel of `mask`, half the time near its middle: int (2,), (x, y)."""
    if rng.random() < 0.5:
        distance = interior_distance(mask)
        chosen = np.flatnonzero(distance > 0.5 * distance.max())
    else:
        chosen = np.flatnonzero(mask)
    y, x = divmod(int(chosen[rng.integers(len(chosen))]), mask.shape[1])
    return np.array([x, y])


class MicroStream(TorchDataset[TrainItem]):
    """The training stream; item `i` is always the same.

    Args:
        seed: of the whole stream.
        length: number of items.
        photos: mixes in photographs, or None.
        targets_per_image: prompt targets per image.
        photo_fraction: fraction of items that are photographs, if there are any.
    """

    def __init__(
        self,
        seed: int,
        length: int,
        photos: PhotoMixer | None = None,
        *,
        targets_per_image: int,
        photo_fraction: float,
    ) -> None:
        self.seed, self.length, self.targets_per_image = seed, length, targets_per_image
        self.photos, self.photo_fraction = photos, photo_fraction if photos else 0.0
        self.scenes = [Scenes("train", size=size) for size in SCENE_SIZES]
        self.textured = self.scenes
        if photos is not None:
            self.textured = [
                Scenes("train", size=scenes.size, material=photos.material)
                for scenes in self.scenes
            ]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> TrainItem:
        rng = np.random.default_rng([self.seed, 7, index])
        while True:
            item = self._photo(rng) if rng.random() < self.photo_fraction else self._scene(rng)
            if item is not None:
                return item

    def _photo(self, rng: np.random.Generator) -> TrainItem | None:
        assert self.photos is not None
        image, masks, ignore = self.photos.view(rng)
        if not len(masks):
            return None
        areas = mask_areas(masks)
        weight = np.sqrt(areas) / np.sqrt(areas).sum()
        targets = []
        for _ in range(self.targets_per_image):
            kind = rng.random()
            mask = masks[rng.choice(len(masks), p=weight)]
            if kind < 0.1 and len(masks) > 1:
                targets.append(self._union(rng, masks[rng.permutation(len(masks))[:2]]))
            elif kind < 0.2 and len(masks) > 2:
                targets.append(_whole(rng, _group(masks, mask)))
            else:
                targets.append(_whole(rng, mask))
        labels = np.full((SIZE // LABEL_STRIDE,) * 2, NO_LABEL, np.uint8)
        return TrainItem(image, tuple(targets), labels, ignore)

    def _scene(self, rng: np.random.Generator) -> TrainItem | None:
        scenes = self.textured if rng.random() < 0.35 else self.scenes
        sample = scenes[int(rng.random() < 0.3)][int(rng.integers(2**31))]
        image, masks, parts = sample.image, sample.masks, sample.parts
        assert parts is not None
        side = len(image)
        labels = np.zeros((side, side), np.uint8)
        for mask, category in zip(masks, sample.categories, strict=True):
            labels[mask] = 1 + category
        top, left, shown = 0, 0, side
        if rng.random() < 0.3:
            shown = int(side * rng.uniform(0.45, 0.9))
            top, left = rng.integers(0, side - shown + 1, 2)
        view = (slice(top, top + shown), slice(left, left + shown))

        def framed(mask: np.ndarray) -> np.ndarray:
            return cv2.resize(mask[view].astype(np.uint8) * 255, (SIZE, SIZE)) > 127

        image = cv2.resize(image[view], (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
        masks = np.array([framed(mask) for mask in masks])
        parts = np.array([framed(part) for part in parts]).reshape(-1, SIZE, SIZE)
        nearest = cv2.INTER_NEAREST
        labels = np.asarray(cv2.resize(labels[view], (SIZE, SIZE), interpolation=nearest))
        visible = mask_areas(masks) > 2 * MIN_AREA
        masks, categories = masks[visible], sample.categories[visible]
        parts = parts[mask_areas(parts) > 4 * MIN_AREA]
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
        labels = labels[half::LABEL_STRIDE, half::LABEL_STRIDE]
        return TrainItem(image, tuple(targets), labels, np.zeros((SIZE, SIZE), bool))

    def _union(self, rng: np.random.Generator, masks: np.ndarray) -> PromptTarget:
        seen = [mask for mask in masks if mask.any()]
        clicks = np.stack([random_click(rng, mask) for mask in seen])
        return PromptTarget(np.any(masks, axis=0), rng.permutation(clicks))


def _whole(rng: np.random.Generator, mask: np.ndarray) -> PromptTarget:
    return PromptTarget(mask, random_click(rng, mask)[None])


def _group(masks: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Return all objects that touch each other, directly or not, and a member: a rider and a horse,
    a person and the clothes. bool (H, W)."""
    union = np.asarray(masks.any(axis=0), np.uint8)
    covered = cv2.dilate(union, np.ones((5, 5), np.uint8))
    _, labels = cv2.connectedComponents(covered)
    group = np.zeros_like(member)
    for mask in masks:
        if np.isin(labels[mask], labels[member]).any():
            group |= mask
    return group
