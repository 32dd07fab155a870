"""Segment images from one point per class or instance, without training."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.semantic.points import POINTS, PointName
from sam_gym.backbones import Backbone
from sam_gym.backbones.prompts import Prompts
from sam_gym.data import Dataset, Sample
from sam_gym.data.base import IGNORED, class_names
from sam_gym.metrics.masks import iou
from sam_gym.utils.transfer import to_device

Per = Literal["class", "instance"]

#: Prompts per decoder call, and masks that are enlarged at once.
_PROMPTS, _MASKS = 128, 16


@dataclass(frozen=True)
class Prompt:
    """A point and what it asks for.

    Attributes:
        category: index of the class.
        mask: bool (H, W), the ground truth.
        point: (x, y) in pixels.
        bound: IoU of the class's largest object with `mask`, which one point on one object can
            reach; None if no object is known.
    """

    category: int
    mask: np.ndarray
    point: tuple[int, int]
    bound: float | None


class PromptedImage(NamedTuple):
    """An image to segment.

    Attributes:
        number: its index in the dataset.
        name: its name in tables: that of its file, if it has one.
        image: uint8 (H, W, 3), RGB.
        truth: uint8 (H, W), its label map.
        prompts: at least one.
    """

    number: int
    name: str
    image: np.ndarray
    truth: np.ndarray
    prompts: list[Prompt]


@dataclass(frozen=True)
class Outcome:
    """The result of an image.

    Attributes:
        ious: IoU of each prompt's mask with its ground truth; all pixels count, as in the
            SAM-Cityscapes code.
        labels: uint8 (H, W), the label map: of several masks at a pixel, that with the highest
            logit; pixels in no mask are background, or `IGNORED` if there is no such class.
        overlaps: int64 (2, C), intersection and union of each class's masks with its ground truth,
            over pixels that count, where masks of several classes may overlap.
    """

    ious: list[float]
    labels: np.ndarray
    overlaps: np.ndarray


@dataclass(frozen=True)
class PromptResult:
    """A prompt and its score: class, (x, y), IoU, bound (see `Prompt`), whether on the border."""

    category: int
    point: tuple[int, int]
    iou: float
    bound: float | None
    on_border: bool

    @classmethod
    def of(cls, prompt: Prompt, iou: float) -> PromptResult:
        (x, y), (height, width) = prompt.point, prompt.mask.shape
        on_border = x in (0, width - 1) or y in (0, height - 1)
        return cls(prompt.category, prompt.point, iou, prompt.bound, on_border)


@dataclass(frozen=True)
class ImageResult:
    """Index and name of an image, its prompts, and the mean IoU of its label map (maybe nan)."""

    index: int
    name: str
    prompts: list[PromptResult]
    score: float


def find_prompts(
    sample: Sample, truth: np.ndarray, categories: int, point: PointName, per: Per, seed: int
) -> list[Prompt]:
    """Return the prompts of an image.

    Args:
        sample: the image.
        truth: uint8 (H, W), its label map.
        categories: number of classes that are prompted for: the first ones.
        point: where points are placed.
        per: one point per class, or per instance.
        seed: seed of random points.
    """
    if per == "instance":
        wanted = list(zip(sample.categories.tolist(), sample.masks, strict=True))
    else:
        present = np.unique(truth)
        wanted = [(int(c), truth == c) for c in present[present < categories]]
    rng = np.random.default_rng([seed, *sample.source.encode(errors="backslashreplace")])
    prompts = []
    for category, mask in wanted:
        own = sample.masks[sample.categories == category]
        bound = max((iou(other, mask) for other in own), default=None) if per == "class" else 1.0
        prompts.append(Prompt(category, mask, POINTS[point](mask, rng), bound))
    return prompts


def decode_points(
    backbone: Backbone, images: Sequence[np.ndarray], points: Sequence[Sequence[tuple[int, int]]]
) -> list[Tensor]:
    """Return the best of three masks, by predicted IoU, for each point of a batch of images.

    Args:
        backbone: the SAM.
        images: uint8 (H, W, 3) each, RGB.
        points: (x, y) of the points of each image, at least one, in pixels.

    Returns:
        Low-res logits (P, hm, wm) of each image.
    """
    features, device = backbone.encode(images), backbone.device
    counts = [len(own) for own in points]
    rows = torch.repeat_interleave(torch.arange(len(images)), torch.tensor(counts)).to(device)
    placed = [
        backbone.to_input_frame(np.array(own).reshape(-1, 1, 2), image.shape[:2])
        for image, own in zip(images, points, strict=True)
    ]
    frame = to_device(np.concatenate(placed), device)
    parts = []
    for first in range(0, len(frame), _PROMPTS):
        part = slice(first, first + _PROMPTS)
        own = frame[part]
        labels = torch.ones(own.shape[:2], dtype=torch.int64, device=device)
        ambiguous = torch.ones(len(own), dtype=torch.bool, device=device)
        prompts = Prompts(points=own, labels=labels, rows=rows[part])
        parts.append(backbone.decode_best(features, prompts, ambiguous)[0])
    return list(torch.cat(parts).split(counts))


def full_size(backbone: Backbone, logits: Tensor, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield low-res logits (P, hm, wm) at (height, width) of an image: float32 (H, W) each."""
    for part in logits.split(_MASKS):
        yield from backbone.masks_at(part, size).cpu().numpy()


