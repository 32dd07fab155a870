"""Samples, the dataset protocol, and the specification of a registered dataset."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

from sam_gym.utils.registry import check_choice, load_entry_point, unknown_name
from sam_gym.utils.settings import check_arguments

#: Names of the splits.
SPLITS = ("train", "val", "test")
#: Value of ignored pixels in label maps.
IGNORED = 255
#: Name of the class of pixels on no object.
BACKGROUND_CLASS = "background"


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
        semantic: uint8 (H, W), label map: index of each pixel's class in `class_names` of the
            dataset, `IGNORED` (255) where metrics ignore it; None if the data has none. Its ignored
            pixels may differ from `ignore`: of some pixels only the class is known.
    """

    image: np.ndarray
    masks: np.ndarray
    categories: np.ndarray
    source: str
    ignore: np.ndarray | None = None
    parts: np.ndarray | None = None
    digest: bytes | None = None
    semantic: np.ndarray | None = None

    def category_mask(self, category: int) -> np.ndarray:
        """Return the union of all instances of `category`: bool (H, W)."""
        return self.masks[self.categories == category].any(axis=0)

    def label_map(self, background: int) -> np.ndarray:
        """Return `semantic`, or else the label map of the instances, uint8 (H, W).

        Smaller instances lie on top of larger ones.

        Args:
            background: index of the class of pixels on no instance.
        """
        if self.semantic is not None:
            return self.semantic
        labels = np.full(self.image.shape[:2], background, np.uint8)
        if self.ignore is not None:
            labels[self.ignore] = IGNORED
        for number in np.argsort(-self.masks.sum(axis=(1, 2)), kind="stable"):
            labels[self.masks[number]] = self.categories[number]
        return labels


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
    if all splits are the same images, else None: see `sam_gym.data.splits`. One with label maps
    also has `classes` and `category_groups`: see `sam_gym.data.semantic`.
    """

    name: str
    categories: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Return the sample at `index`, always the same; raise `IndexError` outside the range."""

    def draw(self, rng: np.random.Generator) -> tuple[int, int | None]:
        """Draw the index of an image, and the category to segment (None: any in the image)."""


def class_names(dataset: Dataset) -> tuple[str, ...]:
    """Return the names of the classes in the label maps of a dataset.

    They begin with its categories; a further one is no object, such as the background.

    Raises:
        ValueError: they are too many for a label map of 8 bits.
    """
    names: tuple[str, ...] = getattr(dataset, "classes", (*dataset.categories, BACKGROUND_CLASS))
    if len(names) > IGNORED:
        raise ValueError(
            f"{dataset.name}: {len(names)} classes, and a label map holds at most {IGNORED}. "
            "Select some of them."
        )
    return names


@dataclass(frozen=True)
class FrameAnnotation:
    """The masks of a video's objects in one frame.

    Attributes:
        masks: bool (N, H, W), visible mask of each object, in the order of `Video.objects`.
            Masks may overlap. Empty if the object is out of sight, or is not annotated.
        annotated: bool (N,), whether the mask is known. That an object is out of sight is known
            too: then it is annotated, and not visible.
        ignore: bool (H, W) of pixels that are void or hold a crowd, or None.
    """

    masks: np.ndarray
    annotated: np.ndarray
    ignore: np.ndarray | None = None

    @property
    def visible(self) -> np.ndarray:
        """Whether each object has a pixel: bool (N,)."""
        return np.asarray(self.masks.any(axis=(1, 2)))


@runtime_checkable
class Video(Protocol):
    """The interface of a video: frames and masks are read one by one, when they are asked for.

    Attributes:
        name: unique in the dataset.
        size: (height, width) of all frames.
        frames: name of each frame, in order, without the suffix of a file.
        objects: ids of the N objects; at least one. An object may appear late, leave and return:
            it is in the list of the whole video.
        categories: index of each object's category in `VideoDataset.categories`.
        annotated: bool (T, N), `FrameAnnotation.annotated` of each frame. Metrics and losses leave
            out what is not annotated.
    """

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def frames(self) -> Sequence[str]: ...
    @property
    def objects(self) -> tuple[int, ...]: ...
    @property
    def categories(self) -> tuple[int, ...]: ...
    @property
    def annotated(self) -> np.ndarray: ...

    def __len__(self) -> int:
        """Return T, the number of frames."""

    def image(self, frame: int) -> np.ndarray:
        """Read the frame at an index: uint8 (H, W, 3), RGB; `IndexError` outside the range."""

    def annotation(self, frame: int) -> FrameAnnotation:
        """Read the masks of the frame at an index; `IndexError` outside the range."""


@runtime_checkable
class VideoDataset(Protocol):
    """The interface of datasets of videos; `Dataset` is the one of images.

    A dataset that reads files has `files`, the paths of its frames, and `unsplit`, as `Dataset`.
    It validates on construction what does not need pixels, and the masks of a video when the video
    is first returned.
    """

    name: str
    categories: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Video:
        """Return the video at `index`, always the same; raise `IndexError` outside the range."""


D = TypeVar("D", Dataset, VideoDataset)


@dataclass(frozen=True, kw_only=True)
class DatasetSpec(Generic[D]):
    """Everything that commands and environments need to know about a dataset of images or videos.

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

    @classmethod
    def of(cls, methods: Sequence[str], found: Any, entry_point: str) -> DatasetSpec[D]:
        """Return what an entry point names, if it is a specification, or that of its class.

        Of a class, the parameters tell whether it is procedural (`length`) and reads files
        (`root`, without a default).

        Args:
            methods: names of the methods that the class must have.
            found: what the entry point names.
            entry_point: "module:attribute".

        Raises:
            ValueError: it is neither.
        """
        if isinstance(found, DatasetSpec):
            return replace(found, name=entry_point)
        missing = [name for name in methods if not callable(getattr(found, name, None))]
        if missing or not isinstance(found, type):
            raise ValueError(
                f"{entry_point!r} is no dataset: expected a class with {', '.join(methods)}, or a "
                f"DatasetSpec, got {found!r}."
            )
        takes = inspect.signature(found).parameters
        root = takes.get("root")
        return cls(
            name=entry_point,
            entry_point=entry_point,
            description=(inspect.getdoc(found) or entry_point).splitlines()[0],
            procedural="length" in takes,
            reads_files=root is not None and root.default is root.empty,
        )

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Options of the dataset, by name: the parameters of its factory, without `split`."""
        takes = dict(inspect.signature(load_entry_point(self.entry_point)).parameters)
        takes.pop("split", None)
        return takes

    def make(self, split: str = "train", **options: Any) -> D:
        """Make the dataset; see `sam_gym.data.make_dataset` and `make_video_dataset`."""
        takes = self.parameters
        if "root" in options and "root" not in takes:
            raise ValueError(
                f"Dataset {self.name!r} reads no files. Name one that does, or leave out --data "
                "(data=, root=)."
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
        dataset: D = factory(split=split, **options)
        return dataset
