"""Long work in a thread of its own, with progress, that people can stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import closing


class _Stopped(Exception):
    """The job was asked to stop."""


def stepwise(work: Generator[object, None, None]) -> Callable[[Callable[[int], None]], None]:
    """Return work for a `Job`: each item of a generator, which is closed at the end, is a step."""

    def run(advance: Callable[[int], None]) -> None:
        with closing(work):
            for _ in work:
                advance(1)

    return run


class Job:
    """Runs work in a thread.

    Args:
        label: what is done, for people.
        work: is called with a function that it calls after a number of steps, and that raises where
            the job is to stop.
        total: expected number of steps.

    Attributes:
        done: number of steps so far.
        error: why it ended early, or "".
    """

    def __init__(
        self, label: str, work: Callable[[Callable[[int], None]], None], total: int
    ) -> None:
        self.label, self.total, self.done, self.error = label, total, 0, ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=[work], daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[Callable[[int], None]], None]) -> None:
        try:
            work(self._advance)
        except _Stopped:
            pass
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            self.error = str(error)

    def _advance(self, steps: int) -> None:
        self.done += steps
        if self._stop.is_set():
            raise _Stopped

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """End it after the present step."""
        self._stop.set()

    def wait(self) -> None:
        """Wait until it has ended."""
        self._thread.join()
