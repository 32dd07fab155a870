"""When and how layers are computed in another way on a CPU, which spends most of its time on memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def in_pieces(x: Tensor) -> bool:
    """Whether to compute a few rows of a batch after the others.

    On a CPU, what a layer hands to the next then stays in the cache. With gradients, everything is
    stored anyway.
    """
    return (
        x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    )


def gelu(x: Tensor) -> Tensor:
    """Apply GELU to a tensor that nobody else needs: without gradients, in place."""
    return F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)
