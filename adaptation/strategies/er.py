"""Experience replay: images of past domains are trained on again."""

from __future__ import annotations

import numpy as np

from adaptation.features import Views
from adaptation.strategy import STRATEGIES, Strategy, image_bytes, images_kept


@STRATEGIES.register("er")
class ER(Strategy):
    """Rolnick et al. 2019; Chaudhry et al. 2019: a buffer of a few images of each past domain.

    Each step takes as many objects from the buffer, all past domains alike, as from the present
    domain.
    """

    def replayed(self) -> list[tuple[int, Views, np.ndarray]]:
        bank, past = self.setting.bank, range(self.task)
        buffers = images_kept(self.setting, past)
        return [
            (task, bank.train(bank.stream[task]), kept)
            for task, kept in zip(past, buffers, strict=True)
        ]

    def kept_bytes(self) -> int:
        return super().kept_bytes() + image_bytes(self.setting, range(self.task + 1))
