"""The pointing game: does the maximum of a word's map lie on an object of that category?

Zhang et al. 2018, "Top-down Neural Attention by Excitation Backprop".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from agents.clip.surgery import ClipSurgery
from sam_gym.data.base import Sample
from sam_gym.utils.registry import unknown_name

Redundant = Literal["empty", "texts", "none"]


@dataclass(frozen=True)
class PointingResult:
    """Outcome of a pointing game, one entry per image and category in it.

    Attributes:
        hits: bool (K,), whether the maximum of the map lies on an object of the category.
        chances: float64 (K,), fraction of the image that the category covers: the accuracy of a
            random point.
        categories: int64 (K,).
    """

    hits: np.ndarray
    chances: np.ndarray
    categories: np.ndarray

    @property
    def accuracy(self) -> float:
        return float(self.hits.mean())

    @property
    def half_width(self) -> float:
        """Half-width of the 95% interval of the accuracy (normal approximation)."""
        return float(1.96 * np.sqrt(self.accuracy * (1 - self.accuracy) / len(self.hits)))

    @property
    def chance(self) -> float:
        return float(self.chances.mean())

    def by_category(self, names: Sequence[str]) -> dict[str, float]:
        """Return the accuracy of each category that occurs."""
        return {
            names[k]: float(self.hits[self.categories == k].mean())
            for k in np.unique(self.categories)
        }


def pointing_game(
    surgery: ClipSurgery,
    samples: Sequence[Sample],
    names: Sequence[str],
    redundant: Redundant = "empty",
) -> PointingResult:
    """Play the pointing game with every category of every image.

    Args:
        surgery: computes the maps; with 0 blocks, from CLIP's own patch tokens.
        samples: images with masks.
        names: category names, by index.
        redundant: feature to subtract: that of the empty prompt ("empty"), the weighted mean of
            all names ("texts"), or nothing ("none").
    """
    texts = surgery.embed_texts(names)
    off = redundant_feature(surgery, redundant)
    hits, chances, categories = [], [], []
    for sample in samples:
        maps = word_maps(surgery, sample.image, texts, off)
        for category in np.unique(sample.categories):
            mask = sample.category_mask(int(category))
            y, x = _peak(maps[category], mask.shape)
            hits.append(bool(mask[y, x]))
            chances.append(float(mask.mean()))
            categories.append(int(category))
    return PointingResult(np.array(hits), np.array(chances), np.array(categories))


def redundant_feature(surgery: ClipSurgery, redundant: Redundant) -> Tensor | None:
    """Return the `redundant` argument of `feature_surgery`: (E,), or None for "texts"."""
    if redundant not in get_args(Redundant):
        raise unknown_name("redundant feature", redundant, get_args(Redundant))
    if redundant == "texts":
        return None
    empty = surgery.redundant()
    return empty if redundant == "empty" else torch.zeros_like(empty)


def word_maps(
    surgery: ClipSurgery, image: np.ndarray, texts: Tensor, redundant: Tensor | None
) -> Tensor:
    """Return the maps (N, h, w) of an image uint8 (H, W, 3), not scaled."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    return surgery.similarity(pixels, texts, redundant)[0][0]


def _peak(similarity: Tensor, size: tuple[int, int]) -> tuple[int, int]:
    """Return row and column of the maximum of a map (h, w) resized to an image."""
    full = F.interpolate(similarity[None, None], size, mode="bilinear", align_corners=False)
    return divmod(int(full.argmax()), size[1])
