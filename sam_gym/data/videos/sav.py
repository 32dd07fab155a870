"""SA-V: videos with masklets in JSON (train), folders of frames and masks (val, test)."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import cv2
import numpy as np

from sam_gym.data.base import SPLITS, FrameAnnotation, check_index
from sam_gym.data.coco_records import checked_rle, is_missing, positive_size
from sam_gym.data.io import (
    OnError,
    Records,
    Reject,
    check_all,
    read_json,
    read_labels,
    whole_number,
)
from sam_gym.data.videos.reader import (
    FileVideo,
    RleVideo,
    Track,
    VideoReader,
    check_folder,
    check_frame_size,
    check_frames,
    list_files,
    missing_split,
    stem,
)
from sam_gym.utils.registry import check_choice

FRAMES, MASKS = "JPEGImages_24fps", "Annotations_6fps"
#: Frames between two annotated frames: 24 fps against 6 fps.
STRIDE = 4

Masklets = Literal["manual", "auto", "both"]


class FolderVideo(FileVideo):
    """A video of val or test: one folder of masks per object.

    Args:
        name, paths, size: see `FileVideo`.
        masks: object id -> frame -> path of its mask.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[str],
        size: tuple[int, int],
        masks: dict[int, dict[int, str]],
    ) -> None:
        super().__init__(name, paths, size)
        self._masks = masks

    @property
    def objects(self) -> tuple[int, ...]:
        return tuple(self._masks)

    @property
    def categories(self) -> tuple[int, ...]:
        return (0,) * len(self._masks)

    @property
    def annotated(self) -> np.ndarray:
        annotated = np.zeros((len(self), len(self._masks)), bool)
        for number, paths in enumerate(self._masks.values()):
            annotated[sorted(paths), number] = True
        return annotated

    def annotation(self, frame: int) -> FrameAnnotation:
        """Read the masks of the frame at an index: every value but 0 is the object."""
        check_index(self.name, frame, len(self))
        masks = np.zeros((len(self._masks), *self.size), bool)
        annotated = np.zeros(len(masks), bool)
        for number, paths in enumerate(self._masks.values()):
            if frame in paths:
                record = f"frame {frame} of video {self.name!r}"
                ids = read_labels(paths[frame], record)
                check_frame_size(paths[frame], record, ids, self.size)
                masks[number], annotated[number] = ids > 0, True
        return FrameAnnotation(masks, annotated)


class MaskletVideo:
    """A video of train: an MP4 file, and masklets in JSON that are read when first needed.

    Frames are decoded in order; an earlier frame than the last one starts from the beginning.
    """

    def __init__(self, path: str, files: dict[str, str], annotated_only: bool) -> None:
        self.path, self._files = path, files
        self.name, self.paths = stem(path), [path]
        self._stride = STRIDE if annotated_only else 1
        self._capture: cv2.VideoCapture | None = None
        self._next = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_capture": None, "_next": 0}

    @cached_property
    def masklets(self) -> RleVideo:
        """The masklets, without frames.

        Raises:
            ValueError: a JSON file is invalid.
        """
        tracks: dict[int, Track] = {}
        length, size = 0, (0, 0)
        for file in self._files.values():
            data = read_json(file, "masklets")
            with Records(file, "raise").validate(f"video {self.name!r}"):
                if not isinstance(data, dict):
                    raise Reject("file is not an object", f"got {type(data).__name__!r}")
                own = positive_size(data, "video_height"), positive_size(data, "video_width")
                count = positive_size(data, "video_frame_count")
                if tracks and (own, count) != (size, length):
                    raise Reject("manual and auto masklets differ in the size of the video")
                size, length = own, count
                first = max(tracks) + 1 if tracks else 0
                for number, track in _tracks(data, size, length).items():
                    tracks[first + number] = track
        kept = range(0, length, self._stride)
        number_of = {frame: number for number, frame in enumerate(kept)}
        moved = {}
        for number, track in tracks.items():
            masks = {number_of[f]: m for f, m in track.masks.items() if f in number_of}
            moved[number] = Track(0, masks, set(range(len(kept))) - set(masks))
        names = [f"{frame:05d}" for frame in kept]
        return RleVideo(self.name, names, size, moved, {})

    @property
    def size(self) -> tuple[int, int]:
        return self.masklets.size

    @property
    def frames(self) -> tuple[str, ...]:
        return self.masklets.frames

    @property
    def objects(self) -> tuple[int, ...]:
        return self.masklets.objects

    @property
    def categories(self) -> tuple[int, ...]:
        return self.masklets.categories

    @property
    def annotated(self) -> np.ndarray:
        return self.masklets.annotated

    def __len__(self) -> int:
        return len(self.masklets)

    def annotation(self, frame: int) -> FrameAnnotation:
        """Decode the masks of the frame at an index."""
        return self.masklets.annotation(frame)

    def image(self, frame: int) -> np.ndarray:
        """Decode the frame at an index: uint8 (H, W, 3), RGB.

        Raises:
            IndexError: the index is outside the range.
            ValueError: the file ends before the frame, or has another size than the JSON.
        """
        check_index(self.name, frame, len(self))
        wanted = frame * self._stride
        if self._capture is None or wanted < self._next:
            self.close()
            self._capture, self._next = cv2.VideoCapture(self.path), 0
        while self._next < wanted and self._capture.grab():
            self._next += 1
        bgr = self._capture.read()[1] if self._next == wanted else None
        if bgr is None:
            at = self._next
            self.close()
            raise ValueError(
                f"{self.path}: frame {wanted} cannot be decoded: the file ends, or is damaged, at "
                f"frame {at}; the JSON says {len(self) * self._stride}. Fetch the file again."
            )
        self._next += 1
        pixels = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
        check_frame_size(self.path, f"frame {wanted}", pixels, self.size)
        return pixels

    def close(self) -> None:
        """Close the video file; it is opened again when a frame is asked for."""
        if self._capture is not None:
            self._capture.release()
        self._capture = None


