"""SAM's mask decoder, batched: many images and ragged prompts in one call.

segment_anything decodes one image at a time, with the same number of points in each prompt set.
Here each row is a prompt set for an image of its own. Missing points, boxes and masks are masked
out of attention, so batching does not change a row's result. The weights are those of the
segment_anything modules, read in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from segment_anything.modeling import MaskDecoder, Sam
from torch import Tensor, nn
from torch.nn import functional as F

from sam_gym.backbones.cpu import infers_on_cpu
from sam_gym.backbones.encoders import upscaling_of
from sam_gym.backbones.features import ImageFeatures
from sam_gym.backbones.hq import HqMaskDecoder
from sam_gym.backbones.prompts import Prompts, encode_masks, encode_points_and_boxes
from sam_gym.backbones.sam2 import Sam2, VideoSam

#: Below this number of keys, and from it on for queries, a CPU takes `_attend_to_few`.
_FEW = 32
#: Prompts whose masks are computed together on a CPU.
PIECE = 16


def _attend(attention: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """segment_anything's attention, for projected queries, keys and values."""

    if q.device.type == "cpu" and k.shape[1] < _FEW <= q.shape[1]:
        return attention.out_proj(_attend_to_few(attention.num_heads, q, k, v, mask))

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

    out = F.scaled_dot_product_attention(split(q), split(k), split(v), attn_mask=mask)
    return attention.out_proj(out.transpose(1, 2).flatten(2))


