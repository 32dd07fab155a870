"""ADE20K: the SceneParsing benchmark of 150 classes, and the full data."""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Sequence

import numpy as np

from sam_gym.data.base import MissingSplit, select_categories
from sam_gym.data.folder import image_files
from sam_gym.data.images import decode_colours
from sam_gym.data.io import Decode, OnError
from sam_gym.data.semantic import (
    NO_OBJECT,
    OTHER,
    UNLABELLED,
    LabelledImage,
    Labels,
    SemanticDataset,
    Target,
    check_folders,
    lookup,
)
from sam_gym.utils.registry import check_choice

#: Number of classes of the benchmark, and of the full data by default.
NUM_CLASSES = 150

_SPLITS = {"train": "training", "val": "validation"}
_NAMES = "objectInfo150.txt"
_PARSING = (
    "SceneParsing has images/training, annotations/training and objectInfo150.txt; pass the folder "
    "ADEChallengeData2016 out of ADEChallengeData2016.zip."
)
_FULL = (
    "The full form has images/ADE/training/SCENE/... with an image, its *_seg.png and its JSON "
    "side by side; pass the folder ADE20K_2021_17_01."
)


def _open_split(split: str, root: str) -> str:
    check_choice("split", split, (*_SPLITS, "test"))
    if split == "test":
        raise MissingSplit(f"{root}: the labels of ADE20K's test split are not public. Choose val.")
    check_folders(root, (), "")
    return _SPLITS[split]


class Ade20k(SemanticDataset):
    """ADE20K of the SceneParsing benchmark (ADEChallengeData2016): 150 classes.

    Label files hold 1 to 150; 0, which is ignored, is everything else. Classes have the first of
    their names in `objectInfo150.txt`, if it is unique; their groups are "stuff" and "thing". The
    files have no objects, see `SemanticDataset`.

    Args:
        split: "train" or "val". The labels of "test" are not public.
        root: folder with `images`, `annotations` and `objectInfo150.txt`.
        target, min_area, on_error: see `SemanticDataset`.

    Raises:
        FileNotFoundError: a folder or file is missing, the split is "test", or the folder is that
            of the full data.
        ValueError: see `SemanticDataset`.
    """

    name = "ade20k"
    label_ids: tuple[int, ...] = tuple(range(1, NUM_CLASSES + 1))
    void_id = 0

    def __init__(
        self,
        split: str = "train",
        *,
        root: str,
        target: Target = "instances",
        min_area: int = 0,
        on_error: OnError = "raise",
    ) -> None:
        part = _open_split(split, root)
        if os.path.isdir(os.path.join(root, "images", "ADE")):
            raise FileNotFoundError(
                f"{root}: this is the full form of ADE20K. Read it as dataset 'ade20k-full', or "
                f"pass SceneParsing. {_PARSING}"
            )
        check_folders(root, (f"images/{part}", f"annotations/{part}"), _PARSING)
        names, groups = _benchmark_classes(os.path.join(root, _NAMES))
        self._classes = {0: UNLABELLED} | {value: value - 1 for value in self.label_ids}
        super().__init__(
            root,
            [
                LabelledImage(
                    stem,
                    f"images/{part}/{os.path.basename(paths[0])}",
                    (f"annotations/{part}/{stem}.png",),
                )
                for stem, paths in sorted(image_files(os.path.join(root, "images", part)).items())
            ],
            classes=names,
            category_groups=groups,
            target=target,
            min_area=min_area,
            on_error=on_error,
        )

    def parse(self, image: LabelledImage, files: Sequence[np.ndarray]) -> Labels:
        return Labels(lookup(files[0], self._classes, f"0 to {NUM_CLASSES}"))


