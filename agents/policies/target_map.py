"""A module beside the policy that learns to predict the target, and what it is used for.

- Semantic recalibration, after AlignSAM (Huang et al., CVPR 2024): the policy chooses where to
  click, and the module labels the click. That halves the policy's action space.
- Search: the module judges the masks of several clicks before one is played, see `agents.search`,
  and guides the policy: the errors that it sees in a mask are added to the logits of clicks.

The module has its own copy of the policy's features and learns from the targets of the training
with Dice and binary cross-entropy losses. Environments and evaluations never show it a target.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import obs_as_tensor, update_learning_rate
from torch import Tensor, nn
from torch.nn import functional as F

from agents.policies.implicit import ImplicitPolicy
from agents.ppo.distributed import share_gradients
from sam_gym.envs.click import ClickCore
from sam_gym.utils.process_group import ALONE, ProcessGroup


def target_loss(logits: Tensor, target: Tensor, scored: Tensor) -> Tensor:
    """Return the sum of Dice and binary cross-entropy losses, averaged over a batch.

    Args:
        logits: (B, h, w).
        target: fraction of each cell that belongs to the target, 0 to 1 (B, h, w).
        scored: fraction of each cell that is scored, 0 to 1 (B, h, w).
    """
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    cross_entropy = (each * scored).sum(dim=(1, 2)) / scored.sum(dim=(1, 2)).clamp(min=1.0)
    probability = logits.sigmoid() * scored
    common = (probability * target).sum(dim=(1, 2))
    total = probability.sum(dim=(1, 2)) + (target * scored).sum(dim=(1, 2))
    dice = 1.0 - (2.0 * common + 1.0) / (total + 1.0)
    return (cross_entropy + dice).mean()


class TrainTargetMap(BaseCallback):
    """Trains the target map of a policy after each environment step.

    Args:
        policy: with a target map.
        core: the sub-environments, with their targets.
        updates: optimizer steps per step of the environments (AlignSAM: 1 for the implicit agent,
            5 for the explicit one).
        rate: Adam's learning rate, as a multiple of PPO's at that time.
        max_grad_norm: bound on the norm of the gradients.
        ranks: the processes of the run, with equally many sub-environments each.
    """

    def __init__(
        self,
        policy: ImplicitPolicy,
        core: ClickCore,
        updates: int,
        rate: float = 2.0,
        max_grad_norm: float = 0.5,
        ranks: ProcessGroup = ALONE,
    ) -> None:
        super().__init__()
        assert policy.target_map is not None
        self.module: nn.Module = policy.target_map
        self.core, self.updates, self.rate, self.ranks = core, updates, rate, ranks
        self.optimizer = torch.optim.Adam(self.module.parameters())
        share_gradients(self.optimizer, ranks, max_grad_norm)

    def get_state(self) -> dict[str, Any]:
        """Return the optimizer's state, for `set_state`; the policy holds the weights."""
        return self.optimizer.state_dict()

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore the state that `get_state` returned."""
        self.optimizer.load_state_dict(state)

    def _on_step(self) -> bool:
        self.update(self.locals["new_obs"])
        return True

    def update(self, new_obs: dict[str, Any]) -> None:
        """Make the updates of a step of the environments.

        Args:
            new_obs: what they returned. The core is one step ahead, and so are its targets.
        """
        observations = obs_as_tensor(new_obs, self.model.device)
        schedule: Schedule = cast(Any, self.model).lr_schedule
        now = schedule(cast(Any, self.model)._current_progress_remaining)
        update_learning_rate(self.optimizer, self.rate * now)
        for _ in range(self.updates):
            logits = self.module(observations)
            target, scored = self.core.soft_targets(cast(Any, logits.shape[-2:]))
            loss = target_loss(logits, target, scored)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        mean = self.ranks.sum(loss.detach()) / self.ranks.world
        self.logger.record_mean("target_map/loss", float(mean))
