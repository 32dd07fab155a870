"""A small memory with random weights, and trackers with it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sam_gym.backbones import Backbone
from sam_gym.backbones.sam2 import Sam2
from sam_gym.backbones.video.memory import VideoMemory
from sam_gym.backbones.video.perceiver import Perceiver
from sam_gym.backbones.video.tracker import VideoTracker


@pytest.fixture(scope="module", params=["sam2", "edgetam"])
def memory(request: pytest.FixtureRequest) -> VideoMemory:
    """A small memory with random weights that all matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        own: dict[str, Any] = {}
        if request.param == "edgetam":
            perceiver = Perceiver(16, latents=3, side=2)
            own = {"perceiver": perceiver, "dates_pointers": False, "marks_absence": False}
        memory = VideoMemory((4, 4), 32, 16, hidden=32, depth=2, **own)
        for name, parameter in memory.named_parameters():
            if "gamma" in name or "no_obj" in name or "tpos_enc" in name:
                nn.init.normal_(parameter, 0.0, 0.5)
    return memory


@pytest.fixture
def tracker(build_sam2: Callable[..., Sam2], memory: VideoMemory) -> Callable[..., VideoTracker]:
    backbone = Backbone("tiny_sam2", build_sam2(), torch.device("cpu"), torch.float32)
    return lambda **options: VideoTracker(backbone, memory, **options)
