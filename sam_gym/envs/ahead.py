"""Drawing the next episodes while SAM is busy with the current ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")


class _Pending(NamedTuple, Generic[T]):
    """A draw under way: from which state, with which generator, and what will come of it."""

    start: Mapping[str, Any]
    rng: np.random.Generator
    future: Future[T]


class DrawAhead(Generic[T]):
    """Makes the next draw of each slot in a thread, before it is asked for.

    What it returns, and what it does to the slots' generators, is what `draw(rng)` would return and
    do: a draw ahead works on a copy of the generator, and counts only if the generator has not been
    used or replaced since. All draws happen in one thread, so `draw` needs no locks.

    Args:
        draw: makes something out of a generator and nothing else.
    """

    def __init__(self, draw: Callable[[np.random.Generator], T]) -> None:
        self._draw = draw
        self._pending: dict[int, _Pending[T]] = {}
        self._executor: ThreadPoolExecutor | None = None

    def take(self, slots: Sequence[int], rngs: Sequence[np.random.Generator]) -> list[T]:
        """The next draw of each slot; raises what `draw` raises."""
        fetched = [self._ready(slot, rng) for slot, rng in zip(slots, rngs, strict=True)]
        drawn = []
        for rng, (used, future) in zip(rngs, fetched, strict=True):
            drawn.append(future.result())
            rng.bit_generator.state = used.bit_generator.state
        return drawn

    def _ready(self, slot: int, rng: np.random.Generator) -> tuple[np.random.Generator, Future[T]]:
        pending = self._pending.pop(slot, None)
        if pending is not None:
            if pending.start == rng.bit_generator.state:
                return pending.rng, pending.future
            pending.future.cancel()
        return rng, self._submit(rng)

    def begin(self, slots: Sequence[int], rngs: Sequence[np.random.Generator]) -> None:
        """Start on the draw after this one, for each slot."""
        for slot, rng in zip(slots, rngs, strict=True):
            copy = deepcopy(rng)
            self._pending[slot] = _Pending(rng.bit_generator.state, copy, self._submit(copy))

    def _submit(self, rng: np.random.Generator) -> Future[T]:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="draw-ahead")
        return self._executor.submit(self._draw, rng)

    def close(self) -> None:
        """Forget what is under way and end the thread; the next draw starts another."""
        self._pending.clear()
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None
