"""The base class of datasets with label maps: classes, and the objects in them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np

from sam_gym.data.base import IGNORED, Sample, Unsplit, check_index, class_names
from sam_gym.data.io import (
    Decode,
    OnError,
    Records,
    Reject,
    check_all,
    check_annotated,
    decode_labels,
    flag,
    read_annotated,
    resolve,
)
from sam_gym.utils.registry import check_choice
from sam_gym.utils.text import counted, printable

#: What an object is; see `SemanticDataset`.
Target = Literal["instances", "components", "class"]
_TARGETS = ("instances", "components", "class")

#: Classes of pixels that a file does not label, and of those that have none of the chosen classes.
UNLABELLED, OTHER = -1, -2
#: Objects of pixels where the file has none, and where it does not tell several objects apart.
NO_OBJECT, CROWD = 0, -1


class Labels(NamedTuple):
    """The content of the label files of an image.

    Attributes:
        classes: int16 (H, W), index of each pixel's class, `UNLABELLED` or `OTHER`.
        objects: int32 (H, W), id of each pixel's object, from 1, `NO_OBJECT` or `CROWD`; None if
            the files have no objects.
    """

    classes: np.ndarray
    objects: np.ndarray | None = None


@dataclass(frozen=True)
class LabelledImage:
    """The files of an image.

    Attributes:
        name: its name in messages and results, unique in the dataset.
        image: path of the image in the root.
        labels: paths of its label files in the root.
        about: what else its reader knows of it.
    """

    name: str
    image: str
    labels: tuple[str, ...]
    about: Any = None


class SemanticDataset:
    """Images with label maps; a subclass finds the files and says what their values mean.

    Every sample has `semantic`, the label map, and at least one object. Images without an object
    are left out. What an object is, depends on `target`:

    - "instances": an object of the files. Where they have none, as in most classes of surfaces such
      as sky or road, each 8-connected region of a class is an object. Where they do not tell
      several objects apart (groups, crowds), there is none, and the pixels are ignored in
      `Sample.ignore` only.
    - "components": each 8-connected region of a class.
    - "class": all pixels of a class.

    Construction reads all label files once, in threads, and checks that image files are whole;
    images are decoded on access. They are upright, see `sam_gym.data.io.read_image`.

    Args:
        root: folder of the dataset, which no file leaves.
        images: the files; the images are numbered in this order.
        classes: names of the classes. All but a last class "background" are categories.
        category_groups: the group of each class, or None.
        target: definition of an object.
        min_area: minimum area of an object in pixels; smaller ones are ignored pixels, except with
            target="class". Label maps and their metrics do not depend on it.
        on_error: handling of invalid images on construction: "raise", or "skip" to count them in
            `skipped`, with one warning. Reading always raises.
        skipped: images that were skipped already, by reason.

    Attributes:
        name: the registered name, or that of the folder.
        categories: names of the classes that can be objects.
        classes: names of all classes, which label maps index; the first ones are the categories.
        category_groups: the group of each class, or None.
        skipped: number of skipped images, by reason.
        unsplit: why every split is all images; None if they differ.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an option is unknown, a file cannot be read, the sizes of an image and its
            labels differ, a label has no class, or no image has an object.
    """

    name: str
    unsplit: Unsplit | None = None
    #: How label files are decoded.
    decode: Decode = staticmethod(decode_labels)
    #: Value of each class in the label files, and of unlabelled pixels; None if colours are codes.
    label_ids: tuple[int, ...] | None = None
    void_id: int = IGNORED

    def __init__(
        self,
        root: str,
        images: Sequence[LabelledImage],
        *,
        classes: Sequence[str],
        background: bool = False,
        category_groups: Sequence[str] | None = None,
        target: Target = "instances",
        min_area: int = 0,
        on_error: OnError = "raise",
        skipped: Mapping[str, int] | None = None,
    ) -> None:
        check_choice("target", target, _TARGETS)
        self.root = root
        self.classes = tuple(classes)
        self.categories = self.classes[:-1] if background else self.classes
        self.category_groups = None if category_groups is None else tuple(category_groups)
        class_names(self)  # refuses too many
        self._target, self._min_area = target, min_area
        records = Records(root, on_error)
        records.skipped.update(skipped or {})
        found: list[tuple[LabelledImage, str, list[str]]] = []
        for image in images:
            with records.validate(self._record(image)):
                labels = [resolve(root, label) for label in image.labels]
                found.append((image, resolve(root, image.image), labels))
        self._images: list[tuple[LabelledImage, str, list[str]]] = []
        for own, result in zip(found, check_all(self._has_object, found), strict=True):
            with records.validate(self._record(own[0])):
                if isinstance(result, Reject):
                    raise result
                if result:
                    self._images.append(own)
        self.skipped: dict[str, int] = dict(records.skipped)
        if not self._images:
            why = str(records) or counted(len(found), "image")
            raise ValueError(
                f"{root}: no image has an object of the classes {', '.join(self.categories[:8])}"
                f"{', ...' * (len(self.categories) > 8)} of at least {max(1, min_area)} pixels "
                f"({why}). Check the folder, or choose other classes or a lower {flag('min_area')}."
            )
        records.warn()

    def __len__(self) -> int:
        return len(self._images)

    @property
    def files(self) -> list[str]:
        """Paths of the image files."""
        return [path for _, path, _ in self._images]

    def __getitem__(self, index: int) -> Sample:
        """Return the image at `index` with its label map and objects.

        `ignore` marks unlabelled pixels, crowds, and objects below `min_area`.

        Raises:
            IndexError: `index` is outside `range(len(self))`.
            FileNotFoundError: a file is missing.
            ValueError: a file is corrupt, or has changed since construction.
        """
        check_index(self.name, index, len(self))
        image, path, label_paths = self._images[index]
        record = self._record(image)
        pixels, files = read_annotated(path, label_paths, record, self.decode)
        with Records(label_paths[0], "raise").validate(record):
            labels = self.parse(image, files)
        objects, categories = self._objects(labels)
        kept = self._kept(objects, len(categories))
        masks = objects == (kept + 1)[:, None, None]
        ignore = labels.classes == UNLABELLED
        ignore |= self._countable(labels) & ~masks.any(axis=0)
        return Sample(
            image=pixels,
            masks=masks,
            categories=categories[kept],
            source=f"{self.name}/{image.name}",
            ignore=ignore if ignore.any() else None,
            semantic=np.where(labels.classes < 0, IGNORED, labels.classes).astype(np.uint8),
        )

    def draw(self, rng: np.random.Generator) -> tuple[int, int | None]:
        """Draw an image uniformly; the category is None: any in the image."""
        return int(rng.integers(len(self))), None

    def save_prediction(self, folder: str | Path, index: int, labels: np.ndarray) -> Path:
        """Write a predicted label map with the values of the dataset's own label files, as PNG.

        Args:
            folder: where `NAME.png` is written.
            index: of the image.
            labels: uint8 (H, W), indices of `classes`; `IGNORED` becomes the value of unlabelled
                pixels.

        Raises:
            ValueError: the dataset codes classes as colours, or a label has no class.
        """
        if self.label_ids is None:
            raise ValueError(f"{self.name}: label files with colour codes are not written.")
        table = np.full(256, self.void_id, np.uint8)
        table[: len(self.classes)] = self.label_ids
        wrong = (labels >= len(self.classes)) & (labels != IGNORED)
        if wrong.any():
            raise ValueError(
                f"A label is {labels[wrong][0]}; {self.name} has {len(self.classes)} classes."
            )
        path = Path(folder) / f"{self._images[index][0].name}.png"
        path.write_bytes(cv2.imencode(".png", table[labels])[1].tobytes())
        return path

    def parse(self, image: LabelledImage, files: Sequence[np.ndarray]) -> Labels:
        """Return what the decoded label files of an image mean.

        Raises:
            Reject: a value has no meaning.
        """
        raise NotImplementedError

    def _record(self, image: LabelledImage) -> str:
        return f"image {image.name!r} of {printable(self.name)}"

    def _has_object(self, found: tuple[LabelledImage, str, list[str]]) -> bool:
        """Check the files of an image; return whether it has an object. Raises `Reject`."""
        image, path, label_paths = found
        files = check_annotated(path, label_paths, self.decode)
        try:
            labels = self.parse(image, files)
        except Reject as reject:
            where = f"{label_paths[0]}{reject.detail and ': '}{reject.detail}"
            raise Reject(reject.reason, where) from None
        countable = self._countable(labels)
        if self._target == "instances" and labels.objects is not None:
            countable &= labels.objects != CROWD
        if self._target == "class" or self._min_area <= 1 or not countable.any():
            return bool(countable.any())
        objects, categories = self._objects(labels)
        return len(self._kept(objects, len(categories))) > 0

    def _countable(self, labels: Labels) -> np.ndarray:
        """Return the pixels of classes that can be objects: bool (H, W)."""
        return (labels.classes >= 0) & (labels.classes < len(self.categories))

    def _kept(self, objects: np.ndarray, count: int) -> np.ndarray:
        """Return the indices of objects that are large enough."""
        areas = np.bincount(objects.ravel(), minlength=count + 1)[1:]
        least = 1 if self._target == "class" else max(self._min_area, 1)
        return np.flatnonzero(areas >= least)

    def _objects(self, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
        """Return the objects of an image.

        Returns:
            The object of each pixel, from 1, int32 (H, W), 0 for none; their categories, int64
            (N,).
        """
        classes, loose = labels.classes, self._countable(labels)
        objects = np.zeros(classes.shape, np.int32)
        if self._target == "class":
            objects[loose] = np.unique(classes[loose], return_inverse=True)[1] + 1
            loose = np.zeros_like(loose)
        elif self._target == "instances" and labels.objects is not None:
            given = loose & (labels.objects > 0)
            # Of an id that covers several classes, each class is an object.
            keys = labels.objects[given].astype(np.int64) * 256 + classes[given]
            objects[given] = np.unique(keys, return_inverse=True)[1] + 1
            loose &= labels.objects == NO_OBJECT
        count = int(objects.max())
        for present in np.unique(classes[loose]):
            regions = (loose & (classes == present)).astype(np.uint8)
            number, regions = cv2.connectedComponents(regions, connectivity=8)
            objects += np.where(regions > 0, regions + count, 0).astype(np.int32)
            count += number - 1
        categories = np.zeros(count + 1, np.int64)
        categories[objects.ravel()] = classes.ravel()
        return objects, categories[1:]


def lookup(values: np.ndarray, table: Mapping[int, int], what: str) -> np.ndarray:
    """Translate the values of a label file.

    Args:
        values: uint8 or uint16 (H, W).
        table: value -> class.
        what: the values that are valid, for messages.

    Returns:
        int16 (H, W).

    Raises:
        Reject: a value is not in the table.
    """
    unknown = -3
    translated = np.full(max(int(values.max()), *table) + 1, unknown, np.int16)
    translated[list(table)] = list(table.values())
    classes = translated[values]
    if (classes == unknown).any():
        found = np.unique(values[classes == unknown])
        shown = ", ".join(map(str, found[:8].tolist())) + ", ..." * (len(found) > 8)
        raise Reject(
            "a label has no class", f"found {shown}; expected {what}. A resized map is not exact"
        )
    return classes


def check_folders(root: str, folders: Sequence[str], layout: str) -> None:
    """Raise `FileNotFoundError` unless all folders are in the root.

    Args:
        root: folder of the dataset.
        folders: paths in it.
        layout: sentences on what the folder should hold, and where it comes from.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root}: the root folder does not exist. Check the path.")
    for folder in folders:
        if not os.path.isdir(os.path.join(root, folder)):
            found = ", ".join(sorted(os.listdir(root))[:8]) or "nothing"
            raise FileNotFoundError(
                f"{os.path.join(root, folder)}: the folder does not exist (found {found}). {layout}"
            )
