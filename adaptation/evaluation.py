"""Evaluate a model on the held-out objects of a domain: by box, or by clicks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from adaptation.features import FeatureBank, Objects
from sam_gym.backbones import Backbone, Prompts
from sam_gym.backbones.adapters.model import Model
from sam_gym.backbones.features import ImageFeatures
from sam_gym.data.base import class_names
from sam_gym.data.streams import Domain
from sam_gym.metrics.masks import boundary, boundary_iou, iou
from sam_gym.metrics.semantic import SemanticMetric
from sam_gym.simulation.interactive import Target, click_out
from sam_gym.utils.registry import unknown_name
from sam_gym.utils.transfer import to_device

#: Prompt name -> clicks of the standard rule; 0: the ground-truth box.
PROMPTS = {"box": 0, "click": 1, "clicks5": 5}
_CHUNK = 64
#: Images whose pixels are classified together.
_LABELLED = 8


@dataclass(frozen=True)
class Scores:
    """Scores of a model on the held-out objects of a domain.

    Attributes:
        iou: float64 (P,), IoU of each object, or class, at the size of its image.
        biou: float64 (P,), boundary IoU of each.
        routed: fraction of the images routed to the expert of their own domain; None without a
            router, or if the domain has no expert.
        masks: bool (H, W) of each object, if requested.
    """

    iou: np.ndarray
    biou: np.ndarray
    routed: float | None = None
    masks: tuple[np.ndarray, ...] = ()


def check_prompt(name: str) -> str:
    """Return a key of `PROMPTS`; raise `ValueError` for another name."""
    if name not in PROMPTS:
        raise unknown_name("evaluation prompt", name, PROMPTS)
    return name


@torch.no_grad()
def score(
    model: Model,
    bank: FeatureBank,
    domain: Domain,
    prompt: str = "box",
    split: str = "test",
    keep_masks: bool = False,
) -> Scores:
    """Segment every held-out object of a domain and compare with the truth, at image size.

    Args:
        model: as `Strategy.model` builds it.
        bank: the bank of the stream.
        domain: one of the stream's, or another that the bank can read.
        prompt: key of `PROMPTS`: "box" (the box of the true mask, the single mask), "click" (one
            click of the standard rule, the best of three masks by predicted IoU), or "clicks5".
        split: "val" or "test".
        keep_masks: return the masks, too.
    """
    objects, backbone = bank.held_out(domain, split), bank.backbone.with_model(model)
    segment = partial(_clicked, clicks=PROMPTS[check_prompt(prompt)]) if prompt != "box" else _boxed
    images = _Features(model, bank, domain, split)
    ious, boundaries, masks = [], [], []
    for rows in np.array_split(np.arange(len(objects.rows)), -(-len(objects.rows) // _CHUNK)):
        features, first = images.of(objects.rows[rows])
        found = segment(backbone, features, objects, rows, objects.rows[rows] - first)
        for row, mask in zip(rows, found, strict=True):
            truth, ignore = objects.masks[row], objects.ignore[objects.rows[row]]
            ignore = None if ignore is None else ignore & ~truth
            ious.append(iou(mask, truth, ignore))
            boundaries.append(boundary_iou(mask, truth, ignore))
            if keep_masks:
                masks.append(mask)
    return Scores(np.array(ious), np.array(boundaries), images.well_routed(), tuple(masks))


@torch.no_grad()
def score_labels(model: Model, bank: FeatureBank, domain: Domain, split: str) -> Scores:
    """Classify the pixels of the held-out images of a domain, and compare with their label maps.

    Args:
        model: with a semantic head.
        bank: the bank of the stream.
        domain: one of the stream's, or another that the bank can read.
        split: "val" or "test".

    Returns:
        IoU and boundary IoU of each class that is there or was predicted.

    Raises:
        ValueError: the domain has other classes than the head.
    """
    dataset, backbone = domain.split(split), bank.backbone.with_model(model)
    names = class_names(dataset)
    if names != backbone.semantic_classes:
        raise ValueError(
            f"{dataset.name} has the classes {', '.join(names)}; the semantic head knows "
            f"{', '.join(backbone.semantic_classes)}. Pass the images of its training, or others "
            "with these classes (--stream, --data)."
        )
    images, metric = bank.labelled(domain, split), SemanticMetric(names)
    assert model.segmenter is not None
    for first in range(0, len(images.images), _LABELLED):
        index = np.arange(first, min(first + _LABELLED, len(images.images)))
        raw = bank.labelled_features(images, model.segmenter.kind, index)
        for k, logits in zip(index.tolist(), backbone.segment_logits(raw), strict=True):
            truth = images.labels[k]
            metric.update(backbone.labels_at(logits, (truth.shape[0], truth.shape[1])), truth)
    ious, boundaries = metric.class_iou, metric.boundary_iou
    assert boundaries is not None
    return Scores(ious[~np.isnan(ious)], boundaries[~np.isnan(boundaries)])


class _Features:
    """A model's features of the held-out images of a domain, a few chunks at a time.

    Args:
        model, bank, domain, split: as of `score`.
    """

    def __init__(self, model: Model, bank: FeatureBank, domain: Domain, split: str) -> None:
        self.model, self.bank, self.domain, self.split = model, bank, domain, split
        self._count = len(bank.held_out(domain, split).images)
        self._chunks: dict[int, ImageFeatures] = {}
        self._routes: dict[int, Tensor] = {}

    def of(self, images: np.ndarray) -> tuple[ImageFeatures, int]:
        """Features of consecutive images that include the given ones, and the first of them.

        Args:
            images: int64 (P,), ascending.
        """
        first, last = int(images[0]) // _CHUNK, int(images[-1]) // _CHUNK
        self._chunks = {k: self._chunk(k) for k in range(first, last + 1)}
        return ImageFeatures.cat(list(self._chunks.values())), first * _CHUNK

    def _chunk(self, number: int) -> ImageFeatures:
        if number in self._chunks:
            return self._chunks[number]
        bank, place = self.bank, (self.domain, self.split)
        rows = np.arange(number * _CHUNK, min((number + 1) * _CHUNK, self._count))
        with bank.backbone.autocast():
            raw = bank.raw(*place, self.model.raw, rows)
            features = self.model.embed(raw, partial(bank.pixels, *place, rows))
        if "route" in features:
            self._routes[number] = features["route"]
        return features

    def well_routed(self) -> float | None:
        """Fraction of images routed to the expert of their domain, once that expert exists."""
        if not self._routes or self.domain.name not in self.bank.stream.names:
            return None
        number = self.bank.stream.names.index(self.domain.name)
        if number >= self.model.num_experts:
            return None
        for chunk in range(-(-self._count // _CHUNK)):  # images without objects count too
            if chunk not in self._routes:
                self._chunk(chunk)
        return float((torch.cat(list(self._routes.values())) == number).float().mean())


def _boxed(
    backbone: Backbone,
    features: ImageFeatures,
    objects: Objects,
    rows: np.ndarray,
    images: np.ndarray,
) -> list[np.ndarray]:
    boxes = to_device(objects.boxes[rows], backbone.device)
    prompts = Prompts(boxes=boxes, rows=to_device(images, backbone.device))
    logits, _ = backbone.decode(features, prompts)
    return [
        (backbone.masks_at(own[0], objects.masks[row].shape) > backbone.mask_threshold)
        .cpu()
        .numpy()
        for own, row in zip(logits, rows, strict=True)
    ]


def _clicked(
    backbone: Backbone,
    features: ImageFeatures,
    objects: Objects,
    rows: np.ndarray,
    images: np.ndarray,
    clicks: int,
) -> list[np.ndarray]:
    targets = [
        Target(objects.images[image], objects.masks[row], objects.ignore[image])
        for row, image in zip(rows, objects.rows[rows], strict=True)
    ]
    own = features[to_device(images, features.device)]
    return [session.mask for session in click_out(backbone, targets, clicks, own)]


def narrow_fraction(objects: Objects) -> float:
    """Fraction of objects that consist of boundary pixels only, so that boundary IoU equals IoU."""
    return float(np.mean([bool((boundary(mask) == mask).all()) for mask in objects.masks]))
