"""The entry point of the command lines."""

from __future__ import annotations

from collections.abc import Callable
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
