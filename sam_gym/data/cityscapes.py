"""Cityscapes: street scenes with label ids and instance ids."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from sam_gym.data.base import MissingSplit
from sam_gym.data.io import OnError
from sam_gym.data.semantic import (
    CROWD,
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


class Label(NamedTuple):
    """A class of Cityscapes: its value in labelIds, its group, and how it is used."""

    name: str
    id: int
    group: str
    instances: bool = False
    evaluated: bool = True


#: The classes of cityscapesScripts, `helpers/labels.py`. The evaluated ones are in the order of
#: their trainIds.
LABELS = (
    Label("unlabeled", 0, "void", evaluated=False),
    Label("ego vehicle", 1, "void", evaluated=False),
    Label("rectification border", 2, "void", evaluated=False),
    Label("out of roi", 3, "void", evaluated=False),
    Label("static", 4, "void", evaluated=False),
    Label("dynamic", 5, "void", evaluated=False),
    Label("ground", 6, "void", evaluated=False),
    Label("road", 7, "flat"),
    Label("sidewalk", 8, "flat"),
    Label("parking", 9, "flat", evaluated=False),
    Label("rail track", 10, "flat", evaluated=False),
    Label("building", 11, "construction"),
    Label("wall", 12, "construction"),
    Label("fence", 13, "construction"),
    Label("guard rail", 14, "construction", evaluated=False),
    Label("bridge", 15, "construction", evaluated=False),
    Label("tunnel", 16, "construction", evaluated=False),
    Label("pole", 17, "object"),
    Label("polegroup", 18, "object", evaluated=False),
    Label("traffic light", 19, "object"),
    Label("traffic sign", 20, "object"),
    Label("vegetation", 21, "nature"),
    Label("terrain", 22, "nature"),
    Label("sky", 23, "sky"),
    Label("person", 24, "human", instances=True),
    Label("rider", 25, "human", instances=True),
    Label("car", 26, "vehicle", instances=True),
    Label("truck", 27, "vehicle", instances=True),
    Label("bus", 28, "vehicle", instances=True),
    Label("caravan", 29, "vehicle", instances=True, evaluated=False),
    Label("trailer", 30, "vehicle", instances=True, evaluated=False),
    Label("train", 31, "vehicle", instances=True),
    Label("motorcycle", 32, "vehicle", instances=True),
    Label("bicycle", 33, "vehicle", instances=True),
)

#: The classes of the SAM-Cityscapes document.
FIVE = ("road", "sidewalk", "building", "person", "car")

_LAYOUT = (
    "Cityscapes has leftImg8bit/SPLIT/CITY and gtFine/SPLIT/CITY, out of leftImg8bit_trainvaltest."
    "zip and gtFine_trainvaltest.zip; pass the folder that holds both."
)
_IMAGE, _CLASS_IDS, _OBJECT_IDS = (
    "_leftImg8bit.png",
    "_gtFine_labelIds.png",
    "_gtFine_instanceIds.png",
)


class Cityscapes(SemanticDataset):
    """Cityscapes: `leftImg8bit` and `gtFine`, with labelIds and instanceIds.

    Classes come from labelIds, as the official evaluation has it. Objects of person, rider and the
    vehicles come from instanceIds of 1000 and more; smaller values there are groups, whose objects
    cannot be told apart. See `SemanticDataset` for objects of other classes. Category groups are
    the official categories. Pixels of labels that are not evaluated are ignored.

    Args:
        split: "train" or "val". The labels of "test" are not public.
        root: folder with `leftImg8bit` and `gtFine`.
        classes: "train": the 19 evaluated classes, in the order of trainIds. "five": road,
            sidewalk, building, person and car; metrics ignore pixels of other classes.
        target, min_area, on_error: see `SemanticDataset`.

    Raises:
        FileNotFoundError: a folder or file is missing, or the split is "test".
        ValueError: see `SemanticDataset`.
    """

    name = "cityscapes"
    void_id = 0

    def __init__(
        self,
        split: str = "train",
        *,
        root: str,
        classes: Literal["train", "five"] = "train",
        target: Target = "instances",
        min_area: int = 0,
        on_error: OnError = "raise",
    ) -> None:
        check_choice("split", split, ("train", "val", "test"))
        check_choice("classes", classes, ("train", "five"))
        if split == "test":
            raise MissingSplit(
                f"{root}: the labels of Cityscapes' test split are not public; its label files are "
                "dummies. Choose val."
            )
        images, labels = f"leftImg8bit/{split}", f"gtFine/{split}"
        check_folders(root, (images, labels), _LAYOUT)
        paths = sorted(glob.glob(f"*/*{_IMAGE}", root_dir=os.path.join(root, images)))
        stems = [path.removesuffix(_IMAGE) for path in paths]
        if not stems:
            raise FileNotFoundError(f"{root}/{images}: no CITY/*{_IMAGE}. {_LAYOUT}")
        suffixes = (_CLASS_IDS, _OBJECT_IDS) if target == "instances" else (_CLASS_IDS,)
        for suffix in suffixes:
            if not glob.glob(f"*/*{suffix}", root_dir=os.path.join(root, labels)):
                raise FileNotFoundError(
                    f"{root}/{labels}: no CITY/*{suffix}. Fetch gtFine_trainvaltest.zip again, or "
                    "write the files from its polygons with cityscapesScripts: "
                    "json2labelImg and json2instanceImg."
                )
        evaluated = [label for label in LABELS if label.evaluated]
        chosen = evaluated if classes == "train" else [x for x in evaluated if x.name in FIVE]
        self.label_ids = tuple(label.id for label in chosen)
        left_out = {label.id: OTHER if label.evaluated else UNLABELLED for label in LABELS}
        self._classes = left_out | {label.id: index for index, label in enumerate(chosen)}
        super().__init__(
            root,
            [
                LabelledImage(
                    os.path.basename(stem),
                    f"{images}/{stem}{_IMAGE}",
                    tuple(f"{labels}/{stem}{suffix}" for suffix in suffixes),
                )
                for stem in stems
            ],
            classes=[label.name for label in chosen],
            category_groups=[label.group for label in chosen],
            target=target,
            min_area=min_area,
            on_error=on_error,
        )

    def parse(self, image: LabelledImage, files: Sequence[np.ndarray]) -> Labels:
        ids = files[0]
        classes = lookup(ids, self._classes, "label ids from 0 to 33")
        if len(files) == 1:
            return Labels(classes)
        given = files[1].astype(np.int32)
        # A group has the class for an id, as have all pixels of classes without instances.
        objects = np.where(given // 1000 == ids, given, NO_OBJECT)
        grouped = np.isin(ids, [label.id for label in LABELS if label.instances])
        objects[grouped & (objects == NO_OBJECT)] = CROWD
        return Labels(classes, objects)
