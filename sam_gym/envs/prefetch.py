"""Drawing the next episodes while SAM is busy with the current ones."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from copy import deepcopy
from typing import Generic, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")


class _Pending(NamedTuple, Generic[T]):
    """A draw under way: of what, from which state, with which generator, what will come of it."""

    about: tuple[Hashable, ...]
    start: bytes
    rng: np.random.Generator
    future: Future[T]

    def counts(self, rng: np.random.Generator, about: tuple[Hashable, ...]) -> bool:
        """Whether this is the draw that is asked for now."""
        return self.about == about and self.start == _state(rng)


def _state(rng: np.random.Generator) -> bytes:
    """The state of a generator, in a form that can be compared whatever its bit generator is."""
    return pickle.dumps(rng.bit_generator.state)


class Prefetcher(Generic[T]):
    """Makes the next draw of each slot in a thread, before it is asked for.

    What it returns, and what it does to the slots' generators, is what `draw(rng, *about)` would
    return and do: a draw ahead works on a copy of the generator, and counts only if the generator
    has not been used or replaced since and the draw is about the same. No two draws happen at once,
    so `draw` needs no locks.

    Args:
        draw: makes something out of a generator, and of what else it is told, and nothing else.
    """

    def __init__(self, draw: Callable[..., T]) -> None:
        self._draw = draw
        self._pending: dict[int, _Pending[T]] = {}
        self._executor: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def take(
        self,
        slots: Sequence[int],
        rngs: Sequence[np.random.Generator],
        *abouts: Sequence[Hashable],
    ) -> list[T]:
        """The next draw of each slot; raises what `draw` raises.

        Args:
            slots: which.
            rngs: the generator of each.
            *abouts: more arguments of `draw`: each a sequence with a value for every slot.
        """
        if self._process != os.getpid():
            # A fork has copied what is pending, but not the thread that was to do it.
            self._pending, self._executor, self._process = {}, None, os.getpid()
        begun = [
            (self._pending.pop(slot, None), rng, tuple(about))
            for slot, rng, *about in zip(slots, rngs, *abouts, strict=True)
        ]
        for pending, rng, about in begun:
            if pending is not None and not pending.counts(rng, about):
                pending.future.cancel()
        return [self._one(pending, rng, about) for pending, rng, about in begun]

    def _one(
        self, pending: _Pending[T] | None, rng: np.random.Generator, about: tuple[Hashable, ...]
    ) -> T:
        if pending is None or not pending.counts(rng, about):
            return self._now(rng, about)
        try:
            return pending.future.result()
        finally:
            rng.bit_generator.state = pending.rng.bit_generator.state

    def _now(self, rng: np.random.Generator, about: tuple[Hashable, ...]) -> T:
        """A draw that was not begun: in the thread, if there is one, so that draws never meet."""
        if self._executor is None:
            return self._draw(rng, *about)
        return self._executor.submit(self._draw, rng, *about).result()

    def begin(
        self,
        slots: Sequence[int],
        rngs: Sequence[np.random.Generator],
        *abouts: Sequence[Hashable],
    ) -> None:
        """Start on the draw after this one, for each slot; arguments as for `take`."""
        for slot, rng, *about in zip(slots, rngs, *abouts, strict=True):
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="draw-ahead")
            copy = deepcopy(rng)
            future = self._executor.submit(self._draw, copy, *about)
            self._pending[slot] = _Pending(tuple(about), _state(rng), copy, future)

    def wait(self) -> None:
        """Wait for all that is under way."""
        wait([pending.future for pending in self._pending.values()])

    def close(self) -> None:
        """Forget what is under way and end the thread; the next draw starts another."""
        self._pending.clear()
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None
