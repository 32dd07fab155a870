"""Batch normalisation that does not depend on the number of processes."""

from __future__ import annotations

from typing import Any, cast

import torch.distributed
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


def processes() -> int:
    """Return the number of processes that train together."""
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return 1 if alone else torch.distributed.get_world_size()


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """Normalises by the batches of all processes, which are of one size.

    `torch.nn.SyncBatchNorm` does the same on GPUs only.
    """

    def forward(self, x: Tensor) -> Tensor:
        world = processes()
        if not self.training or world == 1:
            return super().forward(x)
        own = x.float()
        mean = all_reduce(own.mean(dim=(0, 2, 3))) / world
        centred = own - mean[:, None, None]
        variance = all_reduce(centred.square().mean(dim=(0, 2, 3))) / world
        self._update(mean.detach(), variance.detach(), world * x[:, 0].numel())
        scale = cast(Tensor, self.weight) * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def _update(self, mean: Tensor, variance: Tensor, count: int) -> None:
        running_mean, running_var = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        momentum = cast(float, self.momentum)
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * (count / (count - 1)), momentum)
        cast(Tensor, self.num_batches_tracked).add_(1)


def synchronise(module: Any) -> Any:
    """Replace the batch normalisations in a module, in place; names of weights stay."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            own = SyncedBatchNorm2d(child.num_features, child.eps, cast(float, child.momentum))
            own.load_state_dict(child.state_dict())
            setattr(module, name, own)
        else:
            synchronise(child)
    return module
