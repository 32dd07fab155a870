"""`micro`, the bundled SAM: 384 x 384 input, 16 x 16 x 128 embedding, 96 x 96 masks.

An EfficientNet-Lite0 (Tan and Le 2019; ImageNet weights) computes features at strides 4 to 32. A
small ViT with global attention mixes them on the grid of the embedding, at stride 24. Fine features
reach the embedding through a pixel-unshuffle, directly and through a feature pyramid. The prompt
encoder, mask decoder and transformer blocks are segment_anything's modules; the decoder upscales by
3 and 2 instead of 2 and 2, so that a mask has the resolution of the finest features.
"""

from __future__ import annotations

from typing import Any

import torch
from segment_anything.modeling import Sam
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.image_encoder import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sam_gym.backbones.cpu import infers_on_cpu
from sam_gym.backbones.encoders import assemble

#: Pixels per cell of the embedding, and the factors from there to a low-res mask.
STRIDE, UPSCALING = 24, (3, 2)
#: Images that go through the trunk together on a CPU.
PIECE = 2
#: Channels of the trunk at strides 4, 8, 16 and 32.
WIDTHS = (24, 40, 112, 320)
#: Channels kept of each pixel at strides 4 and 8; they are folded into the cells of the embedding.
QUARTER, EIGHTH = 6, 24
#: Channels of the fine features.
FINE = QUARTER * 6**2 + EIGHTH * 3**2


def build_trunk() -> Any:
    """EfficientNet-Lite0 without classifier, with normalisations: features at strides 4 to 32."""
    from timm import create_model

    return create_model("tf_efficientnet_lite0", features_only=True, out_indices=(1, 2, 3, 4))


def fold_norms(trunk: Any) -> Any:
    """Fold the normalisations of a trunk into its convolutions, in place.

    A convolution takes over its activation, too. Names of weights stay.
    """
    trunk.eval()
    for block in [trunk, *(block for stage in trunk.blocks for block in stage)]:
        convs = [name for name, own in block.named_children() if isinstance(own, nn.Conv2d)]
        norms = [name for name, own in block.named_children() if isinstance(own, nn.BatchNorm2d)]
        for conv, norm in zip(convs, norms, strict=True):
            own: Any = getattr(block, norm)
            folded = fuse_conv_bn_eval(getattr(block, conv), own)
            setattr(block, conv, FusedConv(folded, own.act))
            setattr(block, norm, nn.Identity())
    for stage in trunk.blocks:
        for block in stage:
            if getattr(block, "conv_pw", None) is not None and max(block.conv_dw.stride) > 1:
                _pad_early(block)
    return trunk


def _border(conv: nn.Conv2d) -> tuple[int, int]:
    """Rows and columns that timm pads before and after, for even sizes.

    Like TensorFlow, it pads more at the right and bottom.
    """
    total = conv.kernel_size[0] - conv.stride[0]
    return total // 2, total - total // 2


def _pad_early(block: Any) -> None:
    """Let a strided block pad its input instead of the expanded one, six times as large.

    Padding the expanded one costs as much as a convolution.
    """
    block.conv_pw.border = border = _border(block.conv_dw)
    block.bn1 = _ZeroBorder(*border)
    block.conv_dw.border = (0, 0)


class FusedConv(nn.Conv2d):
    """A convolution and its activation, in one call of oneDNN where no gradient is needed.

    On a CPU, an activation of its own reads and writes as much as the convolution.

    Args:
        conv: the convolution, whose weights it takes over; it may pad as timm's `Conv2dSame`.
        act: the activation: ReLU, ReLU6 or the identity.

    Attributes:
        border: rows and columns of zeros before and after the input.
    """

    def __init__(self, conv: nn.Conv2d, act: nn.Module) -> None:
        own: Any = conv
        super().__init__(
            *(own.in_channels, own.out_channels, own.kernel_size, own.stride, own.padding),
            groups=conv.groups,
            device="meta",
        )
        self.weight, self.bias, self.act = conv.weight, conv.bias, act
        # timm's own padding depends on the size; here all are even.
        self.border = _border(conv) if type(conv) is not nn.Conv2d else (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        if max(self.border):
            x = F.pad(x, 2 * self.border)
        if not _can_fuse(x, self.weight):
            return self.act(super().forward(x))
        name, limits = _FUSED_ACTIVATIONS[type(self.act)]
        return torch.ops.mkldnn._convolution_pointwise(
            *(x, self.weight, self.bias, self.padding, self.stride, self.dilation),
            *(self.groups, name, limits, ""),
        )


#: Activation -> its name and limits in oneDNN's calls.
_FUSED_ACTIVATIONS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.Identity: ("none", []),
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
}
#: Whether this build of torch has the call, which its own compiler makes.
_HAS_FUSED = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_convolution_pointwise"
)


