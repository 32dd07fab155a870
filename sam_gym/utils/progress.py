"""The progress bar of all commands, on stderr."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
