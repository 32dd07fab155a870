"""Muon, an optimizer for matrices and convolutions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def orthogonalized(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Approximate the orthogonal matrix nearest to `matrix` (rows, columns) by Newton-Schulz.

    With the quintic of Jordan et al. 2024, singular values end up between about 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized steps for matrices and convolutions (as output x rest).

    Jordan et al. 2024, "Muon: an optimizer for hidden layers"; step size and weight decay follow
    "Muon is scalable for LLM training" (2025), so that learning rates of AdamW carry over.
    `torch.optim.Muon` takes no convolutions and computes in bfloat16, which is slow on CPUs.

    Args:
        parameters: tensors of two or more dimensions.
        lr: learning rate, as of AdamW.
        weight_decay: decoupled weight decay.
        momentum: of the Nesterov average of the gradients.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step with the gradients there are."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                average = state.setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1.0 - group["momentum"])
                ahead = parameter.grad.lerp(average, group["momentum"]).flatten(1)
                # An orthogonal step has an RMS of 1 / sqrt(longer side); AdamW's is about 0.2.
                size = 0.2 * max(ahead.shape) ** 0.5
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                direction = orthogonalized(ahead).view_as(parameter)
                parameter.add_(direction, alpha=-size * group["lr"])


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon optimizes a parameter: it maps features to features."""
    if parameter.ndim < 2 or "embed" in name or "dwconv" in name:
        return False
    return min(parameter.flatten(1).shape) >= 8


def muon_and_adamw(
    matrices: Sequence[Tensor], rest: Sequence[Tensor], config: Any, weight_decay: float
) -> tuple[torch.optim.Optimizer, ...]:
    """Return Muon for matrices, and AdamW without weight decay for the rest.

    Args:
        matrices, rest: parameters.
        config: a `SmallTrainerConfig`.
        weight_decay: of the matrices.
    """
    adamw = torch.optim.AdamW(
        rest, lr=config.vector_learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    return Muon(matrices, config.learning_rate, weight_decay), adamw
