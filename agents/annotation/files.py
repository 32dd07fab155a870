"""The files of an annotation run: what it reads, what it writes, partial results."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import posixpath
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from agents.annotation.sources import ImageRecord
from sam_gym.backbones import BackboneService
from sam_gym.data.io import number_as_text, read_image, read_json, whole_number
from sam_gym.utils.digest import file_digest
from sam_gym.utils.files import check_no_file, json_line, plain, write_atomic
from sam_gym.utils.registry import unknown_name

OVERLAY_SUFFIX = ".jpg"


@dataclass(frozen=True)
class OutputPaths:
    """Paths that a run writes.

    Attributes:
        annotations: the COCO file.
        overlays: folder of the overlays.
        has_overlays: whether overlays are written.
    """

    annotations: Path
    overlays: Path
    has_overlays: bool

    @classmethod
    def prepare(cls, out: str, overlays: str | None) -> OutputPaths:
        """Return the paths; make their folders.

        Args:
            out: path of the COCO file.
            overlays: folder of the overlays; None: beside `out`; "none": no overlays.

        Raises:
            ValueError: `out` is a folder, or its folder a file.
            OSError: nothing can be written there.
        """
        path = Path(out)
        if os.path.isdir(path) or out.endswith(("/", os.sep)):
            example = path / "annotations.json"
            raise ValueError(f"--out {out} is a folder. Name a file, for example {example}.")
        has_overlays = overlays != "none"
        folder = Path(overlays) if overlays and has_overlays else _overlays_beside(path)
        _make_folder("--out", path.parent)
        if has_overlays:
            _make_folder("--overlays", folder)
        return cls(path, folder, has_overlays)

    @property
    def results(self) -> Path:
        """File of the results that COCOeval takes."""
        return self.annotations.with_name(f"{self.annotations.stem}_results.json")

    @property
    def labels(self) -> Path:
        """Folder of label maps."""
        return self.annotations.with_name(f"{self.annotations.stem}_labels")

    @property
    def panoptic(self) -> Path:
        """File of COCO panoptic; its PNG files are in the folder of the same name."""
        return self.annotations.with_name(f"{self.annotations.stem}_panoptic.json")

    @property
    def partial(self) -> Path:
        """Folder of the results so far."""
        return self.annotations.with_suffix(".partial")

    @property
    def overlay_list(self) -> Path:
        """File that names the overlays."""
        return self.annotations.with_name(f".{self.annotations.stem}_overlays.jsonl")

    @property
    def overlay_lock(self) -> Path:
        """File that is locked while an overlay is listed."""
        return self.annotations.with_name(f".{self.annotations.stem}_overlays.lock")

    @property
    def lock(self) -> Path:
        """File that a run locks while it writes."""
        return self.annotations.with_name(f".{self.annotations.stem}.lock")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing the same files.

        Raises:
            FileExistsError: another process is writing them.
        """
        try:
            with FileLock(self.lock, timeout=0):
                yield
        except Timeout:
            raise FileExistsError(
                f"Another process is writing {self.annotations}. Wait for it, or pass another "
                "--out."
            ) from None

    def lists_overlays(self) -> bool:
        """Return whether earlier runs have listed overlays in the same folder."""
        first = next(_json_lines(self.overlay_list), None)
        return first == os.path.abspath(self.overlays)

    def listed_overlays(self) -> Iterator[str]:
        """Yield the names of the overlays that earlier runs have written into the same folder."""
        if self.lists_overlays():
            names = islice(_json_lines(self.overlay_list), 1, None)
            yield from (name for name in names if isinstance(name, str) and _is_overlay(name))

    def existing(self) -> set[str]:
        """Return the real paths of files and folders that this and earlier runs write."""
        own = {self.annotations, self.results, self.partial, self.overlay_list, self.lock}
        own |= {self.overlay_lock, self.labels, self.panoptic, self.panoptic.with_suffix("")}
        beside = _overlays_beside(self.annotations)
        if self.overlays != beside:
            own |= {self.overlays / name for name in self.listed_overlays()}
        return {os.path.realpath(path) for path in own | {beside}}


def _overlays_beside(annotations: Path) -> Path:
    return annotations.with_name(f"{annotations.stem}_overlays")


