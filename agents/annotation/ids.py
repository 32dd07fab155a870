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
            raise ValueError(
                f"{coco}: no COCO JSON with images and categories ({error!r})."
            ) from None
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
        self.categories = {
            name: names[name] if name in names else next(unused) for name in categories
        }
