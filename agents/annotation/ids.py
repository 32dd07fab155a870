"""Image and category ids of an annotation file."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from sam_gym.utils.registry import unknown_name


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
        ValueError: the file lacks a category, or is not COCO JSON.
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

    def split(self, files: Sequence[str], folder: str) -> tuple[list[str], list[str]]:
        """Split image files into those that have an id and those that have none.

        Raises:
            ValueError: no file has an id.
        """
        left_out = [file for file in files if file not in self.images]
        if len(left_out) == len(files):
            raise ValueError(
                f"{self.coco} has none of the {len(left_out)} images of {folder} (the first is "
                f"{left_out[0]!r}): its file_name must be a path relative to --images."
            )
        return [file for file in files if file in self.images], left_out
