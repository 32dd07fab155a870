"""The files of an annotation run: what it reads, what it writes, partial results."""

from __future__ import annotations

import itertools
import json
import os
import posixpath
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from sam_gym.backbones import BackboneService
from sam_gym.data.io import (
    IMAGE_SUFFIXES,
    image_size,
    number_as_text,
    read_image,
    read_json,
    whole_number,
)
from sam_gym.utils.digest import file_digest, text_digest
from sam_gym.utils.files import plain, write_atomic
from sam_gym.utils.registry import unknown_name
from sam_gym.utils.render import save_image
from sam_gym.utils.text import safe_name

#: Suffixes of images that are not read: formats that Pillow and OpenCV lack, and camera raw files,
#: of which they would read the thumbnail.
FOREIGN_SUFFIXES = frozenset(
    ".dcm .exr .fits .heic .heif .hif .jxl .nii .svg .3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .iiq "
    ".kdc .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 .rwl .sr2 .srf .srw .x3f".split()
)
_OVERLAY_SUFFIX = ".jpg"


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
            ValueError: `out` is a folder.
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
        """File of the results so far."""
        return self.annotations.with_suffix(".partial.jsonl")

    @property
    def overlay_list(self) -> Path:
        """File that names the overlays."""
        return self.annotations.with_name(f".{self.annotations.stem}_overlays.jsonl")

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

    def listed_overlays(self) -> set[str]:
        """Return the names of the overlays that earlier runs have written into the same folder."""
        folder, *names = _json_lines(self.overlay_list) or [None]
        if folder != os.path.abspath(self.overlays):
            return set()
        return {name for name in names if isinstance(name, str) and _is_overlay(name)}

    def existing(self) -> set[str]:
        """Return the real paths of files and folders that this and earlier runs write."""
        own = {self.annotations, self.results, self.partial, self.overlay_list, self.lock}
        own.add(_overlays_beside(self.annotations))
        own |= {self.labels, self.panoptic, self.panoptic.with_suffix("")}
        own |= {self.overlays / name for name in self.listed_overlays()}
        return {os.path.realpath(path) for path in own}


def _overlays_beside(annotations: Path) -> Path:
    return annotations.with_name(f"{annotations.stem}_overlays")


def _make_folder(option: str, folder: Path) -> None:
    """Make a folder; raise `OSError` if no file can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"{option}: cannot write into {folder} ({reason}).") from error


@dataclass
class ImageFolder:
    """The files below a folder, as paths relative to it, with slashes.

    Attributes:
        root: the folder.
        images: the images, sorted.
        skipped: file -> why it is not read.
        others: number of files that are no images, by suffix.
    """

    root: str
    images: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)

    @classmethod
    def search(cls, root: str, written: Collection[str] = ()) -> ImageFolder:
        """List the files below a folder.

        Args:
            root: the folder.
            written: real paths of files and folders to leave out.

        Raises:
            FileNotFoundError: the folder does not exist.
            ValueError: the folder holds no image.
        """
        if not os.path.isdir(root):
            raise FileNotFoundError(f"{root}: no such folder of images.")
        found = cls(root)

        def unreadable(error: OSError) -> None:
            found._skip(error.filename, f"the folder cannot be read ({error.strerror})")

        for parent, folders, names in os.walk(root, onerror=unreadable):
            real = os.path.realpath(parent)
            folders[:] = [name for name in folders if os.path.join(real, name) not in written]
            for name in folders:
                if os.path.islink(os.path.join(parent, name)):
                    found._skip(os.path.join(parent, name), "links to folders are not followed")
            for name in names:
                if os.path.join(real, name) not in written:
                    found._add(os.path.join(parent, name))
        if not found.images:
            lines = [f"skipped {file}: {reason}" for file, reason in found.skipped.items()][:3]
            told = "".join(f" {line}." for line in lines + found.ignored())
            raise ValueError(f"{root}: no image in this folder.{told}")
        found.images.sort()
        return found

    def ignored(self) -> list[str]:
        """Return a line on the files that are no images, if there are any."""
        if not self.others:
            return []
        counts = ", ".join(f"{suffix} {number}" for suffix, number in sorted(self.others.items()))
        return [f"ignored {self.others.total()} files that are no images ({counts})"]

    def _add(self, path: str) -> None:
        suffix = os.path.splitext(path)[1].lower()
        if os.path.islink(path) and not self._is_inside(path):
            self._skip(path, "the link leaves the folder. Copy the file into it")
        elif not os.path.isfile(path):
            self._skip(path, "a broken link" if os.path.islink(path) else "not a regular file")
        elif suffix in FOREIGN_SUFFIXES:
            self._skip(path, f"{suffix} files are not read. Convert it to PNG, TIFF or JPEG")
        elif suffix in IMAGE_SUFFIXES or _is_image(path, suffix):
            self.images.append(self._relative(path))
        else:
            self.others[suffix or "no suffix"] += 1

    def _is_inside(self, path: str) -> bool:
        return os.path.realpath(path).startswith(os.path.join(os.path.realpath(self.root), ""))

    def _skip(self, path: str, reason: str) -> None:
        self.skipped[self._relative(path)] = reason

    def _relative(self, path: str) -> str:
        return Path(path).relative_to(self.root).as_posix()


def _is_image(path: str, suffix: str) -> bool:
    """Return whether Pillow knows the suffix, or else the content, as an image's."""
    if Image.registered_extensions().get(suffix) in Image.OPEN:
        return True
    try:
        image_size(path)
    except (ValueError, OSError):
        return False
    return True


