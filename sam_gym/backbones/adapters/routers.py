"""Routers: choose the expert of an image by its features under the frozen encoder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

from sam_gym.backbones.adapters.model import (
    ADAPTER_MODULES,
    AdapterModule,
    Model,
    embed,
    raw_features,
)
from sam_gym.backbones.adapters.tuning import plain_blocks
from sam_gym.backbones.decode import MaskTokens, decode_tokens
from sam_gym.backbones.features import FeatureSpec, ImageFeatures, TensorSpec
from sam_gym.backbones.hq import encode_pixels, feature_spec
from sam_gym.backbones.prompts import Prompts

#: Returns the prepared pixels of some images, (B, 3, S, S).
Pixels = Callable[[], Tensor]


@contextmanager
def recorded_inputs(encoder: Any) -> Iterator[list[Tensor]]:
    """Record the input of each transformer block while the encoder runs: (B, h, w, D) each."""
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
    """Run a frozen encoder; returns the input of each transformer block: (B, h, w, D) each.

    Args:
        encoder: an image encoder with segment_anything's blocks.
        pixels: float32 (B, 3, S, S), prepared.
    """
    with recorded_inputs(encoder) as seen:
        encoder(pixels)
    return seen


class Router(AdapterModule):
    """Chooses an expert for each image, so that each image has one."""

    @abstractmethod
    def logits(
        self, sam: Sam, pixels: Pixels, embedding: Tensor | None, inputs: Sequence[Tensor]
    ) -> Tensor:
        """Score the experts: (B, number of experts).

        Args:
            sam: the pretrained SAM.
            pixels: returns the prepared pixels, (B, 3, S, S).
            embedding: (B, C, h, w), by the pretrained SAM; None where it has not run.
            inputs: of its encoder's blocks (`block_inputs`), if it has just run; else empty.
        """

    def wrap(self, sam: Sam, experts: Sequence[Sam], raw: str) -> RoutedModel:
        return RoutedModel(sam, experts, self, raw)


@ADAPTER_MODULES.register("tokens")
class TokenRouter(Router):
    """MoDA's router: trained tokens that pass through the frozen encoder beside the image.

    After CoSAM (Yang et al. 2024, arXiv 2412.06418): the first token becomes the global feature
    that is classified, the others assist it. Here attention is one way: tokens attend to the image
    and to each other, the image does not attend to the tokens. One pass of the encoder therefore
    gives both embedding and tokens; the released code runs a second pass, with other attention, for
    the tokens.

    Args:
        channels: of the encoder's blocks.
        num_domains: number of experts.
        num_tokens: the global feature token and its assistants.
    """

    def __init__(self, channels: int, num_domains: int, num_tokens: int = 10) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, num_tokens, channels))
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, num_domains)

    @classmethod
    def from_weights(cls, sam: Sam, weights: Mapping[str, Tensor], num_experts: int) -> Self:
        _, tokens, channels = weights["tokens"].shape
        plain_blocks(sam.image_encoder)
        return cls(channels, num_experts, tokens)

    def forward(self, encoder: Any, seen: Sequence[Tensor]) -> Tensor:
        """Logits (B, num_domains) from keys and values of B images, `keys_of`."""
        tokens = self.tokens.expand(len(seen[0]), -1, -1)
        for block, image in zip(plain_blocks(encoder), seen, strict=True):
            tokens = _attend(block, tokens, image)
        return self.head(self.norm(tokens[:, 0]))

    def logits(
        self, sam: Sam, pixels: Pixels, embedding: Tensor | None, inputs: Sequence[Tensor]
    ) -> Tensor:
        encoder = sam.image_encoder
        return self(encoder, keys_of(encoder, inputs or block_inputs(encoder, pixels())))


def _projected(block: Any, x: Tensor) -> Tensor:
    """Queries, keys and values of a block for x (B, N, D): (3, B, heads, N, d)."""
    attention = block.attn
    qkv = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1))
    return qkv.permute(2, 0, 3, 1, 4)


@torch.no_grad()
def keys_of(encoder: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Keys and values of images in each block, (B, 2, heads, h * w, d), from `block_inputs`."""
    blocks = plain_blocks(encoder)
    return [
        _projected(block, x.flatten(1, 2))[1:].transpose(0, 1)
        for block, x in zip(blocks, inputs, strict=True)
    ]


