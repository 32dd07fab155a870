"""Whole objects with one mask file each, listed in a metadata file (EntitySeg, SAOM)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from sam_gym.data.base import Sample, check_index
from sam_gym.data.io import (
    OnError,
    Records,
    Reject,
    check_all,
    check_annotated,
    read_annotated,
    read_json,
    resolve,
    whole_number,
)
from sam_gym.utils.registry import check_choice
from sam_gym.utils.text import printable

METADATA = "metadata.json"

#: Split -> key of its list in the metadata file.
_LISTS = {"train": "train_data", "val": "val_data", "test": "test_data"}


class Entities:
    """Images in `root/images`, one PNG per object in `root/masks`, and `root/metadata.json`.

    This is the layout of the whole-object data of SAOM (arXiv 2403.10780) and EntitySeg. The
    metadata holds "entity classes" (a list of names, or an object of name -> index or of index ->
    name), and the lists "train_data" and "val_data" of entries with "image_name", "entity_masks"
    (one file name per object; pixels other than 0 are the object) and "entity_indices" (the class
    of each). Files are looked up in `images` and `masks`, then in the root. **Split "test" is
    "test_data" if the file has it, else "val_data".**

    Construction validates everything, reads every mask once, and checks that image files are
    whole; images are decoded on access. They are upright, see `sam_gym.data.io.read_image`.

    Args:
        split: "train", "val" or "test".
        root: folder of the dataset.
        metadata: name of the metadata file in `root`.
        images: folder of the images in `root`; names in the metadata cannot leave it.
        masks: folder of the masks in `root`; names in the metadata cannot leave it.
        on_error: handling of invalid entries: "raise", or "skip" to count them in `skipped`, with
            one warning. An entry of which some masks are empty is kept without these. Reading
            always raises.

    Attributes:
        name: name of the root folder.
        categories: the classes, sorted by index.
        skipped: number of skipped entries and empty masks, by reason.

    Raises:
        FileNotFoundError: the root, the metadata file, an image or a mask is missing.
        ValueError: the metadata has another form, an entry is invalid, the split is unknown, or no
            entry is left.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        root: str,
        metadata: str = METADATA,
        images: str = "images",
        masks: str = "masks",
        on_error: OnError = "raise",
    ) -> None:
        check_choice("split", split, _LISTS)
        if not os.path.isdir(root):
            raise FileNotFoundError(f"{root}: the root folder does not exist. Check the path.")
        self.name = printable(os.path.basename(os.path.realpath(root)))
        path = os.path.join(root, metadata)
        data = _load(path)
        classes = _classes(path, data.get("entity classes"))
        self.categories = tuple(classes[index] for index in sorted(classes))
        self._category_of = {index: position for position, index in enumerate(sorted(classes))}

        key, entries = _entries(path, data, split)
        folders = [os.path.join(root, images), root], [os.path.join(root, masks), root]
        records = Records(path, on_error)
        listed: dict[str, tuple[str, tuple[str, str, list[str], list[int]]]] = {}
        for number, entry in enumerate(entries):
            with records.validate(_entry_name(key, number, entry)):
                found = self._validate(entry, *folders)
                if found[1] in listed:
                    raise Reject("image is listed twice", f"got {found[0]!r}")
                listed[found[1]] = _entry_name(key, number, entry), found
        #: Per image: name, path, paths of the masks, categories.
        self._entries: list[tuple[str, str, list[str], list[int]]] = []
        checked = check_all(_have_objects, [found[1:3] for _, found in listed.values()])
        for (record, found), result in zip(listed.values(), checked, strict=True):
            with records.validate(record):
                if isinstance(result, Reject):
                    raise result
                self._entries.append(_without_empty(*found, result, records))
        self.skipped: dict[str, int] = dict(records.skipped)
        if not self._entries:
            why = str(records) or "the list is empty"
            raise ValueError(
                f"{path}: list {key!r} has no usable entry ({why}). "
                "Check the file, or choose another split."
            )
        records.warn()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def files(self) -> list[str]:
        """Paths of the image files."""
        return [path for _, path, *_ in self._entries]

    def __getitem__(self, index: int) -> Sample:
        """Return the image at `index` with its objects.

        Raises:
            IndexError: `index` is outside `range(len(self))`.
            FileNotFoundError: a file is missing.
            ValueError: a file is corrupt, or a mask is empty or differs in size from the image.
        """
        check_index(self.name, index, len(self))
        name, image_path, mask_paths, categories = self._entries[index]
        record = f"image {name!r} of {self.name}"
        image, labels = read_annotated(image_path, mask_paths, record)
        masks = np.stack([label > 0 for label in labels])
        if not masks.any(axis=(1, 2)).all():
            path = mask_paths[masks.any(axis=(1, 2)).argmin()]
            raise ValueError(f"{path}: {record}: the mask is empty. Restore the original file.")
        return Sample(
            image=image,
            masks=masks,
            categories=np.array(categories, np.int64),
            source=f"{self.name}/{name}",
        )

    def draw(self, rng: np.random.Generator) -> tuple[int, int | None]:
        """Draw an image uniformly; the category is None: any in the image."""
        return int(rng.integers(len(self))), None

    def _validate(
        self, entry: Any, images: list[str], masks: list[str]
    ) -> tuple[str, str, list[str], list[int]]:
        """Return name and path of the image, paths of the masks, and categories of an entry."""
        if not isinstance(entry, dict):
            raise Reject("entry is not an object", f"got {type(entry).__name__!r}")
        image = _find(images, entry.get("image_name"), "image")
        names, indices = _list(entry, "entity_masks"), _list(entry, "entity_indices")
        if len(names) != len(indices):
            detail = f"{len(names)} masks, {len(indices)} indices"
            raise Reject("numbers of masks and indices differ", detail)
        if not names:
            raise Reject("entry has no mask")
        for index in indices:
            if whole_number(index) is None:
                raise Reject("index is not a whole number", f"got {index!r}")
            if index not in self._category_of:
                known = ", ".join(map(str, self._category_of))
                raise Reject("index has no class", f"got {index}, classes have {known}")
        paths = [_find(masks, name, "mask") for name in names]
        return entry["image_name"], image, paths, [self._category_of[index] for index in indices]


