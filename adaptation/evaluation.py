"""How well a model segments the held-out objects of a domain: by box, or by clicks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from adaptation.features import FeatureBank, Objects
from sam_gym.backbones import Backbone, Prompts
from sam_gym.backbones.adapters.model import Model
from sam_gym.backbones.features import ImageFeatures
from sam_gym.data.streams import Domain
from sam_gym.metrics.masks import boundary, boundary_iou, iou
from sam_gym.simulation.interactive import Target, click_out
from sam_gym.utils.registry import unknown_name
from sam_gym.utils.transfer import to_device

#: Prompt name -> clicks of the standard rule; 0 stands for the ground-truth box.
PROMPTS = {"box": 0, "click": 1, "clicks5": 5}
_CHUNK = 64


@dataclass(frozen=True)
class Scores:
    """What a model comes to on the held-out objects of a domain.

    Attributes:
        iou: float64 (P,), IoU of each object at the size of its image.
        biou: float64 (P,), boundary IoU of each.
        routed: share of the images that the selector sent to the expert of their own domain; None
            where nothing is selected or the domain has no expert.
        masks: bool (H, W) of each object, if they were asked for.
    """

    iou: np.ndarray
    biou: np.ndarray
    routed: float | None = None
    masks: tuple[np.ndarray, ...] = ()


def check_prompt(name: str) -> str:
    """A key of `PROMPTS`; raises `ValueError` for another name."""
    if name not in PROMPTS:
        raise unknown_name("evaluation prompt", name, PROMPTS)
    return name


@torch.no_grad()
def features(model: Model, bank: FeatureBank, domain: Domain, split: str) -> ImageFeatures:
    """A model's features of all held-out images of a domain.

    Args:
        model: as of `Strategy.model`.
        bank: of the stream.
        domain: one of the stream's, or another that the bank can read.
        split: "val" or "test".
    """
    raw = bank.raw(domain, split, model.raw)
    chunks = []
    for rows in torch.arange(len(raw)).split(_CHUNK):
        pixels = partial(bank.pixels, domain, split, rows.numpy())
        chunks.append(model.embed(raw[rows.to(raw.device)], pixels))
    return ImageFeatures.cat(chunks)


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
        model: what `Strategy.model` gave.
        bank: of the stream.
        domain: whose objects.
        prompt: key of `PROMPTS`: "box" (the box of the true mask, the single mask), "click" (one
            click of the standard rule, the best of three masks by predicted IoU), or "clicks5".
        split: "val" or "test".
        keep_masks: return the masks, too.
    """
    objects, backbone = bank.held_out(domain, split), bank.backbone.with_model(model)
    with bank.backbone.autocast():
        images = features(model, bank, domain, split)
    own = None
    if "route" in images and domain.name in bank.stream.names:
        number = bank.stream.names.index(domain.name)
        if number < model.num_experts:
            own = float((images["route"] == number).float().mean())
    clicks = PROMPTS[check_prompt(prompt)]
    ious, boundaries, masks = [], [], []
    for rows in np.array_split(np.arange(len(objects.rows)), -(-len(objects.rows) // _CHUNK)):
        if clicks:
            found = _clicked(backbone, images, objects, rows, clicks)
        else:
            found = _boxed(backbone, images, objects, rows)
        for row, mask in zip(rows, found, strict=True):
            truth, ignore = objects.masks[row], objects.ignore[objects.rows[row]]
            ignore = None if ignore is None else ignore & ~truth
            ious.append(iou(mask, truth, ignore))
            boundaries.append(boundary_iou(mask, truth, ignore))
            if keep_masks:
                masks.append(mask)
    return Scores(np.array(ious), np.array(boundaries), own, tuple(masks))


def _boxed(
    backbone: Backbone, features: ImageFeatures, objects: Objects, rows: np.ndarray
) -> list[np.ndarray]:
    boxes, images = (
        to_device(array[rows], backbone.device) for array in (objects.boxes, objects.rows)
    )
    logits, _ = backbone.decode(features, Prompts(boxes=boxes, rows=images))
    return [
        (backbone.masks_at(own[0], objects.masks[row].shape) > 0).cpu().numpy()
        for own, row in zip(logits, rows, strict=True)
    ]


def _clicked(
    backbone: Backbone, features: ImageFeatures, objects: Objects, rows: np.ndarray, clicks: int
) -> list[np.ndarray]:
    images = objects.rows[rows]
    targets = [
        Target(objects.images[image], objects.masks[row], objects.ignore[image])
        for row, image in zip(rows, images, strict=True)
    ]
    own = features[to_device(images, features.device)]
    return [session.mask for session in click_out(backbone, targets, clicks, own)]


def narrow_share(objects: Objects) -> float:
    """Share of objects whose boundary is all of them, so that boundary IoU is IoU."""
    return float(np.mean([bool((boundary(mask) == mask).all()) for mask in objects.masks]))
