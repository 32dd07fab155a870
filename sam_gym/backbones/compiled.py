"""Compiled model calls that see few shapes, so that nothing compiles once work is under way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: Shapes that one function may be compiled for; torch's own limits are for shapes by accident.
_LIMITS = {"recompile_limit": 256, "accumulated_recompile_limit": 4096}


def padded_size(count: int) -> int:
    """The power of two that a batch of `count` rows is padded to."""
    return 1 << max(0, count - 1).bit_length()


class FixedShapes:
    """A function compiled for batches of 1, 2, 4, ... rows; others are padded up to the next.

    On CUDA its calls are CUDA graphs (`mode="reduce-overhead"`). The first call of each size
    compiles, which takes up to minutes; later ones never do.

    Args:
        function: tensors of B rows (or None) -> tensors of B rows, row by row.
        backend: what compiles, a name that `torch.compile` knows or a function.
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

    def __call__(self, *inputs: Tensor | None) -> list[Tensor]:
        count = next(len(tensor) for tensor in inputs if tensor is not None)
        missing = padded_size(count) - count
        if missing:
            inputs = tuple(
                None if x is None else torch.cat([x, x[-1:].expand(missing, *x.shape[1:])])
                for x in inputs
            )
        with torch._dynamo.config.patch(_LIMITS):
            torch.compiler.cudagraph_mark_step_begin()
            outputs = self._compiled(*inputs)
        # The next call of a CUDA graph overwrites what this one returned.
        return [output[:count].clone() for output in outputs]
