"""Gymnasium environments in which an agent, or a trainer, works a Segment Anything Model.

Importing registers the environment ids and loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from sam_gym.version import __version__

if TYPE_CHECKING:
    from sam_gym.backbones import Backbone, Prompts, load_backbone
    from sam_gym.data import Dataset, Sample, make_dataset

__all__ = [
    "Backbone",
    "Dataset",
    "Prompts",
    "Sample",
    "__version__",
    "load_backbone",
    "make_dataset",
]

#: Environment id -> (scalar entry point, vector entry point).
ENVIRONMENTS = {
    "SamSeg-v0": ("sam_gym.envs.click:SamSegEnv", "sam_gym.envs.click:SamSegVectorEnv"),
    "SamContinual-v0": (
        "sam_gym.envs.continual:SamContinualEnv",
        "sam_gym.envs.continual:SamContinualVectorEnv",
    ),
    "SamEverything-v0": (
        "sam_gym.envs.everything:SamEverythingEnv",
        "sam_gym.envs.everything:SamEverythingVectorEnv",
    ),
}

for _id, (_scalar, _vector) in ENVIRONMENTS.items():
    if _id not in gym.registry:
        gym.register(_id, entry_point=_scalar, vector_entry_point=_vector)

_HOMES = {
    "Backbone": "sam_gym.backbones",
    "Prompts": "sam_gym.backbones",
    "load_backbone": "sam_gym.backbones",
    "Dataset": "sam_gym.data",
    "Sample": "sam_gym.data",
    "make_dataset": "sam_gym.data",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
