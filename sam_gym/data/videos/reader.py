"""What the readers of video datasets share."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from pycocotools import mask as rle

from sam_gym.data.base import FrameAnnotation, MissingSplit, Unsplit, Video, check_index
from sam_gym.data.io import IMAGE_SUFFIXES, Records, Reject, check_image, read_image, resolve
from sam_gym.data.splits import seeded_part
from sam_gym.utils.text import printable

V = TypeVar("V", bound=Video)


class FileVideo(ABC):
    """A video whose frames are image files.

    Args:
        name: of the video.
        paths: of its frames, in order.
        size: (height, width) of all frames.

    Attributes:
        name, size, frames: see `sam_gym.data.Video`.
        paths: of its frames.
    """

    def __init__(self, name: str, paths: Sequence[str], size: tuple[int, int]) -> None:
        self.name, self.paths, self.size = name, list(paths), size
        self.frames = tuple(stem(path) for path in paths)

    @property
    @abstractmethod
    def objects(self) -> tuple[int, ...]: ...

    @property
    @abstractmethod
    def categories(self) -> tuple[int, ...]: ...

    @property
    @abstractmethod
    def annotated(self) -> np.ndarray: ...

    @abstractmethod
    def annotation(self, frame: int) -> FrameAnnotation: ...

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, frame: int) -> np.ndarray:
        """Read the frame at an index: uint8 (H, W, 3), RGB.

        Raises:
            IndexError: the index is outside the range.
            FileNotFoundError: the file is missing.
            ValueError: the file is corrupt, or its size is not that of the video.
        """
        check_index(self.name, frame, len(self))
        path, record = self.paths[frame], f"frame {frame} of video {self.name!r}"
        pixels = read_image(path, record, self.size)
        check_frame_size(path, record, pixels, self.size)
        return pixels


@dataclass(frozen=True)
class Track:
    """An object of a video as run lengths.

    Attributes:
        category: index of its category.
        masks: frame -> counts of a compressed RLE; frames without a mask are left out.
        unknown: frames in which it is not annotated.
    """

    category: int
    masks: dict[int, bytes] = field(default_factory=dict)
    unknown: set[int] = field(default_factory=set)


class RleVideo(FileVideo):
    """A video whose masks are held as run lengths, and decoded when they are asked for.

    Args:
        name, paths, size: see `FileVideo`.
        tracks: object id -> its masks.
        ignored: frame -> counts of masks of crowds.
        annotated: bool (T,), frames that are annotated at all; None: all.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[str],
        size: tuple[int, int],
        tracks: Mapping[int, Track],
        ignored: Mapping[int, Sequence[bytes]],
        annotated: np.ndarray | None = None,
    ) -> None:
        super().__init__(name, paths, size)
        self._tracks, self._ignored = list(tracks.values()), ignored
        self._objects = tuple(tracks)
        frames = np.ones(len(paths), bool) if annotated is None else annotated
        self._annotated = np.repeat(frames[:, None], len(tracks), axis=1)
        for number, track in enumerate(self._tracks):
            self._annotated[sorted(track.unknown), number] = False

    @property
    def objects(self) -> tuple[int, ...]:
        return self._objects

    @property
    def categories(self) -> tuple[int, ...]:
        return tuple(track.category for track in self._tracks)

    @property
    def annotated(self) -> np.ndarray:
        return self._annotated.copy()

    def annotation(self, frame: int) -> FrameAnnotation:
        """Decode the masks of the frame at an index; crowds are ignored pixels."""
        check_index(self.name, frame, len(self))
        masks = np.zeros((len(self._tracks), *self.size), bool)
        held = [n for n, track in enumerate(self._tracks) if frame in track.masks]
        if held:
            masks[held] = decode([self._tracks[n].masks[frame] for n in held], self.size)
        crowds = self._ignored.get(frame)
        ignore: np.ndarray | None = None
        if crowds:
            ignore = np.logical_and(decode(crowds, self.size).any(axis=0), ~masks.any(axis=0))
        return FrameAnnotation(masks, self._annotated[frame].copy(), ignore)


