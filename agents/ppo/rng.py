"""Randomness that belongs to an environment slot, not to the process that plays it.

Exploration and minibatches are drawn from one generator per slot. The same slots then play and
learn the same, whether one process has them all or several share them, and the state of a run is
that of its slots.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor


def slot_generators(seed: int, slots: Iterable[int]) -> list[np.random.Generator]:
    """A generator for each slot, independent of all others of the same seed.

    Args:
        seed: of the run.
        slots: numbers of the slots, counted over all processes.
    """
    return [
        np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(slot,))) for slot in slots
    ]


class SlotCategorical(CategoricalDistribution):
    """A categorical distribution in which each row samples with its slot's own generator.

    Args:
        action_dim: number of actions.
        generators: of the slots, in the order of the rows.
    """

    def __init__(self, action_dim: int, generators: Sequence[np.random.Generator]) -> None:
        super().__init__(action_dim)
        self.generators = generators

    def sample(self) -> Tensor:
        """Actions int64 (B,), one per slot.

        Raises:
            ValueError: the batch does not have one row per slot.
        """
        logits = self.distribution.logits
        if len(logits) != len(self.generators):
            raise ValueError(
                f"This policy explores in {len(self.generators)} slots, got a batch of "
                f"{len(logits)}. Act deterministically, or load policy.zip."
            )
        # The first of exponential arrivals with rates p is category k with probability p[k].
        waiting = np.stack([rng.standard_exponential(self.action_dim) for rng in self.generators])
        return (logits - torch.from_numpy(np.log(waiting)).to(logits)).argmax(dim=1)


class SlotRolloutBuffer(DictRolloutBuffer):
    """A rollout of some slots, whose minibatches hold equally many samples of each.

    Advantages are normalised over the whole minibatch, which may be spread over processes.

    Args:
        *args: as SB3 passes them.
        generators: of the slots, in order.
        total: sums a tensor over all processes.
        **kwargs: as SB3 passes them.
    """

    def __init__(
        self,
        *args: Any,
        generators: Sequence[np.random.Generator],
        total: Callable[[Tensor], Tensor],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.generators, self.total = generators, total

    def get(  # type: ignore[override]
        self, batch_size: int | None = None
    ) -> Generator[DictRolloutBufferSamples, None, None]:
        """One pass over the rollout.

        Args:
            batch_size: samples per minibatch, a multiple of the slots (default: all).
        """
        assert self.full, "a rollout is read when it is complete"
        if not self.generator_ready:
            self._flatten()
        order = np.stack([rng.permutation(self.buffer_size) for rng in self.generators])
        order += self.buffer_size * np.arange(self.n_envs)[:, None]
        share = self.buffer_size if batch_size is None else batch_size // self.n_envs
        for first in range(0, self.buffer_size, share):
            yield self._get_samples(order[:, first : first + share].ravel())

    def _flatten(self) -> None:
        """Lay the arrays out slot after slot: (steps, slots, ...) -> (slots * steps, ...)."""
        for key, values in self.observations.items():
            self.observations[key] = self.swap_and_flatten(values)
        for name in ("actions", "values", "log_probs", "advantages", "returns"):
            setattr(self, name, self.swap_and_flatten(getattr(self, name)))
        self.generator_ready = True

    def _get_samples(  # type: ignore[override]
        self, batch_inds: np.ndarray, env: VecNormalize | None = None
    ) -> DictRolloutBufferSamples:
        samples = super()._get_samples(batch_inds, env)
        return samples._replace(advantages=self._normalised(samples.advantages))

    def _normalised(self, advantages: Tensor) -> Tensor:
        """Advantages (B,) less their mean, over their standard deviation, over all processes."""
        count, total = self.total(
            torch.stack([advantages.new_tensor(len(advantages)), advantages.sum()])
        )
        if count <= 1:
            return advantages
        centred = advantages - total / count
        variance = self.total(centred.square().sum()) / (count - 1)
        return centred / (variance.sqrt() + 1e-8)
