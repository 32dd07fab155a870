"""Draw the next episodes in a thread while SAM processes the current ones."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from copy import deepcopy
from typing import Generic, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")


class PendingDraw(NamedTuple, Generic[T]):
    """A draw in progress.

    Attributes:
        arguments: of `draw`, after the generator.
        start: state of the generator before the draw.
        rng: copy of the generator, used by the draw.
        future: its result.
    """

    arguments: tuple[Hashable, ...]
    start: bytes
    rng: np.random.Generator
    future: Future[T]

    def matches(self, rng: np.random.Generator, arguments: tuple[Hashable, ...]) -> bool:
        """Return whether `draw(rng, *arguments)` would be this draw."""
        return self.arguments == arguments and self.start == _state(rng)


def _state(rng: np.random.Generator) -> bytes:
    """Return the state of a generator, comparable for any bit generator."""
    return pickle.dumps(rng.bit_generator.state)


class Prefetcher(Generic[T]):
    """Makes the next draw of each sub-environment in a thread, ahead of time.

    Results and generator states are those of calling `draw(rng, *arguments)` directly: a prefetch
    works on a copy of the generator, and is used only if the generator has not changed since and
    the arguments are equal. Draws never run concurrently, so `draw` needs no locks.

    Args:
        draw: makes a value of a random generator and further arguments; has no side effects.
    """

    def __init__(self, draw: Callable[..., T]) -> None:
        self._draw = draw
        #: Draws in progress, by sub-environment.
        self.pending: dict[int, PendingDraw[T]] = {}
        self._executor: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def take(
        self,
        indices: Sequence[int],
        rngs: Sequence[np.random.Generator],
        *arguments: Sequence[Hashable],
    ) -> list[T]:
        """Return the next draw of each sub-environment; raise what `draw` raises.

        Args:
            indices: sub-environments.
            rngs: the generator of each.
            *arguments: further arguments of `draw`, each with a value per sub-environment.
        """
        if self._process != os.getpid():
            # A fork copies the pending draws, but not the thread that makes them.
            self.pending, self._executor, self._process = {}, None, os.getpid()
        begun = [
            (self.pending.pop(i, None), rng, tuple(own))
            for i, rng, *own in zip(indices, rngs, *arguments, strict=True)
        ]
        for pending, rng, own in begun:
            if pending is not None and not pending.matches(rng, own):
                pending.future.cancel()
        return [self._one(pending, rng, own) for pending, rng, own in begun]

    def _one(
        self,
        pending: PendingDraw[T] | None,
        rng: np.random.Generator,
        arguments: tuple[Hashable, ...],
    ) -> T:
        if pending is None or not pending.matches(rng, arguments):
            return self._now(rng, arguments)
        try:
            return pending.future.result()
        finally:
            rng.bit_generator.state = pending.rng.bit_generator.state

    def _now(self, rng: np.random.Generator, arguments: tuple[Hashable, ...]) -> T:
        """Draw without a prefetch; in the thread, if there is one, so that draws never overlap."""
        if self._executor is None:
            return self._draw(rng, *arguments)
        return self._executor.submit(self._draw, rng, *arguments).result()

    def begin(
        self,
        indices: Sequence[int],
        rngs: Sequence[np.random.Generator],
        *arguments: Sequence[Hashable],
    ) -> None:
        """Start the next draw of each sub-environment; arguments as for `take`."""
        for i, rng, *own in zip(indices, rngs, *arguments, strict=True):
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
            copy = deepcopy(rng)
            future = self._executor.submit(self._draw, copy, *own)
            self.pending[i] = PendingDraw(tuple(own), _state(rng), copy, future)

    def wait(self) -> None:
        """Wait for all draws in progress."""
        wait([pending.future for pending in self.pending.values()])

    def close(self) -> None:
        """Drop all draws in progress and end the thread; the next draw starts another."""
        self.pending.clear()
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None
