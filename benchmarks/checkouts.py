"""Other checkouts of this project, which benchmarks compare this one with."""

from __future__ import annotations

import os
from pathlib import Path

from sam_gym.utils.provenance import HERE

#: Sides of a comparison.
OURS, OTHER = "this", "other"


def checkouts_of(against: str | None) -> dict[str, Path]:
    """Return the folder of each side: this checkout and, unless it is None, another one.

    Raises:
        ValueError: `against` is no checkout of this project.
    """
    if against is None:
        return {OURS: HERE}
    folder = Path(against).expanduser().resolve()
    if not (folder / "agents" / "train_ppo.py").is_file():
        raise ValueError(
            f"--against {against}: no checkout of this project, it has no agents/train_ppo.py. "
            "Make one: git worktree add PATH COMMIT."
        )
    return {OURS: HERE, OTHER: folder}


def environment_of(checkout: Path) -> dict[str, str]:
    """Return environment variables with which Python imports a checkout."""
    return os.environ | {"PYTHONPATH": str(checkout)}


def check_imported(found: str, checkout: Path) -> None:
    """Raise `RuntimeError` if a process has imported another checkout than it was to."""
    if Path(found) != checkout:
        raise RuntimeError(f"Python imported {found} instead of {checkout}.")
