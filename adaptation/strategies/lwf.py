"""Learning without Forgetting: the model of before teaches what it would have said."""

from __future__ import annotations

from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import Tensor

from adaptation.losses import MaskLoss, mask_costs
from adaptation.strategy import STRATEGIES, Batch, Strategy
from sam_gym.backbones.adapters.adapter import embed
from sam_gym.backbones.adapters.tuning import apply_tuned, tuned_weights
from sam_gym.backbones.decode import decode_tokens


@STRATEGIES.register("lwf")
class LwF(Strategy):
    """Li and Hoiem, ECCV 2016; as in CoSAM's release, on the masks of the present domain.

    From the second domain on, cross-entropy and Dice towards the soft mask that the model gave
    before this domain, for the same prompt and mask token.
    """

    def __init__(self, setting: Any) -> None:
        super().__init__(setting)
        self._taught: dict[str, Tensor] | None = None
        self._teacher: Sam | None = None

    def before_task(self, task: int) -> None:
        super().before_task(task)
        self._set_teacher(tuned_weights(self.sam) if task else None)

    def _set_teacher(self, weights: dict[str, Tensor] | None) -> None:
        """The model with tuned weights teaches from now on; it shares what is frozen."""
        setting, self._taught = self.setting, weights
        self._teacher = None
        if weights is not None:
            self._teacher = apply_tuned(setting.sam, setting.tune, weights)

    def loss(self, batch: Batch, masks: MaskLoss) -> Tensor | float:
        if self._teacher is None:
            return 0.0
        with torch.no_grad():
            raw = embed(self._teacher, batch.raw, self.raw)
            tokens = decode_tokens(self._teacher, raw, batch.prompts)
            index = masks.chosen[:, None, None]
            taught = tokens.draw(tokens.vectors.take_along_dim(index, dim=1))[:, 0].sigmoid()
        costs = mask_costs(masks.logits[:, None], taught, batch.valid)
        return self.setting.options.lwf_weight * costs.mean()

    def state(self) -> dict[str, Any]:
        return super().state() | {"teacher": self._taught}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self._set_teacher(state["teacher"])
