"""Arguments that environments share."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from sam_gym.backbones.embeddings.disk import DEFAULT_BYTES
from sam_gym.backbones.spec import backbone_help
from sam_gym.data import DATASETS, Dataset
from sam_gym.data.augmented import Augmented
from sam_gym.data.options import DatasetOptions
from sam_gym.utils.fields import documented
from sam_gym.utils.settings import Count, Fraction, Natural, Positive, check_settings, whole

Grid = Annotated[int, whole(2, 64)]


@documented
@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """Arguments of all environments, JSON-plain; subclasses add those of a task."""

    split: str = "train"
    """Split of the data: train, val, test."""
    backbone: Annotated[str, tyro.conf.arg(help=backbone_help("SAM to prompt"))] = "micro"
    checkpoint: str | None = None
    """Weights of the backbone (micro is bundled)."""
    device: str = "auto"
    """Device of the backbone: auto, cpu, cuda, mps."""
    dtype: str = "auto"
    """Precision of the backbone: auto, float32, bfloat16, float16."""
    adapter: str | None = None
    """Adapter file for the SAM, as written by adaptation.train."""
    compile: bool = False
    """Compile the backbone: faster steps after a warm-up of a minute or two."""
    obs: Literal["full", "handle"] = "full"
    """Observations with image and embedding, or with a small handle of the embedding."""
    grid: Grid = 16
    """Prompts lie on the centres of grid x grid cells of SAM's square input frame."""
    min_target: Fraction = 0.002
    """Minimum target area, as a fraction of the frame."""
    cache_mib: Natural = 1024
    """Memory for cached samples, in MiB."""
    store_gib: Positive = 1.0
    """Memory for cached embeddings, in GiB."""
    disk: str | None = None
    """Folder for embeddings on disk, kept between runs; "home" for SAM_GYM_HOME/embeddings."""
    disk_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of embeddings on disk."""
    disk_gib: Positive = DEFAULT_BYTES / 2**30
    """Maximum size of the files of this backbone and precision, in GiB; evicts the least recently
    used."""

    def validate(self) -> None:
        """Raise `ValueError` for an impossible value."""
        check_settings(self)
        if self.disk == "":
            raise ValueError("disk is empty: name a folder, or leave it out.")
        process = multiprocessing.current_process()
        # gymnasium's workers have such names; they need not be daemons.
        if self.obs == "handle" and (process.daemon or process.name.startswith("Worker<")):
            raise ValueError(
                "obs='handle' refers to embeddings in this process, so it does not work in the "
                "workers of AsyncVectorEnv or SubprocVecEnv. Use gymnasium.make_vec(..., "
                "vectorization_mode='vector_entry_point'), which is faster, or obs='full'."
            )

    def open_dataset(self) -> Any:
        """Open and validate the data: a `Dataset`, or what the core of the task takes."""
        raise NotImplementedError

    @property
    def held_out_split(self) -> str:
        """Split on which results are reported by default."""
        return "test"

    @property
    def max_episode_steps(self) -> int:
        """Number of steps after which an episode is truncated."""
        raise NotImplementedError


@documented
@dataclass(frozen=True, kw_only=True)
class DatasetConfig(DatasetOptions, EnvConfig):
    """Arguments of an environment over one dataset."""

    augmentations: Count = 1
    """Augmentations per image of the split train: the image itself, then crops, half of them
    flipped. More of them help where there are a few hundred photographs; each is encoded once."""

    def validate(self) -> None:
        super().validate()
        self.options_of(self.dataset)

    def open_dataset(self) -> Dataset:
        """Open the dataset, with its augmentations; raises as `make_dataset` does."""
        dataset = self.make_dataset(self.split)
        if self.augmentations == 1 or self.split != "train":
            return dataset
        return Augmented(dataset, self.augmentations)

    @property
    def held_out_split(self) -> str:
        return DATASETS.get(self.dataset).held_out_split
