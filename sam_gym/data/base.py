"""Samples, the dataset protocol, and the specification of a registered dataset."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from sam_gym.utils.registry import check_choice, load_entry_point, unknown_name
from sam_gym.utils.settings import check_arguments

#: Names of the splits.
SPLITS = ("train", "val", "test")


def check_index(name: str, index: int, length: int) -> None:
    """Raise `IndexError` for an index outside `range(length)` of the dataset `name`."""
    if not 0 <= index < length:
        raise IndexError(f"{name}: index {index} is outside 0..{length - 1}")


def select_categories(wanted: str | Sequence[str] | None, names: Sequence[str]) -> tuple[str, ...]:
    """Return the wanted categories, in the order given, without duplicates.

    Args:
        wanted: names, as a sequence or comma-separated; None: all.
        names: valid names.

    Raises:
        ValueError: a name is unknown, or none is given.
    """
    if wanted is None:
        return tuple(names)
    if isinstance(wanted, str):
        wanted = split_names(wanted, names)
    for name in wanted:
        check_choice("category", name, names)
    if not wanted:
        raise ValueError("categories is empty. Name at least one, or pass None for all.")
    return tuple(dict.fromkeys(wanted))


def split_names(text: str, names: Sequence[str]) -> list[str]:
    """Split comma-separated names, some of which contain commas themselves."""
    known = {tuple(part.strip() for part in name.split(",")): name for name in names}
    parts = [part.strip() for part in text.split(",")]
    found = []
    while parts:
        # The longest known name at the start; an unknown one ends at the first comma.
        ends = (end for end in range(len(parts), 0, -1) if tuple(parts[:end]) in known)
        end = next(ends, 1)
        found.append(known.get(tuple(parts[:end]), parts[0]))
        del parts[:end]
    return found


@dataclass(frozen=True)
class Sample:
    """One image with its annotated instances.

    Attributes:
        image: uint8 (H, W, 3), RGB.
        masks: bool (N, H, W), visible mask of each instance.
        categories: int64 (N,), index of each instance's category in `Dataset.categories`.
        source: name of the sample, for messages and result tables.
        ignore: bool (H, W) of pixels that metrics ignore, or None.
        parts: bool (P, H, W), visible masks of parts of instances (training targets only), or None.
        digest: `image_digest` of the image, if known.
    """

    image: np.ndarray
    masks: np.ndarray
    categories: np.ndarray
    source: str
    ignore: np.ndarray | None = None
    parts: np.ndarray | None = None
    digest: bytes | None = None

    def category_mask(self, category: int) -> np.ndarray:
        """Return the union of all instances of `category`: bool (H, W)."""
        return self.masks[self.categories == category].any(axis=0)


class MissingSplit(FileNotFoundError):
    """The data lacks the split, as COCO lacks an annotated test split."""


class Unsplit(NamedTuple):
    """Why every split of some data holds the same images, and how to give it splits (a clause)."""

    reason: str
    remedy: str


@runtime_checkable
class Dataset(Protocol):
    """The interface of datasets for environments, trainers and benchmarks.

    A dataset validates its annotations on construction, so that bad input fails before work starts.
    One that reads files also has `files`, the paths of its image files, and `unsplit`, an `Unsplit`
    if all splits are the same images, else None: see `sam_gym.data.splits`.
    """

    name: str
    categories: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Return the sample at `index`, always the same; raise `IndexError` outside the range."""

    def draw(self, rng: np.random.Generator) -> tuple[int, int | None]:
        """Draw the index of an image, and the category to segment (None: any in the image)."""


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """Everything that commands and environments need to know about a dataset.

    Attributes:
        name: the name in `sam_gym.data.DATASETS`.
        entry_point: "module:attribute" of the dataset's class or factory. It takes `split` and
            keyword arguments; these are the dataset's options.
        description: one line for the documentation.
        procedural: whether images are generated: endless, unless the option `length` is given.
        reads_files: whether it reads a folder, given as the option `root`.
        held_out_split: split on which results are reported by default.
    """

    name: str
    entry_point: str
    description: str
    procedural: bool = False
    reads_files: bool = False
    held_out_split: str = "test"

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Options of the dataset, by name: the parameters of its factory, without `split`."""
        takes = dict(inspect.signature(load_entry_point(self.entry_point)).parameters)
        takes.pop("split", None)
        return takes

    def make(self, split: str = "train", **options: Any) -> Dataset:
        """Make the dataset; see `sam_gym.data.make_dataset`."""
        takes = self.parameters
        if "root" in options and "root" not in takes:
            raise ValueError(
                f"Dataset {self.name!r} reads no files. Name one that does, such as coco or "
                "folder, or leave out --data (data=, root=)."
            )
        for option in options:
            if option not in takes:
                raise unknown_name(f"option of dataset {self.name!r}", option, takes)
        if self.reads_files and "root" not in options:
            raise ValueError(
                f"Dataset {self.name!r} reads files: pass its folder "
                "(--data PATH; environments: data='PATH'; make_dataset: root='PATH')."
            )
        for name, parameter in takes.items():
            if parameter.default is parameter.empty and name not in options:
                raise ValueError(f"Dataset {self.name!r} needs the option {name!r}.")
        factory = load_entry_point(self.entry_point)
        check_arguments(factory, options)
        dataset: Dataset = factory(split=split, **options)
        return dataset
