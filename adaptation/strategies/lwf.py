"""Learning without Forgetting: distil the model from before the current domain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import Tensor

from adaptation.losses import MaskLoss, mask_costs
from adaptation.strategy import STRATEGIES, Batch, Strategy, StrategyContext
from sam_gym.backbones.adapters.model import embed
from sam_gym.backbones.adapters.tuning import tuned_weights
from sam_gym.backbones.decode import decode_tokens
from sam_gym.utils.fields import documented
from sam_gym.utils.settings import NotNegative


@STRATEGIES.register("lwf")
class LwF(Strategy):
    """Li and Hoiem, ECCV 2016. As in CoSAM's release, on the masks of the current domain.

    From the second domain on, adds cross-entropy and Dice loss towards the soft mask that the model
    from before this domain predicts for the same prompt and mask token.
    """

    @documented
    @dataclass(frozen=True)
    class Options:
        weight: NotNegative = 3.0
        """Weight of the distillation loss."""

    def __init__(self, context: StrategyContext) -> None:
        super().__init__(context)
        self._teacher_weights: dict[str, Tensor] | None = None
        self._teacher: Sam | None = None

    def before_task(self, task: int) -> None:
        super().before_task(task)
        self._set_teacher(tuned_weights(self.sam) if task else None)

    def _set_teacher(self, weights: dict[str, Tensor] | None) -> None:
        """Make the SAM with these tuned weights the teacher; None: no teacher."""
        self._teacher_weights, self._teacher = weights, None
        if weights is not None:
            backbone = self.context.bank.backbone
            self._teacher = backbone.apply_tuned(self.context.tune, weights)

    def loss(self, batch: Batch, masks: MaskLoss) -> Tensor | float:
        if self._teacher is None:
            return 0.0
        with torch.no_grad():
            features = embed(self._teacher, batch.raw)
            tokens = decode_tokens(self._teacher, features, batch.prompts)
            chosen = tokens.mask_embeddings.take_along_dim(masks.chosen[:, None, None], dim=1)
            soft = tokens.decode_masks(chosen)[:, 0].sigmoid()
        costs = mask_costs(masks.logits[:, None], soft, batch.valid)
        return self.options.weight * costs.mean()

    def state(self) -> dict[str, Any]:
        return super().state() | {"teacher": self._teacher_weights}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self._set_teacher(state["teacher"])
