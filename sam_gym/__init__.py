"""Gymnasium environments over one batched Segment Anything Model.

Importing registers the environment ids, and limits torch to one thread in forked processes, where
its thread pool does not work. Public names, and with them torch, load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from sam_gym.utils.processes import survive_forks
from sam_gym.version import __version__

if TYPE_CHECKING:
    from sam_gym.backbones import Backbone, BackboneSpec, Prompts, load_backbone, register_backbone
    from sam_gym.backbones.features import ImageFeatures
    from sam_gym.backbones.video.session import TrackedFrame, TrackingSession
    from sam_gym.backbones.video.tracker import VideoTracker
    from sam_gym.data import (
        Dataset,
        DatasetSpec,
        Sample,
        Video,
        VideoDataset,
        make_dataset,
        make_video_dataset,
        register_dataset,
        register_video_dataset,
    )
    from sam_gym.envs.rewards import Transition, register_reward
    from sam_gym.mask_generation.generator import GeneratorOptions, MaskGenerator
    from sam_gym.predictor import Predictions, Predictor

__all__ = [
    "ENVIRONMENTS",
    "Backbone",
    "BackboneSpec",
    "Dataset",
    "DatasetSpec",
    "GeneratorOptions",
    "ImageFeatures",
    "MaskGenerator",
    "Predictions",
    "Predictor",
    "Prompts",
    "Sample",
    "TrackedFrame",
    "TrackingSession",
    "Transition",
    "Video",
    "VideoDataset",
    "VideoTracker",
    "__version__",
    "load_backbone",
    "make_dataset",
    "make_video_dataset",
    "register_backbone",
    "register_dataset",
    "register_reward",
    "register_video_dataset",
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
    "SamVideo-v0": ("sam_gym.envs.video:SamVideoEnv", "sam_gym.envs.video:SamVideoVectorEnv"),
}

for _id, (_scalar, _vector) in ENVIRONMENTS.items():
    if _id not in gym.registry:
        gym.register(_id, entry_point=_scalar, vector_entry_point=_vector)

survive_forks()

#: Module -> the public names that are imported from it when they are first used.
_LAZY = {
    "sam_gym.backbones": (
        "Backbone",
        "BackboneSpec",
        "Prompts",
        "load_backbone",
        "register_backbone",
    ),
    "sam_gym.backbones.features": ("ImageFeatures",),
    "sam_gym.backbones.video.session": ("TrackedFrame", "TrackingSession"),
    "sam_gym.backbones.video.tracker": ("VideoTracker",),
    "sam_gym.data": (
        "Dataset",
        "DatasetSpec",
        "Sample",
        "Video",
        "VideoDataset",
        "make_dataset",
        "make_video_dataset",
        "register_dataset",
        "register_video_dataset",
    ),
    "sam_gym.envs.rewards": ("Transition", "register_reward"),
    "sam_gym.mask_generation.generator": ("GeneratorOptions", "MaskGenerator"),
    "sam_gym.predictor": ("Predictions", "Predictor"),
}


def __getattr__(name: str) -> Any:
    for module, names in _LAZY.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
