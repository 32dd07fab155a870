"""Augmented copies of the images of a dataset."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from sam_gym.data.base import Dataset, Sample, check_index
from sam_gym.utils.settings import Count, checked

#: Smallest side of a crop, as a fraction of the image's.
_CROP = 0.5


class Augmented:
    """A dataset with augmented copies: crops of the image's aspect ratio, half of them flipped.

    A SAM scales every image to its frame, so objects of a crop are larger there. A crop shows all
    categories of its image. All else is that of the dataset: its name, categories, files.

    Args:
        dataset: the images.
        augmentations: samples per image; the first is the image itself.
    """

    @checked
    def __init__(self, dataset: Dataset, augmentations: Count) -> None:
        self.dataset, self.augmentations = dataset, augmentations
        self.name, self.categories = dataset.name, dataset.categories

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # in a copy that is being made
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset) * self.augmentations

    def __getitem__(self, index: int) -> Sample:
        check_index(self.name, index, len(self))
        number, copy = divmod(index, self.augmentations)
        sample = self.dataset[number]
        return sample if copy == 0 else _augmented(sample, np.random.default_rng([number, copy]))

    def draw(self, rng: np.random.Generator) -> tuple[int, int | None]:
        number, category = self.dataset.draw(rng)
        return number * self.augmentations + int(rng.integers(self.augmentations)), category


def _augmented(sample: Sample, rng: np.random.Generator) -> Sample:
    """Return a crop that keeps all categories, or else the whole image; flipped or not."""
    height, width = sample.image.shape[:2]
    share = rng.uniform(_CROP, 1.0)
    rows, columns = (max(1, round(share * side)) for side in (height, width))
    y, x = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
    place = (slice(y, y + rows), slice(x, x + columns))
    kept = sample.masks[:, *place].any(axis=(1, 2))
    if set(sample.categories[kept]) != set(sample.categories):
        place, kept = (slice(None), slice(None)), np.ones(len(sample.masks), bool)
    step = -1 if rng.random() < 0.5 else 1

    def cut(pixels: np.ndarray | None, first: int = 0) -> np.ndarray | None:
        if pixels is None:
            return None
        own = pixels[(slice(None),) * first + place]
        return np.ascontiguousarray(np.flip(own, first + 1) if step < 0 else own)

    image, masks = cut(sample.image), cut(sample.masks[kept], first=1)
    assert image is not None and masks is not None
    return replace(
        sample,
        image=image,
        masks=masks,
        categories=sample.categories[kept],
        source=f"{sample.source} (augmented)",
        ignore=cut(sample.ignore),
        parts=cut(sample.parts, first=1),
        semantic=cut(sample.semantic),
        digest=None,
    )
