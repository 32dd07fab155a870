"""Options that choose a dataset, for environments and commands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import tyro

from sam_gym.data import (
    DATASETS,
    VIDEO_DATASETS,
    Dataset,
    VideoDataset,
    dataset_help,
    video_dataset_help,
)
from sam_gym.data.io import OnError
from sam_gym.utils.fields import documented
from sam_gym.utils.registry import Registry


@documented
@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """Options of reading, whatever names the dataset."""

    registry: ClassVar[Registry[Any]] = DATASETS

    dataset_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Further options of the dataset or stream, as pairs of names and values (in Python, a dict):
    --dataset-kwargs kind night length 2048."""
    on_error: OnError = "raise"
    """Stop at the first invalid record or file of the dataset, or skip and count them."""

    def options_of(self, dataset: str) -> dict[str, Any]:
        """Return the options of a dataset, by name, without `root`.

        Raises:
            ValueError: `dataset_kwargs` holds what has an option of its own, or the name is
                unknown.
        """
        for name, own in (("split", "split"), ("root", "data")):
            if name in self.dataset_kwargs:
                raise ValueError(
                    f"dataset_kwargs may not hold {name!r}: use {own}= instead (--{own})."
                )
        skip = self.on_error != "raise" and not self.registry.get(dataset).procedural
        return ({"on_error": self.on_error} if skip else {}) | self.dataset_kwargs


@documented
@dataclass(frozen=True, kw_only=True)
class DatasetOptions(ReadingOptions):
    """Options that choose a dataset."""

    dataset: Annotated[str, tyro.conf.arg(help=dataset_help())] = "scenes"
    data: str | None = None
    """Root folder of a dataset that reads files."""

    def make_dataset(self, split: str, **options: Any) -> Dataset:
        """Make the dataset.

        Args:
            split: "train", "val" or "test".
            **options: further options of the dataset; `dataset_kwargs` wins.

        Raises:
            ValueError, FileNotFoundError: as `sam_gym.data.make_dataset`.
        """
        root = {} if self.data is None else {"root": self.data}
        own = self.options_of(self.dataset)
        return DATASETS.get(self.dataset).make(split, **root | options | own)


@documented
@dataclass(frozen=True, kw_only=True)
class VideoDatasetOptions(ReadingOptions):
    """Options that choose a dataset of videos."""

    registry = VIDEO_DATASETS

    dataset: Annotated[str, tyro.conf.arg(help=video_dataset_help())] = "clips"
    data: str | None = None
    """Root folder of a dataset that reads files."""

    def make_dataset(self, split: str, **options: Any) -> VideoDataset:
        """Make the dataset; arguments as for `DatasetOptions.make_dataset`.

        Raises:
            ValueError, FileNotFoundError: as `sam_gym.data.make_video_dataset`.
        """
        root = {} if self.data is None else {"root": self.data}
        own = self.options_of(self.dataset)
        return VIDEO_DATASETS.get(self.dataset).make(split, **root | options | own)
