"""Objects that are shared within a process."""

import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import pytest

from sam_gym.utils.shared import SharedObjects, stamp_of


@dataclass(eq=False)
class Read:
    """The content of a file."""

    identity: str


def test_an_object_lasts_until_its_files_change(tmp_path: Path) -> None:
    shared: SharedObjects[Read] = SharedObjects()
    path = tmp_path / "weights"

    def get(argument: int = 0) -> Read:
        return shared.get(argument, [path], lambda: Read(path.read_text()))

    path.write_text("one")
    first = get()
    assert get() is first and get(1) is not first
    path.write_text("one")
    assert get() is first
    path.write_text("two")
    assert get().identity == "two" and first.identity == "one"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        get()
    path.write_text("two")
    assert get().identity == "two"


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork"
)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_can_be_forked_while_a_thread_loads(tmp_path: Path) -> None:
    shared: SharedObjects[Read] = SharedObjects()
    child = multiprocessing.get_context("fork").Process(
        target=shared.get, args=(0, [], lambda: Read("loaded"))
    )
    with shared._lock:  # as a thread that loads holds it
        child.start()
        child.join(timeout=20)
        child.kill()
    assert child.exitcode == 0


def test_a_folder_changes_with_its_files(tmp_path: Path) -> None:
    assert stamp_of(tmp_path / "none") is None
    (tmp_path / "weights").write_text("one")
    before = stamp_of(tmp_path)
    assert stamp_of(tmp_path) == before
    (tmp_path / "weights").write_text("three")
    assert stamp_of(tmp_path) != before
