"""Where sam-gym keeps what it downloads and computes."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """`SAM_GYM_HOME`, or else `sam-gym` in the user's cache folder. It need not exist."""
    own = os.environ.get("SAM_GYM_HOME")
    if own:
        return Path(own).expanduser().resolve()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "sam-gym"