class VideoReader(Generic[V]):
    """A dataset of videos that were checked.

    Attributes:
        name, categories: see `sam_gym.data.VideoDataset`.
        skipped: number of skipped records, by reason.
        unsplit: why every split is all videos; None if they differ.
    """

    name: str
    categories: tuple[str, ...]

    def __init__(
        self,
        name: str,
        categories: Sequence[str],
        videos: Sequence[V],
        records: Records,
        unsplit: Unsplit | None,
        where: str,
    ) -> None:
        self.name, self.categories = name, tuple(categories)
        self.skipped: dict[str, int] = dict(records.skipped)
        self.unsplit = unsplit
        self._videos = list(videos)
        if not self._videos:
            why = f" ({records})" if records.skipped else ""
            raise ValueError(
                f"{where}: no usable video{why}. Check that this is the folder or file you meant."
            )
        records.warn()

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, index: int) -> V:
        """Return the video at `index`.

        Raises:
            IndexError: `index` is outside `range(len(self))`.
            FileNotFoundError: a file is missing.
            ValueError: a file is corrupt, or has changed since construction.
        """
        check_index(self.name, index, len(self))
        return self._videos[index]

    @property
    def checked(self) -> Sequence[V]:
        """The videos as they were checked, before their masks are read."""
        return self._videos

    @property
    def files(self) -> list[str]:
        """Paths of the files of frames."""
        return [path for video in self._videos for path in getattr(video, "paths", ())]


def stem(path: str) -> str:
    """Return the name of a file without folder and suffix."""
    return os.path.splitext(os.path.basename(path))[0]


def decode(counts: Sequence[bytes], size: tuple[int, int]) -> np.ndarray:
    """Decode run lengths: bool (N, H, W)."""
    masks = rle.decode([{"size": list(size), "counts": own} for own in counts])
    return np.ascontiguousarray(masks.transpose(2, 0, 1)).astype(bool)


def check_frame_size(path: str, record: str, pixels: np.ndarray, size: tuple[int, int]) -> None:
    """Raise `ValueError` if a frame or mask that was read has another size than its video."""
    if pixels.shape[:2] != size:
        (height, width), (expected_height, expected_width) = pixels.shape[:2], size
        raise ValueError(
            f"{path}: {record}: the file is {width} x {height} pixels, the video is "
            f"{expected_width} x {expected_height}. Restore the original file, or drop the video."
        )


def list_files(folder: str, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> dict[str, str]:
    """Return the files of a folder by stem, sorted by name.

    Raises:
        Reject: the folder is missing, two files have one stem, or a file is a link out of it.
    """
    if not os.path.isdir(folder):
        raise Reject("folder is missing", f"looked for {folder}", FileNotFoundError)
    found: dict[str, str] = {}
    for name in sorted(os.listdir(folder)):
        if name.startswith(".") or os.path.splitext(name)[1].lower() not in suffixes:
            continue
        if stem(name) in found:
            raise Reject("two files have this stem", os.path.join(folder, name))
        found[stem(name)] = resolve(folder, name)
    return found


def check_frames(paths: Sequence[str], kind: str, size: tuple[int, int] | None) -> tuple[int, int]:
    """Check the files of a video's frames or masks; the pixels are not decoded.

    Args:
        paths: at least one.
        kind: "frame" or "mask", for messages.
        size: expected (height, width); None: that of the first file.

    Returns:
        Their (height, width).

    Raises:
        Reject: a file is missing, is truncated, cannot be read, or has another size.
    """
    for path in paths:
        header = check_image(path, kind=kind)
        size = size or header.size
        if header.fit(size) != size:
            (height, width), (expected_height, expected_width) = header.size, size
            raise Reject(
                f"{kind} differs in size from the first frame",
                f"{path} is {width} x {height}, not {expected_width} x {expected_height}",
            )
    assert size is not None
    return size


def check_folder(path: str) -> str:
    """Return the path of a folder; raise `FileNotFoundError` if it is missing."""
    if not os.path.isdir(path):
        raise FileNotFoundError(f"{path}: the folder does not exist. Check the path.")
    return path


def split_by_seed(
    names: Sequence[str], split: str, split_seed: int | None, where: str, unsplit: Unsplit | None
) -> tuple[list[str], Unsplit | None]:
    """Return the videos of a split of data that may come without splits.

    Args:
        names: of all videos.
        split: "train", "val", "test", or "all".
        split_seed: splits the videos; None: they have splits, or are all taken.
        where: file or folder, for messages.
        unsplit: why every split holds the same videos; None if they have splits.

    Returns:
        The names, and `unsplit`, or None after a split by seed.
    """
    if split_seed is None:
        return list(names), unsplit
    if unsplit is None:
        raise ValueError(
            f"{where}: split_seed={split_seed!r} is for data without splits. Leave it out."
        )
    part = seeded_part(names, split, split_seed, where)
    return [name for name in names if name in part], None


def missing_split(where: str, split: str, found: Sequence[str], remedy: str) -> MissingSplit:
    """Return the error for a split that the data lacks."""
    return MissingSplit(
        printable(f"{where}: no split {split!r}. Found: {', '.join(found) or 'none'}. {remedy}")
    )
