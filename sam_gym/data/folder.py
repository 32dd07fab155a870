"""A folder of images with one mask file each."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Literal

import cv2
import numpy as np

from sam_gym.data.base import SPLITS, Sample, Unsplit, check_index
from sam_gym.data.io import (
    IMAGE_SUFFIXES,
    OnError,
    Records,
    Reject,
    check_all,
    check_annotated,
    flag,
    read_annotated,
    read_json,
    resolve,
)
from sam_gym.data.splits import ALL, seeded_part
from sam_gym.utils.registry import check_choice
from sam_gym.utils.text import printable

BACKGROUND, IGNORE, OBJECT = 0, 128, 255

_TARGETS = ("mask", "components", "instances")


class Folder:
    """Images in `root/images`, masks of the same stem as PNG in `root/masks`.

    Mask values are 0 for background, 255 for the object and 128 for ignored pixels; other values
    are errors. `root/splits.json` lists the stems of each split under "train", "val" and "test";
    other keys are ignored. **Without this file, every split is all images**, sorted by stem, unless
    `split_seed` is given.

    Construction checks names, sizes, whether files are whole, and the contents of the masks;
    images are decoded when they are read. They are upright, see `sam_gym.data.io.read_image`.

    Args:
        split: "train", "val" or "test"; or "all" for all images, whatever splits.json says.
        root: folder of the dataset.
        split_seed: seed that splits the images (80% train, 10% val, 10% test) without splits.json.
        target: definition of an instance. "mask": the whole object mask. "components": each
            8-connected component of it. "instances": each id of `root/instances/STEM.png` (uint8
            or uint16, 0 is background; `root/masks` is not read).
        min_area: minimum area of a component or instance in pixels; smaller ones are ignored
            pixels. Has no effect with target="mask".
        category: name of the only category.
        on_error: handling of invalid images on construction: "raise", or "skip" to count them in
            `skipped`, with one warning. Reading always raises.

    Attributes:
        name: name of the root folder.
        categories: the only category.
        skipped: number of skipped images, by reason.
        unsplit: why every split is all images; None if they differ.

    Raises:
        FileNotFoundError: the root, one of its folders, an image or a mask is missing.
        ValueError: an option is unknown, splits.json is invalid, the sizes of an image and its mask
            differ, a file is not an image or not whole, a mask has no object or other values, a
            name leaves the root, or no image is left.
    """

    def __init__(
        self,
        split: str = "test",
        *,
        root: str,
        split_seed: int | None = None,
        target: Literal["mask", "components", "instances"] = "mask",
        min_area: int = 0,
        category: str = "object",
        on_error: OnError = "raise",
    ) -> None:
        check_choice("split", split, (*SPLITS, ALL))
        check_choice("target", target, _TARGETS)
        self.name = printable(os.path.basename(os.path.realpath(root)))
        self.categories = (category,)
        self._target = target
        self._min_area = min_area
        images = os.path.join(root, "images")
        masks = os.path.join(root, "instances" if target == "instances" else "masks")
        for folder in (images, masks):
            if not os.path.isdir(folder):
                remedy = "Check the path."
                if folder == masks and target != "instances":
                    if os.path.isdir(os.path.join(root, "instances")):
                        remedy = f"instances/ is there: pass {flag('target', 'instances')}."
                raise FileNotFoundError(f"{folder}: the folder does not exist. {remedy}")

        files = image_files(images)
        listed, self.unsplit = list_split(root, files, split, split_seed)
        note = _without_image(masks, files) if _stems(root, split) is None else ""
        records = Records(root, on_error)
        listed_pairs: dict[str, tuple[str, str]] = {}
        for stem in listed:
            with records.validate(_record(stem, split)):
                mask = resolve(masks, f"{stem}.png")
                if stem in listed_pairs:
                    raise Reject("image is listed twice")
                image = only_file(files.get(stem, []), os.path.join(images, f"{stem}.*"))
                resolve(images, os.path.basename(image))  # refuses a link out of the folder
                listed_pairs[stem] = image, mask
        #: Per image: stem, path, path of the mask.
        self._pairs: list[tuple[str, str, str]] = []
        checked = check_all(self._check, list(listed_pairs.values()))
        for (stem, pair), reject in zip(listed_pairs.items(), checked, strict=True):
            with records.validate(_record(stem, split)):
                if reject is not None:
                    raise reject
                self._pairs.append((stem, *pair))
        self.skipped: dict[str, int] = dict(records.skipped)
        if not self._pairs:
            why = str(records) or "none is listed"
            raise ValueError(
                f"{root}: split {split!r} has no usable image ({why}). "
                "Check the images folder and splits.json."
            )
        records.warn(note)

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def files(self) -> list[str]:
        """Paths of the image files."""
        return [image for _, image, _ in self._pairs]

    def mask_path(self, index: int) -> str:
        """Return the path of the mask at `index`."""
        return self._pairs[index][2]

    def __getitem__(self, index: int) -> Sample:
        """Return the image at `index` with its instances, all of category 0.

        `ignore` marks pixels of value 128, and components or instances below `min_area`.

        Raises:
            IndexError: `index` is outside `range(len(self))`.
            FileNotFoundError: a file is missing.
            ValueError: a file is corrupt, or has changed since construction.
        """
        check_index(self.name, index, len(self))
        stem, image_path, mask_path = self._pairs[index]
        record = f"image {stem!r} of {self.name}"
        image, (labels,) = read_annotated(image_path, [mask_path], record)
        with Records(mask_path, "raise").validate(record):
            instances, kept, ignore = self._instances(labels)
        masks = instances == kept[:, None, None]
        ignore |= (instances > 0) & ~masks.any(axis=0)
        return Sample(
            image=image,
            masks=masks,
            categories=np.zeros(len(masks), dtype=np.int64),
            source=f"{self.name}/{stem}",
            ignore=ignore if ignore.any() else None,
        )

    def draw(self, rng: np.random.Generator) -> tuple[int, int | None]:
        """Draw an image uniformly; the category is None: there is only one."""
        return int(rng.integers(len(self))), None

    def _check(self, pair: tuple[str, str]) -> None:
        """Check the files of an image and its mask; raises `Reject`."""
        image, mask = pair
        (labels,) = check_annotated(image, [mask])
        try:
            self._instances(labels)
        except Reject as reject:
            raise Reject(reject.reason, f"{mask}{reject.detail and ': '}{reject.detail}") from None

    def _instances(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Split the labels of a mask file into instances.

        Returns:
            The instance of each pixel, integers (H, W), 0 for none; the instances to keep, int64
            (N,); the ignored pixels, bool (H, W).

        Raises:
            Reject: a value is none of a mask, or there is no instance to keep.
        """
        ignore = np.zeros(labels.shape, bool)
        if self._target != "instances":
            _check_values(labels)
            ignore = labels == IGNORE
            labels = (labels == OBJECT).astype(np.uint8)
        if self._target == "components":
            labels = cv2.connectedComponents(labels, connectivity=8)[1]
        areas = np.bincount(labels.ravel())
        areas[BACKGROUND] = 0
        least = 1 if self._target == "mask" else max(self._min_area, 1)
        kept = np.flatnonzero(areas >= least)
        if not len(kept):
            if not areas.any():
                raise Reject("mask has no object")
            detail = f"the largest has {areas.max()}; lower {flag('min_area')}"
            raise Reject(f"mask has no object of at least {least} pixels", detail)
        return labels, kept, ignore


