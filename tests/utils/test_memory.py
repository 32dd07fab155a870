"""The allocator: changed once, by our commands only, and not where somebody tunes it."""

import resource
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from sam_gym.backbones import load_backbone, loading
from sam_gym.utils import cli, memory
from sam_gym.utils.memory import keep_freed_memory
from sam_gym.utils.shared import SharedObjects

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")

FAULTS = """
import resource, numpy
from sam_gym.utils.memory import keep_freed_memory
print(keep_freed_memory())
def work():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        numpy.ones(2**26, numpy.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
work()
print(work())
"""


def faults(**environment: str) -> tuple[str, int]:
    """Whether the settings were taken, and the page faults of 5 arrays of 64 MiB."""
    # Large pages would hide how many small ones there are.
    env = {"NUMPY_MADVISE_HUGEPAGE": "0"} | environment
    result = subprocess.run(
        [sys.executable, "-c", FAULTS], env=env, capture_output=True, text=True, check=True
    )
    kept, count = result.stdout.split()
    return kept, int(count)


def test_freed_memory_is_used_again() -> None:
    kept, count = faults()
    if kept != "True":
        pytest.skip("no glibc")
    assert count < 2**26 / resource.getpagesize()
    left_alone, many = faults(MALLOC_MMAP_THRESHOLD_="131072")
    assert left_alone == "False" and many > 10 * max(count, 1)


RESIDENT = """
import numpy, resource
from pathlib import Path
from sam_gym.utils.memory import keep_freed_memory, release_freed_memory
keep_freed_memory()
arrays = [numpy.ones(2**20, numpy.uint8) for _ in range(256)]
arrays = arrays[::8]  # in use all over the heap
pages = lambda: int(Path("/proc/self/statm").read_text().split()[1])
before = pages()
release_freed_memory()
print((before - pages()) * resource.getpagesize() // 2**20)
"""


def test_freed_memory_between_used_memory_goes_back_to_the_system() -> None:
    if not keep_freed_memory():
        pytest.skip("no glibc, or an allocator that is tuned already")
    result = subprocess.run(
        [sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) > 200  # of the 224 MiB that were freed


def test_asking_twice_is_asking_once() -> None:
    assert keep_freed_memory() is keep_freed_memory()


def test_only_commands_change_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator belongs to the host process: loading a backbone must not touch it."""
    calls: list[object] = []
    monkeypatch.setattr(memory, "ctypes", SimpleNamespace(CDLL=calls.append))
    monkeypatch.setattr(memory, "platform", SimpleNamespace(libc_ver=lambda: ("glibc", "2.40")))
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(loading, "_loaded", SharedObjects())
    keep_freed_memory.cache_clear()
    load_backbone("micro", device="cpu").encode([np.zeros((8, 8, 3), np.uint8)])
    assert not calls
    cli.run(lambda: None)
    keep_freed_memory.cache_clear()
    assert calls == [None]
