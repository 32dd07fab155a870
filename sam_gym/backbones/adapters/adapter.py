"""Adapters: what was learned on top of a SAM, as a small file that `load_backbone` applies.

A file holds the tuned weights of one or several *experts* (copies of the SAM that share what is
frozen), and whatever chooses among them by the image: a selector, or a pool of prompts. It may hold
a head that tells what a mask is of.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

from sam_gym.backbones.adapters.prompt_pools import PROMPT_POOLS, PromptPool, query_of
from sam_gym.backbones.adapters.selectors import (
    EmbeddingSelector,
    TokenSelector,
    block_inputs,
    keys_of,
    pooled_embedding,
    recorded_inputs,
)
from sam_gym.backbones.adapters.tuning import (
    TUNINGS,
    apply_tuned,
    bytes_of,
    check_names,
    encoder_blocks,
    with_early_features,
)
from sam_gym.backbones.decode import MaskTokens, Prompts, decode_tokens, scattered
from sam_gym.backbones.hq import (
    embedding_channels,
    encode_features,
    encode_pixels,
    with_hq_features,
)

_KEY, _VERSION = "sam_gym_adapter", 1
#: What of an `Adapter` is not tensors.
_ABOUT = ("backbone", "identity", "method", "tune", "domains", "chooser", "classes")


class Model(nn.Module):
    """A SAM as the service runs it: images to embeddings, embeddings and prompts to masks.

    Args:
        sam: the model; of one that chooses by the image, what it was adapted from.
        raw: what of an image the frozen SAM that it was adapted from can say beforehand: a kind of
            `raw_features`.
        head: tells what a mask is of, or None.
    """

    def __init__(self, sam: Sam, raw: str = "pixels", head: ClassHead | None = None) -> None:
        super().__init__()
        self.sam, self.raw, self.head = sam, raw, head

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of what `class_logits` tells apart; none without a head."""
        return () if self.head is None else self.head.classes

    def class_logits(self, tokens: MaskTokens) -> Tensor:
        """What each mask of decoded prompts is of: logits (P, K, number of classes).

        Raises:
            ValueError: the model has no head.
        """
        if self.head is None:
            raise ValueError("This model tells no classes: its adapter holds no class head.")
        return self.head(tokens.tokens)

    @property
    def channels(self) -> int:
        """Channels of an embedding."""
        return embedding_channels(self.sam)

    @property
    def fixed_shapes(self) -> bool:
        """Whether it can be compiled: the work does not depend on what is in the tensors."""
        return True

    def encode(self, pixels: Tensor) -> Tensor:
        """Prepared pixels (B, 3, S, S) -> embeddings (B, channels, h, w)."""
        return encode_pixels(self.sam, pixels)

    def decode(self, embeddings: Tensor, prompts: Prompts) -> MaskTokens:
        """See `decode_tokens`."""
        return decode_tokens(self.sam, embeddings, prompts)


