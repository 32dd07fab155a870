"""SAM 2.1 as a model of images: Hiera with a feature pyramid, and a decoder of finer features.

Ravi et al. 2024, "SAM 2: Segment Anything in Images and Videos". The numbers are those of the
authors' `SAM2ImagePredictor`. The trunk is timm's. Modules have segment_anything's names, so that
tune targets and adapters find them; `split_state` translates the names of published checkpoints
and sets the weights of the video memory aside.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from segment_anything.modeling import MaskDecoder, Sam
from segment_anything.modeling.mask_decoder import MLP
from torch import Tensor, nn
from torch.nn import functional as F

from sam_gym.backbones.cpu import infers_on_cpu
from sam_gym.backbones.encoders import State, assemble
from sam_gym.backbones.features import FeatureSpec, ImageFeatures, TensorSpec

#: Beginnings of the names, in published checkpoints, of weights that only the video memory uses.
MEMORY_PREFIXES = (
    "memory_attention.",
    "memory_encoder.",
    "maskmem_tpos_enc",
    "no_mem_pos_enc",
    "no_obj_embed_spatial",
    "no_obj_ptr",
    "obj_ptr_proj.",
    "obj_ptr_tpos_proj.",
    "mask_downsample.",
)
#: (pattern, replacement) from the authors' names to ours.
_NAMES = (
    (r"^sam_(prompt_encoder|mask_decoder)\.", r"\1."),
    (r"^(image_encoder\.trunk\.blocks\.\d+\.mlp)\.layers\.0\.", r"\1.fc1."),
    (r"^(image_encoder\.trunk\.blocks\.\d+\.mlp)\.layers\.1\.", r"\1.fc2."),
    (r"^(mask_decoder\.transformer\.layers\.\d+\.mlp)\.layers\.0\.", r"\1.lin1."),
    (r"^(mask_decoder\.transformer\.layers\.\d+\.mlp)\.layers\.1\.", r"\1.lin2."),
)


class Sam2Neck(nn.Module):
    """Brings the stages of the trunk to one width; the embedding also sees the coarsest stage.

    Args:
        widths: channels of the stages, from stride 4 to stride 32.
        out_chans: channels of the result.
    """

    def __init__(self, widths: Sequence[int], out_chans: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Sequential(OrderedDict(conv=nn.Conv2d(width, out_chans, 1)))
            for width in reversed(widths)
        )

    def forward(
        self, stages: Sequence[Tensor], further: Sequence[nn.Conv2d] = ()
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Stages (B, D, S / s, S / s) of the strides s 4, 8, 16, 32 -> (B, C, ...) of 4, 8, 16.

        Args:
            stages: of the trunk.
            further: 1x1 convolutions of the results of strides 4 and 8, or nothing. The wide maps
                between are never computed.
        """
        convs = [conv[0] for conv in reversed(cast(Any, self.convs))]
        quarter = pointwise(stages[0], convs[0], *further[:1])
        eighth = pointwise(stages[1], convs[1], *further[1:])
        embedding, coarsest = pointwise(stages[2], convs[2]), pointwise(stages[3], convs[3])
        coarsest = F.interpolate(coarsest.float(), scale_factor=2.0, mode="nearest")
        return quarter, eighth, embedding + coarsest


def pointwise(x: Tensor, *convs: nn.Conv2d) -> Tensor:
    """Apply 1x1 convolutions, one after another, as one linear map: (B, D, h, w) -> (B, C, h, w).

    The result is channels-last in memory, and nothing is copied if `x` is.
    """
    weight, bias = convs[0].weight.flatten(1), cast(Tensor, convs[0].bias)
    for conv in convs[1:]:
        last = conv.weight.flatten(1)
        weight, bias = last @ weight, F.linear(bias, last, conv.bias)
    return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


