"""Use torch in forked processes."""

from __future__ import annotations

import multiprocessing
import os
import sys


def use_one_thread() -> None:
    """Limit torch, if it is loaded, to one thread of this process."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


def _was_forked() -> bool:
    """Return whether multiprocessing forked this process."""
    if multiprocessing.parent_process() is None:
        return False
    process = multiprocessing.current_process()
    return (getattr(process, "_start_method", None) or multiprocessing.get_start_method()) == "fork"


def survive_forks() -> None:
    """Limit torch to one thread in every process that is forked from this one.

    The threads of torch's pool do not exist in a forked process: its first parallel operation would
    wait for them for ever. PyTorch's own `DataLoader` limits its workers in the same way.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=use_one_thread)
        if _was_forked():
            use_one_thread()  # the parent had loaded torch, but not this package
