"""What the command lines share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def run(main: Callable[[], Any]) -> None:
    """Run a command; wrong input ends it with its message and status 1, without a traceback."""
    try:
        main()
    except (ValueError, OSError, MemoryError, ImportError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
