"""Split the mask of a category into its instances.

SAM is prompted with single clicks inside the mask; what it finds there is an instance if it lies in
the mask. On scenes with several instances of a category, AP of this is 0.69, that of connected
regions 0.37 (docs/results.md): instances touch, and parts of an occluded one do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch

from sam_gym.backbones import BackboneService, ImageFeatures, Prompts
from sam_gym.simulation.clicks import interior_distance, relative_grid
from sam_gym.utils.lowres import frame_mask, low_res
from sam_gym.utils.transfer import to_device, to_host

#: Columns and rows of the grid of clicks over an image, and the maximum number of clicks.
_GRID, _MAX_CLICKS = 20, 60
#: Minimum predicted IoU of an instance, and the minimum fraction of it that lies in the mask.
_LEAST_IOU, _INSIDE = 0.5, 0.8
#: Minimum area of an instance, as a fraction of the mask.
_LEAST_AREA = 0.03
#: Of two instances that share this fraction of the smaller one, that of lower predicted IoU goes.
_SHARED = 0.5
#: A region of the mask in no instance is one itself from this fraction of a mean instance on.
_REST = 0.15


@dataclass(frozen=True)
class Instance:
    """An instance of a category.

    Attributes:
        mask: bool (H, W); instances of one mask do not overlap.
        score: predicted IoU.
    """

    mask: np.ndarray
    score: float


@torch.no_grad()
def split_instances(
    backbone: BackboneService, features: ImageFeatures, union: np.ndarray, score: float
) -> list[Instance]:
    """Split a mask into instances.

    Args:
        backbone: the SAM.
        features: of the image, from `encode`.
        union: bool (H, W), the mask.
        score: its predicted IoU; a region in which SAM finds no instance gets half of it.

    Returns:
        Instances whose union is in the mask, best first; none if it is empty.
    """
    if not union.any():
        return []
    clicks = _clicks(union)
    frame = backbone.to_input_frame(clicks, union.shape).astype(np.float32)
    prompts = Prompts(
        points=to_device(frame[:, None], backbone.device),
        labels=torch.ones((len(frame), 1), dtype=torch.int64, device=backbone.device),
        rows=torch.zeros(len(frame), dtype=torch.int64, device=backbone.device),
    )
    logits, predicted = backbone.decode(features, prompts, multimask=True)
    logits, ious = logits.flatten(0, 1), predicted.flatten()
    found = []
    taken = np.zeros_like(union)
    for index in _chosen(backbone, logits, ious, union):
        full = backbone.masks_at(logits[index], union.shape) > backbone.mask_threshold
        mask = to_host(full)[0] & union & ~taken
        if mask.any():
            taken |= mask
            found.append(Instance(mask, float(ious[index])))
    mean = np.count_nonzero(union) / (len(found) + 1)
    rest = [
        Instance(region, score / 2)
        for region in _regions(union & ~taken)
        if np.count_nonzero(region) >= _REST * mean
    ]
    return sorted(found + rest, key=lambda own: -own.score)


def _clicks(union: np.ndarray) -> np.ndarray:
    """Return clicks (x, y) inside a mask: float64 (N, 2).

    The innermost pixel of each region, then points of a grid; evenly drawn if they are too many.
    """
    height, width = union.shape
    inner = [divmod(int(interior_distance(own).argmax()), width)[::-1] for own in _regions(union)]
    grid = relative_grid(_GRID, _GRID) * (width, height)
    x, y = grid.astype(int).T
    clicks = np.concatenate([np.array(inner, float).reshape(-1, 2), grid[union[y, x]]])
    few = np.linspace(0, len(clicks) - 1, min(len(clicks), _MAX_CLICKS))
    return clicks[few.round().astype(int)]


def _regions(mask: np.ndarray) -> list[np.ndarray]:
    """Return the connected regions of a mask, bool (H, W) each."""
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    return [labels == number for number in range(1, count)]


def _chosen(
    backbone: BackboneService, logits: torch.Tensor, ious: torch.Tensor, union: np.ndarray
) -> list[int]:
    """Return the indices of the masks (N, hm, wm) that are instances, best first."""
    content, side = backbone.input_size(union.shape), backbone.image_size
    own = low_res(frame_mask(union, content, side), backbone.mask_shape) > 0.5
    low = to_host(logits > backbone.mask_threshold)[0].reshape(len(ious), -1)
    predicted = to_host(ious)[0]
    areas, inside = low.sum(axis=1), (low & own.ravel()).sum(axis=1)
    suits = (predicted > _LEAST_IOU) & (areas > 0) & (inside >= _INSIDE * areas)
    suits &= inside >= _LEAST_AREA * own.sum()
    chosen: list[int] = []
    for index in np.argsort(-predicted, kind="stable"):
        if suits[index] and all(
            np.count_nonzero(low[index] & low[other]) < _SHARED * min(areas[index], areas[other])
            for other in chosen
        ):
            chosen.append(int(index))
    return chosen
