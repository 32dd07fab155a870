"""`SamVideo-v0`: one module per task, over what they share in `core` and `frames`."""

from sam_gym.envs.video.config import SamVideoConfig
from sam_gym.envs.video.core import VideoCore
from sam_gym.envs.video.env import SamVideoEnv, SamVideoVectorEnv, make_core
from sam_gym.envs.video.frames import PLACE_COLUMNS
from sam_gym.envs.video.memory import MemoryCore
from sam_gym.envs.video.prompt import FRAME_COLUMNS, PromptCore
from sam_gym.envs.video.when import WhenCore

__all__ = [
    "FRAME_COLUMNS",
    "PLACE_COLUMNS",
    "MemoryCore",
    "PromptCore",
    "SamVideoConfig",
    "SamVideoEnv",
    "SamVideoVectorEnv",
    "VideoCore",
    "WhenCore",
    "make_core",
]
