"""Drawing the next episodes while SAM is busy with the current ones."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from copy import deepcopy
from typing import Generic, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")


class _Pending(NamedTuple, Generic[T]):
    """A draw under way: from which state, with which generator, and what will come of it."""

    start: bytes
    rng: np.random.Generator
    future: Future[T]


def _state(rng: np.random.Generator) -> bytes:
    """The state of a generator, in a form that can be compared whatever its bit generator is."""
    return pickle.dumps(rng.bit_generator.state)


class DrawAhead(Generic[T]):
    """Makes the next draw of each slot in a thread, before it is asked for.

    What it returns, and what it does to the slots' generators, is what `draw(rng)` would return and
    do: a draw ahead works on a copy of the generator, and counts only if the generator has not been
    used or replaced since. No two draws happen at once, so `draw` needs no locks.

    Args:
        draw: makes something out of a generator and nothing else.
    """

    def __init__(self, draw: Callable[[np.random.Generator], T]) -> None:
        self._draw = draw
        self._pending: dict[int, _Pending[T]] = {}
        self._executor: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def take(self, slots: Sequence[int], rngs: Sequence[np.random.Generator]) -> list[T]:
        """The next draw of each slot; raises what `draw` raises."""
        if self._process != os.getpid():
            # A fork has copied what is pending, but not the thread that was to do it.
            self._pending, self._executor, self._process = {}, None, os.getpid()
        begun = [self._pending.pop(slot, None) for slot in slots]
        for pending, rng in zip(begun, rngs, strict=True):
            if pending is not None and pending.start != _state(rng):
                pending.future.cancel()
        return [self._one(pending, rng) for pending, rng in zip(begun, rngs, strict=True)]

    def _one(self, pending: _Pending[T] | None, rng: np.random.Generator) -> T:
        if pending is None or pending.start != _state(rng):
            return self._now(rng)
        try:
            return pending.future.result()
        finally:
            rng.bit_generator.state = pending.rng.bit_generator.state

    def _now(self, rng: np.random.Generator) -> T:
        """A draw that was not begun: in the thread, if there is one, so that draws never meet."""
        if self._executor is None:
            return self._draw(rng)
        return self._executor.submit(self._draw, rng).result()

    def begin(self, slots: Sequence[int], rngs: Sequence[np.random.Generator]) -> None:
        """Start on the draw after this one, for each slot."""
        for slot, rng in zip(slots, rngs, strict=True):
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="draw-ahead")
            copy = deepcopy(rng)
            future = self._executor.submit(self._draw, copy)
            self._pending[slot] = _Pending(_state(rng), copy, future)

    def wait(self) -> None:
        """Wait for all that is under way."""
        wait([pending.future for pending in self._pending.values()])

    def close(self) -> None:
        """Forget what is under way and end the thread; the next draw starts another."""
        self._pending.clear()
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None
