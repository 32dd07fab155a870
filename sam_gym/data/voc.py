"""Pascal VOC segmentation: palette images of classes and of objects."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from sam_gym.data.base import BACKGROUND_CLASS, IGNORED, MissingSplit
from sam_gym.data.io import OnError
from sam_gym.data.semantic import (
    UNLABELLED,
    LabelledImage,
    Labels,
    SemanticDataset,
    Target,
    check_folders,
    lookup,
)
from sam_gym.utils.registry import check_choice

#: The categories, by index from 1 in the files.
CATEGORIES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)

_LAYOUT = (
    "Pascal VOC has JPEGImages, SegmentationClass, SegmentationObject and ImageSets/Segmentation; "
    "pass the folder of a year, such as VOCdevkit/VOC2012."
)


class Voc(SemanticDataset):
    """Pascal VOC: `SegmentationClass` and `SegmentationObject`, 20 categories and the background.

    Label files are palette images, read as indices: 0 is the background, 1 to 20 are categories,
    255 are ignored outlines. `ImageSets/Segmentation/SPLIT.txt` lists the images.

    Args:
        split: "train", "val" or, for VOC2007, "test".
        root: folder of a year, such as `VOCdevkit/VOC2012`.
        target, min_area, on_error: see `SemanticDataset`.

    Raises:
        FileNotFoundError: a folder, a file or the list of the split is missing.
        ValueError: see `SemanticDataset`.
    """

    name = "voc"
    label_ids: tuple[int, ...] = (*range(1, len(CATEGORIES) + 1), 0)

    def __init__(
        self,
        split: str = "train",
        *,
        root: str,
        target: Target = "instances",
        min_area: int = 0,
        on_error: OnError = "raise",
    ) -> None:
        check_choice("split", split, ("train", "val", "test"))
        folders = ["SegmentationClass"]
        if target == "instances":
            folders.append("SegmentationObject")
        check_folders(root, ("JPEGImages", "ImageSets/Segmentation", *folders), _LAYOUT)
        path = os.path.join(root, "ImageSets", "Segmentation", f"{split}.txt")
        if not os.path.isfile(path):
            raise MissingSplit(
                f"{path}: there is no list of split {split!r}. Choose another split: the labels of "
                "a test split are public for VOC2007 only."
            )
        with open(path, encoding="utf-8", errors="replace") as file:
            stems = dict.fromkeys(line.strip() for line in file if line.strip())
        self._classes = {IGNORED: UNLABELLED}
        self._classes |= {value: index for index, value in enumerate(self.label_ids)}
        super().__init__(
            root,
            [
                LabelledImage(
                    stem,
                    f"JPEGImages/{stem}.jpg",
                    tuple(f"{folder}/{stem}.png" for folder in folders),
                )
                for stem in stems
            ],
            classes=(*CATEGORIES, BACKGROUND_CLASS),
            background=True,
            target=target,
            min_area=min_area,
            on_error=on_error,
        )

    def parse(self, image: LabelledImage, files: Sequence[np.ndarray]) -> Labels:
        classes = lookup(files[0], self._classes, "0 to 20 and 255")
        return Labels(classes, files[1].astype(np.int32) if len(files) > 1 else None)
