"""The progress bar of all commands, on stderr."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

T = TypeVar("T")

#: Seconds between two lines of a log.
_PRINT_EVERY = 60.0


class ProgressBar(Progress):
    """Show a description, a bar, the count, the remaining time, and optional numbers per task.

    Args:
        in_bytes: count bytes, and show the transfer speed.
        disable: show nothing.
        transient: remove the bar when it is finished.
    """

    def __init__(
        self, *, in_bytes: bool = False, disable: bool = False, transient: bool = False
    ) -> None:
        count = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *count,
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=Console(stderr=True),
            disable=disable,
            transient=transient,
        )

    def add_task(self, description: str, *args: Any, numbers: str = "", **kwargs: Any) -> TaskID:
        """Add a task as rich does; `update(task, numbers=...)` sets the text behind its bar."""
        return super().add_task(description, *args, numbers=numbers, **kwargs)


def track(
    items: Iterable[T],
    description: str,
    total: int | None = None,
    *,
    disable: bool = False,
    transient: bool = False,
) -> Iterator[T]:
    """Yield the items while a progress bar counts them.

    Args:
        items: any iterable.
        description: text before the bar.
        total: number of items, if `items` has no length.
        disable, transient: as of `ProgressBar`.
    """
    with ProgressBar(disable=disable, transient=transient) as bar:
        yield from bar.track(items, total=total, description=description)


class ThroughputBar:
    """A bar with items per second and the remaining time; where there is no terminal, also a line
    per minute on stdout. Use it as a context manager.

    Args:
        description: text before the bar.
        total: number of items.
        unit: name of the items.
        done: number of items that are done at the start.
        disable: show nothing.
    """

    def __init__(
        self,
        description: str,
        total: int,
        unit: str = "images",
        *,
        done: float = 0,
        disable: bool = False,
    ) -> None:
        self.total, self.unit, self.disable = total, unit, disable
        self._before = self._done = done
        self._start = self._printed = time.monotonic()
        self._bar = ProgressBar(disable=disable)
        self._is_log = not disable and not self._bar.console.is_terminal
        self._task = self._bar.add_task(description, total=total, completed=int(done))

    def __enter__(self) -> ThroughputBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def skip(self, items: float) -> None:
        """Count items as done that needed no work."""
        self._before += items

    def update(self, done: float) -> None:
        """Show that a number of items are done."""
        self._done = done
        rate, now = self._rate(), time.monotonic()
        numbers = self._per_second(rate)
        self._bar.update(self._task, completed=done, numbers=numbers)
        if self._is_log and now - self._printed > _PRINT_EVERY:
            self._printed = now
            left = timedelta(seconds=round((self.total - done) / max(rate, 1e-9)))
            told = f"{done:.0f} of {self.total} {self.unit}, {numbers}, {left} left"
            print(told, flush=True)

    def summary(self) -> str:
        """Return the items of this run, its seconds, and items per second."""
        seconds = time.monotonic() - self._start
        count = f"{self._done - self._before:.0f} {self.unit} in {seconds:.1f} s"
        return f"{count}: {self._per_second(self._rate())}"

    def _per_second(self, rate: float) -> str:
        return f"{rate:.1f} {self.unit}/s" if rate >= 1 else f"{rate:.2g} {self.unit}/s"

    def _rate(self) -> float:
        return (self._done - self._before) / (time.monotonic() - self._start)