def _frames(path: Path) -> int:
    """Return the number of frames of an animation, or of pages of a TIFF file."""
    try:
        with Image.open(path) as image:
            # The further pictures of a phone's JPEG are previews.
            return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except Exception:  # Pillow's readers raise many classes; OpenCV has read the file
        return 1


class ImageReader:
    """Read images and remember those that cannot be read.

    The last image is kept, so that consecutive reads of one file decode it once.

    Args:
        folder: root of the files.
        backbone: the SAM that will see the images.
        sizes: file -> annotated (H, W), of the files that have one.

    Attributes:
        broken: file -> why it cannot be used.
        frames: file -> number of frames or pages, of which the first is read, if there are several.
    """

    def __init__(
        self,
        folder: str,
        backbone: BackboneService,
        sizes: Mapping[str, tuple[int, int]],
    ) -> None:
        self.folder, self.backbone, self.sizes = Path(folder), backbone, sizes
        self.broken: dict[str, str] = {}
        self.frames: dict[str, int] = {}
        self._last: tuple[str, np.ndarray, str] | None = None

    def read(self, file: str) -> tuple[np.ndarray, str] | None:
        """Return an image, uint8 (H, W, 3), and the digest of its file; None if it is unusable."""
        if self._last is not None and self._last[0] == file:
            return self._last[1:]
        if file in self.broken:
            return None
        try:
            digest = file_digest(self.folder / file)
            annotated = self.sizes.get(file)
            image = read_image(str(self.folder / file), "image", annotated)
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
        if (frames := _frames(self.folder / file)) > 1:
            self.frames[file] = frames
        self._last = (file, image, digest)
        return image, digest

    def digest(self, file: str) -> str | None:
        """Return the digest of a file; None if it cannot be read."""
        try:
            return file_digest(self.folder / file)
        except OSError:
            return None


class OverlayWriter:
    """Write overlays, images with masks drawn over them, into one flat folder.

    A list beside the annotations names them, so that a later run can remove them.

    Args:
        outputs: paths of the run.

    Attributes:
        failed: overlay -> why it could not be written.
    """

    def __init__(self, outputs: OutputPaths) -> None:
        self._outputs, self._listed = outputs, outputs.listed_overlays()
        self.failed: dict[str, str] = {}

    def write(self, name: str, overlay: np.ndarray) -> None:
        """Save an overlay, uint8 (H, W, 3)."""
        if not self._listed:
            self._write_list(())
        try:
            if name not in self._listed:
                self._listed.add(name)
                with self._outputs.overlay_list.open("a") as file:
                    file.write(json.dumps(name) + "\n")
            save_image(self._outputs.overlays / name, overlay)
        except (OSError, ValueError) as error:
            self.failed[name] = str(error)

    def keep_only(self, names: Collection[str]) -> None:
        """Remove the listed overlays of other names: those of earlier runs with the same --out."""
        for name in self._listed.difference(names):
            (self._outputs.overlays / name).unlink(missing_ok=True)
        if names:
            self._write_list(sorted(names))
        else:
            self._outputs.overlay_list.unlink(missing_ok=True)

    def _write_list(self, names: Iterable[str]) -> None:
        rows = map(json.dumps, [os.path.abspath(self._outputs.overlays), *names])
        write_atomic(self._outputs.overlay_list, "".join(f"{row}\n" for row in rows))


def overlay_names(labels: Mapping[Any, str]) -> dict[Any, str]:
    """Return a unique file name for the overlay of each key, safe on every file system.

    Args:
        labels: key -> text of the name; slashes become "__".
    """
    safe = {key: safe_name(label) for key, label in labels.items()}
    taken = Counter(map(_folded, safe.values()))
    names = {}
    for key, name in safe.items():
        if taken[_folded(name)] > 1 or name != labels[key].replace("/", "__"):
            name += "-" + text_digest(repr(key))[:8]
        names[key] = name + _OVERLAY_SUFFIX
    return names


def _folded(name: str) -> str:
    """Return the form in which file systems that ignore case compare names."""
    return unicodedata.normalize("NFC", name).casefold()


