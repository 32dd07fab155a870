"""The masklets of a video, and its COCO file, which is written after every change."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle

from agents.annotation.interactive.prompting import Click
from sam_gym.data.coco_records import encode_segmentation
from sam_gym.data.io import Records, Reject, read_json
from sam_gym.data.videos.reader import decode
from sam_gym.data.videos.writer import AnnotatedVideo, Masklet, image_records
from sam_gym.utils.files import json_line, write_atomic
from sam_gym.utils.text import counted

#: The name of an object that has got none.
UNNAMED = "object"
_DESCRIPTION = "masklets of agents.app"


class Mask(NamedTuple):
    """A mask of an object in a frame.

    Attributes:
        counts: of its compressed RLE.
        iou: predicted IoU.
        text: the entries of its annotation as JSON, so that saving formats only what is new.
    """

    counts: str
    iou: float
    text: str

    @classmethod
    def of(cls, mask: np.ndarray, iou: float) -> Mask | None:
        """Return a mask bool (H, W), or None if it is empty."""
        if not mask.any():
            return None
        code = rle.encode(np.asfortranarray(mask, np.uint8))
        return cls.of_counts(code["counts"], (mask.shape[0], mask.shape[1]), iou)

    @classmethod
    def of_counts(cls, counts: bytes, size: tuple[int, int], iou: float) -> Mask:
        """Return a mask of an image of (H, W) from run lengths."""
        text = counts.decode("ascii")
        code = {"size": list(size), "counts": text}
        values = {"segmentation": code, "area": int(rle.area(code))}
        values |= {"bbox": rle.toBbox(code).tolist(), "iscrowd": 0, "predicted_iou": iou}
        return cls(text, iou, json_line(values).decode()[1:-1])

    def decoded(self, size: tuple[int, int]) -> np.ndarray:
        """Return the mask: bool (H, W)."""
        return decode([self.counts.encode()], size)[0]


@dataclass(frozen=True)
class FramePrompt:
    """What a person has said about an object in a frame; without anything: it is not in sight.

    Attributes:
        clicks: in their order.
        box: (x0, y0, x1, y1) in pixels of the video, or None.
    """

    clicks: tuple[Click, ...] = ()
    box: tuple[float, float, float, float] | None = None


@dataclass
class VideoObject:
    """An object of a video.

    Attributes:
        id: from 1 on.
        name: of its category.
        prompts: by frame.
        masks: by frame, of all frames that were prompted or tracked; None: not in sight.
        version: changes with each change of the object.
    """

    id: int
    name: str
    prompts: dict[int, FramePrompt] = field(default_factory=dict)
    masks: dict[int, Mask | None] = field(default_factory=dict, repr=False)
    version: int = 0

    def copy(self) -> VideoObject:
        """Return a copy that shares only what does not change."""
        return replace(self, prompts=dict(self.prompts), masks=dict(self.masks))

    @property
    def score(self) -> float:
        """Mean predicted IoU of its masks; 0 without one."""
        return float(np.mean([own.iou for own in self.masks.values() if own] or [0.0]))


class Masklets:
    """The objects of a video. Methods may be called from any thread.

    Every change is written before the call returns, atomically and to the disk; if writing fails,
    the change is undone. The masks of a pass are the exception: `track` holds them, and the next
    write, of `flush` or of any change, has them. The file is COCO JSON of videos, as
    `agents.annotate --video` writes it, with the clicks and boxes in a further table, `tracks`.

    Args:
        path: of the COCO file, which is continued if it exists.
        file: path of the video, as people know it.
        name: of the folder of its frames.
        size: (H, W).
        frames: names of its frames.
        names: categories to begin with.

    Attributes:
        objects: by id.
        frame: number of the frame that was edited last.
        is_done: whether somebody has finished the video.
        lock: held while objects are read or changed.

    Raises:
        ValueError: the file is no such COCO JSON, or of another video.
    """

    def __init__(
        self,
        path: Path,
        file: str,
        name: str,
        size: tuple[int, int],
        frames: Sequence[str],
        names: Sequence[str] = (),
    ) -> None:
        self.path, self.file, self.name, self.size = path, file, name, size
        self.frames, self.names = list(frames), list(names)
        self.objects: dict[int, VideoObject] = {}
        self.frame, self.is_done = 0, False
        self.lock = threading.RLock()
        self._versions = itertools.count(1)
        self._images = [json_line(own).decode() for own in image_records([self.annotated()])]
        self._is_written = True
        if path.exists():
            self._load()
        self._ids = itertools.count(1 + max(self.objects, default=0))

    @classmethod
    def read(cls, path: Path) -> Masklets:
        """Read a COCO file that the app has written, without its video.

        Raises:
            ValueError: it is no such file.
        """
        content = read_json(str(path), "COCO file")
        try:
            images = content["images"]
            folders, frames = zip(*(own["file_name"].rsplit("/", 1) for own in images), strict=True)
            size = int(images[0]["height"]), int(images[0]["width"])
            return cls(path, content["info"]["file"], folders[0], size, frames)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: no masklets of the app ({error!r}).") from None

    def annotated(self) -> AnnotatedVideo:
        """Return the video with its masklets, as the writers of datasets take it."""
        with self.lock:
            objects = {
                own.id: Masklet(
                    own.name, own.score, {k: m.counts for k, m in own.masks.items() if m}
                )
                for own in self.objects.values()
            }
        return AnnotatedVideo(self.name, self.size, self.frames, objects)

    def all_names(self) -> list[str]:
        """Return the names of all categories."""
        with self.lock:
            used = [own.name for own in self.objects.values()]
            return list(dict.fromkeys([*self.names, *used]))

    # Changes -----------------------------------------------------------------------------------

    def new_id(self) -> int:
        """Return an id for another object.

        No object has had it since the file was read: passes, tabs and pages know objects by their
        ids, also those that are gone.
        """
        return next(self._ids)

    @contextmanager
    def changing(self, *ids: int, frame: int | None = None, is_new: bool = True) -> Iterator[None]:
        """Write the file after the body, which changes these objects; undo that if it fails.

        Args:
            *ids: of objects to change, add or remove.
            frame: the frame that is edited, if any.
            is_new: whether the objects get new versions; not if the body puts earlier ones back.
        """
        with self.lock:
            before = self.copies(ids)
            state = self.frame, self.is_done
            try:
                yield
                self.frame = self.frame if frame is None else frame
                self.is_done = False
                for number in ids:
                    if is_new and number in self.objects:
                        self.objects[number].version = next(self._versions)
                self.save()
            except BaseException:
                self.put(before)
                self.frame, self.is_done = state
                raise

    def track(self, frame: int, masks: Mapping[int, Mask | None], versions: dict[int, int]) -> None:
        """Take what a pass has found in a frame, without writing the file; see `flush`.

        Args:
            frame: its number.
            masks: by object. Those of objects that are gone are dropped; prompted ones stay.
            versions: of the objects that only the pass has changed since it began. They are
                updated; an object that others have changed meanwhile is removed.
        """
        with self.lock:
            for number, mask in masks.items():
                own = self.objects.get(number)
                if own is None or frame in own.prompts:
                    continue
                is_unchanged = versions.pop(number, None) == own.version
                own.masks[frame], own.version = mask, next(self._versions)
                if is_unchanged:
                    versions[number] = own.version
                self._is_written = self.is_done = False

    def copies(self, ids: Sequence[int]) -> dict[int, VideoObject | None]:
        """Return copies of objects; None: there is none of this id."""
        with self.lock:
            found = {number: self.objects.get(number) for number in ids}
            return {number: own and own.copy() for number, own in found.items()}

    def versions(self, ids: Iterable[int]) -> dict[int, int | None]:
        """Return the versions of objects; None: there is none of this id."""
        with self.lock:
            objects = self.objects
            return {k: objects[k].version if k in objects else None for k in ids}

    def put(self, objects: Mapping[int, VideoObject | None]) -> None:
        """Replace objects, without writing the file; None: remove it."""
        with self.lock:
            for number, own in objects.items():
                if own is None:
                    self.objects.pop(number, None)
                else:
                    self.objects[number] = own
            self.objects = dict(sorted(self.objects.items()))

    def set_done(self) -> None:
        """Write that the video is done."""
        with self.lock:
            before, self.is_done = self.is_done, True
            try:
                self.save()
            except BaseException:
                self.is_done = before
                raise

    # The file ----------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the file.

        Raises:
            OSError: it could not be written.
        """
        with self.lock:
            write_atomic(self.path, self.text(), durable=True)
            self._is_written = True

    def flush(self) -> None:
        """Write the file if it lacks masks of a pass; raises as `save`."""
        with self.lock:
            if not self._is_written:
                self.save()

    def text(self) -> str:
        """Return the content of the COCO file, a record per line."""
        with self.lock:
            ids = {name: number for number, name in enumerate(self.all_names(), start=1)}
            info = {"description": _DESCRIPTION, "file": self.file, "frames": len(self.frames)}
            info |= {"frame": self.frame, "done": self.is_done}
            tables = {
                "images": self._images,
                "annotations": self._annotations(ids),
                "categories": [
                    json_line({"id": number, "name": name}).decode() for name, number in ids.items()
                ],
                "tracks": [json_line(_track(own)).decode() for own in self.objects.values()],
            }
            parts = [f'"info": {json_line(info).decode()}']
            for name, rows in tables.items():
                parts.append(f'"{name}": [\n' + ",\n".join(rows) + "\n]")
        return "{" + ",\n".join(parts) + "}\n"

    def _annotations(self, ids: Mapping[str, int]) -> list[str]:
        rows: list[str] = []
        for own in self.objects.values():
            end = f'"category_id": {ids[own.name]}, "track_id": {own.id}, "score": {own.score}, '
            for frame, mask in sorted(own.masks.items()):
                if mask is not None:
                    begin = f'{{"id": {len(rows) + 1}, "image_id": {frame + 1}, '
                    rows.append(f"{begin}{end}{mask.text}}}")
        return rows

    def _load(self) -> None:
        content = read_json(str(self.path), "COCO file")
        try:
            info = content["info"]
            if (info["file"], info["frames"]) != (self.file, len(self.frames)):
                raise ValueError(f"of {info['file']!r}, {info['frames']} frames")
            names = {own["id"]: str(own["name"]) for own in content["categories"]}
            given = [name for name in names.values() if name != UNNAMED]
            self.names = list(dict.fromkeys([*given, *self.names]))
            orders = {own["id"]: int(own["order_in_video"]) for own in content["images"]}
            for track in content["tracks"]:
                own = _object(track)
                self.objects[own.id] = own
            for record in content["annotations"]:
                own = self.objects[record["track_id"]]
                own.name = names[record["category_id"]]
                counts = encode_segmentation(
                    record["segmentation"], *self.size, Records("", "skip")
                )
                if counts is None:
                    raise ValueError(f"annotation {record['id']} has no mask")
                iou = float(record["predicted_iou"])
                mask = Mask.of_counts(counts, self.size, iou)
                own.masks[orders[record["image_id"]]] = mask
            self.frame = min(max(int(info["frame"]), 0), len(self.frames) - 1)
            self.is_done = bool(info["done"])
        except (KeyError, TypeError, ValueError, AttributeError, Reject) as error:
            raise ValueError(
                f"{self.path}: no masklets of {self.file}, {counted(len(self.frames), 'frame')} "
                f"({error!r}). Move the file away, or pass another --out."
            ) from None


