"""Encode a dataset into files: `python -m sam_gym.backbones.embeddings.precompute --help`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sam_gym.backbones.embeddings.disk import DEFAULT_BYTES, DiskStore
from sam_gym.backbones.loading import load_backbone, resolve_device
from sam_gym.backbones.spec import backbone_help
from sam_gym.data import DATASETS, Sample, dataset_help
from sam_gym.data.options import DatasetOptions
from sam_gym.utils.digest import image_digest
from sam_gym.utils.fields import documented
from sam_gym.utils.progress import ThroughputBar
from sam_gym.utils.settings import Count, Positive, check_settings
from sam_gym.utils.text import counted


@documented
@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig(DatasetOptions):
    """Encode all images of a dataset and keep their features on disk.

    Environments with the same backbone, weights and `dtype` read them when `disk=` is the same
    folder and `disk_dtype=` the same precision. Images that are on disk are not encoded again, so
    an interrupted run resumes where it stopped. Several processes share the work if torchrun starts
    them, or if each has its own `--shard`.
    """

    dataset: Annotated[str, tyro.conf.arg(help=dataset_help())] = "coco"
    split: str = "train"
    """Dataset split: train, val, test."""
    limit: Count | None = None
    """Maximum number of images (procedural datasets are endless: their default is 2048)."""
    backbone: Annotated[str, tyro.conf.arg(help=backbone_help("Backbone"))] = "micro"
    checkpoint: str | None = None
    """Weights of the backbone (micro brings its own)."""
    device: str = "auto"
    """Device: auto (CUDA, then MPS, then CPU), cpu, mps, cuda, cuda:N."""
    dtype: str = "auto"
    """Its precision: auto (bfloat16 on CUDA, else float32), float32, bfloat16, float16."""
    folder: str | None = None
    """Root folder of the embeddings (None: SAM_GYM_HOME/embeddings)."""
    disk_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the files; float16 and bfloat16 take half the space."""
    disk_gib: Positive = DEFAULT_BYTES / 2**30
    """Maximum size of the files of this backbone and precision, in GiB."""
    batch_size: Count = 16
    """Images per encoder call."""
    shard: str | None = None
    """Shard of this process, as "0/4" for the first of four (None: torchrun's, else all)."""


def parse_shard(shard: str | None) -> tuple[int, int]:
    """Parse "0/4", or torchrun's environment variables, into (rank, number of shards).

    Raises:
        ValueError: another form, or a rank that is not below the number of shards.
    """
    text = shard or f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}"
    try:
        rank, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise ValueError(f"--shard must look like 0/4, got {text!r}.") from None
    if not 0 <= rank < count:
        raise ValueError(f"--shard {text}: the first number must be from 0 to {count - 1}.")
    return rank, count


@contextmanager
def _naming(sample: Sample) -> Iterator[None]:
    """Put the source of a sample before the message of a `ValueError`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{sample.source}: {error}") from error


def precompute(config: PrecomputeConfig) -> dict[str, int]:
    """Fill the store; returns the numbers of images encoded and found on disk.

    Raises:
        ValueError, FileNotFoundError: an option, an image or the checkpoint is wrong.
        OSError: the embeddings cannot be written.
    """
    check_settings(config)
    rank, shards = parse_shard(config.shard)
    procedural = DATASETS.get(config.dataset).procedural
    length = {"length": config.limit or 2048} if procedural else {}
    dataset = config.make_dataset(config.split, **length)
    device = config.device
    if device == "auto" and "LOCAL_RANK" in os.environ and resolve_device().type == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    backbone = load_backbone(config.backbone, config.checkpoint, device, config.dtype)
    folder = None if config.folder is None else Path(config.folder).expanduser()
    max_bytes = int(config.disk_gib * 2**30)
    disk = DiskStore(backbone, folder, config.disk_dtype, max_bytes)
    total = min(len(dataset), config.limit or len(dataset))
    needed = total * disk.spec.nbytes
    if needed > max_bytes:
        raise ValueError(
            f"{total} embeddings take {needed / 2**30:.1f} GiB, but the bound is "
            f"{config.disk_gib:.1f}: the first would be evicted before the last is written. Raise "
            "--disk-gib (environments: disk_gib=), or take --disk-dtype float16."
        )
    numbers = range(rank, total, shards)
    counts = {"encoded": 0, "found": 0}
    waiting: list[tuple[bytes, Sample]] = []

    def check_written() -> None:
        if disk.failure is not None:
            raise OSError(f"{disk.folder}: {disk.failure}. Free some space, or pass --folder.")

    def encode() -> None:
        features = backbone.encode([sample.image for _, sample in waiting]).split(1)
        for (key, sample), own in zip(waiting, features, strict=True):
            with _naming(sample):
                disk.put(key, own)
        check_written()
        counts["encoded"] += len(waiting)
        waiting.clear()

    check_written()
    with ThroughputBar("encoding", len(numbers), disable=rank > 0) as bar:
        for done, number in enumerate(numbers, start=1):
            sample = dataset[number]
            with _naming(sample):
                backbone.check_image(sample.image)
            key = image_digest(sample.image)
            if disk.get(key) is None:
                waiting.append((key, sample))
            else:
                counts["found"] += 1
                bar.skip(1)
            if len(waiting) == config.batch_size:
                encode()
            bar.update(done)
        if waiting:
            encode()
    own = f"process {rank} of {shards}: " if shards > 1 else ""
    print(
        f"{own}{counted(counts['encoded'], 'image')} encoded, {counts['found']} found, "
        f"{disk.damaged} damaged files replaced: {disk.folder}"
    )
    print(f"{own}{bar.summary()}")
    dtype = str(backbone.dtype).removeprefix("torch.")
    print(
        f"Environments read them with disk={config.folder or 'home'!r}, dtype={dtype!r}, "
        f"disk_dtype={config.disk_dtype!r}, disk_gib={config.disk_gib:g}."
    )
    return counts


if __name__ == "__main__":
    from sam_gym.utils import cli

    cli.run(
        lambda: precompute(
            cli.parse(PrecomputeConfig, "python -m sam_gym.backbones.embeddings.precompute")
        ),
        "Run the same command again to resume.",
    )