def _tracks(data: dict[str, Any], size: tuple[int, int], length: int) -> dict[int, Track]:
    """Return the masklets of a file by id, with frames of the video; raises `Reject`."""
    frames, ids = data.get("masklet"), data.get("masklet_id")
    if not isinstance(frames, list) or not all(isinstance(frame, list) for frame in frames):
        raise Reject("masklet is not a list of lists")
    if not isinstance(ids, list) or any(whole_number(number) is None for number in ids):
        raise Reject("masklet_id is not a list of whole numbers", f"got {ids!r:.40}")
    if len(set(ids)) < len(ids):
        raise Reject("masklet_id repeats an id", f"got {ids!r:.40}")
    if (len(frames) - 1) * STRIDE >= length:
        raise Reject("masklet has more frames than the video", f"{len(frames)}, video {length}")
    tracks = {int(number): Track(0) for number in ids}
    for frame, codes in enumerate(frames):
        if len(codes) != len(ids):
            raise Reject("masklet has not one entry per object", f"frame {frame}: {len(codes)}")
        for track, code in zip(tracks.values(), codes, strict=True):
            if not is_missing(code):
                track.masks[frame * STRIDE] = bytes(checked_rle(code, *size)["counts"])
    return tracks


class Sav(VideoReader[FolderVideo | MaskletVideo]):
    """SA-V, as Meta publishes it.

    Train: `VIDEO.mp4` with `VIDEO_manual.json` and `VIDEO_auto.json`, in `root`, `root/sav_train`
    or folders in these. Val and test: `JPEGImages_24fps/VIDEO`, `Annotations_6fps/VIDEO/OBJECT` and
    the list `sav_val.txt`, in `root` or `root/sav_val`.

    Every fourth frame is annotated. An object without a mask file, or with null in the JSON, is
    not annotated in that frame: manual masklets may begin late. An empty mask means that it is out
    of sight. Ids are those of the folders, or `masklet_id`; with both kinds of masklets, automatic
    ones are numbered after manual ones.

    Construction checks all files of val and test (about 0.1 ms each). Of train, it checks that
    files exist; the JSON of a video is read and validated when the video is first returned.

    Args:
        split: "train", "val" or "test".
        root: folder of the dataset.
        masklets: of train: "manual", "auto" or "both".
        annotated_only: leave out frames between the annotated ones.
        on_error: handling of invalid videos on construction: "raise", or "skip" to count them in
            `skipped`, with one warning.

    Attributes:
        categories: one, "object".

    Raises:
        FileNotFoundError: the root or a file is missing, or there is no such split.
        ValueError: an option is unknown, a file is invalid, or no video is left.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        root: str,
        masklets: Masklets = "manual",
        annotated_only: bool = False,
        on_error: OnError = "raise",
    ) -> None:
        check_choice("split", split, SPLITS)
        check_choice("masklets", masklets, ("manual", "auto", "both"))
        check_folder(root)
        own = os.path.join(root, f"sav_{split}")
        folder = own if os.path.isdir(own) else root
        records = Records(folder, on_error)
        videos: Sequence[FolderVideo | MaskletVideo]
        if split == "train":
            videos = _train(folder, masklets, annotated_only, records)
        else:
            videos = _folders(folder, split, annotated_only, records)
        super().__init__("sav", ("object",), videos, records, None, folder)

    def __getitem__(self, index: int) -> FolderVideo | MaskletVideo:
        video = super().__getitem__(index)
        if isinstance(video, MaskletVideo):
            _ = video.masklets  # reads and validates the JSON
        return video


def _train(
    folder: str, masklets: Masklets, annotated_only: bool, records: Records
) -> list[MaskletVideo]:
    paths = sorted(
        path
        for n in ("*.mp4", "*/*.mp4")
        for path in glob.glob(os.path.join(glob.escape(folder), n))
    )
    if not paths:
        raise missing_split(folder, "train", sorted(os.listdir(folder))[:8], "Check the path.")
    videos = []
    for path in paths:
        with records.validate(f"video {stem(path)!r}"):
            files = {}
            for kind in ("manual", "auto") if masklets == "both" else (masklets,):
                file = f"{path[: -len('.mp4')]}_{kind}.json"
                if os.path.isfile(file):
                    files[kind] = file
                elif masklets != "both" or kind == "manual":
                    # 5% of the videos have no automatic masklets.
                    raise Reject(f"{kind} masklets are missing", f"looked for {file}")
            videos.append(MaskletVideo(path, files, annotated_only))
    return videos


def _folders(folder: str, split: str, annotated_only: bool, records: Records) -> list[FolderVideo]:
    listed = os.path.join(folder, f"sav_{split}.txt")
    if not os.path.isfile(listed):
        found = sorted(name for name in os.listdir(folder) if name.endswith(".txt"))
        raise missing_split(folder, split, found, f"Looked for {listed}: check the path.")
    with open(listed, encoding="utf-8") as file:
        names = [line.strip() for line in file if line.strip()]
    frames, masks = (check_folder(os.path.join(folder, name)) for name in (FRAMES, MASKS))
    videos = []
    checked = check_all(lambda name: _check(frames, masks, name, annotated_only), names)
    for name, result in zip(names, checked, strict=True):
        with records.validate(f"video {name!r}"):
            if isinstance(result, Reject):
                raise result
            videos.append(result)
    return videos


def _check(frames: str, masks: str, name: str, annotated_only: bool) -> FolderVideo:
    """Check the files of a video; raises `Reject`."""
    paths = list_files(os.path.join(frames, name))
    own = os.path.join(masks, name)
    if not paths or not os.path.isdir(own):
        raise Reject("frames or masks are missing", f"looked for {own}", FileNotFoundError)
    objects: dict[int, dict[str, str]] = {}
    for folder in sorted(os.listdir(own)):
        if not folder.startswith("."):
            if not (folder.isascii() and folder.isdigit()):
                raise Reject("folder of an object is not a number", os.path.join(own, folder))
            found = list_files(os.path.join(own, folder), frozenset({".png"}))
            if not found:
                raise Reject("object has no mask", os.path.join(own, folder))
            objects[int(folder)] = found
    if not objects:
        raise Reject("video has no object", own)
    annotated = {frame for found in objects.values() for frame in found}
    if alone := sorted(annotated - paths.keys()):
        raise Reject("mask has no frame", f"frame {alone[0]}")
    if annotated_only:
        paths = {frame: path for frame, path in paths.items() if frame in annotated}
    size = check_frames(list(paths.values()), "frame", None)
    order = {frame: number for number, frame in enumerate(paths)}
    for found in objects.values():
        check_frames(list(found.values()), "mask", size)
    by_number = {
        number: {order[frame]: path for frame, path in found.items()}
        for number, found in objects.items()
    }
    return FolderVideo(name, list(paths.values()), size, by_number)
