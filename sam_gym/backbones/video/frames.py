"""Frames of a video: read one by one from a file, a folder or a sequence of images, and encoded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from torch import Tensor

from sam_gym.backbones.features import ImageFeatures
from sam_gym.data.base import Video
from sam_gym.data.images import Unreadable, read_header
from sam_gym.data.io import read_image

#: Endings of image files in a folder of frames.
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


class FrameSource(Protocol):
    """A video whose frames are read when they are needed."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of all frames."""

    def __len__(self) -> int: ...

    def __getitem__(self, frame: int) -> np.ndarray:
        """Read a frame, uint8 (H, W, 3), RGB."""


@dataclass
class Frames:
    """Encoded frames: raw features, and the embedding as the memory attention prepares it."""

    features: ImageFeatures
    prepared: Tensor


def open_video(video: Any, max_pixels: int | None = None) -> FrameSource:
    """Open a video.

    Args:
        video: path of a video file or of a folder of frames, a sequence of images uint8
            (H, W, 3), RGB, or a video of a dataset.
        max_pixels: bound on the pixels of a frame of a path, checked before one is decoded.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: there are no frames, they are too large, or the file cannot be read.
    """
    if isinstance(video, Video):
        return _Images(_FramesOf(video))
    if not isinstance(video, str | Path):
        return _Images(video)
    path = Path(video).expanduser()
    if path.is_dir():
        return _Folder(path, max_pixels)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such video.")
    return _File(path, max_pixels)


def _check_pixels(path: Path, size: tuple[int, int], max_pixels: int) -> None:
    height, width = size
    if height * width > max_pixels:
        raise ValueError(
            f"{path}: frames of {width} x {height} pixels are larger than {max_pixels:,} pixels."
        )


class _FramesOf(Sequence[np.ndarray]):
    """The images of a dataset's video."""

    def __init__(self, video: Video) -> None:
        self.video = video

    def __len__(self) -> int:
        return len(self.video)

    def __getitem__(self, frame: Any) -> Any:
        return self.video.image(frame)


class _Images:
    """A sequence of images in memory, or one that reads them itself."""

    def __init__(self, images: Sequence[np.ndarray]) -> None:
        if not len(images):
            raise ValueError("A video needs at least one frame.")
        self.images = images
        self.size = _checked(images[0], "frame 0", None).shape[:2]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, frame: int) -> np.ndarray:
        return _checked(self.images[frame], f"frame {frame}", self.size)


class _Folder:
    """Image files, in the order of the numbers in their names."""

    def __init__(self, path: Path, max_pixels: int | None) -> None:
        # macOS puts hidden files beside images.
        files = [
            file
            for file in path.iterdir()
            if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
        ]
        if not files:
            raise ValueError(f"{path}: no frames. Expected images ({', '.join(SUFFIXES)}).")
        self.files = sorted(files, key=lambda file: _natural(file.name))
        first = self.files[0]
        if max_pixels is not None:
            try:
                _check_pixels(first, read_header(str(first)).size, max_pixels)
            except Unreadable as error:
                raise ValueError(f"{first}: {error}.") from None
        self.size = read_image(str(first), first.name).shape[:2]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, frame: int) -> np.ndarray:
        file = self.files[frame]
        return _checked(read_image(str(file), file.name), str(file), self.size)


class _File:
    """A video file; frames in order are decoded once, others after a search.

    Attributes:
        rate: frames per second, 0 if the file does not say.
    """

    def __init__(self, path: Path, max_pixels: int | None) -> None:
        self.path = path
        self._capture = cv2.VideoCapture(str(path))
        count = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self._count, self._next = max(0, int(count)), 0
        self._last: tuple[int, np.ndarray] | None = None
        if not self._capture.isOpened() or not self._count:
            raise ValueError(f"{path}: no video that OpenCV can read.")
        if max_pixels is not None:
            sides = cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_WIDTH
            height, width = (int(self._capture.get(side)) for side in sides)
            _check_pixels(path, (height, width), max_pixels)
        self.rate = float(self._capture.get(cv2.CAP_PROP_FPS))
        self.size = self[0].shape[:2]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, frame: int) -> np.ndarray:
        if self._last is not None and self._last[0] == frame:
            return self._last[1]
        if frame != self._next:
            self._capture.set(cv2.CAP_PROP_POS_FRAMES, frame)
        read, image = self._capture.read()
        if not read:
            raise ValueError(f"{self.path}: frame {frame} of {self._count} cannot be decoded.")
        self._next = frame + 1
        self._last = frame, cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        return self._last[1]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which "2" comes before "10"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _checked(image: Any, name: str, size: tuple[int, int] | None) -> np.ndarray:
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"{name} must be uint8 (H, W, 3), got {array.dtype} {tuple(array.shape)}.")
    if size is not None and array.shape[:2] != tuple(size):
        raise ValueError(f"{name} has the size {array.shape[:2]}, frame 0 has {tuple(size)}.")
    return array
