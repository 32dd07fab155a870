"""The allocator of the process. Opt-in: only our own commands change it."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

#: Environment variables that tune the allocator; if any is set, it is left alone.
_OWN_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@cache
def keep_freed_memory() -> bool:
    """Let glibc keep freed memory up to 2 GiB for the next tensor; returns whether it does now.

    By default, glibc returns large blocks to the system at once. Each batched decode on a CPU then
    faults its activations in page by page, a quarter of its time (docs/architecture.md). In return,
    the process keeps its peak memory. Does nothing without glibc, or if the environment already
    tunes the allocator. Commands call it through `sam_gym.utils.cli.run`; a script may call it
    before its first decode. Building a backbone never does.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _OWN_SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Versions before about 2.35 accept at most 32 MiB.
    large = mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25)
    return bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) and large)


def release_freed_memory() -> None:
    """Return freed memory to the system, that which glibc keeps between used memory included.

    A command calls it between stages of its work: what one has freed in small pieces would
    otherwise add to the peak of the next. Does nothing without glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
