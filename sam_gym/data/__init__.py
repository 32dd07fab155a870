"""Datasets by name: `make_dataset("scenes", split="test")`."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from sam_gym.data.base import Dataset, MissingSplit, Sample
from sam_gym.utils.registry import unknown_name

__all__ = ["DATASETS", "PROCEDURAL", "Dataset", "MissingSplit", "Sample", "make_dataset"]

#: Dataset name -> "module:factory". A factory takes `split` and its own keyword arguments.
DATASETS: dict[str, str] = {
    "scenes": "sam_gym.data.synthetic.scenes:Scenes",
    "rooms": "sam_gym.data.synthetic.rooms.dataset:Rooms",
    "rooms-panoramas": "sam_gym.data.synthetic.rooms.panoramas:RoomsPanoramas",
    "domain": "sam_gym.data.synthetic.domains.dataset:ProceduralDomain",
    "coco": "sam_gym.data.coco:Coco",
    "folder": "sam_gym.data.folder:Folder",
    "entities": "sam_gym.data.entities:Entities",
}


#: Datasets that are drawn: endless, unless they are given a `length`.
PROCEDURAL = ("scenes", "rooms", "rooms-panoramas")


def make_dataset(name: str, split: str = "train", **kwargs: Any) -> Dataset:
    """Make a registered dataset.

    Args:
        name: a key of `DATASETS`.
        split: "train", "val" or "test".
        **kwargs: what the dataset takes, for example `root=` for those that read files.

    Raises:
        ValueError: the name, the split or an option is unknown, or the data does not validate.
        FileNotFoundError: a file or folder is missing.
    """
    if name not in DATASETS:
        raise unknown_name("dataset", name, DATASETS)
    module, _, factory = DATASETS[name].partition(":")
    make = getattr(importlib.import_module(module), factory)
    takes = inspect.signature(make).parameters
    for option in kwargs:
        if option not in takes:
            raise unknown_name(f"option of dataset {name!r}", option, takes)
    if "root" in takes and "root" not in kwargs:
        raise ValueError(f"Dataset {name!r} reads files: pass its folder (data='PATH').")
    return make(split=split, **kwargs)
