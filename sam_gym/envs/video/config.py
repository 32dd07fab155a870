"""The arguments of `SamVideo-v0`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from sam_gym.backbones.spec import check_tracks, tracker_help
from sam_gym.backbones.video.prompting import PromptKind
from sam_gym.data import VideoDataset
from sam_gym.data.options import VideoDatasetOptions
from sam_gym.envs.config import EnvConfig
from sam_gym.utils.fields import documented
from sam_gym.utils.settings import NotNegative, whole


@documented
@dataclass(frozen=True, kw_only=True)
class SamVideoConfig(VideoDatasetOptions, EnvConfig):
    """Arguments of `SamVideo-v0`."""

    backbone: Annotated[str, tyro.conf.arg(help=tracker_help("SAM to track with"))] = "micro_video"
    task: Literal["memory", "when", "prompt"] = "memory"
    """Decide which frames are remembered (memory), in which frames a click is bought while the
    video is tracked (when), or where a clip is clicked (prompt)."""
    prompt: PromptKind = "mask"
    """Prompt of the object in the first frame: its mask, its box, or a click on its innermost
    pixel."""
    frames: Annotated[int, whole(3, 1000)] = 24
    """Maximum number of frames of an episode. A longer video is cut at random."""
    budget: Annotated[int, whole(1, 64)] = 4
    """Maximum number of clicks of an episode (tasks when and prompt)."""
    click_cost: NotNegative = 0.01
    """Cost of a click in mean J, subtracted from the reward (tasks when and prompt)."""
    score: Literal["low", "full"] = "low"
    """Compute J on SAM's low-res masks, or at the size of the video (slower)."""

    def validate(self) -> None:
        super().validate()
        check_tracks(self.backbone)
        self.options_of(self.dataset)
        unused = [
            name
            for name in ("budget", "click_cost")
            if self.task == "memory" and getattr(self, name) != getattr(SamVideoConfig, name)
        ]
        if unused:
            raise ValueError(
                f"The task memory has no clicks. Leave out {' and '.join(unused)}, or pass "
                "task='when' or task='prompt'."
            )

    def open_dataset(self) -> VideoDataset:
        """Open the dataset; raises as `make_video_dataset` does."""
        takes = self.registry.get(self.dataset).parameters
        return self.make_dataset(
            self.split, **({"frames": self.frames} if "frames" in takes else {})
        )

    @property
    def held_out_split(self) -> str:
        split: str = self.registry.get(self.dataset).held_out_split
        return split

    @property
    def max_episode_steps(self) -> int:
        if self.task == "prompt":
            return self.budget
        # The first frame is prompted, the second is tracked without a choice.
        return self.frames - 2 + (self.budget if self.task == "when" else 0)
