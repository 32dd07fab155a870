"""The frames of annotated videos, as files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2

from sam_gym.backbones.video.frames import FrameSource
from sam_gym.data.videos.reader import stem
from sam_gym.utils.files import write_atomic

#: Endings of video files in a folder of videos.
VIDEO_SUFFIXES = frozenset(".mp4 .mov .avi .mkv .webm .m4v .mpg .mpeg .wmv".split())

_JPEG = [
    *(cv2.IMWRITE_JPEG_QUALITY, 95),
    *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
]


def frame_names(source: FrameSource) -> list[str]:
    """Return names of the frames: those of their files, or numbers."""
    files = getattr(source, "files", None)
    return (
        [f"{k:05d}.jpg" for k in range(len(source))] if files is None else [f.name for f in files]
    )


def written_names(names: Sequence[str], copied: bool) -> list[str]:
    """Return the names of copied frames, whose order every reader understands."""
    if not copied or sorted({*map(stem, names)}) == [*map(stem, names)]:
        return list(names)
    return [f"{number:05d}{Path(name).suffix}" for number, name in enumerate(names)]


def write_frames(folder: Path, names: Sequence[str], source: FrameSource) -> Iterator[int]:
    """Copy the frames of a video into a folder; those of video files become JPEG.

    Args:
        folder: is created.
        names: of the files to write, one per frame.
        source: the video.

    Yields:
        The number of each frame that is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = getattr(source, "files", None)
    for number, name in enumerate(names):
        if files is not None:
            shutil.copyfile(files[number], folder / name)
        else:
            coded = cv2.imencode(".jpg", source[number][..., ::-1], _JPEG)[1]
            write_atomic(folder / name, coded.tobytes())
        yield number
