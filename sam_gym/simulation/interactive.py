"""Simulate interactive segmentation of many objects in one batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sam_gym.backbones.decode import NO_POINT, Prompts
from sam_gym.backbones.features import ImageFeatures
from sam_gym.backbones.service import BackboneService
from sam_gym.metrics.masks import iou
from sam_gym.simulation.clicks import Click, error_click


@dataclass(frozen=True)
class Target:
    """One object to segment.

    Attributes:
        image: uint8 (H, W, 3), RGB.
        mask: bool (H, W).
        ignore: bool (H, W), pixels that do not count, or None.
    """

    image: np.ndarray
    mask: np.ndarray
    ignore: np.ndarray | None = None


@dataclass
class Session:
    """Clicks and IoU of one target.

    Attributes:
        clicks: in order; fewer than `num_clicks` if the mask became perfect.
        ious: IoU after each click, padded with the last one.
        mask: bool (H, W), the mask after the last click.
        seconds: model time per click, divided evenly between the targets of a batch.
    """

    clicks: list[Click]
    ious: list[float]
    mask: np.ndarray
    seconds: float


def click_out(
    backbone: BackboneService,
    targets: Sequence[Target],
    num_clicks: int = 20,
    features: ImageFeatures | None = None,
) -> list[Session]:
    """Simulate a user who segments objects with a SAM, in one batch.

    Each click is the innermost pixel of the widest error region (`error_click`). Each decode takes
    all clicks so far and the previous logits; after the first click, the mask of the highest
    predicted IoU of three is taken.

    Args:
        backbone: the SAM.
        targets: the objects.
        num_clicks: maximum number of clicks.
        features: of each target's image, if they are known already.
    """
    count = len(targets)
    device = backbone.device
    started = time.perf_counter()
    if features is None:
        images = {id(target.image): target.image for target in targets}
        order = {key: row for row, key in enumerate(images)}
        encoded = backbone.encode(list(images.values()))
        features = encoded[[order[id(target.image)] for target in targets]]
    model_seconds = time.perf_counter() - started
    points = np.zeros((count, num_clicks, 2), np.float32)
    labels = np.full((count, num_clicks), NO_POINT, np.int64)
    masks = [np.zeros(target.mask.shape, bool) for target in targets]
    clicked = [np.zeros(target.mask.shape, bool) for target in targets]
    clicks: list[list[Click]] = [[] for _ in targets]
    ious: list[list[float]] = [[] for _ in targets]
    logits: torch.Tensor | None = None

    for step in range(num_clicks):
        for i, target in enumerate(targets):
            click = error_click(target.mask, masks[i], clicked[i], target.ignore)
            if click is None:
                continue
            clicks[i].append(click)
            clicked[i][click.y, click.x] = True
            points[i, step] = backbone.to_input_frame(
                np.array([click.x, click.y]), target.mask.shape
            )
            labels[i, step] = int(click.positive)
        started = time.perf_counter()
        prompts = Prompts(
            points=torch.from_numpy(points[:, : step + 1]).to(device),
            labels=torch.from_numpy(labels[:, : step + 1]).to(device),
            masks=logits,
        )
        first = torch.full((count,), step == 0, device=device)
        logits, _ = backbone.decode_best(features, prompts, first)
        full = [
            (backbone.masks_at(row, target.mask.shape) > 0).cpu().numpy()
            for row, target in zip(logits, targets, strict=True)
        ]
        model_seconds += time.perf_counter() - started
        for i, target in enumerate(targets):
            if labels[i, step] != NO_POINT:
                masks[i] = full[i]
            ious[i].append(iou(masks[i], target.mask, target.ignore))
    seconds = model_seconds / (count * num_clicks)
    return [Session(*parts, seconds) for parts in zip(clicks, ious, masks, strict=True)]
