"""PPO over the processes of one job, each with its share of the environments.

Start a job with `torchrun --nproc_per_node=N -m agents.train_ppo ...`. Its processes are *ranks*:
each plays its own slots, gradients are averaged, and all hold the same policy at all times. A
process alone runs the same code with nobody to talk to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.utils import explained_variance
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from agents.policies.base import POLICIES
from agents.ppo.rng import SlotCategorical, SlotRolloutBuffer, slot_generators
from sam_gym.backbones.loading import resolve_device

T = TypeVar("T")

#: While the first rank evaluates, the others wait; whoever is silent for longer is taken for dead.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a job, and the place of this one among them.

    Attributes:
        rank: number of this process.
        world: how many there are; 1 for a process alone.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def join(cls, device: str) -> ProcessGroup:
        """The ranks of the job that torchrun has started this process for, or this process alone.

        Args:
            device: of the run; with CUDA, each rank of a machine takes the GPU of its number.

        Raises:
            ValueError: the machine has fewer GPUs than ranks.
        """
        ranks = cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        if ranks.world > 1:
            cuda = resolve_device(device).type == "cuda"
            if cuda:
                _take_gpu(int(os.environ["LOCAL_RANK"]))
            with _with_the_others():
                dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
        return ranks

    def leave(self) -> None:
        """End the exchange: from here on, each rank goes its own way."""
        if self.world > 1:
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this process writes, evaluates and shows progress for all."""
        return self.rank == 0

    def share(self, num_envs: int) -> int:
        """How many of the environments of the job each rank has.

        Raises:
            ValueError: they cannot be shared out evenly.
        """
        if num_envs % self.world:
            raise ValueError(
                f"num_envs must be a multiple of the {self.world} processes, got {num_envs}."
            )
        return num_envs // self.world

    def gather(self, value: T) -> list[T]:
        """What each rank passes, in their order; every rank must call this."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        with _with_the_others():
            dist.all_gather_object(gathered, value)
        return gathered

    def merge(self, events: Iterable[tuple[int, int, T]]) -> list[T]:
        """Values of (step, slot, value) of all ranks, as one process with all slots has them."""
        together = [event for own in self.gather(list(events)) for event in own]
        return [value for _, _, value in sorted(together, key=lambda event: event[:2])]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place; every rank must call this."""
        if self.world > 1:
            with _with_the_others():
                dist.all_reduce(tensor)
        return tensor


#: A process that is in no job.
ALONE = ProcessGroup()


