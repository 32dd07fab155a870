"""Training prompts: a box, points inside the object, or a noisy mask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sam_gym.backbones import NO_POINT, Prompts

#: Fraction of each kind of prompt.
FRACTIONS = {"box": 0.4, "points": 0.4, "mask": 0.2}
_MAX_POINTS = 10
#: Standard deviation of the noise on half of the boxes, as a fraction of their side, as in SAM.
_BOX_NOISE = 0.1
#: Logit of a pixel inside a mask prompt.
_CONFIDENCE = 6.0


def training_prompts(
    seeds: np.ndarray, targets: Tensor, boxes: Tensor, rows: Tensor, image_size: int
) -> tuple[Prompts, Tensor]:
    """Draw a prompt for each object: its box, one or more points, or a noisy mask.

    The kinds are those of CoSAM's release. A noisy mask comes with no point, or with one.

    Args:
        seeds: int64 (P,), the seed of each prompt.
        targets: float32 (P, hm, wm), fractions of low-res pixels.
        boxes: float32 (P, 4), in pixels of the frame.
        rows: int64 (P,), the image of each.
        image_size: side of the frame.

    Returns:
        The prompts, and bool (P,), True for ambiguous ones (a single point).
    """
    rngs = [np.random.default_rng(seed) for seed in seeds]
    kinds = np.array([rng.choice(list(FRACTIONS), p=list(FRACTIONS.values())) for rng in rngs])
    points, labels = _points(rngs, targets, image_size, kinds)
    noise = np.stack([rng.normal(0, _BOX_NOISE, 4) * (rng.random() < 0.5) for rng in rngs])
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1).repeat(1, 2)
    moved = (boxes + torch.from_numpy(noise).to(boxes) * sides).unflatten(1, (2, 2))
    moved = torch.cat([moved.amin(dim=1), moved.amax(dim=1)], dim=1).clamp(0, image_size - 1)
    is_mask = torch.from_numpy(kinds == "mask").to(targets.device)
    prompts = Prompts(
        points=torch.from_numpy(points).to(targets.device),
        labels=torch.from_numpy(labels).to(targets.device),
        boxes=moved,
        has_box=torch.from_numpy(kinds == "box").to(targets.device),
        masks=_noisy(rngs, targets),
        has_mask=is_mask,
        rows=rows,
    )
    single = (kinds == "points") & ((labels >= 0).sum(axis=1) == 1)
    return prompts, torch.from_numpy(single).to(targets.device)


def _points(
    rngs: Sequence[np.random.Generator], targets: Tensor, image_size: int, kinds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Points (P, N, 2) inside the objects and their labels (P, N)."""
    host = targets.cpu().numpy()
    points = np.zeros((len(host), _MAX_POINTS, 2), np.float32)
    labels = np.full((len(host), _MAX_POINTS), NO_POINT, np.int64)
    for k, (rng, kind) in enumerate(zip(rngs, kinds, strict=True)):
        wanted = 0
        if kind == "points":
            wanted = 1 if rng.random() < 0.5 else int(rng.integers(2, _MAX_POINTS + 1))
        elif kind == "mask":
            wanted = int(rng.integers(0, 2))
        points[k, :wanted] = points_inside(rng, host[k], wanted, image_size)
        labels[k, :wanted] = 1
    most = max(1, int((labels >= 0).sum(axis=1).max()))
    return points[:, :most], labels[:, :most]


def points_inside(
    rng: np.random.Generator, target: np.ndarray, count: int, image_size: int
) -> np.ndarray:
    """Draw points inside an object: float64 (count, 2), (x, y) in pixels of the frame.

    Args:
        rng: the generator.
        target: float32 (hm, wm), fractions of low-res pixels; if it is empty, points lie anywhere.
        count: number of points.
        image_size: side of the frame.
    """
    width = target.shape[-1]
    cells = rng.choice(np.flatnonzero(target >= min(0.5, target.max())), count)
    where = np.stack([cells % width, cells // width], axis=1)
    return (where + rng.random((count, 2))) * (image_size / width) - 0.5


def _noisy(rngs: Sequence[np.random.Generator], targets: Tensor) -> Tensor:
    """Mask prompts: logits (P, hm, wm) with errors near the outline.

    HQ-SAM's noise: pixels that change when the mask is downsampled and upsampled may flip.
    """
    mask = (targets[:, None] >= 0.5).float()
    small = F.interpolate(mask, scale_factor=0.25 if mask.shape[-1] < 128 else 0.125, mode="area")
    back = F.interpolate(small, mask.shape[-2:], mode="bilinear", align_corners=False)
    unsure = ((mask - back).abs() >= 0.01).float()
    shape = (1, *mask.shape[1:])
    drawn = np.concatenate([rng.standard_normal(shape, np.float32) for rng in rngs])
    noisy = ((mask + torch.from_numpy(drawn).to(mask) * unsure) > 0.5).float()
    return (_CONFIDENCE * (2 * noisy - 1))[:, 0]
