"""The second phase: semantic heads, trained on the training split of the dataset."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from adaptation.options import TrainConfig
from adaptation.results import folder_name
from adaptation.strategies.semantic import Semantic
from adaptation.trainer import Trainer
from benchmarks.options import BackboneOptions
from benchmarks.semantic.zero_shot import PromptedImage
from sam_gym.backbones import Backbone
from sam_gym.backbones.loading import read_adapter
from sam_gym.data import Dataset
from sam_gym.data.base import class_names
from sam_gym.data.options import DatasetOptions
from sam_gym.data.streams import dataset_stream
from sam_gym.mask_generation.generator import MaskGenerator
from sam_gym.mask_generation.voting import voted_labels
from sam_gym.metrics.semantic import (
    SemanticMetric,
    boundary_overlaps,
    class_iou,
    confusion,
    mean_score,
)

HeadName = Literal["seed", "pyramid"]
#: Bootstrap samples of a gain.
_SAMPLES = 1000


@dataclass(frozen=True)
class TrainedHead:
    """A head that is measured.

    Attributes:
        name: in tables and files.
        segment: images uint8 (H, W, 3) -> label maps uint8 (H, W).
        parameters: number of weights of the head.
        seconds: of its training, encoding and evaluation included; None if it was trained before.
    """

    name: str
    segment: Callable[[Sequence[np.ndarray]], list[np.ndarray]]
    parameters: int
    seconds: float | None


@dataclass
class HeadResult:
    """Scores of a head on the images of a run.

    Attributes:
        head: the head.
        metric: of all images.
        keep: whether to keep the scores of each image, for `gain`.
        images: confusion matrix of each image, int64 (C, C + 1).
        boundaries: `boundary_overlaps` of each image, int64 (2, C); empty if not measured.
        seconds_per_image: of segmentation and measurement.
    """

    head: TrainedHead
    metric: SemanticMetric
    keep: bool = False
    images: list[np.ndarray] = field(default_factory=list)
    boundaries: list[np.ndarray] = field(default_factory=list)
    seconds_per_image: float = 0.0

    def update(self, labels: np.ndarray, truth: np.ndarray) -> None:
        """Add an image."""
        self.metric.update(labels, truth)
        count = len(self.metric.classes)
        if self.keep:
            self.images.append(confusion(labels, truth, count))
            if self.metric.boundary_iou is not None:
                self.boundaries.append(boundary_overlaps(labels, truth, count))


def gain(one: HeadResult, other: HeadResult, seed: int) -> dict[str, list[float]]:
    """Compute by how much a head is better than another on the same images.

    Returns:
        `mean_iou`, and `mean_boundary_iou` if it was measured: the difference, and the bounds of
        its 95% interval by 1,000 bootstrap samples of images.
    """
    found = {"mean_iou": gain_of_counts(one.images, other.images, seed)}
    if one.boundaries:
        found["mean_boundary_iou"] = _bootstrap(
            one.boundaries,
            other.boundaries,
            lambda own: mean_score(np.where(own[1] > 0, own[0] / np.maximum(own[1], 1), np.nan)),
            seed,
        )
    return found


def gain_of_counts(
    one: Sequence[np.ndarray] | np.ndarray, other: Sequence[np.ndarray] | np.ndarray, seed: int
) -> list[float]:
    """Compute the gain in mean IoU over a dataset, as `gain` does.

    Args:
        one, other: confusion matrix of each image, int64 (C, C + 1).
        seed: of the bootstrap.
    """
    return _bootstrap(one, other, lambda own: mean_score(class_iou(own)), seed)


def _bootstrap(
    one: Sequence[np.ndarray] | np.ndarray,
    other: Sequence[np.ndarray] | np.ndarray,
    mean: Callable[[np.ndarray], float],
    seed: int,
) -> list[float]:
    """Return a difference of means of summed counts of images, and the bounds of its interval."""
    count = len(one)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), _SAMPLES)
    weights = np.concatenate([np.ones((1, count), np.int64), weights])
    scores = []
    for counts in (one, other):
        sums = np.tensordot(weights, np.stack(list(counts)), axes=1)
        scores.append(np.array([mean(own) for own in sums]))
    difference = scores[0] - scores[1]
    return [float(difference[0]), *np.quantile(difference[1:], (0.025, 0.975)).tolist()]


def load_head(
    backbone: Backbone, path: Path, name: str, dataset: Dataset
) -> tuple[TrainedHead, Backbone]:
    """Load a semantic head for the classes of a dataset, and the SAM with it.

    Args:
        backbone: the SAM.
        path: of the adapter.
        name: of the result.
        dataset: that is measured.

    Raises:
        ValueError, FileNotFoundError: the file is unreadable, has no semantic head, or one for
            other classes or another SAM.
    """
    adapter = read_adapter(path)
    if tuple(adapter.semantic_classes) != class_names(dataset):
        known = ", ".join(adapter.semantic_classes) or "none, for it has no semantic head"
        raise ValueError(
            f"{path}: its classes are not those of {dataset.name} (its own: {known}). Pass the "
            "adapter of a head that was trained on this dataset (--method semantic)."
        )
    adapted = backbone.with_model(backbone.adapted_model(adapter, str(path)))
    weights = sum(value.numel() for value in adapter.semantic.values())
    return TrainedHead(name, adapted.segment, weights, None), adapted


def with_votes(head: TrainedHead, backbone: Backbone) -> TrainedHead:
    """Return a head whose probabilities are voted within the masks of everything mode.

    Args:
        head: the head.
        backbone: the SAM with it.
    """
    generator = MaskGenerator(backbone)

    def segment(images: Sequence[np.ndarray]) -> list[np.ndarray]:
        masks = generator.stream(images)
        return list(map(voted_labels, backbone.pixel_logits(images), masks))

    return replace(head, name=f"{head.name}_masks", segment=segment)


def train_head(
    name: str,
    data: DatasetOptions,
    sam: BackboneOptions,
    train: TrainConfig,
    options: Semantic.Options,
    out: Path,
) -> tuple[Path, float]:
    """Train a head on the training split of a dataset.

    Args:
        name: of its folder.
        data: the dataset.
        sam: the SAM.
        train: settings of the training.
        options: the head and its options.
        out: folder of the benchmark.

    Returns:
        Path of its adapter, and the seconds that it took.
    """
    stream = dataset_stream(data.dataset, data.data, **data.options_of(data.dataset))
    started = time.perf_counter()
    trainer = Trainer(train, sam.arguments, out / "heads" / name)
    trainer.fit(stream, "semantic", method_options=options, overwrite=True)
    folder = out / "heads" / name / folder_name("semantic", "head", train.seed)
    return folder / "adapter.safetensors", time.perf_counter() - started


def segment(
    head: TrainedHead, read: Callable[[int], PromptedImage], indices: Sequence[int], batch_size: int
) -> Iterator[tuple[PromptedImage, np.ndarray]]:
    """Yield images and their label maps by a head, in the order of their indices.

    Args:
        head: the head.
        read: index -> image.
        indices: of the images.
        batch_size: images that are read at once.
    """
    for first in range(0, len(indices), batch_size):
        batch = [read(index) for index in indices[first : first + batch_size]]
        labels = head.segment([own.image for own in batch])
        yield from zip(batch, labels, strict=True)