class Ade20kFull(SemanticDataset):
    """ADE20K in full (ADE20K_2021_17_01): thousands of classes, with objects.

    Classes and objects come from the colours of `*_seg.png`: the class is R // 10 * 256 + G, the
    object is B. Names come from the JSON files, and all of the training split are read to count
    them, which takes a minute or two. Parts of objects are not read. Pixels of other classes are
    ignored in label maps.

    Args:
        split: "train" or "val".
        root: folder with `images/ADE/training` and `images/ADE/validation`.
        classes: names to select, as a sequence or comma-separated, in this order; None: the 150
            that most training images have, by frequency.
        target, min_area, on_error: see `SemanticDataset`.

    Raises:
        FileNotFoundError: a folder or file is missing, the split is "test", or the folder is that
            of SceneParsing.
        ValueError: a class is unknown; or see `SemanticDataset`.
    """

    name = "ade20k-full"
    decode: Decode = staticmethod(decode_colours)

    def __init__(
        self,
        split: str = "train",
        *,
        root: str,
        classes: str | Sequence[str] | None = None,
        target: Target = "instances",
        min_area: int = 0,
        on_error: OnError = "raise",
    ) -> None:
        part = _open_split(split, root)
        if os.path.isdir(os.path.join(root, "annotations")):
            raise FileNotFoundError(
                f"{root}: this is the SceneParsing form of ADE20K. Read it as dataset 'ade20k', or "
                f"pass the full form. {_FULL}"
            )
        folder = f"images/ADE/{part}"
        check_folders(root, (folder, "images/ADE/training"), _FULL)
        paths = sorted(glob.glob("**/*.jpg", root_dir=os.path.join(root, folder), recursive=True))
        stems = [path.removesuffix(".jpg") for path in paths]
        if not stems:
            raise FileNotFoundError(f"{root}/{folder}: no *.jpg. {_FULL}")
        codes = _full_classes(root)
        chosen = _choose(codes, classes)
        self._classes = {code: OTHER for code in codes.values()} | {0: UNLABELLED}
        self._classes |= {codes[name]: index for index, name in enumerate(chosen)}
        super().__init__(
            root,
            [
                LabelledImage(
                    os.path.basename(stem), f"{folder}/{stem}.jpg", (f"{folder}/{stem}_seg.png",)
                )
                for stem in stems
            ],
            classes=chosen,
            target=target,
            min_area=min_area,
            on_error=on_error,
        )

    def parse(self, image: LabelledImage, files: Sequence[np.ndarray]) -> Labels:
        red, green, blue = np.moveaxis(files[0].astype(np.int32), -1, 0)
        codes = red // 10 * 256 + green
        # Rare classes may be in no training image.
        known = self._classes | {
            code: OTHER for code in np.unique(codes).tolist() if code not in self._classes
        }
        objects = np.where(codes > 0, blue, NO_OBJECT).astype(np.int32)
        return Labels(lookup(codes, known, "the classes of the JSON files"), objects)


def _benchmark_classes(path: str) -> tuple[list[str], list[str]]:
    """Return the names and groups of the 150 classes."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: the names of the classes are missing. {_PARSING}")
    with open(path, encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file if line.strip()][1:]
    if len(rows) != NUM_CLASSES or not all(len(row) == 6 for row in rows):
        raise ValueError(
            f"{path}: expected a heading and {NUM_CLASSES} lines of Idx, Ratio, Train, Val, Stuff "
            f"and Name, between tabs; got {len(rows)} lines. Restore the original file."
        )
    names = [row[5].strip() for row in rows]
    short = [name.split(",")[0] for name in names]
    unique = Counter(short)
    groups = ["stuff" if row[4].strip() == "1" else "thing" for row in rows]
    return [
        own if unique[own] == 1 else name for own, name in zip(short, names, strict=True)
    ], groups


def _full_classes(root: str) -> dict[str, int]:
    """Return name -> code of the classes of the training split, the most frequent ones first."""
    folder = os.path.join(root, "images/ADE/training")
    images: Counter[str] = Counter()
    codes: dict[str, int] = {}
    for path in sorted(glob.glob("**/*.json", root_dir=folder, recursive=True)):
        path = os.path.join(folder, path)
        try:
            with open(path, "rb") as file:
                # Some files hold bytes that are not UTF-8, in fields that are not read.
                content = json.loads(file.read().decode("utf-8", "replace"))
            own = {
                str(record["name"]): int(record["name_ndx"])
                for record in content["annotation"]["object"]
                if record["parts"]["part_level"] == 0
            }
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: not the JSON of an ADE20K image ({type(error).__name__}: {error}). "
                "Fetch it again."
            ) from None
        codes |= own
        images.update(own.keys())
    if not codes:
        raise FileNotFoundError(f"{folder}: no *.json with the names of the classes. {_FULL}")
    return {name: codes[name] for name, _ in sorted(images.items(), key=lambda x: (-x[1], x[0]))}


def _choose(codes: dict[str, int], classes: str | Sequence[str] | None) -> list[str]:
    if classes is None:
        return list(codes)[:NUM_CLASSES]
    return list(select_categories(classes, list(codes)))
