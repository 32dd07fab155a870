"""The pretrained SAM."""

from __future__ import annotations

from typing import ClassVar

from adaptation.strategy import STRATEGIES, Strategy
from sam_gym.backbones.adapters.adapter import Adapter
from sam_gym.backbones.adapters.model import Model


@STRATEGIES.register("zero_shot")
class ZeroShot(Strategy):
    """Evaluates the pretrained SAM and learns nothing."""

    learns: ClassVar[bool] = False

    def model(self) -> Model:
        return self.context.bank.backbone.pretrained

    def adapter(self) -> Adapter:
        raise ValueError(
            "zero_shot learns nothing, so there is no adapter: use the backbone itself."
        )

    def kept_bytes(self) -> int:
        return 0