def _can_fuse(x: Tensor, weight: Tensor) -> bool:
    return (
        _HAS_FUSED
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class _ZeroBorder(nn.Module):
    """Zeros in the first and last rows and columns.

    Args:
        before, after: number of rows and columns at the top and left, and at the bottom and right.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        before, after = self.before, self.after
        if torch.is_grad_enabled():
            inner = x[..., before:-after, before:-after]
            return F.pad(inner, (before, after, before, after))
        for axis in (2, 3):
            x.narrow(axis, 0, before).zero_()
            x.narrow(axis, x.shape[axis] - after, after).zero_()
        return x


class _ConvBlock(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


class _Pyramid(nn.Module):
    """A feature pyramid (Lin et al. 2017) to stride 4, folded into the cells of the embedding."""

    def __init__(self, out_chans: int, wide: int = 64, narrow: int = 32) -> None:
        super().__init__()
        quarter, eighth, sixteenth, coarse = WIDTHS
        self.from_coarse = nn.Conv2d(coarse, wide, 1)
        self.from_sixteenth = nn.Conv2d(sixteenth, wide, 1)
        self.from_eighth = nn.Conv2d(eighth, wide, 1)
        self.from_quarter = nn.Conv2d(quarter, narrow, 1)
        self.mix_eighth = _ConvBlock(wide, wide)
        self.down = nn.Conv2d(wide, narrow, 1)
        self.mix_quarter = _ConvBlock(narrow, narrow)
        self.reduce = nn.Conv2d(narrow, 16, 1)
        self.fold = nn.Conv2d(16 * 6**2, out_chans, 1)

    def forward(self, quarter: Tensor, eighth: Tensor, sixteenth: Tensor, coarse: Tensor) -> Tensor:
        x = self.from_sixteenth(sixteenth)
        x = x + _resized(self.from_coarse(coarse), x)
        x = self.from_eighth(eighth) + _resized(F.relu(x), eighth)
        x = self.down(self.mix_eighth(F.relu(x)))
        x = self.from_quarter(quarter) + _resized(x, quarter)
        x = self.reduce(self.mix_quarter(F.relu(x)))
        return self.fold(F.pixel_unshuffle(F.relu(x), 6))


class MicroEncoder(nn.Module):
    """Image encoder of `micro`: float32 (B, 3, S, S) -> (B, out_chans, S / 24, S / 24).

    Args:
        img_size: S, a multiple of 96.
        width: channels of the transformer blocks.
        depth: their number.
        num_heads: their attention heads.
        out_chans: channels of the embedding.

    Raises:
        ValueError: S is no multiple of 96.
    """

    early_channels = FINE

    def __init__(
        self,
        img_size: int = 384,
        width: int = 192,
        depth: int = 3,
        num_heads: int = 6,
        out_chans: int = 128,
    ) -> None:
        super().__init__()
        if img_size % 96:
            raise ValueError(f"img_size must be a multiple of 96, got {img_size}.")
        self.img_size = img_size
        self.trunk = fold_norms(build_trunk())
        _, _, sixteenth, coarse = WIDTHS
        grid = img_size // STRIDE
        self.fine_quarter = nn.Conv2d(WIDTHS[0], QUARTER, 1)
        self.fine_eighth = nn.Conv2d(WIDTHS[1], EIGHTH, 1)
        self.from_sixteenth = nn.Conv2d(sixteenth, width, 1)
        self.from_coarse = nn.Conv2d(coarse, width, 1)
        self.from_fine = nn.Conv2d(FINE, width, 1)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, width))
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio=3.0) for _ in range(depth))
        self.neck = nn.Sequential(
            nn.Conv2d(width + FINE, 256, 1),
            LayerNorm2d(256),
            nn.GELU(),
            nn.Conv2d(256, out_chans, 3, padding=1),
        )
        self.pyramid = _Pyramid(out_chans)
        self.norm = LayerNorm2d(out_chans)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_with_early(x)[0]

    def _trunk_features(self, x: Tensor) -> list[Tensor]:
        """Features of the trunk at strides 4, 8, 16 and 32."""
        if not infers_on_cpu(x):
            return self.trunk(x)
        # The C library keeps the memory of small pieces, and asks the system for that of large ones
        # again each time, which costs as much as the convolutions.
        pieces = [self.trunk(piece) for piece in x.split(PIECE)]
        return [torch.cat(level) for level in zip(*pieces, strict=True)]

    @property
    def stage_shapes(self) -> tuple[tuple[int, int], ...]:
        """Channels and side of the stages."""
        sides = (self.img_size // stride for stride in (4, 8, 16, 32))
        return tuple(zip(WIDTHS, sides, strict=True))

    def forward_with_early(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, S, S) -> embedding (B, C, h, w), fine features (B, `FINE`, h, w)."""
        stages = self._trunk_features(x.contiguous(memory_format=torch.channels_last))
        return self._embed(*stages)

    def forward_with_stages(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pixels (B, 3, S, S) -> embedding (B, C, h, w), features at strides 4, 8, 16 and 32."""
        stages = self._trunk_features(x.contiguous(memory_format=torch.channels_last))
        return self._embed(*stages)[0], stages

    def _embed(
        self, quarter: Tensor, eighth: Tensor, sixteenth: Tensor, coarse: Tensor
    ) -> tuple[Tensor, Tensor]:
        fine = torch.cat(
            [
                F.pixel_unshuffle(self.fine_quarter(quarter), 6),
                F.pixel_unshuffle(self.fine_eighth(eighth), 3),
            ],
            dim=1,
        )
        cells = self.from_fine(fine)
        cells = cells + _resized(self.from_sixteenth(sixteenth), fine)
        cells = cells + _resized(self.from_coarse(coarse), fine)
        cells = cells.permute(0, 2, 3, 1) + self.pos_embed
        for block in self.blocks:
            cells = block(cells)
        embedding = self.neck(torch.cat([cells.permute(0, 3, 1, 2), fine], dim=1))
        return self.norm(embedding + self.pyramid(quarter, eighth, sixteenth, coarse)), fine


def build_micro() -> Sam:
    """`micro` with random weights."""
    return assemble(MicroEncoder(), width=128, mlp_dim=512, stride=STRIDE, upscaling=UPSCALING)
