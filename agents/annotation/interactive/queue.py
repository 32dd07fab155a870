"""What people work through one by one: the images or the videos of a folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path


class Queue(ABC):
    """Files that people finish one after another.

    Args:
        files: their names.

    Attributes:
        files: their names.
        broken: those that could not be opened when they were last tried.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self.files = list(files)
        self.broken: set[str] = set()

    @abstractmethod
    def is_done(self, file: str) -> bool:
        """Return whether somebody has finished the file."""

    @abstractmethod
    def results(self) -> Sequence[Path]:
        """Return the paths of the results, which need not exist."""

    def first_open(self) -> int:
        """Return the index of the first file that nobody has finished; 0 if there is none.

        Broken files come last.
        """
        left = [i for i, file in enumerate(self.files) if not self.is_done(file)]
        return min(left, key=lambda i: self.files[i] in self.broken, default=0)

    def beside(self, index: int, step: int) -> int | None:
        """Return the index of the next file in the direction of `step`, 1 or -1, or None.

        Broken files are passed over.
        """
        index += step
        while 0 <= index < len(self.files):
            if self.files[index] not in self.broken:
                return index
            index += step
        return None

    def count_done(self) -> int:
        """Return the number of finished files."""
        return sum(map(self.is_done, self.files))

    def last_saved(self) -> float:
        """Return when results were last written, in seconds since the epoch; 0: never."""
        return max((own.stat().st_mtime for own in self.results() if own.exists()), default=0.0)
