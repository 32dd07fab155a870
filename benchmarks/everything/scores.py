"""Score masks against objects, and choose thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from sam_gym.backbones import Backbone
from sam_gym.data import Dataset, Sample
from sam_gym.mask_generation.generator import GeneratorOptions, without_duplicates
from sam_gym.mask_generation.masks import Masks
from sam_gym.mask_generation.merging import MergeOptions, merge_masks
from sam_gym.metrics.panoptic import (
    Overlaps,
    average_recall,
    encoded,
    match,
    mean_over_classes,
    panoptic_quality,
)
from sam_gym.utils.digest import image_digest

#: Thresholds among which the operating point of a model is chosen.
PREDICTED_IOU = tuple(sorted({*(k / 20 for k in range(20)), 0.88, 0.92}))
STABILITY = tuple(sorted({*(k / 10 for k in range(10)), 0.85, 0.95}))
#: Options that keep all masks.
ALL: dict[str, Any] = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}


@dataclass(frozen=True)
class OperatingPoint:
    """Thresholds of the masks to keep.

    Attributes:
        predicted_iou: minimum predicted IoU (exclusive); 0 keeps all.
        stability: minimum stability.
    """

    predicted_iou: float
    stability: float


#: Keeps all but duplicates.
EVERYTHING = OperatingPoint(0.0, 0.0)


class Tried(NamedTuple):
    """The scores of an operating point.

    Attributes:
        point: the thresholds.
        pq: panoptic quality, in [0, 1].
        miou: mean over classes, in [0, 1].
        masks_per_object: number of masks kept per object.
    """

    point: OperatingPoint
    pq: float
    miou: float
    masks_per_object: float


def best_of(tried: Sequence[Tried]) -> Tried:
    """Return the operating point of the best PQ; of equal ones, that of the fewest masks."""
    return max(tried, key=lambda own: (own.pq, -own.masks_per_object))


def best_within(tried: Sequence[Tried], budget: float) -> Tried:
    """Return the operating point of the best mIoU within a budget of masks per object."""
    least = min(own.masks_per_object for own in tried)
    allowed = [own for own in tried if own.masks_per_object <= max(budget, least)]
    return max(allowed, key=lambda own: own.miou)


@dataclass
class Split:
    """Images to measure on, with their objects, as a dataset.

    Attributes:
        name: of the dataset.
        categories: of the dataset.
        samples: the images.
        objects: of each image, as run-length codes.
    """

    name: str
    categories: tuple[str, ...]
    samples: list[Sample]
    objects: list[list[dict[str, Any]]]

    @classmethod
    def of(cls, dataset: Dataset, limit: int, but: Split | None = None) -> Split:
        """Take the first images with an object, excluding those of another split.

        Raises:
            ValueError: no image is left.
        """
        samples: list[Sample] = []
        others = set() if but is None else but.digests
        for index in range(len(dataset)):
            if len(samples) == limit:
                break
            sample = dataset[index]
            if len(sample.masks) and image_digest(sample.image) not in others:
                samples.append(replace(sample, parts=None))
        if not samples:
            beyond = "" if but is None else " but those of val: lower --val-images, or add more"
            raise ValueError(f"{dataset.name}: no image shows an object{beyond}.")
        objects = [encoded(sample.masks) for sample in samples]
        return cls(dataset.name, tuple(dataset.categories), samples, objects)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def draw(self, rng: np.random.Generator) -> tuple[int, int | None]:
        """Draw an image, as `Dataset.draw`."""
        return int(rng.integers(len(self))), None

    @cached_property
    def digests(self) -> set[bytes]:
        """Digests of the images."""
        return {image_digest(sample.image) for sample in self.samples}

    @cached_property
    def classes(self) -> np.ndarray:
        """Categories of all objects: int64 (N,)."""
        return np.concatenate([sample.categories for sample in self.samples])


@dataclass(frozen=True)
class Candidates:
    """Masks of a model on a split, and their overlaps with the objects.

    Attributes:
        split: the images.
        masks: of each image.
        overlaps: of each image.
    """

    split: Split
    masks: list[Masks]
    overlaps: list[Overlaps]
    _stable: dict[float, list[np.ndarray]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, masks: Sequence[Masks], split: Split) -> Candidates:
        """Compute the overlaps of the masks of each image."""
        overlaps = [
            Overlaps.of(own.coco(), objects, sample.ignore)
            for own, objects, sample in zip(masks, split.objects, split.samples, strict=True)
        ]
        return cls(split, list(masks), overlaps)

    def kept(self, point: OperatingPoint) -> list[np.ndarray]:
        """Return the masks the generator keeps at an operating point: int64 (K,) per image."""
        if point.stability not in self._stable:
            self._stable[point.stability] = self._without_duplicates(point.stability)
        # Duplicates have a lower predicted IoU, so a higher threshold keeps a prefix.
        least = point.predicted_iou if point.predicted_iou > 0 else -np.inf
        stable = zip(self.masks, self._stable[point.stability], strict=True)
        return [index[masks.predicted_iou[index] > least] for masks, index in stable]

    def _without_duplicates(self, stability: float) -> list[np.ndarray]:
        """Return the non-duplicate masks of a minimum stability: int64 (K,) per image."""
        usual, kept = GeneratorOptions.box_nms_thresh, []
        for masks in self.masks:
            passed = np.flatnonzero(masks.stability >= stability)
            boxes, scores = masks.boxes[passed], masks.predicted_iou[passed]
            kept.append(passed[without_duplicates(boxes, scores, usual)])
        return kept

    def at(self, point: OperatingPoint) -> Candidates:
        """Return the masks kept at an operating point."""
        kept = self.kept(point)
        return Candidates(
            self.split,
            [own.take(index) for own, index in zip(self.masks, kept, strict=True)],
            [own.take(index) for own, index in zip(self.overlaps, kept, strict=True)],
        )

    def tried(self) -> list[Tried]:
        """Score all operating points of `PREDICTED_IOU` x `STABILITY`."""
        every = []
        for point in (OperatingPoint(*values) for values in product(PREDICTED_IOU, STABILITY)):
            kept = self.kept(point)
            overlaps = [own.take(index) for own, index in zip(self.overlaps, kept, strict=True)]
            matches = [match(own) for own in overlaps]
            iou = np.concatenate([own.iou for own in matches])
            miou = mean_over_classes(iou, self.split.classes)
            each = sum(map(len, kept)) / len(iou)
            every.append(Tried(point, panoptic_quality(overlaps, matches), miou, each))
        return every

    def numbers(self) -> dict[str, float]:
        """Return the scores of these masks; fractions in %."""
        matches = [match(own) for own in self.overlaps]
        iou = np.concatenate([own.iou for own in matches])
        accuracy = np.concatenate([own.accuracy for own in matches])
        categories = self.split.classes
        # Masks of ignored pixels only do not count.
        count = sum(int((own.masks >= 1).sum()) for own in self.overlaps)
        parts = sum(int(own.is_part.sum()) for own in self.overlaps)
        numbers = {
            "miou": 100 * mean_over_classes(iou, categories),
            "macc": 100 * mean_over_classes(accuracy, categories),
            "pq": 100 * panoptic_quality(self.overlaps, matches),
            "found": 100 * float((iou >= 0.5).mean()),
            "masks_per_object": count / len(iou),
            "part_share": 100 * parts / count if count else 0.0,
        }
        if self.masks[0].names == self.split.categories:
            right = 0
            for masks, own, sample in zip(self.masks, matches, self.split.samples, strict=True):
                hit = own.masks >= 0
                right += int((masks.classes[own.masks[hit]] == sample.categories[hit]).sum())
            # An object without a mask counts as wrong.
            numbers["class_accuracy"] = 100 * right / len(iou)
        return numbers

    def recalls(self) -> dict[str, float]:
        """Return the average recall of these masks, in %."""
        scores = [masks.predicted_iou for masks in self.masks]
        coded = [masks.coco() for masks in self.masks]
        recalls = average_recall(coded, scores, self.split.objects)
        return {"ar100": 100 * recalls[0], "ar1000": 100 * recalls[1]}


def merged(
    candidates: Candidates, embeddings: Sequence[np.ndarray], options: MergeOptions
) -> Candidates:
    """Merge masks without training.

    Args:
        candidates: masks of a model.
        embeddings: of each image, as of `without_padding`.
        options: thresholds of merging.
    """
    pairs = zip(candidates.masks, embeddings, strict=True)
    whole = [merge_masks(masks, embedding, options) for masks, embedding in pairs]
    return Candidates.of(whole, candidates.split)


def without_padding(backbone: Backbone, image: np.ndarray) -> np.ndarray:
    """Return the embedding of an image without its padding, float32 (C, h, w)."""
    embedding = backbone.encode([image]).embedding[0].cpu().numpy()
    corner = backbone.to_input_frame(np.array([[image.shape[1], image.shape[0]]]), image.shape[:2])
    side = backbone.image_size / embedding.shape[-1]
    columns, rows = np.maximum(np.ceil(corner[0] / side - 0.01), 1).astype(int)
    return embedding[:, :rows, :columns]
