"""DAVIS and MOSE: folders of frames, and of PNG files of object ids."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np

from sam_gym.data.base import SPLITS, FrameAnnotation, Unsplit, check_index
from sam_gym.data.io import OnError, Records, Reject, check_all, flag, read_labels
from sam_gym.data.splits import ALL
from sam_gym.data.videos.reader import (
    FileVideo,
    VideoReader,
    check_folder,
    check_frame_size,
    check_frames,
    list_files,
    missing_split,
    split_by_seed,
)
from sam_gym.utils.registry import check_choice

FRAMES, MASKS = "JPEGImages", "Annotations"
#: Id of void pixels in DAVIS 2017, and of the object in DAVIS 2016.
VOID = 255
_PNG = frozenset({".png"})
#: Split -> names of its list in `ImageSets`.
_LISTS = {"train": ("train",), "val": ("val",), "test": ("test-dev", "test"), ALL: ("trainval",)}

Objects = Literal["first", "all"]


class IdVideo(FileVideo):
    """A video with a PNG file of object ids for every annotated frame.

    Args:
        name, paths, size: see `FileVideo`.
        masks: frame -> path of its PNG file.
        binary: every value but 0 is the only object, 1; else values are ids, and 255 is void.
        objects: which ids are objects: those of the first annotated frame, or of all frames.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[str],
        size: tuple[int, int],
        masks: dict[int, str],
        binary: bool,
        objects: Objects,
    ) -> None:
        super().__init__(name, paths, size)
        self._masks, self._binary, self._objects = masks, binary, objects

    @cached_property
    def objects(self) -> tuple[int, ...]:
        frames = sorted(self._masks)
        found: set[int] = set()
        for frame in frames[:1] if self._objects == "first" else frames:
            found |= ids_of(self._ids(frame))
        if not found:
            where = "first annotated frame" if self._objects == "first" else "video"
            raise ValueError(
                f"{self._masks[frames[0]]}: the {where} of {self.name!r} has no object. Drop the "
                f"video, or pass {flag('objects', 'all')} if objects appear later."
            )
        return tuple(sorted(found))

    @property
    def categories(self) -> tuple[int, ...]:
        return (0,) * len(self.objects)

    @property
    def annotated(self) -> np.ndarray:
        annotated = np.zeros((len(self), len(self.objects)), bool)
        annotated[sorted(self._masks)] = True
        return annotated

    def annotation(self, frame: int) -> FrameAnnotation:
        """Read the masks of the frame at an index; void pixels are ignored pixels."""
        check_index(self.name, frame, len(self))
        count = len(self.objects)
        if frame not in self._masks:
            return FrameAnnotation(np.zeros((count, *self.size), bool), np.zeros(count, bool))
        ids = self._ids(frame)
        void = ids == VOID
        return FrameAnnotation(
            ids == np.array(self.objects, np.uint16)[:, None, None],
            np.ones(count, bool),
            void if void.any() else None,
        )

    def _ids(self, frame: int) -> np.ndarray:
        path, record = self._masks[frame], f"frame {frame} of video {self.name!r}"
        ids = read_labels(path, record)
        check_frame_size(path, record, ids, self.size)
        if not self._binary:
            return ids
        values = np.unique(ids)
        if np.setdiff1d(values, (0, VOID)).size:
            raise ValueError(
                f"{path}: {record}: a mask of DAVIS 2016 holds 0 and 255, this one "
                f"{', '.join(map(str, values[:8]))}. Pass {flag('year', '2017')} if it holds ids."
            )
        return (ids == VOID).astype(np.uint8)


def ids_of(ids: np.ndarray) -> set[int]:
    """Return the ids of objects in an array, without background and void."""
    return set(np.unique(ids).tolist()) - {0, VOID}


class _IdVideos(VideoReader[IdVideo]):
    """What DAVIS and MOSE share."""

    def __getitem__(self, index: int) -> IdVideo:
        video = super().__getitem__(index)
        _ = video.objects  # reads the masks that tell the ids
        return video


def _check(frames: str, masks: str, name: str, binary: bool, objects: Objects) -> IdVideo:
    """Check the files of a video; raises `Reject`."""
    paths = list_files(os.path.join(frames, name))
    if not paths:
        raise Reject("video has no frame", os.path.join(frames, name))
    annotated = list_files(os.path.join(masks, name), _PNG)
    if not annotated:
        raise Reject("video has no mask", os.path.join(masks, name))
    order = {frame: number for number, frame in enumerate(paths)}
    for frame, path in annotated.items():
        if frame not in order:
            raise Reject("mask has no frame", path)
    size = check_frames(list(paths.values()), "frame", None)
    check_frames(list(annotated.values()), "mask", size)
    by_number = {order[frame]: path for frame, path in annotated.items()}
    return IdVideo(name, list(paths.values()), size, by_number, binary, objects)


