"""Where results come from: versions, commit, options, and the SAM with its device."""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sam_gym.version import __version__

if TYPE_CHECKING:
    from sam_gym.backbones import Backbone

#: Folder that the packages lie in.
HERE = Path(__file__).resolve().parents[2]


def provenance(config: Any = None, backbone: Backbone | None = None) -> dict[str, Any]:
    """Return the provenance of results, as results.json has it.

    Args:
        config: a dataclass of options, which become "settings".
        backbone: the SAM that was used, if there is one: name, identity, device, precision.
    """
    own: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "versions": {"sam-gym": __version__, "torch": torch.__version__},
        "commit": own_commit(),
    }
    if config is not None:
        own["settings"] = json.loads(json.dumps(asdict(config)))
    if backbone is None:
        return own
    return own | {
        "backbone": backbone.name,
        "backbone_identity": backbone.identity,
        "device": device_name(backbone.device),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "compiled": backbone.compiled,
    }


@cache
def own_commit() -> str | None:
    """Return the commit of this checkout when this was first called, see `commit_of`.

    Commands call it before long work, during which files may change.
    """
    return commit_of(HERE)


def commit_of(checkout: Path) -> str | None:
    """Return the commit of a checkout, and whether files differ from it; None if it is none."""
    # An installed package may lie inside of a checkout of something else.
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always"]
    command += ["--exclude", "*", "--dirty", "--abbrev=40"]  # no tags
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def device_name(device: torch.device) -> str:
    """Return the name of a device, for example "cuda (NVIDIA H100)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.machine()})"
