"""Files are written whole or not at all, by any number of processes."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sam_gym.utils.files import make_folder, write_atomic, write_csv
from sam_gym.utils.training import save_state

WRITE = """
import sys, pathlib, torch
from sam_gym.utils.training import save_state
for number in range(40):
    save_state({"values": torch.full((20_000,), number)}, pathlib.Path(sys.argv[1]))
"""


def test_two_processes_write_the_same_file(
    start_script: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    path, script, reads = tmp_path / "out" / "checkpoint.pt", tmp_path / "write.py", 0
    save_state({"values": torch.zeros(1)}, path)
    script.write_text(WRITE)
    writers = [start_script(str(script), str(path)) for _ in range(2)]
    while any(writer.process.is_alive() for writer in writers):
        values = torch.load(path, weights_only=True)["values"]
        assert (values == values[0]).all()
        reads += 1
    assert [writer.finish().returncode for writer in writers] == [0, 0] and reads
    assert list(path.parent.iterdir()) == [path]


def test_nothing_is_left_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_atomic(tmp_path / "a.txt", "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(os, name, full)
            write_atomic(path, "new", durable=True)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_atomic(tmp_path / "folder", "new")
    assert path.read_text() == "old"
    assert {own.name for own in tmp_path.iterdir()} == {"a.txt", "folder"}


def test_the_unfinished_file_cannot_be_foreseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who can write to the folder must not redirect a write by a link."""
    names: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (names.append(a.name), replace(a, b)))
    for _ in range(2):
        write_atomic(tmp_path / "a.txt", "text")
    assert names[0] != names[1] and all(name.startswith(".a.txt.") for name in names)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr("secrets.token_hex", lambda _: "known")
    (tmp_path / ".a.txt.known").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "a.txt", "text")
    assert victim.read_text() == "mine"


def test_names_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    assert write_atomic(tmp_path / ("ü" * 125), "text").read_text() == "text"


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    written, usual = write_atomic(tmp_path / "a", ""), tmp_path / "b"
    usual.touch()
    assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)


def test_names_that_are_no_utf8_are_written_as_escapes(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [{"source": os.fsdecode(b"caf\xe9.png")}])
    assert (tmp_path / "a.csv").read_text() == "source\ncaf\\udce9.png\n"


def test_an_empty_path_is_no_folder() -> None:
    with pytest.raises(ValueError, match="--out is empty"):
        make_folder("")