def _attend_to_few(heads: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of many queries (P, N, C) to few keys (P, T, C): two matrix products for all heads.

    On a CPU, fused kernels are slow for narrow heads and few keys. Here each head's keys are a row
    of their own, with zeros in the channels of the other heads.
    """
    channels, count = q.shape[2], k.shape[1]
    own = torch.arange(channels, device=q.device) // (channels // heads)
    own = (own == torch.arange(heads, device=q.device)[:, None]).to(q.dtype)[:, None]
    keys = (k[:, None] * (own * (channels // heads) ** -0.5)).flatten(1, 2)
    scores = torch.bmm(keys, q.transpose(1, 2)).unflatten(1, (heads, count))
    if mask is not None:
        scores = scores.masked_fill(~mask.transpose(-1, -2), -torch.inf)
    weights = scores.softmax(dim=2).flatten(1, 2).transpose(1, 2)
    return torch.bmm(weights, (v[:, None] * own).flatten(1, 2))


def _project_image(layer: Any, keys: Tensor, image_pe: Tensor) -> Sequence[Tensor]:
    """Project the image (P, h * w, C): key, the query of image-to-token attention, and value."""
    to_image = layer.cross_attn_token_to_image
    look_back = layer.cross_attn_image_to_token.q_proj
    return _project(keys, image_pe, [to_image.k_proj, look_back], [to_image.v_proj])


def _project(
    keys: Tensor, image_pe: Tensor, posed: Sequence[Any], plain: Sequence[Any]
) -> Sequence[Tensor]:
    """Apply linear layers to an image.

    A CPU spends most of the time on memory: it reads the image once, in one matrix product for all
    layers, and never adds positions to it. Since layers are linear, their projections of positions
    are added instead, which are the same for all images.

    Args:
        keys: (P, h * w, C).
        image_pe: (1, h * w, C), positional encoding.
        posed: layers of `keys + image_pe`.
        plain: layers of `keys`.

    Returns:
        (P, h * w, outputs) of each layer.
    """
    layers = [*posed, *plain]
    # A LoRA that is being trained is no plain linear layer.
    if (
        torch.is_grad_enabled()
        or keys.device.type != "cpu"
        or any(type(own) is not nn.Linear for own in layers)
    ):
        with_positions = keys + image_pe
        return [own(with_positions) for own in posed] + [own(keys) for own in plain]
    weight = torch.cat([own.weight for own in layers])
    bias = torch.cat([own.bias for own in layers])
    sizes = [own.out_features for own in layers]
    count = sum(sizes[: len(posed)])
    projected = F.linear(keys, weight, bias)
    projected[..., :count] += F.linear(image_pe, weight[:count])
    return projected.split(sizes, dim=-1)


def _two_way(
    transformer: Any,
    image: Tensor,
    image_pe: Tensor,
    tokens: Tensor,
    present: Tensor,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """segment_anything's TwoWayTransformer with absent tokens left out of every attention.

    Args:
        transformer: the module whose weights are used.
        image: (B, h * w, C), embeddings with mask prompts added.
        image_pe: (1, h * w, C), positional encoding.
        tokens: (P, T, C).
        present: bool (P, T), which tokens exist.
        rows: int64 (P,), the image of each prompt set, or None if they correspond. The first
            layer's projections of an image are then computed once for all of its prompts.
    """
    mask = present[:, None, None, :]
    queries, keys = tokens, image
    for number, layer in enumerate(transformer.layers):
        own, q = layer.self_attn, queries if layer.skip_first_layer_pe else queries + tokens
        attended = _attend(own, own.q_proj(q), own.k_proj(q), own.v_proj(queries), mask)
        queries = layer.norm1(attended if layer.skip_first_layer_pe else queries + attended)
        k, look_back, v = _project_image(layer, keys, image_pe)
        if number == 0 and rows is not None:
            keys, k, look_back, v = keys[rows], k[rows], look_back[rows], v[rows]
        to_image, to_tokens = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        attended = _attend(to_image, to_image.q_proj(queries + tokens), k, v, None)
        queries = layer.norm2(queries + attended)
        queries = layer.norm3(queries + layer.mlp(queries))
        k, v = to_tokens.k_proj(queries + tokens), to_tokens.v_proj(queries)
        keys = layer.norm4(keys + _attend(to_tokens, look_back, k, v, mask))
    final = transformer.final_attn_token_to_image
    k, v = _project(keys, image_pe, [final.k_proj], [final.v_proj])
    attended = _attend(final, final.q_proj(queries + tokens), k, v, None)
    return transformer.norm_final_attn(queries + attended), keys


#: Finer features of N or one prompts, (N or 1, ...) each, or None.
Finer = tuple[Tensor, Tensor] | None


def _upscale(
    decoder: MaskDecoder, precision: torch.dtype | None, keys: Tensor, finer: Finer
) -> Tensor:
    """`output_upscaling` in channels-last form: (P, h * w, C) -> (P, h * w, k * k, C / 8).

    A transposed convolution whose kernel is its stride is a linear map from each pixel to its
    children (2 x 2 in SAM). The last two axes of the result hold the k x k grandchildren and their
    features; k is the product of both strides.

    Args:
        decoder: the module whose weights are used.
        precision: dtype of the autocast in which the prompts were decoded, or None: it may be over
            when their masks are computed.
        keys: (P, h * w, C), the image after the transformer.
        finer: SAM 2's features that are added to children and grandchildren, (P, C / 4, 2h, 2w) and
            (P, C / 8, 4h, 4w); one row instead of P if all are of one image. None: nothing.
    """
    first, norm, act, second, last_act = cast(Any, decoder.output_upscaling)

    def children(x: Tensor, conv: Any) -> Tensor:
        weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)
        count = conv.stride[0] ** 2
        return F.linear(x, weight, conv.bias.repeat(count)).unflatten(-1, (count, -1))

    with torch.autocast(keys.device.type, precision, precision is not None):
        x = children(keys, first)
        if finer is not None:
            x = x + _folded(finer[0], 1)
        x = act(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps))
        x = children(x, second)
        if finer is not None:
            x = x + _folded(finer[1], 2)
        return last_act(x).flatten(2, 3)


def _folded(x: Tensor, levels: int) -> Tensor:
    """Features (B, D, h * 2^n, w * 2^n) as descendants of a grid: (B, h * w, 4, ..., 4, D)."""
    height, width = (side >> levels for side in x.shape[-2:])
    x = x.unflatten(3, (width, *[2] * levels)).unflatten(2, (height, *[2] * levels))
    # Axes are B, D, row, row within it, ..., column, column within it, ...
    order = [axis for row in range(2, 3 + levels) for axis in (row, row + 1 + levels)]
    x = x.permute(0, *order, 1).flatten(1, 2)
    for level in range(2, 2 + levels):
        x = x.flatten(level, level + 1)
    return x


def _unfold(masks: Tensor, grid: tuple[int, int], upscaling: tuple[int, int]) -> Tensor:
    """(P, M, h * w, k * k) grandchildren in (row, column, row, column) order -> (P, M, kh, kw)."""
    (h, w), (a, b) = grid, upscaling
    x = masks.reshape(*masks.shape[:2], h, w, a, a, b, b)
    return x.permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(*masks.shape[:2], a * b * h, a * b * w)


def _rows_of(finer: Finer, rows: Tensor | slice) -> Finer:
    """Select prompts; features of one prompt are shared by all."""
    if finer is None or len(finer[0]) == 1:
        return finer
    return finer[0][rows], finer[1][rows]


def _shared(features: Tensor) -> Tensor:
    """Return the one row of features that were expanded, others as they are."""
    return features[:1] if features.stride(0) == 0 else features


def _as_they_are(features: Tensor, finer: Finer) -> Tensor:
    """Return features that are upscaled already."""
    del finer
    return features


@dataclass(frozen=True)
class MaskTokens:
    """Decoded prompts before their masks are computed.

    Attributes:
        mask_embeddings: (P, K, C / 8), one per mask token; token 0 is the single mask, 1.. the
            multimask.
        features: (P, h * w, ...), image features that `upscale` takes.
        iou: (P, K), predicted IoU of each mask.
        grid: (h, w) of the embedding.
        upscaling: the two factors of k.
        refinement: (P, kh, kw), logits that an HQ decoder adds to every mask, or None.
        tokens: (P, K, C), output of the transformer for the mask tokens, as class heads take it.
        object_score: (P,), logit that the object is in the image, of a `VideoSam`, or None.
        stability: see `ScoringMaskDecoder.stability`; None: the single mask is kept.
        upscale: features (N, h * w, ...) and `finer` of N or one prompts -> upscaled features
            (N, h * w, k * k, C / 8), of which masks are computed; k is 4 in SAM.
        finer: features of P or one prompts that `upscale` takes, too, or None.
    """

    mask_embeddings: Tensor
    features: Tensor
    iou: Tensor
    grid: tuple[int, int]
    upscaling: tuple[int, int] = (2, 2)
    refinement: Tensor | None = None
    tokens: Tensor | None = None
    object_score: Tensor | None = None
    stability: tuple[float, float] | None = None
    upscale: Callable[[Tensor, Finer], Tensor] = _as_they_are
    finer: Finer = None

    def decode_masks(self, mask_embeddings: Tensor | None = None) -> Tensor:
        """Mask logits (P, M, kh, kw) of mask embeddings (P, M, C / 8), by default of all."""
        chosen = self.mask_embeddings if mask_embeddings is None else mask_embeddings
        logits = self._decode(chosen, self.features, self.finer)
        return logits if self.refinement is None else logits + self.refinement[:, None]

    def decode_mask_pairs(self, rows: Tensor, which: Tensor) -> Tensor:
        """Mask logits (N, kh, kw) of single masks.

        Args:
            rows: int64 (N,), the prompt of each.
            which: int64 (N,), its mask token.
        """
        # Each prompt is upscaled once, for all of its masks.
        own, place = rows.unique(return_inverse=True)
        chosen = self.mask_embeddings[rows, which][:, None]
        logits = self._decode(chosen, self.features[own], _rows_of(self.finer, own), place)[:, 0]
        return logits if self.refinement is None else logits + self.refinement[rows]

    def _decode(
        self, chosen: Tensor, features: Tensor, finer: Finer, place: Tensor | None = None
    ) -> Tensor:
        """Upscale features of N prompts, and decode masks of them.

        Args:
            chosen: (N, M, C / 8), mask embeddings; with `place`, of L prompts.
            features: (N, h * w, ...).
            finer: of N prompts, or of one.
            place: int64 (L,), row of `features` for each of `chosen`; None: they correspond.

        Returns:
            (N or L, M, kh, kw).
        """

        def decode(chosen: Tensor, upscaled: Tensor) -> Tensor:
            masks = torch.einsum("pmc,pnkc->pmnk", chosen, upscaled)
            return _unfold(masks, self.grid, self.upscaling)

        if not infers_on_cpu(features):
            upscaled = self.upscale(features, finer)
            return decode(chosen, upscaled if place is None else upscaled[place])
        # A CPU spends most of the time on memory: pieces stay in its cache.
        parts, places = [], []
        for first in range(0, max(1, len(features)), PIECE):
            piece = slice(first, first + PIECE)
            upscaled = self.upscale(features[piece], _rows_of(finer, piece))
            if place is None:
                parts.append(decode(chosen[piece], upscaled))
            else:
                own = ((place >= first) & (place < first + PIECE)).nonzero()[:, 0]
                parts.append(decode(chosen[own], upscaled[place[own] - first]))
                places.append(own)
        logits = torch.cat(parts)
        return logits if place is None else logits[torch.cat(places).argsort()]

    def upscaled(self) -> MaskTokens:
        """The same prompts with features that are upscaled."""
        features = self.upscale(self.features, self.finer)
        return replace(self, features=features, upscale=_as_they_are, finer=None)

    def decode_best_masks(self, multimask: Tensor) -> tuple[Tensor, Tensor]:
        """Mask logits (P, kh, kw) and predicted IoU (P,) of each row's `best_token`.

        Where `stability` says so, rows with an unstable single mask get the best of three.
        """
        if self.stability is not None:
            delta, least = self.stability
            single = self.decode_masks(self.mask_embeddings[:, :1]).flatten(1)
            inner, outer = (single > delta).sum(dim=1), (single > -delta).sum(dim=1)
            multimask = multimask | ((outer > 0) & (inner / outer < least))
        best = best_token(self.iou, multimask)[:, None]
        chosen = self.mask_embeddings.take_along_dim(best[..., None], dim=1)
        return self.decode_masks(chosen)[:, 0], self.iou.gather(1, best)[:, 0]

    def best_iou(self, multimask: Tensor) -> Tensor:
        """Predicted IoU (P,) of the masks of `decode_best_masks`, without computing them.

        Only where `stability` may replace masks, they are.
        """
        if self.stability is not None:
            return self.decode_best_masks(multimask)[1]
        return self.iou.gather(1, best_token(self.iou, multimask)[:, None])[:, 0]

    @classmethod
    def merged(cls, parts: Sequence[tuple[Tensor, MaskTokens]]) -> MaskTokens:
        """Put prompts that were decoded in several calls back in order.

        Args:
            parts: rows, int64 (P_i,), and their decoded prompts; all of one grid.
        """
        order = torch.cat([rows for rows, _ in parts]).argsort()
        # Their decoders may differ.
        own = [vars(part.upscaled()) for _, part in parts]

        def merge(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return torch.cat([part[name] for part in own])[order]

        return cls(**{name: merge(name, value) for name, value in own[0].items()})


def decode_tokens(
    sam: Sam, features: ImageFeatures, prompts: Prompts, further: Tensor | None = None
) -> MaskTokens:
    """Run the prompt encoder and the two-way transformer; differentiable.

    Args:
        sam: the model whose weights are used.
        features: of B images, from `encode_pixels`.
        prompts: P prompt sets; without `rows`, P equals B.
        further: (P, K, C), tokens that are appended to those of the prompts, or None.

    Raises:
        ValueError: P differs from B and the prompts have no rows.
    """
    decoder = sam.mask_decoder
    hq = decoder if isinstance(decoder, HqMaskDecoder) else None
    video = sam if isinstance(sam, VideoSam) else None
    count = len(prompts)
    rows = prompts.rows
    if rows is None and len(features) != count:
        raise ValueError(f"{count} prompt sets for {len(features)} images: pass rows=.")
    if rows is not None and (prompts.masks is not None or len(features) > count):
        # With masks, no two prompts see the same; and few prompts do not pay for many images.
        features, rows = features[rows], None
    sparse, present = encode_points_and_boxes(sam.prompt_encoder, prompts, video is not None)
    dense = encode_masks(sam.prompt_encoder, prompts, None if video is None else video.mask_limit)
    output = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    if hq is not None:
        output = torch.cat([output, hq.hf_token.weight])
    if video is not None:
        output = torch.cat([output, video.mask_decoder.obj_score_token.weight])
    tokens = torch.cat([output.expand(count, -1, -1), sparse.to(output.dtype)], dim=1)
    present = torch.cat([present.new_ones((count, len(output))), present], dim=1)
    if further is not None:
        tokens = torch.cat([tokens, further.to(tokens.dtype)], dim=1)
        present = torch.cat([present, present.new_ones(further.shape[:2])], dim=1)

    embedding = features.embedding
    grid = (embedding.shape[-2], embedding.shape[-1])
    image = (embedding + dense).flatten(2).transpose(1, 2).contiguous()
    image_pe = sam.prompt_encoder.get_dense_pe().to(image.dtype).flatten(2).transpose(1, 2)
    tokens, keys = _two_way(decoder.transformer, image, image_pe, tokens, present, rows)

    own = tokens[:, 1 : 1 + decoder.num_mask_tokens]
    mlps = enumerate(decoder.output_hypernetworks_mlps)
    mask_embeddings = torch.stack([mlp(own[:, k]) for k, mlp in mlps], dim=1)
    iou = decoder.iou_prediction_head(tokens[:, 0])
    last = tokens[:, len(output) - 1]
    finer: Finer = None
    score, stability = None, None
    if video is not None:
        stability = video.mask_decoder.stability
        score = video.mask_decoder.pred_obj_score_head(last)[:, 0]
    if isinstance(video, Sam2):
        shared = rows is None or len(features) == 1
        high_res = _shared(features["high_res_s1"]), _shared(features["high_res_s0"])
        finer = high_res if shared else (high_res[0][rows], high_res[1][rows])
    upscaling, kind = upscaling_of(decoder), keys.device.type
    precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    decoded = MaskTokens(
        mask_embeddings=mask_embeddings,
        features=keys,
        iou=iou,
        grid=grid,
        upscaling=upscaling,
        tokens=own,
        object_score=score,
        stability=stability,
        upscale=partial(_upscale, decoder, precision),
        finer=finer,
    )
    if hq is None:
        return decoded
    decoded = decoded.upscaled()
    own_features = features["hq"] if rows is None else features["hq"][rows]
    folded = _unfold(decoded.features.permute(0, 3, 1, 2), grid, upscaling)
    return replace(decoded, refinement=hq.refinement(last, folded, own_features))


def best_token(iou: Tensor, multimask: Tensor) -> Tensor:
    """Index (P,) of the mask to keep: the best multimask by predicted IoU, or the single mask."""
    return torch.where(multimask, 1 + iou[:, 1:].argmax(dim=1), 0)
