"""Progress of a run over all of its processes."""

from __future__ import annotations

import time

from agents.annotation.shards import Shards
from sam_gym.utils.process_group import ProcessGroup
from sam_gym.utils.progress import ThroughputBar

#: Seconds between two counts of the shards that other processes have finished.
_COUNT_EVERY = 5.0


class Throughput:
    """Shows the images that all processes have annotated, in the first of them.

    Use it as a context manager.

    Args:
        shards: what is shared out.
        items_per_image: number of items of each image.
        ranks: the processes.
    """

    def __init__(self, shards: Shards, items_per_image: int, ranks: ProcessGroup) -> None:
        self._shards, self._items_per_image, self._ranks = shards, items_per_image, ranks
        self._finished, self._items = shards.finished_images(), 0
        self._counted = time.monotonic()
        self._bar = ThroughputBar(
            "annotating", shards.plan.total, done=self._finished, disable=not ranks.is_first
        )

    def __enter__(self) -> Throughput:
        self._bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._items = 0
        self._count()
        self._show()
        self._bar.__exit__()

    def start_shard(self, done: int) -> None:
        """Begin a shard of which a number of items are done."""
        self._items = done
        self._bar.skip(done / self._items_per_image)
        self._count()

    def add_item(self) -> None:
        """Count an item of the shard."""
        self._items += 1
        if self._ranks.world > 1 and time.monotonic() - self._counted > _COUNT_EVERY:
            self._count()
        self._show()

    def summary(self) -> str:
        """Return a line on what this run has done."""
        processes = f" by {self._ranks.world} processes" if self._ranks.world > 1 else ""
        return f"annotated{processes}: {self._bar.summary()}"

    def _count(self) -> None:
        self._finished, self._counted = self._shards.finished_images(), time.monotonic()

    def _show(self) -> None:
        self._bar.update(self._finished + self._items / self._items_per_image)
