"""Semantic recalibration: the policy chooses where to click, a segmenter whether it is inside.

After the semantic recalibration module of AlignSAM (Huang et al., CVPR 2024): it sees what the
policy sees through weights of its own, and learns from the training targets by Dice and binary
cross-entropy. The policy is left with places, half as many actions.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import obs_as_tensor
from torch import Tensor, nn
from torch.nn import functional as F

from agents.policies.implicit import ImplicitPolicy
from agents.ppo.distributed import ALONE, ProcessGroup, share_gradients
from sam_gym.envs.click import ClickCore


def recalibration_loss(logits: Tensor, target: Tensor, scored: Tensor) -> Tensor:
    """Dice and binary cross-entropy, averaged over a batch: a scalar.

    Args:
        logits: (B, h, w).
        target: share of each cell that belongs to the target, 0 to 1 (B, h, w).
        scored: share of each cell that counts, 0 to 1 (B, h, w).
    """
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    cross_entropy = (each * scored).sum(dim=(1, 2)) / scored.sum(dim=(1, 2)).clamp(min=1.0)
    probability = logits.sigmoid() * scored
    common = (probability * target).sum(dim=(1, 2))
    total = probability.sum(dim=(1, 2)) + (target * scored).sum(dim=(1, 2))
    dice = 1.0 - (2.0 * common + 1.0) / (total + 1.0)
    return (cross_entropy + dice).mean()


class TrainRecalibration(BaseCallback):
    """Teaches the recalibration of a policy from what its slots show, after each step.

    Args:
        policy: with a recalibration.
        core: the slots, with their targets.
        updates: optimizer steps per step of the environments (the paper: 1 for the implicit agent,
            5 for the explicit one).
        learning_rate: Adam's, which does not fall.
        max_grad_norm: bound on the norm of the gradients.
        ranks: the processes of the run, each with as many slots.
    """

    def __init__(
        self,
        policy: ImplicitPolicy,
        core: ClickCore,
        updates: int,
        learning_rate: float = 1e-3,
        max_grad_norm: float = 0.5,
        ranks: ProcessGroup = ALONE,
    ) -> None:
        super().__init__()
        assert policy.recalibration is not None
        self.module: nn.Module = policy.recalibration
        self.core, self.updates, self.ranks = core, updates, ranks
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=learning_rate)
        share_gradients(self.optimizer, ranks, max_grad_norm)

    def get_state(self) -> dict[str, Any]:
        """The optimizer, for `set_state`; the weights are among the policy's."""
        return self.optimizer.state_dict()

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `get_state`."""
        self.optimizer.load_state_dict(state)

    def _on_step(self) -> bool:
        # The slots have moved on already: what is observed now belongs to their targets now.
        observations = obs_as_tensor(self.locals["new_obs"], self.model.device)
        for _ in range(self.updates):
            logits = self.module(observations)
            target, scored = self.core.soft_targets(cast(Any, logits.shape[-2:]))
            loss = recalibration_loss(logits, target, scored)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        mean = self.ranks.sum(loss.detach()) / self.ranks.world
        self.logger.record_mean("recalibration/loss", float(mean))
        return True
