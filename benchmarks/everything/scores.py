"""What masks come to against the objects of an image, and at which thresholds they are kept."""

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

#: Least predicted IoU and least stability, of which the operating point of a model is chosen.
TRUST = tuple(sorted({*(k / 20 for k in range(20)), 0.88, 0.92}))
STABILITY = tuple(sorted({*(k / 10 for k in range(10)), 0.85, 0.95}))
#: What leaves no mask out: operating points are tried on all that a model says.
ALL: dict[str, Any] = {
    "pred_iou_thresh": 0.0,
    "stability_score_thresh": 0.0,
    "box_nms_thresh": 1.0,
}


@dataclass(frozen=True)
class OperatingPoint:
    """Which masks of a model are kept.

    Attributes:
        trust: above which predicted IoU; 0 keeps all.
        stability: from which stability on.
    """

    trust: float
    stability: float


#: Keeps all but duplicates.
EVERYTHING = OperatingPoint(0.0, 0.0)


class Tried(NamedTuple):
    """What an operating point comes to.

    Attributes:
        point: which masks are kept.
        pq: panoptic quality, in [0, 1].
        miou: mean over classes, in [0, 1].
        masks_per_object: how many masks are kept.
    """

    point: OperatingPoint
    pq: float
    miou: float
    masks_per_object: float


def best_of(tried: Sequence[Tried]) -> Tried:
    """The operating point of the best panoptic quality, and of those the one of fewest masks."""
    return max(tried, key=lambda own: (own.pq, -own.masks_per_object))


def best_within(tried: Sequence[Tried], budget: float) -> Tried:
    """The operating point of the best mIoU of those that keep no more masks per object."""
    least = min(own.masks_per_object for own in tried)
    allowed = [own for own in tried if own.masks_per_object <= max(budget, least)]
    return max(allowed, key=lambda own: own.miou)


@dataclass
class Split:
    """Images to measure on, with their objects; a dataset of its own.

    Attributes:
        name: of the dataset that they are of.
        categories: of that dataset.
        samples: the images.
        objects: of each image, as run-length codes.
    """

    name: str
    categories: tuple[str, ...]
    samples: list[Sample]
    objects: list[list[dict[str, Any]]]

    @classmethod
    def of(cls, dataset: Dataset, limit: int, but: Split | None = None) -> Split:
        """The first images of a dataset that show an object, but for those of another split.

        Raises:
            ValueError: there is none.
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
        """As of `Dataset`."""
        return int(rng.integers(len(self))), None

    @cached_property
    def digests(self) -> set[bytes]:
        """Of the images."""
        return {image_digest(sample.image) for sample in self.samples}

    @cached_property
    def classes(self) -> np.ndarray:
        """The category of each object of all images: int64 (N,)."""
        return np.concatenate([sample.categories for sample in self.samples])


@dataclass(frozen=True)
class Candidates:
    """All masks that a model has for the images of a split, and what they share with its objects.

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
        """Of the masks of each image of a split."""
        overlaps = [
            Overlaps.of(own.coco(), objects, sample.ignore)
            for own, objects, sample in zip(masks, split.objects, split.samples, strict=True)
        ]
        return cls(split, list(masks), overlaps)

    def kept(self, point: OperatingPoint) -> list[np.ndarray]:
        """What the generator would keep at an operating point, best first: int64 (K,) an image."""
        if point.stability not in self._stable:
            self._stable[point.stability] = self._without_duplicates(point.stability)
        # A mask is a duplicate of one that is trusted more: a higher trust keeps the first ones.
        trust = point.trust if point.trust > 0 else -np.inf
        stable = zip(self.masks, self._stable[point.stability], strict=True)
        return [index[masks.predicted_iou[index] > trust] for masks, index in stable]

    def _without_duplicates(self, stability: float) -> list[np.ndarray]:
        """The masks of at least a stability that are no duplicates: int64 (K,) an image."""
        usual, kept = GeneratorOptions.box_nms_thresh, []
        for masks in self.masks:
            passed = np.flatnonzero(masks.stability >= stability)
            boxes, scores = masks.boxes[passed], masks.predicted_iou[passed]
            kept.append(passed[without_duplicates(boxes, scores, usual)])
        return kept

    def at(self, point: OperatingPoint) -> Candidates:
        """What is kept at an operating point."""
        kept = self.kept(point)
        return Candidates(
            self.split,
            [own.take(index) for own, index in zip(self.masks, kept, strict=True)],
            [own.take(index) for own, index in zip(self.overlaps, kept, strict=True)],
        )

    def tried(self) -> list[Tried]:
        """What every operating point of `TRUST` x `STABILITY` comes to."""
        every = []
        for point in (OperatingPoint(*values) for values in product(TRUST, STABILITY)):
            kept = self.kept(point)
            overlaps = [own.take(index) for own, index in zip(self.overlaps, kept, strict=True)]
            matches = [match(own) for own in overlaps]
            iou = np.concatenate([own.iou for own in matches])
            miou = mean_over_classes(iou, self.split.classes)
            each = sum(map(len, kept)) / len(iou)
            every.append(Tried(point, panoptic_quality(overlaps, matches), miou, each))
        return every

    def numbers(self) -> dict[str, float]:
        """What these masks come to, in points of 100 where that makes sense."""
        matches = [match(own) for own in self.overlaps]
        iou = np.concatenate([own.iou for own in matches])
        accuracy = np.concatenate([own.accuracy for own in matches])
        categories = self.split.classes
        # Masks of nothing but what is left out of the metrics do not count.
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
            # An object without a mask is not told right.
            numbers["class_accuracy"] = 100 * right / len(iou)
        return numbers

    def recalls(self) -> dict[str, float]:
        """Average recall of these masks, in points of 100."""
        scores = [masks.predicted_iou for masks in self.masks]
        coded = [masks.coco() for masks in self.masks]
        recalls = average_recall(coded, scores, self.split.objects)
        return {"ar100": 100 * recalls[0], "ar1000": 100 * recalls[1]}


def merged(
    candidates: Candidates, embeddings: Sequence[np.ndarray], options: MergeOptions
) -> Candidates:
    """Masks merged and filtered without training.

    Args:
        candidates: what a model keeps.
        embeddings: of each image, as of `without_padding`.
        options: when masks belong together.
    """
    pairs = zip(candidates.masks, embeddings, strict=True)
    whole = [merge_masks(masks, embedding, options) for masks, embedding in pairs]
    return Candidates.of(whole, candidates.split)


def without_padding(backbone: Backbone, image: np.ndarray) -> np.ndarray:
    """The embedding of an image, float32 (C, h, w), where there is image."""
    embedding = backbone.encode([image]).embedding[0].cpu().numpy()
    corner = backbone.to_input_frame(np.array([[image.shape[1], image.shape[0]]]), image.shape[:2])
    side = backbone.image_size / embedding.shape[-1]
    columns, rows = np.maximum(np.ceil(corner[0] / side - 0.01), 1).astype(int)
    return embedding[:, :rows, :columns]
