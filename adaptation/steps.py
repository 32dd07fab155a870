"""A step of training: which objects, with which prompts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor, nn

from adaptation.features import BatchTargets, FeatureBank, ObjectIndices, gathered
from adaptation.prompting import training_prompts
from adaptation.strategy import Batch, Strategy


def make_batch(
    bank: FeatureBank,
    draw: ObjectIndices,
    kind: str,
    seeds: np.ndarray,
    make: Callable[[BatchTargets, np.ndarray], Batch | None] | None = None,
) -> Batch:
    """The objects of a draw, each with a prompt that is drawn with a seed of its own.

    An object's prompt depends on its own seed alone, so that processes can share a batch.

    Args:
        bank: of the stream.
        draw: which objects.
        kind: of `raw_features`.
        seeds: int64 (P,), of each prompt.
        make: `Strategy.batch`, or None: box, points or noisy mask.
    """
    own = gathered(bank, draw, kind)
    batch = None if make is None else make(own, seeds)
    if batch is not None:
        return batch
    size = bank.backbone.image_size
    drawn = training_prompts(seeds, own.targets, own.boxes, own.rows, size)
    return Batch(own.raw, *drawn, own.targets, own.valid, own.categories)


class Learner(nn.Module):
    """What a process trains: one forward pass from a batch to its loss.

    Args:
        strategy: whose trained module it is.
    """

    def __init__(self, strategy: Strategy) -> None:
        super().__init__()
        self.module = strategy.module
        # Not a submodule: only what is trained is handed to the optimizer and to other processes.
        self._strategy = [strategy]

    def forward(self, made: Callable[[], Batch]) -> tuple[Tensor, Tensor]:
        """The loss, and the mean IoU of the masks with their targets.

        Args:
            made: gives the batch. In mixed precision Fabric goes through what it is passed, and
                refuses frozen dataclasses.
        """
        batch, strategy = made(), self._strategy[0]
        tokens = strategy.decode(batch)
        masks = strategy.masks(batch, tokens)
        return masks.total + strategy.loss(batch, masks), masks.ious.mean()
