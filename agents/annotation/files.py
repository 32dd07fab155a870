"""The files of an annotation run: images, COCO ids, partial results, overlays."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sam_gym.backbones import BackboneService
from sam_gym.data.io import IMAGE_SUFFIXES, read_image
from sam_gym.utils.files import plain, write_atomic
from sam_gym.utils.registry import unknown_name
from sam_gym.utils.render import save_image


def image_files(folder: str) -> list[str]:
    """List the image files below a folder as sorted paths relative to it.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the folder holds no image.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of images.")
    files = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES
    )
    if not files:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f"{folder}: no image in this folder ({suffixes}).")
    return files


class ImageReader:
    """Read images and remember those that cannot be read.

    The last image is kept, so that consecutive reads of one file decode it once.

    Args:
        folder: root of the files.
        backbone: the SAM that will see the images.

    Attributes:
        broken: file -> why it cannot be used.
    """

    def __init__(self, folder: str, backbone: BackboneService) -> None:
        self.folder, self.backbone = Path(folder), backbone
        self.broken: dict[str, str] = {}
        self._last: tuple[str, np.ndarray] | None = None

    def read(self, file: str) -> np.ndarray | None:
        """Return an image, uint8 (H, W, 3), or None if it is broken or too thin for SAM."""
        if self._last is not None and self._last[0] == file:
            return self._last[1]
        if file in self.broken:
            return None
        try:
            image = read_image(str(self.folder / file), "image")
            if not all(self.backbone.input_size(image.shape[:2])):
                height, width = image.shape[:2]
                raise ValueError(f"{width} x {height} pixels are too thin for SAM.")
        except (ValueError, OSError) as error:
            self.broken[file] = str(error)
            return None
        self._last = (file, image)
        return image


class OverlayWriter:
    """Write overlays, images with masks drawn over them, into one flat folder.

    Args:
        option: the folder; None: beside `out`; "none": write nothing.
        out: path of the annotation file.
    """

    def __init__(self, option: str | None, out: Path) -> None:
        beside = out.with_suffix("").as_posix() + "_overlays"
        #: The folder, or None if nothing is written.
        self.folder = None if option == "none" else Path(option or beside)

    def write(self, name: str, overlay: np.ndarray) -> None:
        """Save an overlay, uint8 (H, W, 3), as NAME.jpg; slashes in the name become "__"."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_image(self.folder / f"{name}.jpg".replace("/", "__"), overlay)


class CocoIds:
    """Ids of images and categories: those of a COCO file, or 1, 2, 3, ...

    Args:
        coco: path of the COCO file, or None.
        files: all image files.
        categories: all category names.
        new_categories: give categories that the file lacks ids that it does not use.

    Attributes:
        images: file -> id, of the files that have one.
        categories: name -> id.

    Raises:
        ValueError: the file is not COCO JSON, or lacks a category or all images.
    """

    def __init__(
        self,
        coco: str | None,
        files: Sequence[str],
        categories: Sequence[str],
        new_categories: bool = False,
    ) -> None:
        self.images = {file: number for number, file in enumerate(files, start=1)}
        self.categories = {name: number for number, name in enumerate(categories, start=1)}
        if coco is None:
            return
        try:
            content = json.loads(Path(coco).read_text())
            known = {image["file_name"]: image["id"] for image in content["images"]}
            names = {category["name"]: category["id"] for category in content["categories"]}
        except (ValueError, KeyError, TypeError) as error:
            message = f"{coco}: no COCO JSON with images and categories ({error!r})."
            raise ValueError(message) from None
        self.images = {file: known[file] for file in files if file in known}
        if not self.images:
            raise ValueError(
                f"{coco} has none of the {len(files)} images (the first is {files[0]!r}): its "
                "file_name must be a path relative to --images."
            )
        for name in categories:
            if name not in names and not new_categories:
                raise unknown_name(f"category of {coco}", name, names)
        unused = itertools.count(1 + max(names.values(), default=0))
        self.categories = {n: names[n] if n in names else next(unused) for n in categories}


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
        self.done: dict[tuple[Any, ...], Any] = {}
        if path.exists():
            lines = path.read_text().splitlines()
            rows = [row for row in map(_parsed, lines) if row is not None]
            if not rows or rows[0] != header:
                raise ValueError(
                    f"{path}: left by a run with other settings. Finish that run with its own "
                    "settings, or remove the file to start over."
                )
            self.done = {tuple(row["key"]): row["result"] for row in rows[1:]}
            self._rewrite()

    def add(self, key: tuple[Any, ...], result: Any) -> None:
        """Append a result, which must be JSON-like."""
        self.done[key] = result
        if self.path.exists():
            with self.path.open("a") as file:
                file.write(self._line(key, result))
        else:
            self._rewrite()

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


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
