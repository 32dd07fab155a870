"""Experience replay: train on images of past domains again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from adaptation.features import FeatureBank, Pool
from adaptation.strategy import STRATEGIES, Strategy
from sam_gym.utils.fields import documented
from sam_gym.utils.settings import Count


@documented
@dataclass(frozen=True)
class BufferOptions:
    """Options of methods that keep images of past domains."""

    buffer_images: Count = 10
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


@STRATEGIES.register("er")
class ER(Strategy):
    """Rolnick et al. 2019; Chaudhry et al. 2019: a buffer of a few images of each past domain.

    Each step draws as many objects from the buffer, all past domains alike, as from the current
    domain.
    """

    Options: ClassVar[type[Any]] = BufferOptions

    def replayed(self) -> list[Pool]:
        count = self.options.buffer_images
        return buffered(self.context.bank, self.context.seed, range(self.task), count)

    def kept_bytes(self) -> int:
        count = self.options.buffer_images
        return super().kept_bytes() + buffer_bytes(self.context.bank, range(self.task + 1), count)
