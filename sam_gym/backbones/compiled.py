"""Compiled model calls with few distinct shapes, to avoid recompilation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: Number of shapes per function; torch's lower limits guard against accidental recompilation.
_LIMITS = {"recompile_limit": 256, "accumulated_recompile_limit": 4096}


def padded_size(count: int) -> int:
    """The power of two to which a batch of `count` rows is padded."""
    return 1 << max(0, count - 1).bit_length()


class FixedShapes:
    """A function compiled for batches of 1, 2, 4, ... rows; others are padded up to the next.

    On CUDA, calls are CUDA graphs (`mode="reduce-overhead"`). The first call of each size compiles,
    which can take minutes; later calls never do.

    Args:
        function: maps tensors of B rows, and other constants, to tensors of B rows, row by row.
        backend: of `torch.compile`, a name or a function.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        backend: str | Callable[..., Callable[..., Sequence[Tensor]]] = "inductor",
    ) -> None:
        mode = "reduce-overhead" if backend == "inductor" else None
        self._compiled = torch.compile(
            function, fullgraph=True, dynamic=False, backend=backend, mode=mode
        )

    def __call__(self, *inputs: Any) -> list[Tensor]:
        count = next(len(value) for value in inputs if isinstance(value, Tensor))
        missing = padded_size(count) - count
        if missing:
            inputs = tuple(
                torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if isinstance(x, Tensor) else x
                for x in inputs
            )
        with torch._dynamo.config.patch(_LIMITS):
            torch.compiler.cudagraph_mark_step_begin()
            outputs = self._compiled(*inputs)
        # The next call of a CUDA graph overwrites the result of this one.
        return [output[:count].clone() for output in outputs]
