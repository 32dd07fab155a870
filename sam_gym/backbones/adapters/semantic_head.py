"""Heads that classify pixels by the features of a frozen image encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_gym.backbones.features import FeatureSpec, ImageFeatures
from sam_gym.backbones.timm_features import split_kind
from sam_gym.utils.registry import Registry, check_choice

#: Type -> class, as adapter files name it.
SEMANTIC_HEADS: Registry[type[SemanticHead]] = Registry("semantic head")


class SemanticHead(nn.Module):
    """Base class of heads that classify pixels.

    Args:
        kind: of `raw_features` that it takes, one of `kinds`, of the SAM or a model of timm.
        spec: shapes of these features.
        classes: names.

    Raises:
        ValueError: the head does not take this kind of features.
    """

    #: Name in `SEMANTIC_HEADS`.
    name: ClassVar[str]
    #: Kinds of features that the head takes.
    kinds: ClassVar[tuple[str, ...]]

    def __init__(self, kind: str, spec: FeatureSpec, classes: Sequence[str]) -> None:
        super().__init__()
        check_choice(f"kind of features of the head {self.name!r}", split_kind(kind)[0], self.kinds)
        self.kind, self.classes = kind, tuple(classes)

    def forward(self, features: ImageFeatures) -> Tensor:
        """Logits (B, number of classes, h, w) of the whole input frame, of any resolution."""
        raise NotImplementedError


@SEMANTIC_HEADS.register("seed")
class SeedHead(SemanticHead):
    """Two convolutions on the embedding, with the weights' names of SAM-Cityscapes' head.

    `SegmentationHead` of github.com/erik-p04/SAM-Cityscapes-Project.
    """

    name = "seed"
    kinds = ("embedding",)
    _width = 256

    def __init__(self, kind: str, spec: FeatureSpec, classes: Sequence[str]) -> None:
        super().__init__(kind, spec, classes)
        channels = spec.tensors["embedding"].shape[0]
        self.net = nn.Sequential(
            nn.Conv2d(channels, self._width, 3, padding=1),
            nn.BatchNorm2d(self._width),
            nn.ReLU(inplace=True),
            nn.Conv2d(self._width, self._width, 3, padding=1),
            nn.BatchNorm2d(self._width),
            nn.ReLU(inplace=True),
            nn.Conv2d(self._width, len(self.classes), 1),
        )

    def forward(self, features: ImageFeatures) -> Tensor:
        return self.net(features.embedding)


@SEMANTIC_HEADS.register("pyramid")
class PyramidHead(SemanticHead):
    """A feature pyramid (Lin et al. 2017) over features of all resolutions, finest last."""

    name = "pyramid"
    kinds = ("stages", "tiles")
    #: Channels of levels up to three and six times the side of the embedding, and of finer ones.
    _widths = (128, 64, 32)

    def __init__(self, kind: str, spec: FeatureSpec, classes: Sequence[str]) -> None:
        super().__init__(kind, spec, classes)
        sides = sorted({own.shape[-1] for own in spec.tensors.values()})
        #: Names of the features of each level.
        self._levels = [
            [name for name, own in spec.tensors.items() if own.shape[-1] == side] for side in sides
        ]
        side = spec.tensors["embedding"].shape[-1]
        widths = [self._widths[(own > 3 * side) + (own > 6 * side)] for own in sides]
        self.lateral, self.down, self.mix = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        before = 0
        for names, width in zip(self._levels, widths, strict=True):
            channels = sum(spec.tensors[name].shape[0] for name in names)
            self.lateral.append(_normalised(nn.Conv2d(channels, width, 1, bias=False)))
            changes = before not in (0, width)
            self.down.append(nn.Conv2d(before, width, 1) if changes else nn.Identity())
            self.mix.append(_normalised(nn.Conv2d(width, width, 3, padding=1, bias=False)))
            before = width
        self.classify = nn.Conv2d(before, len(self.classes), 1)

    def forward(self, features: ImageFeatures) -> Tensor:
        x: Tensor | None = None
        levels = zip(self._levels, self.lateral, self.down, self.mix, strict=True)
        for names, lateral, down, mix in levels:
            own = lateral(torch.cat([features[name].float() for name in names], dim=1))
            if x is not None:
                size = own.shape[-2:]
                own = own + F.interpolate(down(x), size, mode="bilinear", align_corners=False)
            x = F.relu(mix(F.relu(own)))
        assert x is not None
        return self.classify(x)


def _normalised(convolution: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels))
