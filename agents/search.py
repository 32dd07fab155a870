"""Test-time search of click agents: decode several clicks, and play the one of the best mask.

The candidates are the policy's likeliest clicks and two at the largest errors of the current mask,
as the policy's target map sees them: a module that learned to predict the target in training. It
also judges the masks, by their soft IoU with it. The ground truth is never used.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sam_gym.envs.click import ClickCore
from sam_gym.utils.transfer import to_device


def soft_iou(probability: Tensor, masks: Tensor) -> Tensor:
    """Return the soft IoU of masks and probabilities of the target: (B,).

    Args:
        probability: that a pixel of the map belongs to the target, float (B, h, w).
        masks: covered fraction of each pixel, float (B, h, w).
    """
    common = (probability * masks).sum(dim=(1, 2))
    total = (probability + masks).sum(dim=(1, 2)) - common
    return common / total.clamp(min=1e-6)


def error_clicks(probability: Tensor, masks: Tensor, grid: int) -> Tensor:
    """Return the cells where masks miss most of the target, and cover most of the rest.

    The errors of a cell count with the mean of its neighbourhood, so that clicks fall inside of an
    error, not on its border.

    Args:
        probability: that a pixel of the map belongs to the target, float (B, h, w).
        masks: covered fraction of each pixel, float (B, h, w).
        grid: clicks fall on grid x grid cells.

    Returns:
        A positive and a negative click, int64 (B, 2).
    """
    errors = torch.stack([probability * (1 - masks), masks * (1 - probability)], dim=1)
    cells = F.adaptive_avg_pool2d(errors, grid)
    near = F.avg_pool2d(cells, 3, stride=1, padding=1)
    largest = (cells + near).flatten(2).argmax(dim=2)
    return largest + torch.tensor([0, grid**2], device=errors.device)


@torch.no_grad()
def best_clicks(
    policy: Any, core: ClickCore, observations: dict[str, Tensor], logits: Tensor
) -> np.ndarray:
    """Return the likeliest actions, with clicks replaced by those of the best masks.

    The target map judges masks. Stop and undo are kept, and so are actions of episodes that are
    over.

    Args:
        policy: with a target map; it proposes its `policy.search` likeliest clicks.
        core: the sub-environments.
        observations: of the sub-environments, as the policy takes them.
        logits: of all actions, float (num_envs, A).

    Returns:
        int64 (num_envs,).
    """
    grid = policy.grid
    clicks, actions = 2 * grid**2, logits.argmax(dim=1).cpu().numpy()
    rows = np.intersect1d(core.playing(), np.flatnonzero(actions < clicks))
    if not len(rows):
        return actions
    index = to_device(rows, core.device)
    target = policy.target_map(observations)[index].sigmoid()
    masks = _covered(core, core.current_logits(rows), target)
    likeliest = logits[index, :clicks].topk(min(policy.search, clicks), dim=1).indices
    at_errors = error_clicks(target, masks, grid)
    candidates = torch.cat([likeliest, at_errors], dim=1).cpu().numpy()
    scores = []
    step, columns = core.previews_at_once(len(rows)), candidates.T
    for some in (columns[k : k + step] for k in range(0, len(columns), step)):
        mask_logits, _ = core.preview(np.tile(rows, len(some)), some.ravel())
        masks = _covered(core, mask_logits, target)
        scores.append(soft_iou(target.repeat(len(some), 1, 1), masks).reshape(len(some), -1))
    best = torch.cat(scores).argmax(dim=0).cpu().numpy()
    chosen = actions.copy()
    chosen[rows] = candidates[np.arange(len(rows)), best]
    return chosen


def _covered(core: ClickCore, mask_logits: Tensor, target: Tensor) -> Tensor:
    """Return the fraction of each pixel of a target map (B, h, w) that masks cover: (B, h, w)."""
    masks = (mask_logits > core.backbone.mask_threshold).float()
    return F.adaptive_avg_pool2d(masks[:, None], cast(Any, target.shape[1:]))[:, 0]
