"""The SAM as it is."""

from __future__ import annotations

from typing import ClassVar

from adaptation.strategy import STRATEGIES, Strategy
from sam_gym.backbones.adapters.adapter import Adapter, Model


@STRATEGIES.register("zero_shot")
class ZeroShot(Strategy):
    """Learns nothing."""

    learns: ClassVar[bool] = False

    def model(self) -> Model:
        return Model(self.context.sam, "embedding")

    def adapter(self) -> Adapter:
        raise ValueError(
            "zero_shot learns nothing, so there is no adapter: use the backbone itself."
        )

    def kept_bytes(self) -> int:
        return 0