def _track(own: VideoObject) -> dict[str, Any]:
    """Return what a COCO file has no place for: the prompts, and where the object is not in sight.

    Ranges of frames are (first, last).
    """
    prompts = [
        {"frame": frame, "box": prompt.box, "clicks": [asdict(click) for click in prompt.clicks]}
        for frame, prompt in sorted(own.prompts.items())
    ]
    absent = ranges(frame for frame, mask in own.masks.items() if mask is None)
    return {"id": own.id, "name": own.name, "prompts": prompts, "absent": absent}


def _object(track: Mapping[str, Any]) -> VideoObject:
    """Return an object without its masks from `_track`."""
    prompts = {
        int(own["frame"]): FramePrompt(
            tuple(Click(**click) for click in own["clicks"]),
            None if own["box"] is None else tuple(own["box"]),
        )
        for own in track["prompts"]
    }
    frames = itertools.chain.from_iterable(range(a, b + 1) for a, b in track["absent"])
    return VideoObject(int(track["id"]), str(track["name"]), prompts, dict.fromkeys(frames))


def ranges(frames: Iterator[int] | Sequence[int]) -> list[list[int]]:
    """Return numbers as ranges [first, last], in order."""
    found: list[list[int]] = []
    for frame in sorted(frames):
        if found and found[-1][1] == frame - 1:
            found[-1][1] = frame
        else:
            found.append([frame, frame])
    return found


def info_of(path: Path) -> dict[str, Any]:
    """Return the `info` of the COCO file of a video, its first line; empty if there is none."""
    try:
        with path.open(encoding="utf-8") as file:
            return dict(json.loads(file.readline().rstrip().rstrip(",") + "}")["info"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