def _attend(block: Any, tokens: Tensor, image: Tensor) -> Tensor:
    """Apply a transformer block to tokens (B, T, D), which attend to an image and each other.

    Args:
        block: the block.
        tokens: (B, T, D).
        image: keys and values, as of `keys_of`.
    """
    q, k, v = _projected(block, tokens)
    keys, values = torch.cat([k, image[:, 0]], dim=2), torch.cat([v, image[:, 1]], dim=2)
    attended = F.scaled_dot_product_attention(q, keys, values)
    tokens = tokens + block.attn.proj(attended.transpose(1, 2).flatten(2))
    return tokens + block.mlp(block.norm2(tokens))


@ADAPTER_MODULES.register("embeddings")
class EmbeddingRouter(Router):
    """A small classifier of pooled embeddings.

    After SAMCL (Wang et al. 2024, arXiv 2412.05012): SAM's embeddings separate domains, so a few
    pooled embeddings of each past domain are enough to train it; no images are kept.

    Args:
        channels: of an embedding.
        num_domains: number of experts.
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

    @classmethod
    def from_weights(cls, sam: Sam, weights: Mapping[str, Tensor], num_experts: int) -> Self:
        return cls(sam.prompt_encoder.embed_dim, num_experts)

    def standardise(self, features: Tensor) -> None:
        """Set mean and deviation of the inputs from features (N, 2 * C)."""
        self.mean.copy_(features.mean(dim=0))
        # A single image has no deviation.
        deviation = features.std(dim=0, correction=int(len(features) > 1))
        self.deviation.copy_(deviation.clamp(min=1e-4))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, num_domains) from `pooled_embedding` (B, 2 * C)."""
        return self.layers((features - self.mean) / self.deviation)

    def logits(
        self, sam: Sam, pixels: Pixels, embedding: Tensor | None, inputs: Sequence[Tensor]
    ) -> Tensor:
        own = encode_pixels(sam, pixels()).embedding if embedding is None else embedding
        return self(pooled_embedding(own))


def pooled_embedding(embeddings: Tensor) -> Tensor:
    """Mean and standard deviation of every channel: (B, C, h, w) -> (B, 2 * C)."""
    flat = embeddings.flatten(2)
    return torch.cat([flat.mean(dim=2), flat.std(dim=2)], dim=1)


class RoutedModel(Model):
    """Several experts and a router. The feature `route` is the number of each image's expert.

    Args:
        sam: the pretrained SAM, from which the router's inputs come.
        experts: a SAM for each domain.
        router: its classes are the experts.
        raw: the kind of `raw_features` that the experts start from.
    """

    def __init__(self, sam: Sam, experts: Sequence[Sam], router: Router, raw: str) -> None:
        super().__init__(sam, raw)
        self.experts: Any = nn.ModuleList(experts)
        self.router = router

    @property
    def feature_spec(self) -> FeatureSpec:
        own = feature_spec(self.experts[0]).tensors
        return FeatureSpec({**own, "route": TensorSpec((), torch.int64)})

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    @property
    def fixed_shapes(self) -> bool:
        return False

    def encode(self, pixels: Tensor) -> ImageFeatures:
        with recorded_inputs(self.sam.image_encoder) as inputs:
            raw = raw_features(self.sam, pixels, self.raw)
        return self.embed(raw, lambda: pixels, inputs)

    def embed(
        self, raw: ImageFeatures, pixels: Pixels | None = None, inputs: Sequence[Tensor] = ()
    ) -> ImageFeatures:
        """Compute features, each image's by its own expert.

        Args:
            raw: of B images.
            pixels: returns the prepared pixels of the images.
            inputs: of the frozen encoder's blocks, if it has just run (else empty).
        """
        if pixels is None:
            pixels = partial(raw.__getitem__, "pixels")
        embedding = None if self.raw == "pixels" else raw.embedding
        route = self.router.logits(self.sam, pixels, embedding, inputs).argmax(dim=1)
        parts = [(rows, embed(self.experts[k], raw[rows])) for k, rows in _by_expert(route)]
        order = torch.cat([rows for rows, _ in parts]).argsort()
        return ImageFeatures.cat([own for _, own in parts])[order].merge(route=route)

    def decode(self, features: ImageFeatures, prompts: Prompts) -> MaskTokens:
        if prompts.rows is not None:
            features, prompts = features[prompts.rows], replace(prompts, rows=None)
        return MaskTokens.merged(
            [
                (rows, decode_tokens(self.experts[k], features[rows], prompts.take(rows)))
                for k, rows in _by_expert(features["route"])
            ]
        )


def _by_expert(route: Tensor) -> list[tuple[int, Tensor]]:
    """Each expert that occurs in route (B,), and the rows in which it does."""
    return [(k, (route == k).nonzero()[:, 0]) for k in route.unique().tolist()]
