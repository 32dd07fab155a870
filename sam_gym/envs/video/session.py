"""A tracking session over frames whose embeddings are in a store."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam_gym.backbones.embeddings.store import EmbeddingStore
from sam_gym.backbones.video.frames import Frames
from sam_gym.backbones.video.memory import ABSENT, Entry
from sam_gym.backbones.video.session import TrackingSession
from sam_gym.backbones.video.track import Clicks, Track
from sam_gym.backbones.video.tracker import VideoTracker
from sam_gym.utils.transfer import to_host


@dataclass(frozen=True)
class StoredVideo:
    """A video of which only embeddings are needed.

    Attributes:
        handles: of its frames, int64 (T,), pinned.
        size: (height, width) of the frames.
    """

    handles: np.ndarray
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.handles)


class StoredSession(TrackingSession):
    """Tracks one object in each of some videos.

    Args:
        tracker: the model.
        store: holds the embeddings of all frames.
        num_videos: number of videos, which `start` sets.
    """

    def __init__(self, tracker: VideoTracker, store: EmbeddingStore, num_videos: int) -> None:
        super().__init__(tracker, [None] * num_videos)  # type: ignore[list-item]
        self.store = store

    def start(self, video: int, source: StoredVideo, **prompt: Any) -> None:
        """Replace a video, and prompt its object in the first frame; see `prompt`."""
        self.videos[video] = source  # type: ignore[index]
        self._tracks[video] = {}
        self.prompt(video, 0, 0, **prompt)

    @torch.no_grad()
    def _encoded(
        self, wanted: Sequence[tuple[int, int]], ahead: Sequence[tuple[int, int]] = ()
    ) -> tuple[Frames, list[int]]:
        del ahead
        unique = list(dict.fromkeys(wanted))
        sources: Any = self.videos
        handles = np.array([sources[video].handles[frame] for video, frame in unique])
        raw = self.tracker.raw(self.store.gather(handles, check=False))
        places = {key: row for row, key in enumerate(unique)}
        return self.tracker.prepared(raw), [places[key] for key in wanted]

    def play(self, videos: Sequence[int], frames: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Track some videos from their first frames to their last.

        Args:
            videos: S numbers.
            frames: T, at least the length of each; what is missing is absent.

        Returns:
            logits float32 (S, T, hm, wm), predicted IoU and object scores float32 (S, T).
        """
        backbone, rows = self.tracker.backbone, {video: row for row, video in enumerate(videos)}
        shape = (len(videos), frames)
        logits = torch.full((*shape, *backbone.mask_shape), ABSENT, device=backbone.device)
        numbers = torch.zeros((2, *shape), device=backbone.device)
        numbers[1] = ABSENT
        for step in self.propagate(videos=rows):
            place = rows[step.video], step.frame
            logits[place] = step.logits[0]
            numbers[0][place], numbers[1][place] = step.ious[0], step.scores[0]
        ious, scores = to_host(numbers[0], numbers[1])
        return logits, ious, scores

    def conditioned(self, video: int) -> list[int]:
        """Return the prompted frames of a video."""
        return sorted(self._tracks[video][0].conditioning)

    def copy(self) -> StoredSession:
        """Return a session of the same state, for experiments."""
        other = copy(self)
        other._tracks = [
            {name: _copied(track) for name, track in tracks.items()} for tracks in self._tracks
        ]
        return other

    # States ------------------------------------------------------------------------------------

    def get_state(self, video: int) -> dict[str, Any]:
        """Return what is known of a video's object: arrays, memories as the bits of bfloat16."""
        track = self._tracks[video][0]
        known = dict(track.known)
        numbers = sorted(known)
        entries = [known[number] for number in numbers]

        def stacked(name: str) -> np.ndarray:
            return to_host(torch.stack([getattr(own, name) for own in entries]))[0].copy()

        memories = torch.stack([own.memory for own in entries if own.memory is not None])
        return {
            "frames": np.array(numbers),
            "conditions": np.array([number in track.conditioning for number in numbers]),
            "clicks": {n: (own.points, own.labels, own.box) for n, own in track.clicks.items()},
            "memory": to_host(memories.view(torch.int16))[0].copy(),
            **{name: stacked(name) for name in ("logits", "iou", "score", "pointer")},
        }

    def set_state(self, video: int, state: dict[str, Any]) -> None:
        """Restore what `get_state` has returned, of the same video."""
        device, track = self.tracker.backbone.device, Track()
        tensors = {
            name: torch.from_numpy(state[name].copy()).to(device)
            for name in ("logits", "iou", "score", "pointer", "memory")
        }
        tensors["memory"] = tensors["memory"].view(torch.bfloat16)
        for row, (frame, conditions) in enumerate(
            zip(state["frames"].tolist(), state["conditions"].tolist(), strict=True)
        ):
            entry = Entry(**{name: tensor[row] for name, tensor in tensors.items()})
            (track.conditioning if conditions else track.tracked)[frame] = entry
            track.passed[frame] = False
        track.clicks = {frame: Clicks(*own) for frame, own in state["clicks"].items()}
        self._tracks[video] = {0: track}


def _copied(track: Track) -> Track:
    other = Track()
    for name, known in vars(track).items():
        setattr(other, name, dict(known))
    return other
