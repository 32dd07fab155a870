"""Output folders of runs: a finished run is replaced on request only, and as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def refuse_finished(folder: Path, finished: str) -> None:
    """Raise `FileExistsError` if a folder holds a finished run.

    Args:
        folder: of the run.
        finished: name of the file that a run writes at its end.
    """
    if (folder / finished).is_file():
        raise FileExistsError(
            f"{folder} holds a finished run ({finished}). Pass --overwrite (overwrite=True) to "
            "replace it, or another --out (out=)."
        )


def remove_files(folder: Path, patterns: Iterable[str]) -> None:
    """Remove the files that an earlier run has left in its folder.

    Args:
        folder: of the run.
        patterns: glob patterns of files that runs write, and nobody else.
    """
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