def _record(stem: str, split: str) -> str:
    return f"image {stem!r} of split {split!r}"


def image_files(folder: str) -> dict[str, list[str]]:
    """Return the paths of the image files in `folder` by stem."""
    files: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
            files.setdefault(stem, []).append(os.path.join(folder, name))
    return files


def list_split(
    root: str, stems: Collection[str], split: str, split_seed: int | None
) -> tuple[list[str], Unsplit | None]:
    """Return the stems of a split of a folder, by splits.json or a seed; see `Folder`.

    Args:
        root: the folder.
        stems: of all images.
        split: "train", "val", "test" or "all".
        split_seed: seed that splits the images, or None.

    Returns:
        The stems; why every split is all images, or None.
    """
    listed = _stems(root, split)
    if split_seed is not None:
        if os.path.exists(os.path.join(root, "splits.json")):
            raise ValueError(
                f"{root}: split_seed={split_seed!r} is for folders without splits.json. "
                "Leave it out, or remove the file."
            )
        return sorted(seeded_part(stems, split, split_seed, root)), None
    if listed is not None:
        return listed, None
    unsplit = Unsplit(
        f"{root}: splits.json is missing, so every split is all images",
        'Write {"train": [stems], "val": [...], "test": [...]} to it',
    )
    return sorted(stems), None if split == ALL else unsplit


def _without_image(masks: str, files: dict[str, list[str]]) -> str:
    """Return a note on masks without an image of a suffix that is read; empty if there are none."""
    alone = [name for name in sorted(os.listdir(masks)) if _is_alone(name, files)]
    return f"masks without an image: {len(alone)} (the first is {alone[0]})" if alone else ""


def _is_alone(name: str, files: dict[str, list[str]]) -> bool:
    stem, suffix = os.path.splitext(name)
    return suffix == ".png" and not name.startswith(".") and stem not in files


def _stems(root: str, split: str) -> list[str] | None:
    """Return the stems that splits.json lists for `split`; None for all: without the file too."""
    path = os.path.join(root, "splits.json")
    if split == ALL or not os.path.isfile(path):
        return None
    splits = read_json(path, "list of splits")
    stems = splits.get(split) if isinstance(splits, dict) else None
    if not isinstance(stems, list) or not all(isinstance(stem, str) for stem in stems):
        raise ValueError(
            f"{path}: split {split!r} is not a list of stems (got {type(stems).__name__!r}). "
            f"Add the list, or choose another split ({', '.join(SPLITS)})."
        )
    return stems


def only_file(paths: list[str], pattern: str) -> str:
    """Return the only path of a stem; raise `Reject` if there is none, or more than one."""
    if not paths:
        raise Reject("image file is missing", f"looked for {pattern}", FileNotFoundError)
    if len(paths) > 1:
        raise Reject("several image files have this stem", ", ".join(paths))
    return paths[0]


def _check_values(labels: np.ndarray) -> None:
    values = np.flatnonzero(np.bincount(labels.ravel()))
    if np.setdiff1d(values, (BACKGROUND, IGNORE, OBJECT)).size:
        shown = ", ".join(map(str, values[:8].tolist())) + (", ..." if values.size > 8 else "")
        raise Reject(
            "mask has values other than 0 (background), 128 (ignore) and 255 (object)",
            f"found {shown}; a JPEG or a resized mask is not exact",
        )
