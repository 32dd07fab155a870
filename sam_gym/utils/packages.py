"""Detect another distribution that installs a package named `agents`, as openai-agents does."""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

#: Distributions known to install a package named `agents`.
OTHERS = ("openai-agents", "agents")
_MARK = "sam-gym"
_REMEDY = "install the two in environments of their own"


def check_agents() -> None:
    """Raise `ImportError` if `import agents` finds a package that is not sam-gym's."""
    spec = find_spec("agents")
    origin = None if spec is None else spec.origin
    if origin is None:
        raise ImportError(
            "sam-gym's package 'agents' is missing, possibly because another distribution that "
            f"installs one was removed: reinstall sam-gym, and {_REMEDY}."
        )
    if _MARK not in Path(origin).read_text(encoding="utf-8", errors="replace"):
        raise ImportError(
            f"{origin} belongs to another distribution (such as openai-agents) and hides the "
            f"package 'agents' of sam-gym: {_REMEDY}."
        )


def warn_of_other_agents() -> None:
    """Warn if sam-gym's package `agents` hides that of another distribution."""
    for name in OTHERS:
        try:
            distribution(name)
        except PackageNotFoundError:
            continue
        warnings.warn(
            f"sam-gym's package 'agents' hides the one of the distribution {name}: {_REMEDY}.",
            stacklevel=3,
        )
