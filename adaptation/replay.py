"""Buffers of training images of past domains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from adaptation.features import FeatureBank
from adaptation.objects import Pool


@dataclass(frozen=True)
class BufferOptions:
    """Options of methods that keep images of past domains."""

    buffer_images: int = 10
    """Images of each past domain that are kept."""


def buffered(bank: FeatureBank, seed: int, tasks: Iterable[int], count: int) -> list[Pool]:
    """The augmented images of each domain that show the images in its buffer.

    Args:
        bank: of the stream.
        seed: of the choice.
        tasks: indices of the domains.
        count: images in a buffer, at most.
    """
    pools = []
    for task in tasks:
        pool = bank.pool(task)
        rng = np.random.default_rng([seed, 11, task])
        chosen = rng.permutation(np.unique(pool.images.image))[:count]
        allowed = np.flatnonzero(np.isin(pool.images.image, chosen))
        pools.append(pool._replace(allowed=allowed))
    return pools


def buffer_bytes(bank: FeatureBank, tasks: Iterable[int], count: int) -> int:
    """Bytes of the images in the buffers of domains, as frames of the model."""
    size = bank.backbone.image_size
    kept = sum(min(count, len(np.unique(bank.pool(task).images.image))) for task in tasks)
    return kept * 3 * size * size
