"""Weights of the classes in a cross-entropy, against rare classes that vanish."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np

from sam_gym.data.base import IGNORED
from sam_gym.utils.registry import check_choice

#: Rule of `class_weights`.
Weighting = Literal["none", "enet", "median"]
_RULES = ("none", "enet", "median")


class PixelCounts(NamedTuple):
    """Pixels of label maps, without ignored ones.

    Attributes:
        classes: int64 (C,), pixels of each class.
        images: int64 (C,), pixels of the label maps that show the class.
    """

    classes: np.ndarray
    images: np.ndarray


def count_pixels(labels: Iterable[np.ndarray], num_classes: int) -> PixelCounts:
    """Count the pixels of label maps.

    Args:
        labels: uint8 (H, W) each, classes or `IGNORED`.
        num_classes: C.
    """
    counts = PixelCounts(np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64))
    for own in labels:
        found = np.bincount(own[own != IGNORED], minlength=num_classes)
        counts.classes[:] += found
        counts.images[found > 0] += found.sum()
    return counts


def class_weights(rule: Weighting, counts: PixelCounts) -> np.ndarray:
    """Compute the weight of each class: float64 (C,).

    Args:
        rule: "none": 1. "enet": 1 / ln(1.02 + p), p the fraction of all pixels (Paszke et al. 2016,
            ENet, section 5.2). "median": the median of the classes' frequencies, divided by that of
            the class, where a frequency is the fraction of the pixels of the images that show the
            class (Eigen and Fergus 2015, section 6.3.2; SegNet). Classes without pixels have 1.
        counts: of the training label maps.

    Raises:
        ValueError: the rule is unknown.
    """
    check_choice("class weights", rule, _RULES)
    weights, there = np.ones(len(counts.classes)), counts.classes > 0
    own = counts.classes[there]
    if rule == "enet":
        weights[there] = 1 / np.log(1.02 + own / own.sum())
    elif rule == "median" and own.size:
        frequencies = own / counts.images[there]
        weights[there] = np.median(frequencies) / frequencies
    return weights
