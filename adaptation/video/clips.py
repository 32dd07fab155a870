"""Clips for training: which frames and objects of which videos a step sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptation.video.options import VideoOptions
from sam_gym.data.base import Video, VideoDataset
from sam_gym.utils.text import counted

#: Attempts to draw a clip that shows an object in its first frame.
_ATTEMPTS = 100


@dataclass(frozen=True)
class Clip:
    """A clip.

    Attributes:
        video: its video.
        number: of the video in the dataset.
        frames: T numbers of frames, in the order in which the clip plays.
        objects: numbers of the objects, in the order of `Video.objects`.
        is_flipped: whether it is mirrored.
    """

    video: Video
    number: int
    frames: tuple[int, ...]
    objects: tuple[int, ...]
    is_flipped: bool

    def image(self, time: int) -> np.ndarray:
        """Read a frame: uint8 (H, W, 3)."""
        image = self.video.image(self.frames[time])
        return np.ascontiguousarray(image[:, ::-1]) if self.is_flipped else image

    def masks(self, time: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Read masks bool (N, H, W), which are known, bool (N,), and ignored pixels (H, W)."""
        own = self.video.annotation(self.frames[time])
        masks, ignore = own.masks[list(self.objects)], own.ignore
        if self.is_flipped:
            masks = masks[..., ::-1]
            ignore = None if ignore is None else ignore[:, ::-1]
        return masks, own.annotated[list(self.objects)], ignore


def check_clips(dataset: VideoDataset, options: VideoOptions) -> None:
    """Raise `ValueError` if a clip is longer than a video of a dataset."""
    needed = (options.frames - 1) * options.stride + 1
    # Generated videos have one length. Masks of files are not read yet.
    videos: Any = getattr(dataset, "checked", None) or [dataset[0]]
    for video in videos[: options.videos]:
        if len(video) < needed:
            paths: Sequence[str] = getattr(video, "paths", ())
            where = f"{paths[0]}: " if paths else ""
            raise ValueError(
                f"{where}video {video.name!r} has {counted(len(video), 'frame')}, and a clip "
                f"of {counted(options.frames, 'frame')} at stride {options.stride} needs "
                f"{needed}: lower --frames or --stride, or drop the video."
            )


def count_videos(dataset: VideoDataset, options: VideoOptions) -> int:
    """Return the number of videos that are trained on."""
    return len(dataset) if options.videos is None else min(len(dataset), options.videos)


def draw_clip(rng: np.random.Generator, dataset: VideoDataset, options: VideoOptions) -> Clip:
    """Draw a clip whose first frame shows at least one object.

    Raises:
        ValueError: none was found.
    """
    span = (options.frames - 1) * options.stride + 1
    for _ in range(_ATTEMPTS):
        number = int(rng.integers(count_videos(dataset, options)))
        video = dataset[number]
        start = int(rng.integers(len(video) - span + 1))
        frames = range(start, start + span, options.stride)
        if rng.random() < options.reverse:
            frames = frames[::-1]
        is_flipped = bool(rng.random() < options.flip)
        first = video.annotation(frames[0])
        shown = np.flatnonzero(first.visible & first.annotated)
        if len(shown):
            count = min(options.objects, len(shown))
            objects = np.sort(rng.choice(shown, count, replace=False)).tolist()
            return Clip(video, number, tuple(frames), tuple(objects), is_flipped)
    raise ValueError(
        f"{dataset.name}: {_ATTEMPTS} clips were drawn, and no first frame has an object. Check "
        "the annotations."
    )


def describe(dataset: VideoDataset, options: VideoOptions) -> Mapping[str, Any]:
    """Return what identifies the data of a run, in plain values."""
    from sam_gym.utils.digest import text_digest

    files = getattr(dataset, "files", ())
    return {"videos": count_videos(dataset, options), "files": text_digest(*files)}
