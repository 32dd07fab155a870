"""Results as files: written whole or not at all, and only with numbers that are numbers."""

from __future__ import annotations

import csv
import io
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """Numpy scalars and arrays, tuples and paths as what JSON knows.

    Raises:
        ValueError: a number is not finite; it names where it stands.
        TypeError: something that JSON cannot hold.
    """
    if isinstance(value, Mapping):
        return {str(key): _within(key, item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_within(index, item) for index, item in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not np.isfinite(value):
        raise ValueError(f"{value} is not a result: every number must be finite.")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"{type(value).__name__} cannot stand in JSON: {value!r}.")


def _within(key: object, item: Any) -> Any:
    try:
        return plain(item)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def write_atomic(path: Path, content: str | bytes, *, durable: bool = False) -> Path:
    """Write a file whole or not at all: under another name first, which is then renamed.

    Args:
        path: of the file.
        content: of the file; text is encoded as UTF-8.
        durable: wait until the file is on the disk, so that it outlives a power cut.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    with unfinished.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(unfinished, path)
    if durable:
        _sync_folder(path.parent)
    return path


def _sync_folder(folder: Path) -> None:
    """Wait until a renaming in a folder is on the disk, where the system can tell."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, results: Mapping[str, Any]) -> Path:
    """Write results as JSON; see `plain` for what is refused."""
    text = json.dumps(plain(results), indent=2, allow_nan=False, ensure_ascii=False)
    return write_atomic(path, text + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows that share the keys of the first; floats to six digits, None as an empty cell."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _cell(value) for key, value in row.items()})
    return write_atomic(path, buffer.getvalue())


def _cell(value: Any) -> Any:
    value = plain(value)
    return f"{value:.6g}" if isinstance(value, float) else value


def wait_for_a_later_name(folder: Path) -> None:
    """Return once a new event file comes after those that are there, in the order of their names.

    That is how TensorBoard reads them. A name begins with the second, and what follows it (process,
    and a counter) says nothing of the order.
    """
    while any(folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
        time.sleep(0.05)