@contextmanager
def _with_the_others() -> Iterator[None]:
    """Say in plain words when other ranks do not answer any more."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            "Another rank has stopped; its message is above. Go on with --resume. "
            f"({str(error).splitlines()[0]})"
        ) from error


def _take_gpu(number: int) -> None:
    """Make one GPU the current one of this process."""
    if number >= torch.cuda.device_count():
        raise ValueError(
            f"This machine has {torch.cuda.device_count()} GPUs, but at least {number + 1} "
            "processes were started. Lower --nproc_per_node, or pass --device cpu."
        )
    torch.cuda.set_device(number)


def share_gradients(optimizer: torch.optim.Optimizer, ranks: ProcessGroup, max_norm: float) -> None:
    """Average gradients over all ranks before each step of an optimizer, then clip their norm.

    SB3 would clip on each rank before the gradients of the others are known.

    Args:
        optimizer: of parameters that have gradients on all ranks or on none.
        ranks: who takes part, with equally large minibatches.
        max_norm: bound on the L2 norm of all gradients.
    """

    def before_step(*_: Any) -> None:
        parameters = [
            parameter
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        gradients = [parameter.grad for parameter in parameters]
        if ranks.world > 1:
            mean = ranks.sum(torch.cat([gradient.flatten() for gradient in gradients]))
            mean /= ranks.world
            parts = mean.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    optimizer.register_step_pre_hook(before_step)


class CountAllProcesses(BaseCallback):
    """Makes `num_timesteps` count the environment steps of all ranks."""

    def __init__(self, ranks: ProcessGroup) -> None:
        super().__init__()
        self.ranks = ranks

    def _on_step(self) -> bool:
        self.model.num_timesteps += (self.ranks.world - 1) * self.training_env.num_envs
        return True


class DistributedPPO(PPO):
    """PPO whose randomness belongs to environment slots, which may be spread over ranks.

    N ranks learn what one process with all their slots would learn, up to rounding. Train it with
    the callback `CountAllProcesses`. What it saves loads as a plain `PPO`.

    Args:
        policy: as `PPO` takes it, with a categorical distribution of actions.
        env: the slots of this rank.
        batch_size: minibatch size over all ranks.
        max_grad_norm: bound on the norm of the averaged gradients.
        seed: of the job; slot `i`, counted over all ranks, plays with `seed + i`.
        ranks: who takes part.
        **kwargs: as `PPO` takes them; advantages are always normalised.

    Raises:
        ValueError: a minibatch cannot hold equally many samples of each slot.
    """

    def __init__(
        self,
        policy: Any,
        env: VecEnv,
        *,
        batch_size: int,
        max_grad_norm: float = 0.5,
        seed: int = 0,
        ranks: ProcessGroup = ALONE,
        **kwargs: Any,
    ) -> None:
        slots = env.num_envs * ranks.world
        if batch_size <= 0 or batch_size % slots:
            raise ValueError(
                f"batch_size must be a multiple of num_envs, so that a minibatch holds equally "
                f"many samples of each environment: got {batch_size} with {slots} environments."
            )
        self.ranks = ranks
        self.first_slot = ranks.rank * env.num_envs
        self.generators = slot_generators(
            seed, range(self.first_slot, self.first_slot + env.num_envs)
        )
        self._episodes: list[tuple[int, int, dict[str, Any]]] = []
        super().__init__(
            policy,
            env,
            batch_size=batch_size // ranks.world,
            # The buffer normalises and the optimizer clips, over all ranks.
            normalize_advantage=False,
            max_grad_norm=float("inf"),
            rollout_buffer_class=SlotRolloutBuffer,
            rollout_buffer_kwargs={"generators": self.generators, "total": ranks.sum},
            seed=seed,
            **kwargs,
        )
        env.seed(seed + self.first_slot)
        choices = cast(CategoricalDistribution, self.policy.action_dist).action_dim
        self.policy.action_dist = SlotCategorical(choices, self.generators)
        share_gradients(self.policy.optimizer, ranks, max_grad_norm)
        #: Name in `POLICIES` under which a saved policy is loaded again; None if it has none.
        self.policy_name = next(
            (name for name, known in POLICIES.items() if known is type(self.policy)), None
        )

    def _excluded_save_params(self) -> list[str]:
        own = ["ranks", "first_slot", "generators", "_episodes"]
        set_here = ["normalize_advantage", "max_grad_norm"]
        buffer = ["rollout_buffer_class", "rollout_buffer_kwargs"]
        return super()._excluded_save_params() + own + set_here + buffer

    def _update_info_buffer(
        self, infos: list[dict[str, Any]], dones: np.ndarray | None = None
    ) -> None:
        self._episodes += [
            (self.num_timesteps, self.first_slot + i, info["episode"])
            for i, info in enumerate(infos)
            if "episode" in info
        ]

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
        goes_on = super().collect_rollouts(*args, **kwargs)
        assert self.ep_info_buffer is not None
        self.ep_info_buffer.extend(self.ranks.merge(self._episodes))
        self._episodes = []
        return goes_on

    def train(self) -> None:
        super().train()
        if self.ranks.world > 1:
            self._average_logged()

    def _average_logged(self) -> None:
        """Make what an update logs the same on all ranks."""
        logged = self.logger.name_to_value
        # Counts of updates are integers and the same everywhere.
        names = sorted(
            name
            for name, value in logged.items()
            if name.startswith("train/") and not isinstance(value, int)
        )
        means = np.mean(self.ranks.gather([float(logged[name]) for name in names]), axis=0)
        logged.update(zip(names, means.tolist(), strict=True))
        buffer = self.rollout_buffer
        values, returns = (
            np.concatenate(self.ranks.gather(own.flatten()))
            for own in (buffer.values, buffer.returns)
        )
        logged["train/explained_variance"] = explained_variance(values, returns)


def recorded(main: Callable[[], T]) -> Callable[[], T]:
    """A command whose errors torchrun can name at the end, if it was torchrun that started it."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return main
    from torch.distributed.elastic.multiprocessing.errors import record

    return cast(Callable[[], T], record(main))
