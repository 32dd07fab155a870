"""Reference points: the pretrained SAM, and training without any measure against forgetting."""

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


@STRATEGIES.register("naive")
class Naive(Strategy):
    """Fine-tunes on each domain in turn; the lower bound of continual learning."""


@STRATEGIES.register("joint")
class Joint(Strategy):
    """Trains on all domains together, each equally often; the upper bound.

    It takes as many steps as a sequential method on all domains.
    """

    joint: ClassVar[bool] = True
