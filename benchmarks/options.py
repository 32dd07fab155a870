"""Options that benchmarks share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import save_file
from segment_anything.modeling import Sam

from adaptation.options import ModelOptions
from sam_gym.backbones import Backbone, load_backbone
from sam_gym.backbones.loading import resolve_device, resolve_dtype
from sam_gym.backbones.spec import BACKBONES
from sam_gym.utils.fields import documented
from sam_gym.utils.settings import Seed


@documented
@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What happens to results that are there already."""

    overwrite: bool = False
    """Replace the results in the output folder. Without --overwrite, finished results are an
    error."""


@documented
@dataclass(frozen=True, kw_only=True)
class BackboneOptions(ModelOptions, OutputOptions):
    """The SAM to measure, and its device."""

    compile: bool = False
    """Use torch.compile; the first calls take a minute or two."""
    seed: Seed = 0
    """Seed of all random choices."""

    def load(self) -> Backbone:
        """Load the backbone."""
        return load_backbone(**self.arguments, compile=self.compile)


@documented
@dataclass(frozen=True, kw_only=True)
class TimedOptions(BackboneOptions):
    """Options of benchmarks that only measure times."""

    random_weights: bool = False
    """Use random weights: times are the same, and no checkpoint is needed."""

    def load(self) -> Backbone:
        if not self.random_weights:
            return super().load()
        device = resolve_device(self.device)
        dtype = resolve_dtype(self.dtype, device)
        return Backbone(self.backbone, self._random_sam(), device, dtype, self.compile)

    @contextmanager
    def as_checkpoint(self) -> Iterator[Self]:
        """Yield the options with random weights, if those are wanted, in a temporary file.

        Environments load their SAM by name and checkpoint.
        """
        if not self.random_weights:
            yield self
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "random.safetensors"
            save_file(self._random_sam().state_dict(), path)
            yield replace(self, checkpoint=str(path), random_weights=False)

    def _random_sam(self) -> Sam:
        torch.manual_seed(self.seed)
        return BACKBONES.get(self.backbone).build()


def subset(items: Sequence[Any], count: int | None, seed: int) -> list[Any]:
    """Sample `count` items by the seed, in their order; None: all."""
    if count is None or count >= len(items):
        return list(items)
    chosen = np.random.default_rng(seed).choice(len(items), count, replace=False)
    return [items[i] for i in np.sort(chosen).tolist()]