def _check_videos(
    frames: str, masks: str, names: Sequence[str], records: Records, binary: bool, objects: Objects
) -> list[IdVideo]:
    """Check the files of videos, and the objects of their first masks."""

    def check(name: str) -> IdVideo:
        video = _check(frames, masks, name, binary, objects)
        if objects == "first":
            try:
                _ = video.objects
            except ValueError as error:
                raise Reject("masks cannot be used", str(error)) from None
        return video

    videos = []
    for name, result in zip(names, check_all(check, names), strict=True):
        with records.validate(f"video {name!r}"):
            if isinstance(result, Reject):
                raise result
            videos.append(result)
    return videos


def _folders(path: str) -> list[str]:
    """Return the names of the folders in a folder, sorted."""
    names = sorted(os.listdir(check_folder(path)))
    return [n for n in names if not n.startswith(".") and os.path.isdir(os.path.join(path, n))]


class Davis(_IdVideos):
    """DAVIS 2016 and 2017: `JPEGImages/SEQUENCE` and `Annotations/SEQUENCE`, or in `480p` of both.

    The files of masks are read as ids, whatever their palette. In DAVIS 2017, 255 is void: ignored
    pixels, which the official evaluation of semi-supervised results counts as background. In DAVIS
    2016, 255 is the only object, id 1. `year=None` tells the two by the first mask of every
    sequence: grey files of 0 and 255 are 2016, other values are 2017, and anything else is refused.

    Frames without a file of masks are not annotated. An object without pixels is out of sight.

    Construction checks all files (about 0.1 ms each) and decodes the first mask of every sequence.

    Args:
        split: "train", "val" or "test" (test-dev of 2017): the sequences that `ImageSets` lists.
            **Without lists, every split is all sequences**, unless `split_seed` is given. "all":
            every sequence.
        root: folder of the dataset.
        year: 2016 or 2017; None: told by the masks.
        resolution: folder in `JPEGImages` and `Annotations`; None: "480p" if there is one.
        split_seed: seed that splits the sequences (80% train, 10% val, 10% test) without lists.
        objects: "first": the ids of the first annotated frame, as in the official evaluation;
            later ids are left out. "all": the ids of all frames, which are read with the video.
        on_error: handling of invalid sequences: "raise", or "skip" to count them in `skipped`, with
            one warning.

    Attributes:
        categories: one, "object".
        year: 2016 or 2017.

    Raises:
        FileNotFoundError: the root, a folder or a file is missing.
        ValueError: an option is unknown, the year cannot be told, the files of a sequence differ in
            size, or a file is not an image, not whole, or not of one channel.
    """

    def __init__(
        self,
        split: str = "val",
        *,
        root: str,
        year: Literal[2016, 2017] | None = None,
        resolution: str | None = None,
        split_seed: int | None = None,
        objects: Objects = "first",
        on_error: OnError = "raise",
    ) -> None:
        check_choice("split", split, (*SPLITS, ALL))
        check_choice("objects", objects, ("first", "all"))
        frames, masks = (check_folder(os.path.join(root, name)) for name in (FRAMES, MASKS))
        if resolution is None and os.path.isdir(os.path.join(frames, "480p")):
            resolution = "480p"
        if resolution is not None:
            frames, masks = (check_folder(os.path.join(f, resolution)) for f in (frames, masks))
        names = _folders(masks)
        self.year = year if year is not None else _year(masks, names)
        listed, unsplit = _listed(root, self.year, split, names)
        names, unsplit = split_by_seed(listed, split, split_seed, root, unsplit)
        records = Records(root, on_error)
        videos = _check_videos(frames, masks, names, records, self.year == 2016, objects)
        super().__init__("davis", ("object",), videos, records, unsplit, root)


