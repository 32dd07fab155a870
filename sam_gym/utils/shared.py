"""Objects that a process makes from files once, and again when the files change."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar


class Identified(Protocol):
    """An object that can tell what it was made from."""

    @property
    def identity(self) -> str:
        """Hex digest of all weights."""


T = TypeVar("T", bound=Identified)


class SharedObjects(Generic[T]):
    """The objects of a process by the arguments that make them; safe for threads.

    An object is made again when a file that it comes from was written since. A file that was only
    touched or copied over itself keeps the object.
    """

    def __init__(self) -> None:
        self._held: dict[Hashable, tuple[Any, T]] = {}
        self._lock = threading.Lock()
        if hasattr(os, "register_at_fork"):
            # A thread that loads while another forks does not exist in the forked process.
            os.register_at_fork(after_in_child=self._unlock)

    def _unlock(self) -> None:
        self._lock = threading.Lock()

    def get(self, arguments: Hashable, files: Sequence[Path], make: Callable[[], T]) -> T:
        """Return the object of some arguments.

        Args:
            arguments: all that `make` depends on, except for the content of files.
            files: files and folders that it reads.
            make: makes the object.
        """
        with self._lock:
            stamp = [stamp_of(file) for file in files]
            known, held = self._held.get(arguments, (None, None))
            if held is None or known != stamp:
                made = make()
                if held is None or held.identity != made.identity:
                    held = made
                self._held[arguments] = stamp, held
            return held


def stamp_of(path: Path) -> Any:
    """Return what tells whether a file, or any file of a folder, was written; None without one."""
    if path.is_dir():
        return [(file.name, stamp_of(file)) for file in sorted(path.iterdir()) if file.is_file()]
    try:
        status = path.stat()
    except OSError:
        return None
    # The time of the last change of the inode also tells of writers that restore that of the file.
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino
