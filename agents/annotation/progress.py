"""Results of an unfinished annotation run, on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sam_gym.utils.files import plain, write_atomic


class PartialResults:
    """Results so far, one line of JSON each, in a file that an interrupted run leaves behind.

    Args:
        path: path of the file, which may exist already.
        settings: settings of the run.

    Attributes:
        done: key (of strings and numbers) -> result.

    Raises:
        ValueError: the file belongs to a run with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self._header = header = {"settings": plain(settings)}
        self.done: dict[tuple[Any, ...], Any] = {}
        if path.exists():
            lines = path.read_text().splitlines()
            rows = [row for row in map(_parsed, lines) if row is not None]
            if not rows or rows[0] != header:
                raise ValueError(
                    f"{path}: left by a run with other settings. Finish that run with its own "
                    "settings, or remove the file to start over."
                )
            self.done = {tuple(row["key"]): row["result"] for row in rows[1:]}
            self._rewrite()

    def add(self, key: tuple[Any, ...], result: Any) -> None:
        """Append a result, which must be JSON-like."""
        self.done[key] = result
        if not self.path.exists():
            self._rewrite()
            return
        with self.path.open("a") as file:
            file.write(self._line(key, result))

    def finish(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)

    def _rewrite(self) -> None:
        """Write the whole file, which drops an incomplete last line."""
        lines = [self._line(key, result) for key, result in self.done.items()]
        write_atomic(self.path, json.dumps(self._header) + "\n" + "".join(lines))

    @staticmethod
    def _line(key: tuple[Any, ...], result: Any) -> str:
        return json.dumps({"key": key, "result": plain(result)}) + "\n"


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
