"""The folder of downloads and caches."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """Return `SAM_GYM_HOME`, or `sam-gym` in the user's cache folder. It may not exist."""
    own = os.environ.get("SAM_GYM_HOME")
    if own:
        return Path(own).expanduser().resolve()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "sam-gym"
