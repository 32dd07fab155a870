"""How the process asks the system for memory."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

#: What a user sets who tunes the allocator: then it is left alone.
_OWN_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@cache
def keep_freed_memory() -> bool:
    """Let glibc keep freed memory up to 2 GiB for the next tensor; returns whether it does now.

    By default it returns large blocks to the system at once. Then each batched decode on a CPU
    faults its activations in page by page, a quarter of its time (docs/architecture.md).
    The process keeps its peak of memory in return. Nothing happens without glibc, or where the
    environment sets the allocator already.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _OWN_SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Before version 2.35 or so, 32 MiB is the most that it takes.
    large = mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25)
    return bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) and large)
