"""HQ-SAM: early encoder features and one more mask token sharpen SAM's masks.

Ke et al. 2023, "Segment Anything in High Quality". Module names are those of the published
checkpoints. The part of the HQ features that does not depend on the prompt is computed once per
image, as the feature `hq` of `ImageFeatures`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, Sam
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.mask_decoder import MLP
from torch import Tensor, nn

from sam_gym.backbones.encoders import assemble, upscaling_of
from sam_gym.backbones.features import FeatureSpec, ImageFeatures, TensorSpec
from sam_gym.backbones.sam2 import VideoSam

#: Modules of an HQ decoder beyond SAM's, as the published checkpoints name them.
_HEAD = ("hf_token", "hf_mlp", "compress_vit_feat", "embedding_encoder", "embedding_maskfeature")


def in_head(name: str) -> bool:
    """Whether a weight of an HQ-SAM belongs to its HQ head."""
    return name.startswith(tuple(f"mask_decoder.{part}." for part in _HEAD))


class HqMaskDecoder(MaskDecoder):
    """SAM's mask decoder with the HQ output token and its features.

    Args:
        vit_dim: channels of the early features.
        vit_rank: channels that a small head reduces them to first (None: no reduction).
        upscaling: factors of the low-res masks.
        **kwargs: as of `MaskDecoder`.
    """

    def __init__(
        self,
        *,
        vit_dim: int,
        vit_rank: int | None = None,
        upscaling: tuple[int, int] = (2, 2),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        first, second = upscaling
        width = self.transformer_dim
        quarter, eighth = width // 4, width // 8
        self.hf_token = nn.Embedding(1, width)
        self.hf_mlp = MLP(width, width, eighth, 3)
        reduce = [] if vit_rank is None else [nn.Conv2d(vit_dim, vit_rank, 1)]
        self.compress_vit_feat = nn.Sequential(
            *reduce,
            nn.ConvTranspose2d(vit_rank or vit_dim, width, first, first),
            LayerNorm2d(width),
            nn.GELU(),
            nn.ConvTranspose2d(width, eighth, second, second),
        )
        self.embedding_encoder = nn.Sequential(
            nn.ConvTranspose2d(width, quarter, first, first),
            LayerNorm2d(quarter),
            nn.GELU(),
            nn.ConvTranspose2d(quarter, eighth, second, second),
        )
        self.embedding_maskfeature = nn.Sequential(
            nn.Conv2d(eighth, quarter, 3, padding=1),
            LayerNorm2d(quarter),
            nn.GELU(),
            nn.Conv2d(quarter, eighth, 3, padding=1),
        )

    def image_features(self, embedding: Tensor, early: Tensor) -> Tensor:
        """The prompt-independent HQ features of images: (B, C / 8, kh, kw); k is 4 in SAM."""
        return self.embedding_encoder(embedding) + self.compress_vit_feat(early)

    def refinement(self, token: Tensor, upscaled: Tensor, image_features: Tensor) -> Tensor:
        """The residual that is added to the logits of every mask: (P, kh, kw).

        Args:
            token: (P, C), the HQ token after the transformer.
            upscaled: (P, C / 8, kh, kw), SAM's own mask features.
            image_features: (P, C / 8, kh, kw), of `image_features`.
        """
        features = self.embedding_maskfeature(upscaled) + image_features
        return torch.einsum("pc,pchw->phw", self.hf_mlp(token), features)


def encode_with_early(encoder: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Encode prepared pixels (B, 3, S, S): embedding (B, C, h, w), early features (B, D, h, w).

    A ViT's early features are those after its first block of global attention. Other encoders
    define `forward_with_early` and `early_channels`.

    Raises:
        ValueError: the encoder has no early features.
    """
    early_channels(encoder)
    if not isinstance(encoder, ImageEncoderViT):
        return encoder.forward_with_early(pixels)
    x: Tensor = encoder.patch_embed(pixels)
    if encoder.pos_embed is not None:
        x = x + encoder.pos_embed
    early = None
    for block in encoder.blocks:
        x = block(x)
        if early is None and block.window_size == 0:
            early = x
    assert early is not None, "an HQ encoder needs a block of global attention"
    return encoder.neck(x.permute(0, 3, 1, 2)), early.permute(0, 3, 1, 2)


def early_channels(encoder: Any) -> int:
    """Channels of an encoder's early features.

    Raises:
        ValueError: the encoder has none.
    """
    if isinstance(encoder, ImageEncoderViT):
        return encoder.patch_embed.proj.out_channels
    if not hasattr(encoder, "early_channels"):
        raise ValueError(
            "tune='hq' and 'hq_small' need early features of the encoder; "
            f"{type(encoder).__name__} has none. Take micro or a ViT SAM, or another tune target."
        )
    return int(encoder.early_channels)


def encode_pixels(sam: Sam, pixels: Tensor) -> ImageFeatures:
    """Encode prepared pixels (B, 3, S, S) to the features of `feature_spec`."""
    if isinstance(sam, VideoSam):
        return sam.encode_pixels(pixels)
    if not isinstance(sam.mask_decoder, HqMaskDecoder):
        return ImageFeatures({"embedding": sam.image_encoder(pixels)})
    return with_hq_features(sam, early_features(sam.image_encoder, pixels))


def early_features(encoder: Any, pixels: Tensor) -> ImageFeatures:
    """Encode prepared pixels: `embedding` and `early`, from which `with_hq_features` starts."""
    embedding, early = encode_with_early(encoder, pixels)
    return ImageFeatures({"embedding": embedding, "early": early})


def with_hq_features(sam: Sam, features: ImageFeatures) -> ImageFeatures:
    """Replace `early` by the `hq` features that an HQ decoder takes; differentiable."""
    decoder = sam.mask_decoder
    assert isinstance(decoder, HqMaskDecoder)
    embedding = features.embedding
    return ImageFeatures(
        {"embedding": embedding, "hq": decoder.image_features(embedding, features["early"])}
    )


def feature_spec(sam: Sam) -> FeatureSpec:
    """Shapes and dtypes of `encode_pixels`, in float32."""
    if isinstance(sam, VideoSam):
        return sam.feature_spec
    width, grid = sam.prompt_encoder.embed_dim, sam.prompt_encoder.image_embedding_size
    tensors = {"embedding": TensorSpec((width, *grid))}
    if isinstance(sam.mask_decoder, HqMaskDecoder):
        scale = math.prod(upscaling_of(sam.mask_decoder))
        tensors["hq"] = TensorSpec((width // 8, scale * grid[0], scale * grid[1]))
    return FeatureSpec(tensors)


def build_hq(embed_dim: int, depth: int, num_heads: int, global_blocks: tuple[int, ...]) -> Sam:
    """An HQ-SAM over a ViT with random weights."""
    encoder = ImageEncoderViT(
        depth=depth,
        embed_dim=embed_dim,
        num_heads=num_heads,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        global_attn_indexes=global_blocks,
        window_size=14,
    )
    return assemble(encoder, decoder=partial(HqMaskDecoder, vit_dim=embed_dim))


build_hq_vit_b = partial(build_hq, 768, 12, 12, (2, 5, 8, 11))
build_hq_vit_l = partial(build_hq, 1024, 24, 16, (5, 11, 17, 23))
build_hq_vit_h = partial(build_hq, 1280, 32, 16, (7, 15, 23, 31))
