"""Write results: atomically, and with finite numbers only."""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


def plain(value: Any) -> Any:
    """Convert numpy scalars and arrays, tuples and paths to JSON types.

    Raises:
        ValueError: a number is not finite; the message holds its keys.
        TypeError: a value has no JSON form.
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


@contextmanager
def atomic_file(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Open a file to write, under a random name beside it; it is renamed when the body ends.

    Any number of processes may write the same file. If the body fails, nothing is left.

    Args:
        path: of the file; its folder exists.
        durable: fsync, so that the file survives a power failure.
    """
    unfinished = path.with_name(f"{unfinished_prefix(path.name)}{secrets.token_hex(8)}")
    try:
        # "x" follows no link that somebody else has put there.
        with unfinished.open("xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    if durable:
        _sync_folder(path.parent)


def write_atomic(path: Path, content: str | bytes, *, durable: bool = False) -> Path:
    """Write a file as `atomic_file` does; text is encoded by `encoded`."""
    with atomic_file(path, durable=durable) as file:
        file.write(encoded(content) if isinstance(content, str) else content)
    return path


def encoded(text: str) -> bytes:
    """Encode text as UTF-8; lone surrogates, which names of files may have, as JSON's escapes."""
    return text.encode(errors="backslashreplace")


def unfinished_prefix(name: str) -> str:
    """Return how the names begin under which `write_atomic` writes a file."""
    # Short, since the name of the file may be as long as the file system allows.
    return f".{name[:32]}."


def _sync_folder(folder: Path) -> None:
    """Flush renames in a folder to the disk, where the system supports it."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, results: Mapping[str, Any] | Sequence[Any]) -> Path:
    """Write results as JSON; raises the errors of `plain`."""
    text = json.dumps(plain(results), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    return write_atomic(path, text)


class JsonRows:
    """Writes a list of JSON values of any length, a line each: `with JsonRows(file) as rows`.

    Args:
        file: where the list is written.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._is_empty = file, True

    def __enter__(self) -> JsonRows:
        self._file.write(b"[")
        return self

    def add(self, value: Any) -> None:
        """Write a value of JSON types; raises `ValueError` for a number that is not finite."""
        self._file.write(b"\n" if self._is_empty else b",\n")
        self._file.write(json_line(value))
        self._is_empty = False

    def __exit__(self, *_: object) -> None:
        self._file.write(b"\n]")


def write_tables(path: Path, tables: Mapping[str, Any]) -> Path:
    """Write a JSON object whose lists may be longer than memory.

    Args:
        path: of the file.
        tables: name -> value of JSON types. An iterator becomes a list, with a line per element; it
            is consumed after those before it.

    Raises:
        ValueError: a number is not finite.
    """
    with atomic_file(path) as file:
        start = b"{"
        for name, value in tables.items():
            file.write(start + b"\n" + json_line(name) + b": ")
            if isinstance(value, Iterator):
                with JsonRows(file) as rows:
                    for row in value:
                        rows.add(row)
            else:
                file.write(json_line(value))
            start = b","
        file.write(b"\n}\n")
    return path


def json_line(value: Any) -> bytes:
    """Encode a value of JSON types; raises `ValueError` for a number that is not finite."""
    return encoded(json.dumps(value, allow_nan=False, ensure_ascii=False))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows with the keys of the first; floats to six digits, None as an empty cell."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _cell(value) for key, value in row.items()})
    return write_atomic(path, buffer.getvalue())


def _cell(value: Any) -> Any:
    value = plain(value)
    return f"{value:.6g}" if isinstance(value, float) else value


def check_no_file(option: str, folder: Path) -> None:
    """Raise `ValueError` if a folder for results, or one above it, is a file."""
    for path in (folder, *folder.parents):
        if path.is_file():
            raise ValueError(f"{option} {path} is a file: name a folder.")


def make_folder(out: str | Path) -> Path:
    """Create the folder for the results, before work starts.

    Raises:
        ValueError: it is a file, cannot be created, or not be written to.
    """
    if out == "":
        raise ValueError("--out is empty: name a folder.")
    folder = Path(out).expanduser()
    check_no_file("--out", folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot create the folder ({error.strerror}).") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out {out}: the folder is not writable.")
    return folder


def output_file(out: str, overwrite: bool) -> Path:
    """Create the folder of a file for results, before work starts.

    Args:
        out: its path.
        overwrite: replace a file that is there.

    Raises:
        ValueError: the folder cannot be created, or not be written to.
        FileExistsError: the file exists.
    """
    path = Path(out).expanduser()
    if path.is_dir() or out.endswith(("/", os.sep)):
        raise ValueError(f"--out {out}: this is a folder. Pass the path of a file in it.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"--out {out} exists. Pass --overwrite to replace it.")
    make_folder(path.parent)
    return path


def wait_for_a_later_name(folder: Path) -> None:
    """Wait until a new event file would sort after the existing ones.

    TensorBoard reads event files in the order of their names, which start with the time in seconds.
    """
    while any(folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
        time.sleep(0.05)
