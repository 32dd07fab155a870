"""Heads that classify masks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from sam_gym.utils.registry import Registry

#: Type -> class, as adapter files name it.
CLASS_HEADS: Registry[type[ClassHead]] = Registry("class head")


@CLASS_HEADS.register("mlp")
class ClassHead(nn.Module):
    """Classifies a mask by its mask token (SAOM, arXiv 2403.10780).

    Args:
        channels: of a token.
        classes: names.
    """

    def __init__(self, channels: int, classes: Sequence[str]) -> None:
        super().__init__()
        self.classes = tuple(classes)
        self.layers = nn.Sequential(
            nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, len(self.classes))
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (..., number of classes) of mask tokens (..., C)."""
        return self.layers(tokens)
