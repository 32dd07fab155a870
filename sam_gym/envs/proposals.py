"""Masks of categories that a semantic head proposes, for episodes to begin with."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sam_gym.backbones import BackboneService
from sam_gym.utils.digest import image_digest

#: Images whose proposals are kept.
_KEPT = 512
#: Bound of the logits, as of the empty mask.
_BOUND = 20.0


class Proposals:
    """The masks of categories by the semantic head of an adapter.

    Args:
        backbone: SAM with a semantic head.
        categories: names, each a class of the head.

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
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    def logits(
        self,
        images: Sequence[np.ndarray],
        digests: Sequence[bytes | None],
        categories: Sequence[int],
    ) -> Tensor:
        """Return mask logits of one category in each image: float32 (S, hm, wm), on the device.

        They are the log-odds of the category's probability, at most 20 in size.

        Args:
            images: uint8 (H, W, 3) each, RGB.
            digests: `image_digest` of each, where it is known.
            categories: index in `categories` of each.
        """
        known = [
            digest or image_digest(image) for image, digest in zip(images, digests, strict=True)
        ]
        masks = [
            self._of(image, digest)[category]
            for image, digest, category in zip(images, known, categories, strict=True)
        ]
        return torch.stack(masks).to(self._backbone.device, torch.float32)

    def _of(self, image: np.ndarray, digest: bytes) -> Tensor:
        """Return the masks of all categories in an image: float16 (categories, hm, wm)."""
        if digest not in self._kept:
            self._kept[digest] = self._propose(image)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(digest)
        return self._kept[digest]

    @torch.no_grad()
    def _propose(self, image: np.ndarray) -> Tensor:
        (logits,) = self._backbone.frame_logits([image])
        others = torch.stack(
            [logits[torch.arange(len(logits)) != row].logsumexp(dim=0) for row in self._rows]
        )
        odds = (logits[self._rows] - others)[None]
        shape = self._backbone.mask_shape
        odds = F.interpolate(odds, shape, mode="bilinear", align_corners=False)[0]
        return odds.clamp(-_BOUND, _BOUND).half().cpu()
