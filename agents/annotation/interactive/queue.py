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
        """Return the index of the first file that nobody has finished, else of the first.

        Broken files are passed over, unless there are no others.
        """
        whole = [i for i, file in enumerate(self.files) if file not in self.broken]
        left = (i for i in whole if not self.is_done(self.files[i]))
        return next(left, whole[0] if whole else 0)

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

    def count_broken(self) -> int:
        """Return the number of files that nobody has finished and that cannot be opened."""
        return sum(file in self.broken and not self.is_done(file) for file in self.files)

    @property
    def is_finished(self) -> bool:
        """Whether no file is left but those that cannot be opened."""
        return self.count_done() + self.count_broken() == len(self.files)

    def last_saved(self) -> float:
        """Return when results were last written, in seconds since the epoch; 0: never."""
        return max((own.stat().st_mtime for own in self.results() if own.exists()), default=0.0)