def segment_batch(
    backbone: Backbone, batch: Sequence[PromptedImage], num_classes: int, background: int
) -> list[Outcome]:
    """Segment a batch of images from their prompts.

    Args:
        backbone: the SAM.
        batch: the images.
        num_classes: number of classes of label maps.
        background: label of pixels in no mask.
    """
    points = [[prompt.point for prompt in own.prompts] for own in batch]
    decoded = decode_points(backbone, [own.image for own in batch], points)
    outcomes = []
    for logits, (_, _, _, truth, prompts) in zip(decoded, batch, strict=True):
        best: np.ndarray = np.full(truth.shape, backbone.mask_threshold, np.float32)
        labels = np.full(truth.shape, background, np.uint8)
        found: dict[int, np.ndarray] = {}
        ious = []
        for prompt, full in zip(prompts, full_size(backbone, logits, truth.shape), strict=True):
            mask = full > backbone.mask_threshold
            ious.append(iou(mask, prompt.mask))
            found[prompt.category] = found.get(prompt.category, False) | mask
            higher = full > best
            best[higher], labels[higher] = full[higher], prompt.category
        overlaps = np.zeros((2, num_classes), np.int64)
        for category in {*found, *np.unique(truth).tolist()} - {IGNORED, background}:
            own = found.get(category, np.zeros(truth.shape, bool)) & (truth != IGNORED)
            other = truth == category
            overlaps[:, category] = np.count_nonzero(own & other), np.count_nonzero(own | other)
        outcomes.append(Outcome(ious, labels, overlaps))
    return outcomes


class ZeroShot:
    """Segments the images of a dataset from points in their ground truth.

    Args:
        dataset: the images.
        backbone: the SAM.
        point: where points are placed.
        per: one point per class of an image, or per instance.
        seed: seed of random points.
        batch_size: images per encoder call.

    Attributes:
        classes: names of the classes of label maps; the first ones are prompted for.
    """

    def __init__(
        self,
        dataset: Dataset,
        backbone: Backbone,
        *,
        point: PointName,
        per: Per,
        seed: int,
        batch_size: int,
    ) -> None:
        self.dataset, self.backbone = dataset, backbone
        self.point, self.per, self.seed, self.batch_size = point, per, seed, batch_size
        self.classes = class_names(dataset)
        self._categories = len(dataset.categories)
        # Label of pixels in no mask.
        self._background = self._categories if self._categories < len(self.classes) else IGNORED

    def read(self, index: int) -> PromptedImage:
        """Return an image with its prompts."""
        sample = self.dataset[index]
        truth = sample.label_map(self._categories)
        prompts = find_prompts(sample, truth, self._categories, self.point, self.per, self.seed)
        files: Sequence[str] = getattr(self.dataset, "files", ())
        name = os.path.basename(files[index]) if files else sample.source
        return PromptedImage(index, name, sample.image, truth, prompts)

    def segment(self, indices: Sequence[int]) -> Iterator[tuple[PromptedImage, Outcome]]:
        """Segment images in batches, in the order of their indices."""
        for first in range(0, len(indices), self.batch_size):
            batch = list(map(self.read, indices[first : first + self.batch_size]))
            outcomes = segment_batch(self.backbone, batch, len(self.classes), self._background)
            yield from zip(batch, outcomes, strict=True)
