"""A folder of images and its COCO file, which is written after every change."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle

from agents.annotation.interactive.queue import Queue
from sam_gym.data.coco_records import encode_segmentation
from sam_gym.data.coco_writer import mask_annotation
from sam_gym.data.images import Unreadable, read_header
from sam_gym.data.io import (
    IMAGE_SUFFIXES,
    Records,
    Reject,
    number_as_text,
    read_image,
    read_json,
    resolve,
    whole_number,
)
from sam_gym.utils.files import plain, write_atomic
from sam_gym.utils.text import counted, safe_name

#: The COCO file in the folder of results.
ANNOTATIONS = "annotations.json"
#: Tables of a COCO file.
_TABLES = ("images", "categories", "annotations")


class _Row(NamedTuple):
    """A record of a COCO file and its JSON text, so that saving formats only what is new."""

    record: dict[str, Any]
    text: str

    @classmethod
    def of(cls, record: dict[str, Any]) -> _Row:
        text = json.dumps(plain(record), allow_nan=False, ensure_ascii=False)
        return cls(record, text)


@dataclass(frozen=True)
class Edit:
    """A change of objects that can be taken back.

    Attributes:
        before: by id, their records before it; None: there was none.
        after: by id, their records after it.
        categories: by id, their names and categories before it.
        order: ids of all objects before it.
    """

    before: dict[int | str, _Row | None]
    after: dict[int | str, _Row | None]
    categories: dict[int | str, tuple[str, _Row]]
    order: tuple[int | str, ...]


@dataclass(frozen=True)
class SavedObject:
    """An object in the COCO file.

    Attributes:
        id: of its annotation.
        name: of its category.
        score: predicted IoU, or None if the file does not say.
        clicks: number of clicks that have made it, as far as the file says.
        segmentation: COCO RLE or polygons.
        size: (H, W) of the image.
    """

    id: int | str
    name: str
    score: float | None
    clicks: int
    segmentation: Any = field(repr=False)
    size: tuple[int, int]

    def mask(self) -> np.ndarray:
        """Return the mask: bool (H, W); raises as `run_lengths`."""
        return rle.decode(self.run_lengths()).astype(bool)

    def run_lengths(self) -> dict[str, Any]:
        """Return the mask as compressed COCO RLE.

        Raises:
            ValueError: the segmentation is no COCO mask of this image.
        """
        try:
            counts = encode_segmentation(self.segmentation, *self.size, Records("", "skip"))
        except Reject as reject:
            raise ValueError(f"annotation {self.id} has no mask: {reject.reason}") from None
        if counts is None:
            raise ValueError(f"annotation {self.id} has no mask")
        return {"size": list(self.size), "counts": counts}


class Project(Queue):
    """Images below a folder and their annotations.

    Every change is written before the call returns, atomically and to the disk; if writing fails,
    the change is undone. All methods may be called from any thread.

    Args:
        root: folder of the images; nothing outside of it is read.
        path: of the COCO file, which is continued if it exists.
        files: images, as paths relative to `root`.
        categories: names to begin with.

    Attributes:
        files: images, as paths relative to `root`.
        broken: those that could not be opened when they were last tried.

    Raises:
        ValueError: the file is no COCO JSON.
    """

    def __init__(
        self, root: Path, path: Path, files: Sequence[str] = (), categories: Sequence[str] = ()
    ) -> None:
        super().__init__(files)
        self.root, self.path = root, path
        self._lock = threading.RLock()
        self._rest: dict[str, Any] = {"info": {"description": "annotated with agents.app"}}
        self._images: dict[str, _Row] = {}
        self._categories: dict[str, _Row] = {}
        self._annotations: dict[int | str, _Row] = {}
        if path.exists():
            self._load()
        for name in categories:
            self._categories.setdefault(name, _Row.of(self._new_category(name)))
        # Others go with their last object.
        self._kept = set(self._categories)

    def _load(self) -> None:
        content = read_json(str(self.path), "COCO file")
        try:
            for record in content["images"]:
                self._images[record["file_name"]] = _Row.of(record)
            for record in content["categories"]:
                self._categories[str(record["name"])] = _Row.of(record)
            for record in content["annotations"]:
                _ = {record["image_id"], record["category_id"]}, record["segmentation"]
                self._annotations[record["id"]] = _Row.of(record)
            counts = [len(table) for table in self._tables()]
            if counts != [len(content[name]) for name in _TABLES]:
                raise ValueError("two records have the same file_name, name or id")
            for name, count in zip(_TABLES, counts, strict=True):
                if len({record["id"] for record in content[name]}) != count:
                    raise ValueError(f"two records of {name} have the same id")
            self._rest = {key: value for key, value in content.items() if key not in _TABLES}
            _Row.of(self._rest)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.path}: no COCO JSON with masks ({error!r}). Move it away, or pass another "
                "--out."
            ) from None

    # Images ------------------------------------------------------------------------------------

    def read(self, file: str, max_pixels: int) -> np.ndarray:
        """Read an image of `files`: uint8 (H, W, 3), RGB.

        Args:
            file: path relative to the folder.
            max_pixels: bound on its pixels, checked before they are decoded.

        Raises:
            ValueError, OSError: the file is not in the folder, too large, no image, or not of the
                size in the COCO file.
        """
        if file not in self.files:
            raise ValueError(f"{file}: not an image of this folder.")
        try:
            path = resolve(str(self.root), file)  # again: links may have changed
            height, width = read_header(path).size
        except Reject as reject:
            raise ValueError(f"{file}: {reject.reason}.") from None
        except Unreadable as error:
            raise ValueError(f"{file}: {error}.") from None
        if height * width > max_pixels:
            raise ValueError(
                f"{file}: {width} x {height} pixels are more than --max-pixels {max_pixels:,}."
            )
        annotated = self._annotated_size(file)
        pixels = read_image(path, "image", annotated)
        height, width = pixels.shape[:2]
        if annotated is not None and annotated != (height, width):
            raise ValueError(
                f"{file}: {width} x {height} pixels, but {self.path} says {annotated[1]} x "
                f"{annotated[0]}. Restore the image that was annotated, or pass another --out."
            )
        return pixels

    def _annotated_size(self, file: str) -> tuple[int, int] | None:
        record = self._images[file].record if file in self._images else {}
        height, width = whole_number(record.get("height")), whole_number(record.get("width"))
        return (height, width) if height and width else None

    def put(self, name: str, data: bytes, max_files: int, max_pixels: int) -> int:
        """Write an uploaded image into the folder; returns its index in `files`.

        Args:
            name: of the file; a number is added to names that are taken.
            data: content of the file.
            max_files: bound on the number of files.
            max_pixels: see `read`.

        Raises:
            ValueError: it is no image, or one of the bounds is exceeded.
            OSError: it could not be written.
        """
        stem, suffix = os.path.splitext(name)
        stem = safe_name(stem).lstrip(".")
        if suffix.lower() not in IMAGE_SUFFIXES:
            known = ", ".join(sorted(IMAGE_SUFFIXES))
            raise ValueError(f"{name}: not one of {known}. Convert it to PNG or JPEG.")
        with self._lock:
            if len(self.files) >= max_files:
                raise ValueError(
                    f"No more than {counted(max_files, 'image')} can be uploaded (--max-uploads)."
                )
            taken, file, number = {own.lower() for own in self.files}, f"{stem}{suffix}", 1
            while file.lower() in taken or not stem:
                stem, number = stem or "image", number + 1
                file = f"{stem}-{number}{suffix}"
            self.root.mkdir(parents=True, exist_ok=True)
            path = write_atomic(self.root / file, data)
            self.files.append(file)
            try:
                self.read(file, max_pixels)
            except BaseException:
                self.files.remove(file)
                path.unlink(missing_ok=True)
                raise
            return len(self.files) - 1

    def results(self) -> list[Path]:
        return [self.path]

    def is_done(self, file: str) -> bool:
        with self._lock:
            return file in self._images and bool(self._images[file].record.get("done"))

    def set_done(self, file: str, size: tuple[int, int], done: bool = True) -> None:
        """Write that an image of (H, W) is finished, or not."""
        if self.is_done(file) == done:
            return
        with self._changing():
            record = self._image_record(file, size)
            self._images[file] = _Row.of(record | {"done": done})

    # Objects -----------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Names of all categories."""
        with self._lock:
            return list(self._categories)

    def objects(self, file: str, size: tuple[int, int]) -> list[SavedObject]:
        """Return the objects of an image of (H, W)."""
        with self._lock:
            if file not in self._images:
                return []
            image_id = self._images[file].record["id"]
            rows = [row.record for row in self._annotations.values()]
            names = {row.record["id"]: name for name, row in self._categories.items()}
        return [
            SavedObject(
                record["id"],
                names.get(record["category_id"], "?"),
                score if isinstance(score := record.get("score"), int | float) else None,
                whole_number(record.get("clicks")) or 0,
                record["segmentation"],
                size,
            )
            for record in rows
            if record["image_id"] == image_id
        ]

    def add(self, file: str, name: str, mask: np.ndarray | dict[str, Any], **values: Any) -> int:
        """Write an object.

        Args:
            file: its image.
            name: of its category, which may be new.
            mask: bool (H, W), or its compressed RLE.
            **values: further entries of the annotation, for example `score`.

        Returns:
            The id of its annotation.

        Raises:
            ValueError: the mask is empty.
            OSError: the file could not be written.
        """
        (number,) = self.add_all(file, [(name, mask, values)]).after
        return int(number)

    def add_all(
        self, file: str, objects: Sequence[tuple[str, np.ndarray | dict[str, Any], dict[str, Any]]]
    ) -> Edit:
        """Write several objects (name, mask, further entries) at once; see `add`."""
        made = [(name, _annotation(mask, values)) for name, mask, values in objects]
        with self._changing() as edit:
            for name, annotation in made:
                height, width = annotation["segmentation"]["size"]
                image = self._image_record(file, (height, width))
                self._images[file] = _Row.of(image)
                number = _next_id(row.record["id"] for row in self._annotations.values())
                own = {"id": number, "image_id": image["id"], "category_id": self._category(name)}
                self._annotations[number] = _Row.of(own | annotation)
        return edit

    def replace(
        self, saved: SavedObject, mask: np.ndarray, name: str | None, values: dict[str, Any]
    ) -> Edit:
        """Change the mask of an object; its id, its place and entries of other tools stay.

        Args:
            saved: the object as it was read.
            mask: bool (H, W).
            name: of its category, which may be new; None: it stays.
            values: further entries of the annotation.

        Raises:
            ValueError: the mask is empty, or somebody else has changed it since.
            OSError: the file could not be written.
        """
        annotation = _annotation(mask, values)
        with self._changing() as edit:
            record = self._record(saved.id)
            if record["segmentation"] != saved.segmentation:
                raise ValueError(
                    "Somebody else has changed this object meanwhile: reset it (R), then select it "
                    "again."
                )
            kept = {key: record[key] for key in ("iscrowd",) if key in record}
            if name is not None:
                kept["category_id"] = self._category(name)
            self._annotations[saved.id] = _Row.of(record | annotation | kept)
        return edit

    def rename(self, number: int | str, name: str) -> Edit:
        """Change the category of an object."""
        with self._changing() as edit:
            record = self._record(number)
            self._annotations[number] = _Row.of(record | {"category_id": self._category(name)})
        return edit

    def remove(self, number: int | str) -> Edit:
        """Remove an object."""
        with self._changing() as edit:
            self._record(number)
            del self._annotations[number]
        return edit

    def take_back(self, edit: Edit) -> None:
        """Undo a change.

        Raises:
            ValueError: somebody else has changed the objects since.
            OSError: the file could not be written.
        """
        with self._changing():
            table = self._annotations
            if any(table.get(number) is not row for number, row in edit.after.items()):
                raise ValueError("Somebody else has changed this object since: nothing is undone.")
            for number, row in edit.before.items():
                if row is None:
                    del table[number]
                    continue
                if number in edit.categories:  # it may have gone meanwhile
                    name, category = edit.categories[number]
                    taken = {own.record["id"] for own in self._categories.values()}
                    if category.record["id"] not in taken:
                        self._categories.setdefault(name, category)
                    own = {"category_id": self._category(name)}
                    row = row if own.items() <= row.record.items() else _Row.of(row.record | own)
                table[number] = row
            self._annotations = {k: table[k] for k in (*edit.order, *table) if k in table}

    def _record(self, number: int | str) -> dict[str, Any]:
        if number not in self._annotations:
            raise ValueError("Somebody else has removed this object.")
        return self._annotations[number].record

    def _category(self, name: str) -> int | str:
        """Return the id of a category, which may be new."""
        row = self._categories.setdefault(name, _Row.of(self._new_category(name)))
        return row.record["id"]

    def _new_category(self, name: str) -> dict[str, Any]:
        return {"id": _next_id(row.record["id"] for row in self._categories.values()), "name": name}

    def _image_record(self, file: str, size: tuple[int, int]) -> dict[str, Any]:
        if file in self._images:
            return self._images[file].record | {"height": size[0], "width": size[1]}
        number = _next_id(row.record["id"] for row in self._images.values())
        return {"id": number, "file_name": file, "height": size[0], "width": size[1]}

    # The file ----------------------------------------------------------------------------------

    def _tables(self) -> list[dict[Any, _Row]]:
        """Return the tables in the order of `_TABLES`."""
        return [self._images, self._categories, self._annotations]

    @contextmanager
    def _changing(self) -> Iterator[Edit]:
        """Write the file after the body; undo its changes if that fails.

        Categories that were made for objects that are gone go, too.

        Yields:
            What has changed; it is filled in after the body.
        """
        with self._lock:
            before = [dict(table) for table in self._tables()]
            _, categories, objects = before
            edit = Edit({}, {}, {}, tuple(objects))
            named = {row.record["id"]: (name, row) for name, row in categories.items()}
            try:
                yield edit
                for number in {**objects, **self._annotations}:
                    old, new = objects.get(number), self._annotations.get(number)
                    if old is not new:
                        edit.before[number], edit.after[number] = old, new
                        if old is not None and old.record["category_id"] in named:
                            edit.categories[number] = named[old.record["category_id"]]
                used = {row.record["category_id"] for row in self._annotations.values()}
                self._categories = {
                    name: row
                    for name, row in self._categories.items()
                    if name in self._kept or row.record["id"] in used
                }
                write_atomic(self.path, self.text(), durable=True)
            except BaseException:
                self._images, self._categories, self._annotations = before
                raise

    def text(self) -> str:
        """Return the content of the COCO file, a record per line."""
        with self._lock:
            parts = [f"{json.dumps(key)}: {_Row.of(v).text}" for key, v in self._rest.items()]
            for name, table in zip(_TABLES, self._tables(), strict=True):
                rows = ",\n".join(row.text for row in table.values())
                parts.append(f'"{name}": [\n{rows}\n]')
        return "{" + ",\n".join(parts) + "}\n"


def _next_id(taken: Iterator[int | str]) -> int:
    """Return a number above all that are taken, also as "1" or 1.0, which other tools write."""
    texts = map(str, map(number_as_text, taken))
    return 1 + max((int(text) for text in texts if text.isdecimal()), default=0)


def _annotation(mask: np.ndarray | dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return the annotation of a mask, without ids; raises `ValueError` if it is empty."""
    annotation = mask_annotation(mask, **values)
    if not annotation["area"]:
        raise ValueError("The mask is empty: click the object first.")
    return annotation