class ClassHead(nn.Module):
    """Tells by its mask token what a mask is of (SAOM, arXiv 2403.10780).

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


class PromptedModel(Model):
    """A frozen SAM whose decoder sees further tokens, which depend on the image."""

    def __init__(self, sam: Sam, pool: PromptPool) -> None:
        super().__init__(sam, "embedding")
        self.pool = pool
        #: The domain that is being learned, or None.
        self.task: int | None = None
        #: The loss of the pool in the last call of `decode`.
        self.pool_loss: Tensor | None = None

    def decode(self, embeddings: Tensor, prompts: Prompts) -> MaskTokens:
        queries = query_of(embeddings[:, : self.pool.channels])
        tokens, self.pool_loss = self.pool(queries, self.task)
        if prompts.rows is not None:
            tokens = tokens[prompts.rows]
        return decode_tokens(self.sam, embeddings, prompts, tokens)


class RoutedModel(Model):
    """Several experts and a selector that says for each image which of them works.

    What the selector says is one more channel behind the embedding, so stores and handles carry it.

    Args:
        sam: the frozen SAM that the selector looks through.
        experts: a SAM for each domain.
        selector: whose classes are the experts.
        raw: what the experts start from, a kind of `raw_features`.
    """

    def __init__(
        self,
        sam: Sam,
        experts: Sequence[Sam],
        selector: TokenSelector | EmbeddingSelector,
        raw: str,
    ) -> None:
        super().__init__(sam, raw)
        self.experts = nn.ModuleList(experts)
        self.selector = selector

    @property
    def channels(self) -> int:
        return 1 + embedding_channels(self._expert(0))

    @property
    def fixed_shapes(self) -> bool:
        return False

    def _expert(self, number: int) -> Any:
        return self.experts[number]

    def encode(self, pixels: Tensor) -> Tensor:
        with recorded_inputs(self.sam.image_encoder) as inputs:
            raw = raw_features(self.sam, pixels, self.raw)
        return self.embed(raw, self.route(pixels, raw, inputs))

    def route(self, pixels: Tensor, raw: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """Number of the expert for each image: int64 (B,).

        Args:
            pixels: prepared, (B, 3, S, S).
            raw: their `raw_features`.
            inputs: what the frozen encoder's blocks were given, if it has run (else empty).
        """
        encoder = self.sam.image_encoder
        if isinstance(self.selector, TokenSelector):
            seen = keys_of(encoder, inputs or block_inputs(encoder, pixels))
            logits = self.selector(encoder, seen)
        else:
            embedding = encoder(pixels) if self.raw == "pixels" else raw
            width = self.sam.prompt_encoder.embed_dim
            logits = self.selector(pooled_embedding(embedding[:, :width]))
        return logits.argmax(dim=1)

    def embed(self, raw: Tensor, routes: Tensor) -> Tensor:
        """Embeddings (B, channels, h, w) of images by the experts that they are routed to.

        Args:
            raw: of `raw_features`.
            routes: int (B,).
        """
        parts = [
            (rows, embed(self._expert(number), raw[rows], self.raw))
            for number, rows in by_number(routes)
        ]
        own = scattered(parts)
        plane = routes.to(own.dtype)[:, None, None, None].expand(-1, 1, *own.shape[2:])
        return torch.cat([own, plane], dim=1)

    def decode(self, embeddings: Tensor, prompts: Prompts) -> MaskTokens:
        if prompts.rows is not None:
            embeddings, prompts = embeddings[prompts.rows], replace(prompts, rows=None)
        routes = embeddings[:, -1, 0, 0].round().long()
        return MaskTokens.merged(
            [
                (rows, decode_tokens(self._expert(k), embeddings[rows, :-1], prompts.take(rows)))
                for k, rows in by_number(routes)
            ]
        )


def by_number(routes: Tensor) -> list[tuple[int, Tensor]]:
    """Each number that occurs in routes (B,), and the rows in which it does."""
    return [(k, (routes == k).nonzero()[:, 0]) for k in routes.unique().tolist()]


def raw_features(sam: Sam, pixels: Tensor, kind: str) -> Tensor:
    """What the tuned part of a SAM starts from; see `sam_gym.backbones.adapters.tuning.Tuning.raw`.

    Args:
        sam: the frozen SAM.
        pixels: prepared, (B, 3, S, S).
        kind: "pixels", "embedding" or "early".

    Returns:
        (B, 3, S, S), (B, C, h, w) as of `encode_pixels`, or (B, C + D, h, w).
    """
    if kind == "pixels":
        return pixels
    if kind == "early":
        return encode_features(with_early_features(sam.image_encoder), pixels)
    return encode_pixels(sam, pixels)


def embed(sam: Sam, raw: Tensor, kind: str) -> Tensor:
    """Embeddings for `decode_tokens` from `raw_features`, by a tuned SAM; differentiable."""
    if kind == "pixels":
        return encode_pixels(sam, raw)
    if kind == "early":
        return with_hq_features(sam, raw)
    return raw


@dataclass
class Adapter:
    """The content of an adapter file.

    Attributes:
        backbone: name of the SAM that was adapted.
        identity: digest of its weights.
        method: how it was learned, for people.
        tune: a key of `TUNINGS`, or "prompts".
        domains: names of the domains, in the order of learning.
        experts: tuned weights of each expert (see `tuned_weights`); none where only prompts are.
        chooser: "", or what chooses by the image: "tokens", "embeddings" (selectors), or a key of
            `PROMPT_POOLS`.
        weights: the state of the chooser.
        classes: what the head tells apart, none without one.
        head: the state of the `ClassHead`.
    """

    backbone: str
    identity: str
    method: str
    tune: str
    domains: list[str]
    experts: list[dict[str, Tensor]] = field(default_factory=list)
    chooser: str = ""
    weights: dict[str, Tensor] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    head: dict[str, Tensor] = field(default_factory=dict)

    @property
    def state(self) -> dict[str, Tensor]:
        """All tensors, as the file names them."""
        tensors = {f"chooser.{name}": value for name, value in self.weights.items()}
        tensors |= {f"head.{name}": value for name, value in self.head.items()}
        for number, weights in enumerate(self.experts):
            tensors |= {f"expert{number}.{name}": value for name, value in weights.items()}
        return tensors

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        return bytes_of(self.state.values())

    def check_fits(self, backbone: str, identity: str) -> None:
        """Raise `ValueError` if it was made for another SAM than that of a name and digest."""
        if backbone != self.backbone:
            raise ValueError(
                f"The adapter was made for the backbone {self.backbone!r}, not {backbone!r}."
            )
        if identity != self.identity:
            raise ValueError(
                f"The adapter was made for other weights of {backbone!r} (digest {self.identity}, "
                f"here {identity}). Pass the checkpoint that it was trained on."
            )

    def save(self, path: Path) -> Path:
        """Write the file, whole or not at all."""
        from safetensors.torch import save

        from sam_gym.utils.files import write_atomic

        about = {name: getattr(self, name) for name in _ABOUT}
        about |= {"version": _VERSION, "num_experts": len(self.experts)}
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state.items()}
        return write_atomic(path, save(tensors, metadata={_KEY: json.dumps(about)}))

    @classmethod
    def load(cls, path: Path) -> Adapter:
        """Read an adapter file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or no adapter.
        """
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such adapter file.")
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get(_KEY, "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, ValueError, OSError) as error:
            raise ValueError(f"{path}: not a readable adapter file ({error}).") from error
        if not isinstance(about, dict) or about.get("version") != _VERSION:
            raise ValueError(
                f"{path}: not an adapter of this version (python -m adaptation.train writes them)."
            )
        experts: list[dict[str, Tensor]] = [{} for _ in range(about.pop("num_experts"))]
        others: dict[str, dict[str, Tensor]] = {"chooser": {}, "head": {}}
        about.pop("version")
        for name, value in tensors.items():
            part, _, own = name.partition(".")
            if part in others:
                others[part][own] = value
            else:
                experts[int(part.removeprefix("expert"))][own] = value
        return cls(**about, experts=experts, weights=others["chooser"], head=others["head"])

    def model(self, sam: Sam, source: str = "adapter") -> Model:
        """The adapted model; frozen, sharing with `sam` whatever was not tuned.

        Raises:
            ValueError: it was made for another SAM.
        """
        experts = [apply_tuned(sam, self.tune, weights, source) for weights in self.experts]
        device = next(sam.parameters()).device
        if not self.chooser:
            head = None
            if self.classes:
                head = ClassHead(sam.prompt_encoder.embed_dim, self.classes)
                head = _loaded(head, self.head, source).to(device)
            return Model(experts[0], TUNINGS.get(self.tune).raw, head).eval()
        if self.chooser in PROMPT_POOLS.names():
            make = PROMPT_POOLS.get(self.chooser).of_size
            pool = make(sam.prompt_encoder.embed_dim, self.weights)
            return PromptedModel(sam, _loaded(pool, self.weights, source).to(device)).eval()
        selector: TokenSelector | EmbeddingSelector
        if self.chooser == "tokens":
            _, tokens, channels = self.weights["tokens"].shape
            encoder_blocks(sam.image_encoder)
            selector = TokenSelector(channels, len(experts), tokens)
        else:
            selector = EmbeddingSelector(sam.prompt_encoder.embed_dim, len(experts))
        selector = _loaded(selector, self.weights, source).to(device)
        return RoutedModel(sam, experts, selector, TUNINGS.get(self.tune).raw).eval()


def digest_of(state: Mapping[str, Tensor], label: str = "") -> str:
    """Hex digest of a state dict, and of a label."""
    digest = hashlib.sha256(label.encode())
    for key, value in sorted(state.items()):
        digest.update(key.encode())
        content: Any = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()[:32]


def _loaded(module: Any, weights: Mapping[str, Tensor], source: str) -> Any:
    check_names(module.state_dict(), weights, source)
    module.load_state_dict(weights)
    return module.requires_grad_(False)