def _year(masks: str, names: Sequence[str]) -> Literal[2016, 2017]:
    """Tell DAVIS 2016 from 2017 by the first mask of every sequence."""
    found: dict[int, str] = {}
    unclear = ""
    for name in names:
        paths = list(_first_mask(os.path.join(masks, name)))
        if not paths:
            continue
        ids = read_labels(paths[0], f"video {name!r}")
        values = set(np.unique(ids).tolist())
        if values - {0, VOID}:
            found.setdefault(2017, paths[0])
        elif VOID in values and not _has_palette(paths[0]):
            found.setdefault(2016, paths[0])
        else:
            unclear = paths[0]
    option = f"pass {flag('year', '2016')} or {flag('year', '2017')}"
    if len(found) == 2:
        raise ValueError(
            f"{found[2016]}: 255 is the object, as in DAVIS 2016, but {found[2017]} holds ids, as "
            f"in DAVIS 2017. Keep the two apart, or {option}."
        )
    if not found:
        raise ValueError(
            f"{unclear or masks}: no first mask tells DAVIS 2016 (0 and 255, grey) from DAVIS 2017 "
            f"(ids). Check the path, or {option}."
        )
    return 2016 if 2016 in found else 2017


def _first_mask(folder: str) -> list[str]:
    names = sorted(n for n in os.listdir(folder) if n.lower().endswith(".png") and n[0] != ".")
    return [os.path.join(folder, name) for name in names[:1]]


def _has_palette(path: str) -> bool:
    """Return whether a PNG file has a palette, as its header tells."""
    with open(path, "rb") as file:
        return file.read(26)[25:] == b"\x03"


def _listed(
    root: str, year: int, split: str, names: Sequence[str]
) -> tuple[list[str], Unsplit | None]:
    """Return the sequences of a split, or all if there are no lists, and why."""
    lists = os.path.join(root, "ImageSets")
    folders = [os.path.join(lists, own) for own in (str(year), "480p")]
    folder = next((own for own in folders if os.path.isdir(own)), None)
    if split == ALL:
        return list(names), None
    if folder is None:
        return list(names), Unsplit(
            f"{lists}: there are no lists of splits, so every split is all sequences",
            f"Write train.txt and val.txt to ImageSets/{year}",
        )
    for name in _LISTS[split]:
        path = os.path.join(folder, f"{name}.txt")
        if os.path.isfile(path):
            return _read_list(path), None
    found = sorted(name for name in os.listdir(folder) if name.endswith(".txt"))
    raise missing_split(folder, split, found, "Choose another split.")


def _read_list(path: str) -> list[str]:
    """Return the sequences of a list: one a line, or (DAVIS 2016) paths of frame and mask."""
    with open(path, encoding="utf-8") as file:
        lines = [line.split()[0] for line in file if line.strip()]
    names = (os.path.basename(os.path.dirname(n)) if "/" in n else n for n in lines)
    return list(dict.fromkeys(names))


class Mose(_IdVideos):
    """MOSE: `train` and `valid`, each with `JPEGImages/VIDEO` and `Annotations/VIDEO`.

    The files of masks are read as ids, whatever their palette; 255 is void. Frames without a file
    of masks are not annotated: of the published val split, all but the first.

    Construction checks all files (about 0.1 ms each).

    Args:
        split: "train", "val" (folder `valid`) or "test"; or "all" for a root that holds the two
            folders itself.
        root: folder of the dataset. **If it holds the two folders itself, every split is all
            videos**, unless `split_seed` is given.
        split_seed: seed that splits the videos of such a root (80% train, 10% val, 10% test).
        objects: "all": the ids of all frames, which are read when a video is first returned.
            "first": the ids of the first annotated frame; later ids are left out.
        on_error: handling of invalid videos: "raise", or "skip" to count them in `skipped`, with
            one warning.

    Attributes:
        categories: one, "object".

    Raises:
        FileNotFoundError: the root, a folder or a file is missing.
        ValueError: an option is unknown, the files of a video differ in size, or a file is not an
            image, not whole, or not of one channel.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        root: str,
        split_seed: int | None = None,
        objects: Objects = "all",
        on_error: OnError = "raise",
    ) -> None:
        check_choice("split", split, (*SPLITS, ALL))
        check_choice("objects", objects, ("first", "all"))
        check_folder(root)
        folder, unsplit = root, None
        if not os.path.isdir(os.path.join(root, FRAMES)):
            folder = os.path.join(root, "valid" if split == "val" else split)
            if not os.path.isdir(folder):
                raise missing_split(root, split, _folders(root), "Choose another split.")
        elif split != ALL:
            unsplit = Unsplit(
                f"{root}: it holds {FRAMES} itself, so every split is all videos",
                "Put the videos into the folders train and valid",
            )
        frames, masks = (check_folder(os.path.join(folder, name)) for name in (FRAMES, MASKS))
        names, unsplit = split_by_seed(_folders(frames), split, split_seed, root, unsplit)
        records = Records(folder, on_error)
        videos = _check_videos(frames, masks, names, records, False, objects)
        super().__init__("mose", ("object",), videos, records, unsplit, folder)
