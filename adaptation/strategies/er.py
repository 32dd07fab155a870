"""Experience replay: train on images of past domains again."""

from __future__ import annotations

from typing import Any, ClassVar

from adaptation.objects import Pool
from adaptation.replay import BufferOptions, buffer_bytes, buffered
from adaptation.strategy import STRATEGIES, Strategy


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
