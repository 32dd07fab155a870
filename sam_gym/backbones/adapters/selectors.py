"""Which domain an image belongs to: selectors over what the frozen encoder sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_gym.backbones.adapters.tuning import encoder_blocks


@contextmanager
def recorded_inputs(encoder: Any) -> Iterator[list[Tensor]]:
    """What each transformer block is given while the encoder runs: (B, h, w, D) each."""
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for block in getattr(encoder, "blocks", ())
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def block_inputs(encoder: Any, pixels: Tensor) -> list[Tensor]:
    """What each transformer block of a frozen encoder is given: (B, h, w, D) each.

    Args:
        encoder: an image encoder with segment_anything's blocks.
        pixels: float32 (B, 3, S, S), prepared.
    """
    with recorded_inputs(encoder) as seen:
        encoder(pixels)
    return seen


class TokenSelector(nn.Module):
    """MoDA's selector: trained tokens that go through the frozen encoder beside the image.

    After CoSAM (Yang et al. 2024, arXiv 2412.06418): the first token becomes the global feature
    that is classified, the others assist it. Here the tokens look at the image and at each other,
    and the image does not look at them, so one pass of the encoder gives embedding and tokens; in
    the released code a second pass, with other attention, is made for the tokens alone.

    Args:
        channels: of the encoder's blocks.
        num_domains: how many to choose from.
        num_tokens: the global feature token and its assistants.
    """

    def __init__(self, channels: int, num_domains: int, num_tokens: int = 10) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, num_tokens, channels))
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, num_domains)

    def forward(self, encoder: Any, seen: Sequence[Tensor]) -> Tensor:
        """Logits (B, num_domains) from what the tokens see of B images, `keys_of`."""
        tokens = self.tokens.expand(len(seen[0]), -1, -1)
        for block, image in zip(encoder_blocks(encoder), seen, strict=True):
            tokens = _look(block, tokens, image)
        return self.head(self.norm(tokens[:, 0]))


def _projected(block: Any, x: Tensor) -> Tensor:
    """Queries, keys and values of a block for x (B, N, D): (3, B, heads, N, d)."""
    attention = block.attn
    qkv = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1))
    return qkv.permute(2, 0, 3, 1, 4)


@torch.no_grad()
def keys_of(encoder: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Keys and values of images in each block, (B, 2, heads, h * w, d), from `block_inputs`."""
    blocks = encoder_blocks(encoder)
    return [
        _projected(block, x.flatten(1, 2))[1:].transpose(0, 1)
        for block, x in zip(blocks, inputs, strict=True)
    ]


def _look(block: Any, tokens: Tensor, image: Tensor) -> Tensor:
    """One transformer block for tokens (B, T, D) that see an image, `keys_of`, and each other."""
    q, k, v = _projected(block, tokens)
    keys, values = torch.cat([k, image[:, 0]], dim=2), torch.cat([v, image[:, 1]], dim=2)
    looked = F.scaled_dot_product_attention(q, keys, values)
    tokens = tokens + block.attn.proj(looked.transpose(1, 2).flatten(2))
    return tokens + block.mlp(block.norm2(tokens))


class EmbeddingSelector(nn.Module):
    """A small classifier of embeddings, which needs nothing else of the encoder.

    After SAMCL (Wang et al. 2024, arXiv 2412.05012): SAM's embeddings tell domains apart, so what
    must be kept of a past domain is a few pooled embeddings, not images.

    Args:
        channels: of an embedding.
        num_domains: how many to choose from.
        width: hidden units.
    """

    def __init__(self, channels: int, num_domains: int, width: int = 64) -> None:
        super().__init__()
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.zeros(2 * channels))
        self.register_buffer("deviation", torch.ones(2 * channels))
        self.layers = nn.Sequential(
            nn.Linear(2 * channels, width), nn.ReLU(), nn.Linear(width, num_domains)
        )

    def standardise(self, features: Tensor) -> None:
        """Take mean and deviation of inputs from features (N, 2 * C)."""
        self.mean.copy_(features.mean(dim=0))
        # Of one image there is no deviation.
        deviation = features.std(dim=0, correction=int(len(features) > 1))
        self.deviation.copy_(deviation.clamp(min=1e-4))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, num_domains) from `pooled_embedding` (B, 2 * C)."""
        return self.layers((features - self.mean) / self.deviation)


def pooled_embedding(embeddings: Tensor) -> Tensor:
    """Mean and standard deviation of every channel: (B, C, h, w) -> (B, 2 * C)."""
    flat = embeddings.flatten(2)
    return torch.cat([flat.mean(dim=2), flat.std(dim=2)], dim=1)
