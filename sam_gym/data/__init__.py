"""Datasets by name: `make_dataset("scenes", split="test")`."""

from __future__ import annotations

from typing import Any

from sam_gym.data.base import Dataset, DatasetSpec, MissingSplit, Sample
from sam_gym.utils.registry import Registry

__all__ = [
    "DATASETS",
    "Dataset",
    "DatasetSpec",
    "MissingSplit",
    "Sample",
    "dataset_help",
    "dataset_table",
    "make_dataset",
    "register_dataset",
]

#: Dataset name -> its specification.
DATASETS: Registry[DatasetSpec] = Registry("dataset")


def register_dataset(spec: DatasetSpec) -> DatasetSpec:
    """Add a dataset, so that `make_dataset`, environments, streams and commands know its name.

    Raises:
        ValueError: the name is taken.
    """
    return DATASETS.add(spec.name, spec)


def make_dataset(name: str, split: str = "train", **options: Any) -> Dataset:
    """Make a registered dataset.

    Args:
        name: one of `DATASETS`.
        split: "train", "val" or "test".
        **options: options of the dataset, for example `root=` of one that reads files.

    Raises:
        ValueError: the name, the split or an option is unknown, or the data does not validate.
        FileNotFoundError: a file or folder is missing.
    """
    return DATASETS.get(name).make(split, **options)


def dataset_help() -> str:
    """Return the help text of an option that takes a dataset: the valid names."""
    return f"Dataset name: {', '.join(DATASETS.names())}."


def dataset_table() -> str:
    """Return the table of datasets as Markdown, for the README."""
    rows = ["| `dataset=` | images | `data=` |", "|---|---|---|"]
    for name, spec in DATASETS.items():
        rows.append(f"| `{name}` | {spec.description} | {'folder' if spec.reads_files else ''} |")
    return "\n".join(rows)


for _spec in (
    DatasetSpec(
        name="scenes",
        entry_point="sam_gym.data.synthetic.scenes:Scenes",
        description="Objects of ten categories on textured ground, with clutter.",
        procedural=True,
    ),
    DatasetSpec(
        name="rooms",
        entry_point="sam_gym.data.synthetic.rooms.dataset:Rooms",
        description="Rooms with furniture; the parts of an object have different colours.",
        procedural=True,
    ),
    DatasetSpec(
        name="rooms-panoramas",
        entry_point="sam_gym.data.synthetic.rooms.dataset:RoomsPanoramas",
        description="Wide rooms with more objects.",
        procedural=True,
    ),
    DatasetSpec(
        name="domain",
        entry_point="sam_gym.data.synthetic.domains.dataset:ProceduralDomain",
        description="One of the domains of the stream `scenes-domains`, chosen by `kind`.",
        procedural=True,
    ),
    DatasetSpec(
        name="coco",
        entry_point="sam_gym.data.coco:Coco",
        description="COCO instance annotations: polygons and RLE. The test split is not annotated.",
        reads_files=True,
        held_out_split="val",
    ),
    DatasetSpec(
        name="folder",
        entry_point="sam_gym.data.folder:Folder",
        description="A folder of images with one mask or instance map each.",
        reads_files=True,
    ),
    DatasetSpec(
        name="entities",
        entry_point="sam_gym.data.entities:Entities",
        description="Whole objects with one mask file each (SAOM, EntitySeg).",
        reads_files=True,
    ),
):
    register_dataset(_spec)
