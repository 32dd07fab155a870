"""Vote on the classes of pixels within masks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sam_gym.mask_generation.masks import Masks


@torch.no_grad()
def voted_labels(logits: Tensor, masks: Masks) -> np.ndarray:
    """Give all pixels of a mask one class, that of the highest mean probability in it.

    Smaller masks lie on top of larger ones; pixels in no mask keep their own class.

    Args:
        logits: class logits (number of classes, H, W) of an image, see `Backbone.pixel_logits`.
        masks: of the image, from everything mode.

    Returns:
        Label map uint8 (H, W).
    """
    probabilities = logits.softmax(dim=0).cpu().numpy()
    labels = probabilities.argmax(axis=0).astype(np.uint8)
    for index in np.argsort(-masks.areas, kind="stable"):
        mask = masks.mask(int(index))
        if mask.any():
            labels[mask] = probabilities[:, mask].mean(axis=1).argmax()
    return labels
