"""Experience replay: images of past domains are trained on again."""

from __future__ import annotations

import numpy as np

from adaptation.strategy import STRATEGIES, Strategy, image_bytes, images_kept
from adaptation.views import Draw


@STRATEGIES.register("er")
class ER(Strategy):
    """Rolnick et al. 2019; Chaudhry et al. 2019: a buffer of a few images of each past domain.

    Each step takes as many objects from the buffer, all past domains alike, as from the present
    domain.
    """

    def more(self, rng: np.random.Generator, count: int, per_view: int = 1) -> Draw | None:
        past = range(self.task)
        if not past:
            return None
        bank = self.setting.bank
        views = [
            (task, bank.train(bank.stream[task]), kept)
            for task, kept in zip(past, images_kept(self.setting, past), strict=True)
        ]
        return Draw.from_views(rng, count, views, per_view)

    def kept_bytes(self) -> int:
        return super().kept_bytes() + image_bytes(self.setting, range(self.task + 1))