def _load(path: str) -> dict[str, Any]:
    data = read_json(path, "metadata file")
    if not isinstance(data, dict):
        raise ValueError(
            f"{path}: expected an object with 'entity classes', 'train_data' and 'val_data', "
            f"got {type(data).__name__!r}."
        )
    return data


def _classes(path: str, table: Any) -> dict[int, str]:
    """Return the names of the classes by index."""
    pairs: list[tuple[Any, Any]] = []
    if isinstance(table, list):
        pairs = list(enumerate(table))
    elif isinstance(table, dict):
        by_name = all(isinstance(value, int | float) for value in table.values())
        pairs = [(value, key) if by_name else (key, value) for key, value in table.items()]
    classes: dict[int, str] = {}
    for index, name in pairs:
        if isinstance(index, str) and index.isascii() and index.isdigit():
            index = int(index)
        number = whole_number(index)
        if number is None or number < 0 or not isinstance(name, str) or not name:
            raise ValueError(
                f"{path}: 'entity classes' holds {index!r} for {name!r}; expected a list of names, "
                "or an object of name -> index or index -> name, with indices from 0."
            )
        if number in classes or name in classes.values():
            raise ValueError(f"{path}: 'entity classes' holds {name!r} or index {number} twice.")
        classes[number] = name
    if not classes:
        raise ValueError(
            f"{path}: 'entity classes' must be a list of names, or an object of name -> index or "
            f"index -> name; got {table!r}."
        )
    return classes


def _entries(path: str, data: dict[str, Any], split: str) -> tuple[str, list[Any]]:
    """Return the key of a split's list in the file, and the list."""
    key = _LISTS[split]
    if split == "test" and key not in data:
        key = _LISTS["val"]
    if not isinstance(data.get(key), list):
        raise ValueError(
            f"{path}: no list {key!r} of entries for split {split!r} "
            f"(got {type(data.get(key)).__name__!r}). Add it, or choose another split."
        )
    return key, data[key]


def _entry_name(key: str, number: int, entry: Any) -> str:
    named = isinstance(entry, dict) and "image_name" in entry
    return f"entry {number} of {key!r}" + (f", image {entry['image_name']!r}" if named else "")


def _list(entry: dict[str, Any], key: str) -> list[Any]:
    values = entry.get(key)
    if not isinstance(values, list):
        raise Reject(f"{key} is not a list", f"got {type(values).__name__!r}")
    return values


def _find(folders: Sequence[str], name: object, kind: str) -> str:
    """Return the path of a file in the first folder that contains it."""
    paths = [resolve(folder, name) for folder in folders]
    for path in paths:
        if os.path.isfile(path):
            return path
    looked = " and ".join(paths)
    raise Reject(f"{kind} file is missing", f"looked for {looked}", FileNotFoundError)


def _have_objects(files: tuple[str, list[str]]) -> list[bool]:
    """Check the files of an image and its masks; return whether each mask has an object."""
    image, masks = files
    return [bool(labels.any()) for labels in check_annotated(image, masks)]


def _without_empty(
    name: str,
    image: str,
    paths: list[str],
    categories: list[int],
    have_objects: list[bool],
    records: Records,
) -> tuple[str, str, list[str], list[int]]:
    """Return an entry without its empty masks, which are counted or raise `Reject`."""
    empty = have_objects.count(False)
    if empty == len(paths) or (empty and records.on_error == "raise"):
        raise Reject("mask is empty", paths[have_objects.index(False)])
    if empty:
        records.skipped["mask is empty"] += empty
    return (
        name,
        image,
        [path for path, has in zip(paths, have_objects, strict=True) if has],
        [category for category, has in zip(categories, have_objects, strict=True) if has],
    )