class PyramidEncoder(nn.Module):
    """Image encoder of a SAM 2: float32 (B, 3, S, S) -> (B, out_chans, S / 16, S / 16).

    Args:
        trunk: a model of timm with `feature_info` and `forward_intermediates`, whose stages have
            the strides 4, 8, 16 and 32.
        img_size: S, a multiple of 32.
        out_chans: channels of the embedding.
    """

    def __init__(self, trunk: Any, img_size: int = 1024, out_chans: int = 256) -> None:
        super().__init__()
        self.img_size, self.trunk = img_size, trunk
        self.neck = Sam2Neck([own["num_chs"] for own in trunk.feature_info], out_chans)

    def pyramid(
        self, pixels: Tensor, further: Sequence[nn.Conv2d] = ()
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (B, 3, S, S) -> (B, C, S / s, S / s) for the strides 4, 8 and 16.

        `further` is what `Sam2Neck` applies to the results of strides 4 and 8.
        """
        return self.neck(self._stages(pixels), further)

    def _stages(self, pixels: Tensor) -> Sequence[Tensor]:
        """Pixels (B, 3, S, S) -> (B, D, S / s, S / s) for the strides s 4, 8, 16 and 32."""
        # `stop_early` would build a module in every call.
        return self.trunk.forward_intermediates(pixels, intermediates_only=True, stop_early=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.pyramid(pixels)[2]


class Sam2Encoder(PyramidEncoder):
    """Image encoder of SAM 2, a Hiera.

    Args:
        img_size: side of the input frame, a multiple of 32.
        out_chans: channels of the embedding.
        **trunk: arguments of timm's `HieraDet`.
    """

    def __init__(self, img_size: int = 1024, out_chans: int = 256, **trunk: Any) -> None:
        from timm.models.hieradet_sam2 import HieraDet

        hiera: Any = HieraDet(num_classes=0, **trunk)
        hiera.head = nn.Identity()
        super().__init__(hiera, img_size, out_chans)

    def _stages(self, pixels: Tensor) -> Sequence[Tensor]:
        if not infers_on_cpu(pixels):
            return super()._stages(pixels)
        from sam_gym.backbones.hiera import hiera_stages

        return hiera_stages(self.trunk, pixels)

    @property
    def blocks(self) -> nn.Sequential:
        """The transformer blocks; channels double and sides halve where a stage begins."""
        return self.trunk.blocks


class ScoringMaskDecoder(MaskDecoder):
    """SAM's mask decoder with a score of the object's presence.

    Attributes:
        stability: (delta, least): the single mask gives way to the best of three if the number of
            pixels above delta is less than this fraction of those above -delta. None: never.
    """

    stability: tuple[float, float] | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        width = self.transformer_dim
        self.obj_score_token = nn.Embedding(1, width)
        self.pred_obj_score_head = MLP(width, width, 1, 3)


class Sam2MaskDecoder(ScoringMaskDecoder):
    """SAM 2's mask decoder, which also has finer image features."""

    stability = (0.05, 0.98)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        width = self.transformer_dim
        self.conv_s0 = nn.Conv2d(width, width // 8, 1)
        self.conv_s1 = nn.Conv2d(width, width // 4, 1)
        self.iou_prediction_head.sigmoid_output = True


class VideoSam(Sam):
    """A SAM for images whose embeddings a video memory can condition.

    Its mask decoder is a `ScoringMaskDecoder`.

    Attributes:
        no_mem_embed: (1, 1, C), added to the embedding of a frame without memories, hence of every
            image.
        mask_limit: bound on the absolute value of mask prompts. SAM 2's predictor bounds the logits
            that it returns as the next prompt.
        squashes: whether images are stretched to the square frame; otherwise they are padded.
    """

    image_encoder: Any
    mask_limit = 32.0
    squashes = False

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.no_mem_embed = nn.Parameter(torch.zeros(1, 1, self.prompt_encoder.embed_dim))
        nn.init.trunc_normal_(self.no_mem_embed, std=0.02)

    @property
    def feature_spec(self) -> FeatureSpec:
        """Shapes and dtypes of `encode_pixels`, in float32."""
        grid = self.prompt_encoder.image_embedding_size
        return FeatureSpec({"embedding": TensorSpec((self.prompt_encoder.embed_dim, *grid))})

    def encode_frames(self, pixels: Tensor) -> ImageFeatures:
        """Encode prepared pixels (B, 3, S, S) without `no_mem_embed`, as frames with memories."""
        return ImageFeatures({"embedding": self.image_encoder(pixels)})

    def without_memory(self, features: ImageFeatures) -> ImageFeatures:
        """Features of frames as those of frames that no memory conditions."""
        return features.merge(embedding=features.embedding + self.no_mem_embed.reshape(1, -1, 1, 1))

    def encode_pixels(self, pixels: Tensor) -> ImageFeatures:
        """Encode prepared pixels (B, 3, S, S) as single images."""
        return self.without_memory(self.encode_frames(pixels))


class Sam2(VideoSam):
    """The part of SAM 2 that segments images: encoder, prompt encoder and mask decoder."""

    squashes = True

    @property
    def feature_spec(self) -> FeatureSpec:
        width, (h, w) = self.prompt_encoder.embed_dim, self.prompt_encoder.image_embedding_size
        return FeatureSpec(
            {
                "embedding": TensorSpec((width, h, w)),
                "high_res_s1": TensorSpec((width // 4, 2 * h, 2 * w)),
                "high_res_s0": TensorSpec((width // 8, 4 * h, 4 * w)),
            }
        )

    def encode_frames(self, pixels: Tensor) -> ImageFeatures:
        decoder: Any = self.mask_decoder
        further = decoder.conv_s0, decoder.conv_s1
        quarter, eighth, embedding = self.image_encoder.pyramid(pixels, further)
        return ImageFeatures(
            {
                "embedding": embedding,
                "high_res_s1": eighth,
                "high_res_s0": quarter,
            }
        )


def split_state(state: State) -> tuple[State, State]:
    """Split the state dict of a published checkpoint.

    Args:
        state: `checkpoint["model"]` of a SAM 2 or 2.1.

    Returns:
        The weights of `Sam2`, under its names, and those of the video memory
        (`MEMORY_PREFIXES`), under the authors' names. Unknown names are among the first, where
        strict loading refuses them.
    """
    image, memory = {}, {}
    for name, value in state.items():
        if name.startswith(MEMORY_PREFIXES):
            memory[name] = value
            continue
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        image[name] = value
    return image, memory


def sam2_state(state: State) -> State:
    """Convert the state dict of a published checkpoint to one of `Sam2`."""
    return split_state(state)[0]


def memory_state(state: State) -> State:
    """Take the weights of the video memory out of the state dict of a published checkpoint."""
    return split_state(state)[1]


def assemble_sam2(
    encoder: PyramidEncoder, width: int = 256, mlp_dim: int = 2048, num_heads: int = 8
) -> Sam2:
    """Combine an image encoder with SAM 2's decoder; arguments as of `assemble`."""
    sam = assemble(encoder, width, mlp_dim, num_heads, Sam2MaskDecoder)
    return Sam2(sam.image_encoder, sam.prompt_encoder, sam.mask_decoder)


def build_sam2(**trunk: Any) -> Sam2:
    """Build a SAM 2.1 with random weights; arguments of timm's `HieraDet`."""
    return assemble_sam2(Sam2Encoder(**trunk))


build_sam2_tiny = partial(build_sam2, stages=(1, 2, 7, 2), global_att_blocks=(5, 7, 9))
build_sam2_small = partial(build_sam2, stages=(1, 2, 11, 2), global_att_blocks=(7, 10, 13))
build_sam2_base_plus = partial(build_sam2, embed_dim=112, num_heads=2, global_pos_size=(14, 14))
build_sam2_large = partial(
    build_sam2,
    embed_dim=144,
    num_heads=2,
    stages=(2, 6, 36, 4),
    global_att_blocks=(23, 33, 43),
    window_spec=(8, 4, 16, 8),
)
