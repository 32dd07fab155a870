"""`micro-v0`, the first bundled SAM: 256 x 256 input, 16 x 16 x 128 embedding, 64 x 64 masks.

The prompt encoder, mask decoder and transformer blocks are segment_anything's modules. The image
encoder is a convolutional stem, which learns from few images, followed by a small ViT with global
attention. Fine features reach the embedding through a pixel-unshuffle, directly and through a
feature pyramid, so that SAM's decoder works unchanged on one tensor.
"""

from __future__ import annotations

import torch
from segment_anything.modeling import Sam
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.image_encoder import Block
from torch import Tensor, nn
from torch.nn import functional as F

from sam_gym.backbones.encoders import assemble

#: Channels of the fine features: 16 of each quarter-resolution pixel and 48 of each eighth.
FINE = 16 * 16 + 48 * 4


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
    )


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _conv(width, width), _conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


class _Detail(nn.Module):
    """A feature pyramid (Lin et al. 2017) up to quarter resolution, folded into the grid."""

    def __init__(
        self, widths: tuple[int, int, int, int], out_chans: int, wide: int = 64, narrow: int = 48
    ) -> None:
        super().__init__()
        _, quarter, eighth, coarse = widths
        self.from_coarse = nn.Conv2d(coarse, wide, 1)
        self.from_eighth = nn.Conv2d(eighth, wide, 1)
        self.mix_eighth = _conv(wide, wide)
        self.down = nn.Conv2d(wide, narrow, 1)
        self.from_quarter = nn.Conv2d(quarter, narrow, 1)
        self.mix_quarter = _Residual(narrow)
        self.reduce = nn.Conv2d(narrow, 16, 1)
        self.fold = nn.Conv2d(16 * 16, out_chans, 1)
        # Initialised to zero: the branch starts without effect.
        nn.init.zeros_(self.fold.weight)
        nn.init.zeros_(self.fold.bias)  # type: ignore[arg-type]

    def forward(self, quarter: Tensor, eighth: Tensor, coarse: Tensor) -> Tensor:
        x = self.mix_eighth(_doubled(self.from_coarse(coarse)) + self.from_eighth(eighth))
        x = F.relu(_doubled(self.down(F.relu(x))) + self.from_quarter(quarter))
        return self.fold(F.pixel_unshuffle(F.relu(self.reduce(self.mix_quarter(x))), 4))


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear")


class MicroV0Encoder(nn.Module):
    """Image encoder of `micro-v0`: float32 (B, 3, S, S) -> (B, out_chans, S / 16, S / 16)."""

    early_channels = FINE

    def __init__(
        self,
        img_size: int = 256,
        widths: tuple[int, int, int, int] = (24, 40, 80, 160),
        depth: int = 4,
        num_heads: int = 4,
        out_chans: int = 128,
    ) -> None:
        super().__init__()
        self.img_size, self._widths = img_size, widths
        half, quarter, eighth, coarse = widths
        self.stem = nn.Sequential(
            _conv(3, half, 2), nn.ReLU(inplace=True), _conv(half, quarter, 2), nn.ReLU(inplace=True)
        )
        self.quarter = _Residual(quarter)
        self.eighth = nn.Sequential(_conv(quarter, eighth, 2), nn.ReLU(), _Residual(eighth))
        self.coarse = _conv(eighth, coarse, 2)
        grid = img_size // 16
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, coarse))
        self.blocks = nn.ModuleList(Block(coarse, num_heads, mlp_ratio=3.0) for _ in range(depth))
        self.fine_quarter = nn.Conv2d(quarter, 16, 1)
        self.fine_eighth = nn.Conv2d(eighth, 48, 1)
        self.neck = nn.Sequential(
            nn.Conv2d(coarse + FINE, 256, 1),
            LayerNorm2d(256),
            nn.GELU(),
            nn.Conv2d(256, out_chans, 3, padding=1),
        )
        self.detail = _Detail(widths, out_chans)
        self.norm = LayerNorm2d(out_chans)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_with_early(x)[0]

    @property
    def stage_shapes(self) -> tuple[tuple[int, int], ...]:
        """Channels and side of the stages."""
        sides = (self.img_size // stride for stride in (4, 8, 16))
        return tuple(zip(self._widths[1:], sides, strict=True))

    def forward_with_early(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, S, S) -> embedding (B, C, h, w), fine features (B, `FINE`, h, w)."""
        embedding, fine, _ = self._all_features(x)
        return embedding, fine

    def forward_with_stages(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pixels (B, 3, S, S) -> embedding (B, C, h, w), features at strides 4, 8 and 16."""
        embedding, _, stages = self._all_features(x)
        return embedding, stages

    def _all_features(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        x = x.contiguous(memory_format=torch.channels_last)
        quarter = self.quarter(self.stem(x))
        eighth = self.eighth(quarter)
        coarse = self.coarse(eighth).permute(0, 2, 3, 1) + self.pos_embed
        for block in self.blocks:
            coarse = block(coarse)
        coarse = coarse.permute(0, 3, 1, 2)
        fine = torch.cat(
            [
                F.pixel_unshuffle(self.fine_quarter(quarter), 4),
                F.pixel_unshuffle(self.fine_eighth(eighth), 2),
            ],
            dim=1,
        )
        embedding = self.neck(torch.cat([coarse, fine], dim=1))
        embedding = self.norm(embedding + self.detail(quarter, eighth, coarse))
        return embedding, fine, [quarter, eighth, coarse]


def build_micro_v0() -> Sam:
    """`micro-v0` with random weights."""
    return assemble(MicroV0Encoder(), width=128, mlp_dim=512)
