"""The processes of one job, which torchrun starts: on one machine or on several."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

#: Timeout of collectives. The other ranks wait while the first one evaluates or merges.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a job.

    Attributes:
        rank: index of this process.
        world: number of processes.
        resume: what to do after one of them has stopped, for messages.
    """

    rank: int = 0
    world: int = 1
    resume: str = "Run the same command again to resume."

    @classmethod
    def join(cls, *, cuda: bool, resume: str = resume) -> ProcessGroup:
        """Join the job that torchrun started this process for; without torchrun, a job of one.

        Args:
            cuda: whether each rank takes the GPU of its local rank.
            resume: what to do after one of them has stopped, for messages.

        Raises:
            ValueError: the machine has fewer GPUs than ranks.
        """
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        ranks = cls(rank, world, resume)
        if ranks.world > 1:
            if cuda:
                _take_gpu(int(os.environ["LOCAL_RANK"]))
            with ranks._plain_errors():
                dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
        return ranks

    def leave(self) -> None:
        """Leave the process group; no collective may follow."""
        if self.world > 1:
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this process writes, evaluates and shows progress."""
        return self.rank == 0

    def share(self, num_envs: int) -> int:
        """Return the number of sub-environments of each rank.

        Raises:
            ValueError: `num_envs` is not a multiple of the ranks.
        """
        if num_envs % self.world:
            raise ValueError(
                f"num_envs must be a multiple of the {self.world} processes, got {num_envs}."
            )
        return num_envs // self.world

    def wait(self) -> None:
        """Wait until every rank has called this."""
        self.gather(None)

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in order; every rank must call this."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        with self._plain_errors():
            dist.all_gather_object(gathered, value)
        return gathered

    def merge(self, events: Iterable[tuple[int, int, T]]) -> list[T]:
        """Return the values of (step, env_index, value) of all ranks, ordered by step and index."""
        together = [event for own in self.gather(list(events)) for event in own]
        return [value for _, _, value in sorted(together, key=lambda event: event[:2])]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks in place and return it; every rank must call this."""
        if self.world > 1:
            with self._plain_errors():
                dist.all_reduce(tensor)
        return tensor

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """Raise `ConnectionError` if another rank has stopped."""
        try:
            yield
        except RuntimeError as error:
            raise ConnectionError(
                f"Another rank has stopped; see its message above. {self.resume} "
                f"({str(error).splitlines()[0]})"
            ) from error


#: A job of one process.
ALONE = ProcessGroup()


def _take_gpu(number: int) -> None:
    """Select a GPU for this process."""
    if number >= torch.cuda.device_count():
        raise ValueError(
            f"This machine has {torch.cuda.device_count()} GPUs, but at least {number + 1} "
            "processes were started. Lower --nproc_per_node, or pass --device cpu."
        )
    torch.cuda.set_device(number)
