"""What annotating a folder needs, whoever annotates: files, ids, and what is done already."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sam_gym.backbones import Backbone
from sam_gym.data.io import IMAGE_SUFFIXES, read_image
from sam_gym.utils.files import plain, write_atomic
from sam_gym.utils.registry import unknown_name


def image_files(folder: str) -> list[str]:
    """Image files of a folder and the folders within, as paths relative to it, sorted.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no image in it.
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
        raise ValueError(
            f"{folder}: no image in this folder ({', '.join(sorted(IMAGE_SUFFIXES))})."
        )
    return files


def overlay_folder(overlays: str | None, out: Path) -> Path | None:
    """The folder for pictures: the one that was named, or beside `out`; None for "none"."""
    if overlays == "none":
        return None
    return Path(overlays or out.with_suffix("").as_posix() + "_overlays")


class Ids:
    """Ids of images and categories: those of a COCO file, or 1, 2, 3, ...

    Args:
        coco: path of the COCO file, or None.
        files: all image files.
        categories: all category names.
        new_categories: give categories that the file does not have ids that it does not use.

    Raises:
        ValueError: the file does not have a category, or is not in COCO's form.
    """

    def __init__(
        self,
        coco: str | None,
        files: Sequence[str],
        categories: Sequence[str],
        new_categories: bool = False,
    ) -> None:
        self.coco = coco
        self.images = {file: number for number, file in enumerate(files, start=1)}
        self.categories = {name: number for number, name in enumerate(categories, start=1)}
        if coco is None:
            return
        try:
            content = json.loads(Path(coco).read_text())
            known = {image["file_name"]: image["id"] for image in content["images"]}
            names = {category["name"]: category["id"] for category in content["categories"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{coco}: no COCO JSON with images and categories ({error!r})."
            ) from None
        self.images = {file: known[file] for file in files if file in known}
        for name in categories:
            if name not in names and not new_categories:
                raise unknown_name(f"category of {coco}", name, names)
        unused = itertools.count(1 + max(names.values(), default=0))
        self.categories = {
            name: names[name] if name in names else next(unused) for name in categories
        }

    def known(self, files: Sequence[str], folder: str) -> tuple[list[str], list[str]]:
        """Image files that have an id, and those that have none.

        Raises:
            ValueError: none has.
        """
        left_out = [file for file in files if file not in self.images]
        if len(left_out) == len(files):
            raise ValueError(
                f"{self.coco} has none of the {len(left_out)} images of {folder} (the first is "
                f"{left_out[0]!r}): its file_name must be a path relative to --images."
            )
        return [file for file in files if file in self.images], left_out


class Reader:
    """Reads images, each once for all of its categories, and remembers which could not be read."""

    def __init__(self, folder: str, backbone: Backbone) -> None:
        self.folder, self.backbone = folder, backbone
        self.broken: dict[str, str] = {}
        self._last: tuple[str, np.ndarray] | None = None

    def read(self, file: str) -> np.ndarray | None:
        """The image uint8 (H, W, 3), or None if it is broken."""
        if self._last is not None and self._last[0] == file:
            return self._last[1]
        if file in self.broken:
            return None
        try:
            image = read_image(str(Path(self.folder) / file), "image")
            if not all(self.backbone.input_size(image.shape[:2])):
                raise ValueError(
                    f"{image.shape[1]} x {image.shape[0]} pixels are too thin for SAM."
                )
        except (ValueError, OSError) as error:
            self.broken[file] = str(error)
            return None
        self._last = (file, image)
        return image

    def report(self, left_out: Sequence[str], coco: str | None) -> None:
        """Say which files were skipped: those that are not in the COCO file, and broken ones."""
        for file in left_out:
            print(f"skipped {file}: not in {coco}")
        for file, reason in self.broken.items():
            print(f"skipped {file}: {reason}")


class Progress:
    """What is done already, a line of JSON each, in a file beside `out`.

    Args:
        path: of the file, which may be there from a run that was cut off.
        settings: of the run.

    Raises:
        ValueError: the file is of a run with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self._header = header = {"settings": plain(settings)}
        #: Key (of strings and numbers) -> what came of it.
        self.done: dict[tuple[Any, ...], Any] = {}
        if path.exists():
            lines = path.read_text().splitlines()
            rows = [row for row in map(_parsed, lines) if row is not None]
            if not rows or rows[0] != header:
                raise ValueError(
                    f"{path}: left by a run with other settings. Run it to its end with those, or "
                    "remove the file to begin anew."
                )
            self.done = {tuple(row["key"]): row["result"] for row in rows[1:]}
            self._rewrite()

    def add(self, key: tuple[Any, ...], result: Any) -> None:
        """Remember what came of something; `result` must be JSON-like."""
        self.done[key] = result
        if not self.path.exists():
            self._rewrite()
            return
        with self.path.open("a") as file:
            file.write(self._line(key, result))

    def finish(self) -> None:
        """Remove the file: all is done."""
        self.path.unlink(missing_ok=True)

    def _rewrite(self) -> None:
        """Write the file anew, without a half-written last line."""
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