def _is_overlay(name: str) -> bool:
    return name.endswith(OVERLAY_SUFFIX) and os.path.basename(name) == name


def _make_folder(option: str, folder: Path) -> None:
    """Make a folder.

    Raises:
        ValueError: it is a file.
        OSError: no file can be written into it.
    """
    check_no_file(option, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"{option}: cannot write into {folder} ({reason}).") from error


def _frames(content: bytes) -> int:
    """Return the number of frames of an animation, or of pages of a TIFF file."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            # The further pictures of a phone's JPEG are previews.
            return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except Exception:  # Pillow's readers raise many classes; OpenCV has read the file
        return 1


class ImageReader:
    """Read images and remember those that cannot be read.

    The last image is kept, so that consecutive reads of one file decode it once.

    Args:
        root: folder of the files, or the tar file.
        backbone: the SAM that will see the images.

    Attributes:
        broken: file -> why it cannot be used.
        frames: file -> number of frames or pages, of which the first is read, if there are several.
    """

    def __init__(self, root: str, backbone: BackboneService) -> None:
        self.root, self.backbone = root, backbone
        self.broken: dict[str, str] = {}
        self.frames: dict[str, int] = {}
        self._last: tuple[str, np.ndarray, str] | None = None

    def read(self, record: ImageRecord) -> tuple[np.ndarray, str] | None:
        """Return an image, uint8 (H, W, 3), and the digest of its file; None if it is unusable."""
        file, annotated = record.file, record.size
        if self._last is not None and self._last[0] == file:
            return self._last[1:]
        if file in self.broken:
            return None
        self._last = None
        try:
            content = record.read(self.root)
            image = read_image(os.path.join(self.root, file), "image", annotated, content)
            height, width = image.shape[:2]
            if annotated is not None and annotated != (height, width):
                raise ValueError(
                    f"{width} x {height} pixels, --coco says {annotated[1]} x {annotated[0]}."
                )
            if not all(self.backbone.input_size((height, width))):
                raise ValueError(f"{width} x {height} pixels are too thin for SAM.")
        except (ValueError, OSError) as error:
            self.broken[file] = str(error)
            return None
        if (frames := _frames(content)) > 1:
            self.frames[file] = frames
        self._last = (file, image, hashlib.sha256(content).hexdigest())
        return image, self._last[2]


class CocoIds:
    """Ids of images and categories: those of a COCO file, or 1, 2, 3, ...

    Args:
        coco: path of the COCO file, or None.
        categories: all category names.
        new_categories: give categories that the file lacks ids that it does not use.

    Attributes:
        categories: name -> id.
        digest: of the COCO file, or None.
        unknown: images that the COCO file lacks.
        absent: number of images of the COCO file that are not among the images.

    Raises:
        FileNotFoundError: the COCO file does not exist.
        ValueError: the file is not COCO JSON, or lacks a category.
    """

    def __init__(
        self, coco: str | None, categories: Sequence[str], new_categories: bool = False
    ) -> None:
        self._coco = coco
        self._known: dict[str, dict[str, Any]] = {}
        self.categories: dict[str, int | str] = {
            name: number for number, name in enumerate(categories, start=1)
        }
        self.unknown: list[str] = []
        self.absent, self.digest = 0, None
        if coco is None:
            return
        content = read_json(coco, "COCO file")
        self.digest = file_digest(Path(coco))
        try:
            used = {row.get("category_id") for row in content.get("annotations", ())}
            self._known = _by_name(coco, content["images"], "file_name")
            names = _by_name(coco, content["categories"], "name", used)
        except (KeyError, TypeError, AttributeError) as error:
            message = f"{coco}: no COCO JSON with images and categories ({error!r})."
            raise ValueError(message) from None
        for name in categories:
            if name not in names and not new_categories:
                raise unknown_name(f"category of {coco}", name, names)
        unused = _unused({record["id"] for record in names.values()})
        self.categories = {
            name: names[name]["id"] if name in names else next(unused) for name in categories
        }

    def number(self, images: Iterable[ImageRecord]) -> Iterator[ImageRecord]:
        """Yield the images that have an id, with it and their annotated size.

        Raises:
            ValueError: the COCO file lacks all of them.
        """
        if self._coco is None:
            yield from (own._replace(id=number) for number, own in enumerate(images, start=1))
            return
        # Windows writes backslashes.
        paths = {posixpath.normpath(name.replace("\\", "/")): name for name in self._known}
        self.unknown, numbered, first = [], 0, ""
        for own in images:
            first = first or own.file
            name = own.file if own.file in self._known else paths.get(own.file)
            if name is None:
                self.unknown.append(own.file)
                continue
            record = self._known[name]
            height, width = (whole_number(record.get(side)) for side in ("height", "width"))
            size = None if height is None or width is None else (height, width)
            numbered += 1
            yield own._replace(id=record["id"], size=size)
        if not numbered:
            raise ValueError(
                f"{self._coco} has none of the {len(self.unknown)} images (the first is "
                f"{first!r}): its file_name must be a path relative to --images."
            )
        self.absent = len(self._known) - numbered


def _by_name(
    coco: str, table: Iterable[dict[str, Any]], key: str, used: Collection[Any] | None = None
) -> dict[str, dict[str, Any]]:
    """Return the records of a table of a COCO file by their name.

    Args:
        coco: path of the file.
        table: the records.
        key: entry with the name.
        used: ids that annotations refer to; of two records of one name, the used one is taken.

    Raises:
        ValueError: an id is neither whole number nor text, or occurs twice, or a name does.
        KeyError, TypeError, AttributeError: the table is malformed.
    """
    records: dict[str, dict[str, Any]] = {}
    seen = set()
    for record in table:
        name = number_as_text(record[key]) if key == "name" else record[key]
        number = record["id"]
        if isinstance(number, float) and number.is_integer():
            number = int(number)
        if not isinstance(name, str) or type(number) not in (int, str):
            raise ValueError(
                f"{coco}: {key} must be text and id a whole number or text, got {name!r} and "
                f"{number!r}. Export the file again."
            )
        if number in seen:
            raise ValueError(f"{coco}: id {number!r} of {name!r} is taken. Give each its own.")
        seen.add(number)
        earlier = records.get(name)
        if earlier is None or (used is not None and earlier["id"] not in used):
            records[name] = record | {"id": number}
        elif used is None or number in used:
            raise ValueError(f"{coco}: {key} {name!r} has two ids. Remove one of its records.")
    return records


def _unused(taken: Collection[int | str]) -> Iterator[int | str]:
    """Return ids that are not taken: numbers, or text if all others are text."""
    numbers = [number for number in taken if isinstance(number, int)]
    if taken and not numbers:
        return (text for text in map(str, itertools.count(1)) if text not in taken)
    return itertools.count(1 + max(numbers, default=0))


class PartialResults:
    """Results so far, one line of JSON each, in a file that an interrupted run leaves behind.

    Args:
        path: path of the file, which may exist already.

    Attributes:
        done: key (of strings and numbers) -> result.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.done = path, self.read(path)
        self.keep_only(lambda *_: True)

    @staticmethod
    def read(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
        """Return the results in a file, which may not exist."""
        rows = (row for row in _json_lines(path) if row is not None)
        return {tuple(row["key"]): row["result"] for row in rows}

    def add(self, key: tuple[Any, ...], result: Any) -> None:
        """Append a result, which must be JSON-like."""
        self.done[key] = result
        with self.path.open("ab") as file:
            file.write(self._line(key, result))

    def keep_only(self, condition: Callable[[tuple[Any, ...], Any], bool]) -> None:
        """Drop results, given as key and result, that fail a condition, and incomplete lines."""
        self.done = {key: own for key, own in self.done.items() if condition(key, own)}
        write_atomic(self.path, b"".join(self._line(key, own) for key, own in self.done.items()))

    @staticmethod
    def _line(key: tuple[Any, ...], result: Any) -> bytes:
        return json_line(plain({"key": key, "result": result})) + b"\n"


def different(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values differ."""
    return sorted(key for key in {*one, *other} if one.get(key) != other.get(key))


def _json_lines(path: Path) -> Iterator[Any]:
    """Yield a JSON value per line, None where a line is incomplete; nothing without a file."""
    if path.exists():
        with path.open(errors="replace") as file:
            yield from map(_parsed, file)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
