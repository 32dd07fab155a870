"""HQ-SAM: early features of the encoder, and one more mask token, sharpen SAM's masks.

Ke et al. 2023, "Segment Anything in High Quality". The modules carry the names of the published
checkpoints. What the decoder needs of the early features depends on the image alone, so it is
computed while encoding and travels behind the embedding as more channels of one tensor: stores,
handles and batches need not know of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, Sam
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.mask_decoder import MLP
from torch import Tensor, nn
from torch.nn import functional as F

from sam_gym.backbones.encoders import assemble


class HqImageEncoder(ImageEncoderViT):
    """SAM's ViT, which also tells what its first block of global attention saw."""

    def forward_with_early(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, S, S) -> embedding (B, C, h, w), early features (B, D, h, w)."""
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        early = None
        for block in self.blocks:
            x = block(x)
            if early is None and block.window_size == 0:
                early = x
        assert early is not None, "an HQ encoder needs a block of global attention"
        return self.neck(x.permute(0, 3, 1, 2)), early.permute(0, 3, 1, 2)


#: What an HQ decoder has beyond SAM's, by the names of the published checkpoints.
_HEAD = ("hf_token", "hf_mlp", "compress_vit_feat", "embedding_encoder", "embedding_maskfeature")


def in_head(name: str) -> bool:
    """Whether a weight of an HQ-SAM belongs to its HQ head."""
    return name.startswith(tuple(f"mask_decoder.{part}." for part in _HEAD))


class HqMaskDecoder(MaskDecoder):
    """SAM's mask decoder with the HQ output token and its features.

    Args:
        vit_dim: channels of the early features.
        vit_rank: channels that they are reduced to first (None: they are not), for a small head.
        **kwargs: as of `MaskDecoder`.
    """

    def __init__(self, *, vit_dim: int, vit_rank: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        width = self.transformer_dim
        quarter, eighth = width // 4, width // 8
        self.hf_token = nn.Embedding(1, width)
        self.hf_mlp = MLP(width, width, eighth, 3)
        reduce = [] if vit_rank is None else [nn.Conv2d(vit_dim, vit_rank, 1)]
        self.compress_vit_feat = nn.Sequential(
            *reduce,
            nn.ConvTranspose2d(vit_rank or vit_dim, width, 2, 2),
            LayerNorm2d(width),
            nn.GELU(),
            nn.ConvTranspose2d(width, eighth, 2, 2),
        )
        self.embedding_encoder = nn.Sequential(
            nn.ConvTranspose2d(width, quarter, 2, 2),
            LayerNorm2d(quarter),
            nn.GELU(),
            nn.ConvTranspose2d(quarter, eighth, 2, 2),
        )
        self.embedding_maskfeature = nn.Sequential(
            nn.Conv2d(eighth, quarter, 3, padding=1),
            LayerNorm2d(quarter),
            nn.GELU(),
            nn.Conv2d(quarter, eighth, 3, padding=1),
        )

    def image_features(self, embedding: Tensor, early: Tensor) -> Tensor:
        """What the HQ token sees of an image, whatever the prompt: (B, C / 8, 4h, 4w)."""
        return self.embedding_encoder(embedding) + self.compress_vit_feat(early)

    def refinement(self, token: Tensor, upscaled: Tensor, image_features: Tensor) -> Tensor:
        """What is added to the logits of every mask: (P, 4h, 4w).

        Args:
            token: (P, C), the HQ token after the transformer.
            upscaled: (P, C / 8, 4h, 4w), SAM's own mask features.
            image_features: (P, C / 8, 4h, 4w), of `image_features`.
        """
        features = self.embedding_maskfeature(upscaled) + image_features
        return torch.einsum("pc,pchw->phw", self.hf_mlp(token), features)


def encode_pixels(sam: Sam, pixels: Tensor) -> Tensor:
    """Prepared pixels (B, 3, S, S) -> embeddings (B, `embedding_channels(sam)`, h, w)."""
    decoder = sam.mask_decoder
    if not isinstance(decoder, HqMaskDecoder):
        return sam.image_encoder(pixels)
    return with_hq_features(sam, encode_features(sam.image_encoder, pixels))


def encode_features(encoder: Any, pixels: Tensor) -> Tensor:
    """Prepared pixels -> the embedding, and behind it the early features: (B, C + D, h, w)."""
    return torch.cat(encoder.forward_with_early(pixels), dim=1)


def with_hq_features(sam: Sam, features: Tensor) -> Tensor:
    """What an HQ decoder takes, (B, 3 * C, h, w), from `encode_features`."""
    decoder = sam.mask_decoder
    assert isinstance(decoder, HqMaskDecoder)
    width = decoder.transformer_dim
    embedding, early = features[:, :width], features[:, width:]
    image_features = decoder.image_features(embedding, early)
    return torch.cat([embedding, F.pixel_unshuffle(image_features, 4)], dim=1)


def embedding_channels(sam: Sam) -> int:
    """Channels of `encode_pixels`: SAM's own, and behind them 16 x C / 8 with an HQ decoder."""
    width = sam.prompt_encoder.embed_dim
    return 3 * width if isinstance(sam.mask_decoder, HqMaskDecoder) else width


def build_hq(embed_dim: int, depth: int, num_heads: int, global_blocks: tuple[int, ...]) -> Sam:
    """An HQ-SAM over a ViT with random weights."""
    encoder = HqImageEncoder(
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
