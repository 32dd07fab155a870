"""Command lines: entry point and printed tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sam_gym.utils.memory import keep_freed_memory


def run(main: Callable[[], Any]) -> None:
    """Run a command that owns its process.

    Wrong input ends it with its message and status 1, without a traceback. Freed memory is kept for
    the next tensor (`keep_freed_memory`).
    """
    keep_freed_memory()
    try:
        main()
    except (ValueError, OSError, MemoryError, ImportError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is left-aligned, the others right-aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
