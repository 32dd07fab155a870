"""Masks of categories that a semantic head proposes, for episodes to begin with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sam_gym.backbones import BackboneService
from sam_gym.utils.digest import text_digest

#: Bound of the logits, as of the empty mask.
_BOUND = 20.0


class Proposals:
    """The masks of categories by the semantic head of an adapter, a feature for `EmbeddingStore`.

    Args:
        backbone: SAM with a semantic head.
        categories: names, each a class of the head.

    Attributes:
        name: for `EmbeddingStore.register_feature`.

    Raises:
        ValueError: it has no semantic head, or a category is none of its classes.
    """

    def __init__(self, backbone: BackboneService, categories: Sequence[str]) -> None:
        classes = list(backbone.semantic_classes)
        if missing := [name for name in categories if name not in classes]:
            known = ", ".join(classes) or "none, for the SAM has no semantic head"
            raise ValueError(
                f"initial_mask='semantic': the semantic head does not know {', '.join(missing)} "
                f"(its classes: {known}). Pass the adapter of a head that was trained on this "
                "dataset (python -m adaptation.train --method semantic)."
            )
        self._backbone = backbone
        self._rows = [classes.index(name) for name in categories]
        self.name = f"proposals/{text_digest(*categories)}"

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> Tensor:
        """Return the log-odds of each category's probability, at most 20 in size.

        Args:
            images: B arrays uint8 (H, W, 3), RGB.

        Returns:
            Mask logits float16 (B, categories, hm, wm), on the device.
        """
        # One by one, for the memory of a head on tiles; the store repeats an image to fill a batch.
        distinct = {id(image): image for image in images}
        masks = {key: self._propose(image) for key, image in distinct.items()}
        return torch.stack([masks[id(image)] for image in images])

    def _propose(self, image: np.ndarray) -> Tensor:
        (logits,) = self._backbone.frame_logits([image])
        others = torch.stack(
            [logits[torch.arange(len(logits)) != row].logsumexp(dim=0) for row in self._rows]
        )
        odds = (logits[self._rows] - others)[None]
        shape = self._backbone.mask_shape
        odds = F.interpolate(odds, shape, mode="bilinear", align_corners=False)[0]
        return odds.clamp(-_BOUND, _BOUND).half()
