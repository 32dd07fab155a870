"""Long work in a thread of its own, with progress, that people can stop."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import closing


class Job:
    """Runs a generator in a thread; each of its items is a step.

    Args:
        label: what is done, for people.
        work: a generator, which is closed if the job is stopped.
        total: expected number of steps.

    Attributes:
        done: number of steps so far.
        error: why it ended early, or "".
    """

    def __init__(self, label: str, work: Generator[object, None, None], total: int) -> None:
        self.label, self.total, self.done, self.error = label, total, 0, ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=[work], daemon=True)
        self._thread.start()

    def _run(self, work: Generator[object, None, None]) -> None:
        try:
            with closing(work):
                for _ in work:
                    self.done += 1
                    if self._stop.is_set():
                        break
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            self.error = str(error)

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
