"""One training step: a batch of prompted objects, and its loss."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor, nn

from adaptation.features import FeatureBank
from adaptation.objects import BatchTargets, ObjectIndices, gather_targets
from adaptation.prompting import training_prompts
from adaptation.strategy import Batch, Strategy


def make_batch(
    bank: FeatureBank,
    indices: ObjectIndices,
    kind: str,
    seeds: np.ndarray,
    make: Callable[[BatchTargets, np.ndarray], Batch | None] | None = None,
) -> Batch:
    """Gather objects and choose a prompt for each.

    The prompt of an object depends on its own seed only, so that processes can share a batch.

    Args:
        bank: of the stream.
        indices: the objects.
        kind: of `raw_features`.
        seeds: int64 (P,), the seed of each prompt.
        make: `Strategy.batch`, or None: box, points or noisy mask.
    """
    own = gather_targets(bank, indices, kind)
    batch = None if make is None else make(own, seeds)
    if batch is not None:
        return batch
    size = bank.backbone.image_size
    drawn = training_prompts(seeds, own.targets, own.boxes, own.rows, size)
    return Batch(own.raw, *drawn, own.targets, own.valid, own.categories)


class Learner(nn.Module):
    """One forward pass from a batch to its loss, as data-parallel training wraps it.

    Args:
        strategy: the method.
    """

    def __init__(self, strategy: Strategy) -> None:
        super().__init__()
        self.module = strategy.module
        # Not a submodule: optimizer and other processes get the trained module only.
        self._strategy = [strategy]

    def forward(self, made: Callable[[], Batch]) -> tuple[Tensor, Tensor]:
        """Compute the loss, and the mean IoU of the masks with their targets.

        Args:
            made: returns the batch. In mixed precision Fabric converts the arguments of a module,
                which fails for frozen dataclasses.
        """
        batch, strategy = made(), self._strategy[0]
        tokens = strategy.decode(batch)
        masks = strategy.masks(batch, tokens)
        return masks.total + strategy.loss(batch, masks), masks.ious.mean()
