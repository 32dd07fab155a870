"""Clicks and boxes on an object, and SAM's mask after each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agents.annotation.interactive.project import SavedObject
from sam_gym.backbones import BackboneService, Prompts
from sam_gym.backbones.features import ImageFeatures
from sam_gym.simulation.clicks import error_click
from sam_gym.utils.transfer import to_device

#: Bound on the clicks of one object.
MAX_CLICKS = 200

#: (x0, y0, x1, y1), in pixels of the image.
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Click:
    """A click: (x, y) in pixels of the image, whether positive, whether the agent's."""

    x: float
    y: float
    positive: bool
    by_agent: bool = False


@dataclass(frozen=True)
class Step:
    """A click or a box, and the mask after it.

    Attributes:
        prompt: the click, or the box.
        logits: (hm, wm).
        predicted_iou: SAM's estimate.
    """

    prompt: Click | Box
    logits: Tensor
    predicted_iou: float


@dataclass(frozen=True)
class Correction:
    """A saved object that is being corrected.

    Attributes:
        saved: the object, as it is in the file until the correction is saved.
        logits: (hm, wm), its mask as SAM takes mask prompts.
        clicks: those that have made the mask, or stand for it, see `inner_click`.
        box: that has made the mask, if it is known.
        name: of the objects that a person made before, and goes on with afterwards.
    """

    saved: SavedObject
    logits: Tensor
    clicks: tuple[Click, ...]
    box: Box | None
    name: str


def clicks_of(correction: Correction | None, steps: Sequence[Step]) -> list[Click]:
    """Return all clicks on an object; a box in the steps replaces those before a correction."""
    known = () if correction is None or box_of(None, steps) else correction.clicks
    return [*known, *(step.prompt for step in steps if isinstance(step.prompt, Click))]


def box_of(correction: Correction | None, steps: Sequence[Step]) -> Box | None:
    """Return the last box of an object, or None."""
    boxes = [step.prompt for step in steps if not isinstance(step.prompt, Click)]
    return boxes[-1] if boxes else None if correction is None else correction.box


def inner_click(mask: np.ndarray) -> tuple[Click, ...]:
    """Return a positive click deep inside a mask bool (H, W); none if no pixel is set.

    It stands for the clicks that have made the mask, where these are not known: corrected by one
    further click, masks of `micro` hardly get better with the mask alone as a prompt.
    """
    found = error_click(mask, np.zeros_like(mask))
    return () if found is None else (Click(float(found.x), float(found.y), True),)


def decode(
    backbone: BackboneService,
    features: ImageFeatures,
    size: tuple[int, int],
    clicks: Sequence[Click],
    box: Box | None,
    logits: Tensor | None,
) -> tuple[Tensor, float]:
    """Return SAM's mask logits (hm, wm) and predicted IoU of an object.

    As in the environments, SAM gets all clicks and the mask before; a first click alone chooses
    among three masks.

    Args:
        backbone: the SAM.
        features: of the image.
        size: (H, W) of the image.
        clicks: on the object.
        box: around it, or None.
        logits: of the mask before, or None.
    """

    def in_frame(points: Sequence[Sequence[float]]) -> Tensor:
        frame = backbone.to_input_frame(np.array(points), size)
        return to_device(frame[None], backbone.device)

    labels = np.array([[int(click.positive) for click in clicks]], np.int64)
    prompts = Prompts(
        points=in_frame([(click.x, click.y) for click in clicks]) if clicks else None,
        labels=to_device(labels, backbone.device) if clicks else None,
        boxes=None if box is None else in_frame([box[:2], box[2:]]).reshape(1, 4),
        masks=None if logits is None else logits[None],
    )
    is_first = box is None and logits is None
    first = torch.tensor([is_first], device=backbone.device)
    decoded, predicted = backbone.decode_best(features, prompts, first)
    return decoded[0], float(predicted[0])
