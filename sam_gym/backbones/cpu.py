"""What a CPU computes in another way than a GPU: it spends much of its time on memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def infers_on_cpu(x: Tensor) -> bool:
    """Whether to compute a few rows at a time, and to overwrite what nobody else needs.

    On a CPU, what a layer hands to the next then stays in the cache. With gradients, everything is
    stored anyway.
    """
    return (
        x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    )


def gelu(x: Tensor) -> Tensor:
    """Apply GELU to a tensor that nobody else needs: without gradients, in place."""
    return F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)
