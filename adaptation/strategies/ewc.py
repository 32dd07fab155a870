"""Elastic weight consolidation: a quadratic penalty on weights that past domains depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptation.losses import MaskLoss, mask_loss
from adaptation.objects import ObjectIndices
from adaptation.steps import make_batch
from adaptation.strategy import STRATEGIES, Batch, Strategy, StrategyContext
from sam_gym.backbones.adapters.tuning import bytes_of
from sam_gym.utils.fields import documented
from sam_gym.utils.settings import Count, NotNegative


@STRATEGIES.register("ewc")
class EWC(Strategy):
    """Kirkpatrick et al. 2017.

    The Fisher information of a domain is estimated as the mean, over `fisher_samples` objects of
    its training images, of the squared gradient of the loss of one object. The penalty is the sum
    over all past domains of Fisher times squared distance from the weights after that domain. It is
    quadratic, so two numbers per weight represent it exactly for any number of domains.
    """

    @documented
    @dataclass(frozen=True)
    class Options:
        weight: NotNegative = 1000.0
        """Weight of the penalty, chosen on val. CoSAM's release has 10, which has no effect with a
        Fisher information of single objects."""
        fisher_samples: Count = 64
        """Objects of a domain from which its Fisher information is estimated."""

    def __init__(self, context: StrategyContext) -> None:
        super().__init__(context)
        self._fisher = {name: torch.zeros_like(w) for name, w in self.trained().items()}
        # Sum over domains of the Fisher information times the weights after that domain.
        self._pull = {name: torch.zeros_like(w) for name, w in self.trained().items()}

    def loss(self, batch: Batch, masks: MaskLoss) -> Tensor | float:
        if self.task == 0:
            return 0.0
        # F w^2 - 2 P w differs from the penalty by a constant.
        parts = [
            (self._fisher[name] * weight.square() - 2 * self._pull[name] * weight).sum()
            for name, weight in self.trained().items()
        ]
        return self.options.weight * torch.stack(parts).sum()

    def after_task(self, task: int) -> None:
        bank = self.context.bank
        rng = np.random.default_rng([self.context.seed, 13, task])
        count = self.options.fisher_samples
        drawn = ObjectIndices.draw(rng, count, [bank.pool(task)])
        weights = self.trained()
        seeds = rng.integers(2**63, size=count)
        for k in range(count):
            batch = make_batch(bank, drawn.part(k, count), self.raw, seeds[k : k + 1])
            cost = mask_loss(self.decode(batch), batch.targets, batch.valid, batch.ambiguous).total
            gradients = torch.autograd.grad(cost, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    own = gradient.square() / count
                    self._fisher[name] += own
                    self._pull[name] += own * weights[name].detach()

    def state(self) -> dict[str, Any]:
        return super().state() | {"fisher": dict(self._fisher), "pull": dict(self._pull)}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self._fisher, self._pull = dict(state["fisher"]), dict(state["pull"])

    def kept_bytes(self) -> int:
        return super().kept_bytes() + bytes_of([*self._fisher.values(), *self._pull.values()])
