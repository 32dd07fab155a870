"""One training step: its batch, and its loss."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from adaptation.features import FeatureBank
from adaptation.objects import BatchTargets, ObjectIndices, gather_targets
from adaptation.prompting import training_prompts
from adaptation.strategy import Batch, Step, Strategy


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


def draw_objects(strategy: Strategy, step: Step, per_augmentation: int) -> Batch:
    """Draw the objects of a step, of the domain and as many replayed ones, with their prompts.

    Args:
        strategy: the method.
        step: the step.
        per_augmentation: objects from each augmented image.
    """
    rng = np.random.default_rng([step.seed, 3, step.stage, step.number])
    bank, world = strategy.context.bank, step.world
    tasks = range(len(bank.stream)) if strategy.joint else [step.stage]
    drawn = [
        ObjectIndices.draw(rng, step.batch_size, pools, per_augmentation)
        for pools in ([bank.pool(task) for task in tasks], strategy.replayed())
        if pools
    ]
    # One row of seeds for objects of the domain, another for replayed ones.
    seeds = rng.integers(2**63, size=(2, world, step.batch_size // world))[:, step.rank]
    own = functools.reduce(operator.add, (indices.part(step.rank, world) for indices in drawn))
    return make_batch(bank, own, strategy.raw, seeds[: len(drawn)].ravel(), strategy.batch)


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

    def forward(self, made: Callable[[], Any]) -> tuple[Tensor, Tensor]:
        """Compute the loss, and the mean IoU of what is predicted.

        Args:
            made: returns the batch. In mixed precision Fabric converts the arguments of a module,
                which fails for frozen dataclasses.
        """
        return self._strategy[0].forward(made())