def _is_overlay(name: str) -> bool:
    return name.endswith(_OVERLAY_SUFFIX) and os.path.basename(name) == name


class CocoIds:
    """Ids of images and categories: those of a COCO file, or 1, 2, 3, ...

    Args:
        coco: path of the COCO file, or None.
        files: all image files.
        categories: all category names.
        new_categories: give categories that the file lacks ids that it does not use.

    Attributes:
        images: file -> id, of the files that have one.
        sizes: file -> annotated (H, W), of the files that have one.
        categories: name -> id.
        absent: number of images of the COCO file that are not among the files.
        digest: of the COCO file, or None.

    Raises:
        FileNotFoundError: the COCO file does not exist.
        ValueError: the file is not COCO JSON, or lacks a category or all images.
    """

    def __init__(
        self,
        coco: str | None,
        files: Sequence[str],
        categories: Sequence[str],
        new_categories: bool = False,
    ) -> None:
        self.images: dict[str, int | str] = {f: number for number, f in enumerate(files, start=1)}
        self.categories: dict[str, int | str] = {
            name: number for number, name in enumerate(categories, start=1)
        }
        self.sizes: dict[str, tuple[int, int]] = {}
        self.absent, self.digest = 0, None
        if coco is None:
            return
        content = read_json(coco, "COCO file")
        self.digest = file_digest(Path(coco))
        try:
            used = {row.get("category_id") for row in content.get("annotations", ())}
            known = _by_name(coco, content["images"], "file_name")
            names = _by_name(coco, content["categories"], "name", used)
        except (KeyError, TypeError, AttributeError) as error:
            message = f"{coco}: no COCO JSON with images and categories ({error!r})."
            raise ValueError(message) from None
        # Windows writes backslashes.
        paths = {posixpath.normpath(name.replace("\\", "/")): name for name in known}
        records = {
            file: known[file if file in known else paths[file]]
            for file in files
            if file in known or file in paths
        }
        if not records:
            raise ValueError(
                f"{coco} has none of the {len(files)} images (the first is {files[0]!r}): its "
                "file_name must be a path relative to --images."
            )
        self.images = {file: record["id"] for file, record in records.items()}
        self.absent = len(known) - len(records)
        for file, record in records.items():
            height, width = (whole_number(record.get(side)) for side in ("height", "width"))
            if height is not None and width is not None:
                self.sizes[file] = (height, width)
        for name in categories:
            if name not in names and not new_categories:
                raise unknown_name(f"category of {coco}", name, names)
        unused = _unused({record["id"] for record in names.values()})
        self.categories = {
            name: names[name]["id"] if name in names else next(unused) for name in categories
        }


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
        settings: settings of the run.

    Attributes:
        done: key (of strings and numbers) -> result.

    Raises:
        ValueError: the file belongs to a run with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self._header = header = {"settings": plain(settings)}
        self.done: dict[tuple[Any, ...], dict[str, Any]] = {}
        first, *rows = _json_lines(path) or [header]
        earlier = first.get("settings") if isinstance(first, dict) else None
        if first != header and (rows or not isinstance(earlier, dict)):
            names = _different(earlier if isinstance(earlier, dict) else {}, header["settings"])
            raise ValueError(
                f"{path}: left by a run with other settings ({', '.join(names)}). Finish that run "
                "with its own settings, or remove the file to start over."
            )
        for row in rows:
            if row is not None:
                self.done[tuple(row["key"])] = row["result"]
        self._rewrite()

    def add(self, key: tuple[Any, ...], result: Any) -> None:
        """Append a result, which must be JSON-like."""
        self.done[key] = result
        with self.path.open("a") as file:
            file.write(self._line(key, result))

    def keep_only(self, condition: Callable[[tuple[Any, ...], Any], bool]) -> int:
        """Drop results, given as key and result, that fail a condition; returns their number."""
        kept = {key: result for key, result in self.done.items() if condition(key, result)}
        dropped, self.done = len(self.done) - len(kept), kept
        return dropped

    def finish(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)

    def _rewrite(self) -> None:
        """Write the whole file, which drops an incomplete last line."""
        lines = [self._line(key, result) for key, result in self.done.items()]
        write_atomic(self.path, json.dumps(self._header) + "\n" + "".join(lines))

    @staticmethod
    def _line(key: tuple[Any, ...], result: Any) -> str:
        return json.dumps({"key": key, "result": plain(result)}) + "\n"


def _different(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values differ."""
    return sorted(key for key in {*one, *other} if one.get(key) != other.get(key))


def _json_lines(path: Path) -> list[Any]:
    """Read a JSON value per line, None where a line is incomplete; empty if there is no file."""
    if not path.exists():
        return []
    return [_parsed(line) for line in path.read_text(errors="replace").splitlines()]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
