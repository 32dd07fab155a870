"""Losses of masks: cross-entropy and Dice on low-res logits, and predicted IoU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sam_gym.backbones.decode import MaskTokens
from sam_gym.metrics.masks import batch_iou


@dataclass(frozen=True)
class MaskLoss:
    """The loss of a batch, and its masks.

    Attributes:
        total: mean over the objects of mask loss and IoU loss.
        logits: (P, hm, wm), of the mask token that is trained.
        chosen: int64 (P,), index of that token.
        ious: float32 (P,), IoU of that mask with the target.
    """

    total: Tensor
    logits: Tensor
    chosen: Tensor
    ious: Tensor


def mask_costs(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy and Dice of each mask: (P, M).

    Args:
        logits: (P, M, hm, wm).
        targets: in [0, 1], (P, hm, wm).
        valid: 1 where a pixel counts, else 0, (P, hm, wm).
    """
    target, weight = targets[:, None].expand_as(logits), valid[:, None]
    count = weight.sum(dim=(2, 3)).clamp(min=1)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * weight
    return entropy.sum(dim=(2, 3)) / count + dice_costs(logits, target, weight)


def dice_costs(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """Dice loss over the last two axes of logits, targets and valid pixels, (..., hm, wm)."""
    probability = logits.sigmoid() * valid
    overlap = (probability * targets).sum(dim=(-2, -1))
    sizes = probability.sum(dim=(-2, -1)) + (targets * valid).sum(dim=(-2, -1))
    return 1 - (2 * overlap + 1) / (sizes + 1)


def mask_loss(tokens: MaskTokens, targets: Tensor, valid: Tensor, ambiguous: Tensor) -> MaskLoss:
    """Compute the loss of decoded prompts.

    An ambiguous prompt trains the best of its three masks, as in SAM's own training; every other
    prompt trains the single mask. The predicted IoU of these masks is trained, too.

    Args:
        tokens: P decoded prompts.
        targets: float32 (P, hm, wm), in [0, 1].
        valid: float32 (P, hm, wm), 1 where a pixel counts.
        ambiguous: bool (P,).
    """
    logits = tokens.decode_masks().float()
    costs = mask_costs(logits, targets, valid)
    allowed = torch.arange(logits.shape[1], device=logits.device)[None] > 0
    allowed = allowed == ambiguous[:, None]
    chosen = costs.masked_fill(~allowed, torch.inf).argmin(dim=1)
    rows = torch.arange(len(chosen), device=chosen.device)
    ious = low_res_iou(logits.detach(), targets[:, None], valid[:, None])
    off = (tokens.iou.float() - ious).square() * allowed
    iou_loss = off.sum(dim=1) / allowed.sum(dim=1)
    total = (costs[rows, chosen] + iou_loss).mean()
    return MaskLoss(total, logits[rows, chosen], chosen, ious[rows, chosen])


def whole_object_loss(tokens: MaskTokens, targets: Tensor, valid: Tensor) -> MaskLoss:
    """Compute the loss of prompts for whole objects (SAOM, arXiv 2403.10780).

    Focal and Dice loss train the mask of the highest predicted IoU, which everything mode selects;
    the focal loss weighs object and background alike. The predicted IoU of all three masks is
    trained, since it selects. A prompt on no object trains it towards 0, and no mask.

    Args:
        tokens: P decoded prompts.
        targets: float32 (P, hm, wm), in [0, 1].
        valid: float32 (P, hm, wm), 1 where a pixel counts.
    """
    from torchvision.ops import sigmoid_focal_loss

    logits = tokens.decode_masks(tokens.mask_embeddings[:, 1:]).float()
    best = tokens.iou[:, 1:].argmax(dim=1)
    rows = torch.arange(len(best), device=best.device)
    chosen = logits[rows, best]
    count = valid.sum(dim=(1, 2)).clamp(min=1)
    focal = (sigmoid_focal_loss(chosen, targets, alpha=-1.0) * valid).sum(dim=(1, 2)) / count
    ious = low_res_iou(logits.detach(), targets[:, None], valid[:, None])
    iou_loss = (tokens.iou[:, 1:].float() - ious).square().mean(dim=1)
    there = targets.amax(dim=(1, 2)) > 0
    # The weights of SAM's training.
    costs = (20.0 * focal + dice_costs(chosen, targets, valid)) * there
    total = costs.sum() / there.sum().clamp(min=1) + iou_loss.mean()
    return MaskLoss(total, chosen, 1 + best, ious[rows, best])


def low_res_iou(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """IoU over the last two axes of masks and of targets of at least 0.5."""
    return batch_iou(logits > 0, targets >= 0.5, valid > 0)
