"""Random numbers per sub-environment, independent of the number of processes.

Exploration and minibatches use one generator per sub-environment. A run gives the same result
whether one process holds all sub-environments or several share them, and its random state is that
of its sub-environments.
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


def env_generators(seed: int, env_indices: Iterable[int]) -> list[np.random.Generator]:
    """Return an independent generator for each sub-environment.

    Args:
        seed: of the run.
        env_indices: the sub-environments, counted over all processes.
    """
    seeds = (np.random.SeedSequence(seed, spawn_key=(index,)) for index in env_indices)
    return [np.random.default_rng(own) for own in seeds]


class PerEnvCategorical(CategoricalDistribution):
    """A categorical distribution that samples each row with its sub-environment's generator.

    Args:
        action_dim: number of actions.
        generators: one per row.
    """

    def __init__(self, action_dim: int, generators: Sequence[np.random.Generator]) -> None:
        super().__init__(action_dim)
        self.generators = generators

    def sample(self) -> Tensor:
        """Sample actions int64 (B,).

        Raises:
            ValueError: the batch does not have one row per sub-environment.
        """
        logits = self.distribution.logits
        if len(logits) != len(self.generators):
            raise ValueError(
                f"This policy explores in {len(self.generators)} sub-environments, got a batch of "
                f"{len(logits)}. Act deterministically, or load policy.zip."
            )
        # The first of exponential arrivals with rates p is category k with probability p[k].
        waiting = np.stack([rng.standard_exponential(self.action_dim) for rng in self.generators])
        return (logits - torch.from_numpy(np.log(waiting)).to(logits)).argmax(dim=1)


class PerEnvRolloutBuffer(DictRolloutBuffer):
    """A rollout buffer whose minibatches hold equally many samples of each sub-environment.

    Normalises advantages over the whole minibatch, across processes.

    Args:
        *args: as SB3 passes them.
        generators: of the sub-environments, in order.
        total: function that sums a tensor over all processes.
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
        """Yield the minibatches of one pass over the rollout.

        Args:
            batch_size: samples per minibatch, a multiple of the sub-environments (default: all).
        """
        assert self.full, "the rollout is incomplete"
        if not self.generator_ready:
            self._flatten()
        order = np.stack([rng.permutation(self.buffer_size) for rng in self.generators])
        order += self.buffer_size * np.arange(self.n_envs)[:, None]
        share = self.buffer_size if batch_size is None else batch_size // self.n_envs
        for first in range(0, self.buffer_size, share):
            yield self._get_samples(order[:, first : first + share].ravel())

    def _flatten(self) -> None:
        """Reshape arrays: (steps, num_envs, ...) -> (num_envs * steps, ...)."""
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
        """Standardise advantages (B,) over all processes."""
        count, total = self.total(
            torch.stack([advantages.new_tensor(len(advantages)), advantages.sum()])
        )
        if count <= 1:
            return advantages
        centred = advantages - total / count
        variance = self.total(centred.square().sum()) / (count - 1)
        return centred / (variance.sqrt() + 1e-8)
