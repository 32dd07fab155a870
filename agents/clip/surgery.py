"""CLIP Surgery: localise words in an image without training.

Li et al. 2023, "CLIP Surgery for Better Explainability with Enhancement in Open-Vocabulary Tasks"
(arXiv 2304.05653). CLIP's patch tokens do not compare with texts: the last blocks attend to
dissimilar regions, and features common to all texts dominate. *Architecture surgery* adds a second
path through the last blocks for the patches, with value-value attention and without MLPs. *Feature
surgery* subtracts a redundant feature from the texts.

The modules of open_clip are read in place and never modified.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agents.clip.models import Clip

#: Added to the range of a map before dividing by it, so that a constant map becomes zero.
_FLAT = 1e-6


def check_operable(visual: nn.Module, blocks: int) -> None:
    """Raise `ValueError` for an image tower that the surgery is not defined for.

    Args:
        visual: image tower of an open_clip model.
        blocks: number of last blocks with a second path.
    """
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    def refuse(reason: str) -> ValueError:
        return ValueError(
            f"CLIP Surgery cannot work on this image tower: {reason}. Use a CLIP with open_clip's "
            "VisionTransformer, for example ViT-B-16, ViT-B-32 or ViT-L-14."
        )

    if type(visual) is not VisionTransformer:
        raise refuse(f"it is a {type(visual).__name__}, not a VisionTransformer")
    if visual.attn_pool is not None or visual.pool_type != "tok":
        raise refuse("it does not pool by its class token")
    if visual.proj is None:
        raise refuse("it has no projection to the space of texts")
    layers = visual.transformer.resblocks
    for layer in layers:
        if type(layer) is not ResidualAttentionBlock or layer.attn.in_proj_weight is None:
            raise refuse(f"a block is a {type(layer).__name__} of another kind")
    if not 0 <= blocks <= len(layers):
        raise ValueError(f"surgical blocks must be from 0 to {len(layers)}, got {blocks}.")


def surgical_tokens(visual: Any, pixels: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Run the image tower with a second path through its last blocks; differentiable.

    Args:
        visual: open_clip's `VisionTransformer`, accepted by `check_operable`.
        pixels: float32 (B, 3, H, W), normalised; sides are multiples of the patch size.
        blocks: number of last blocks with a second path; 0 gives CLIP's own tokens.

    Returns:
        The class token (B, E) of the original path and the patch tokens (B, h * w, E) of the
        second path, both projected to the text space, not normalised.

    Raises:
        ValueError: a side is no multiple of the patch size.
    """
    patch = visual.patch_size[0]
    if pixels.shape[-2] % patch or pixels.shape[-1] % patch:
        raise ValueError(f"Sides must be multiples of {patch} pixels, got {pixels.shape[-2:]}.")
    x = visual.conv1(pixels)
    grid = (x.shape[-2], x.shape[-1])
    x = x.flatten(2).transpose(1, 2)
    first = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
    x = torch.cat([first, x], dim=1) + _positions(visual, grid).to(x.dtype)
    x = visual.ln_pre(x)

    layers, second = visual.transformer.resblocks, None
    for number, layer in enumerate(layers):
        if number >= len(layers) - blocks:
            second = x if second is None else second
            second = second + layer.ls_1(_values_to_values(layer.attn, layer.ln_1(x)))
        if visual.transformer.batch_first:
            x = layer(x)
        else:
            x = layer(x.transpose(0, 1)).transpose(0, 1)
    patches = x if second is None else second
    # open_clip projects them separately too: without surgical blocks, results are bit-identical.
    return visual.ln_post(x)[:, 0] @ visual.proj, visual.ln_post(patches)[:, 1:] @ visual.proj


def _positions(visual: Any, grid: tuple[int, int]) -> Tensor:
    """Return positional embeddings (1 + h * w, D), interpolated to the grid."""
    own = tuple(visual.grid_size)
    if grid == own:
        return visual.positional_embedding
    first, rest = visual.positional_embedding[:1], visual.positional_embedding[1:]
    square = rest.T.reshape(1, -1, *own)
    resized = F.interpolate(square, grid, mode="bilinear", align_corners=False)
    return torch.cat([first, resized[0].flatten(1).T])


def _values_to_values(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Return value-value self-attention of x (B, L, D): values serve as queries and keys."""
    width = x.shape[-1]
    bias = None if attention.in_proj_bias is None else attention.in_proj_bias[2 * width :]
    values = F.linear(x, attention.in_proj_weight[2 * width :], bias)
    values = values.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    out = F.scaled_dot_product_attention(values, values, values)
    return attention.out_proj(out.transpose(1, 2).flatten(2))


def feature_surgery(
    cls: Tensor, patches: Tensor, texts: Tensor, redundant: Tensor | None = None
) -> Tensor:
    """Return the similarity of patches and texts without the redundant feature.

    Args:
        cls: class tokens (B, E), unit length.
        patches: patch tokens (B, L, E), unit length.
        texts: text features (N, E), unit length.
        redundant: feature (E,) to subtract from each text: that of the empty prompt, of unit length
            in the paper. None: the mean over texts, each weighted by its similarity to the image
            (the paper's form for several texts; the map of a text then depends on the others).

    Returns:
        (B, L, N).

    Raises:
        ValueError: `redundant` is None and there is only one text.
    """
    if redundant is not None:
        return patches @ (texts - redundant).T
    if len(texts) < 2:
        raise ValueError("One text alone needs the redundant feature of the empty prompt.")
    share = (2.0 * cls @ texts.T).softmax(dim=-1)
    weighted = (patches @ texts.T) * (share / share.mean(dim=-1, keepdim=True))[:, None]
    return weighted - weighted.mean(dim=-1, keepdim=True)


def min_max(maps: Tensor) -> Tensor:
    """Scale each map (..., h, w) to [0, 1]; a constant map becomes zero."""
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    return (maps - low) / (high - low + _FLAT)


class ClipSurgery:
    """A CLIP model whose patches can be compared with texts.

    Args:
        clip: the model.
        blocks: number of last blocks with a second path (default: `clip.surgical_blocks`).

    Raises:
        ValueError: the surgery is not defined for the model.
    """

    def __init__(self, clip: Clip, blocks: int | None = None) -> None:
        self.clip = clip
        self.blocks = clip.surgical_blocks if blocks is None else blocks
        self.visual: Any = clip.model.visual
        check_operable(self.visual, self.blocks)

    @torch.no_grad()
    def embed_texts(self, names: Sequence[str], *, allow_unknown: bool = False) -> Tensor:
        """Return unit features float32 (N, E) of names, averaged over the prompt templates.

        Args:
            names: texts to embed.
            allow_unknown: accept words outside the model's vocabulary; all share one token.

        Raises:
            ValueError: a name has a word outside the model's vocabulary.
        """
        if not allow_unknown:
            self.clip.check_known(names)
        features = []
        for name in names:
            tokens = self.clip.tokenizer([form.format(name) for form in self.clip.templates])
            each = self.clip.model.encode_text(tokens.to(self.clip.device), normalize=True)
            features.append(F.normalize(each.mean(dim=0), dim=-1))
        return torch.stack(features).float()

    def redundant(self) -> Tensor:
        """Return the feature (E,) of the empty prompt, scaled by `redundant_weight`."""
        return self.clip.redundant_weight * self.embed_texts([""])[0]

    @torch.no_grad()
    def similarity(
        self, images: Tensor, texts: Tensor, redundant: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the similarity of each text to every patch and to the whole image.

        Args:
            images: (B, 3, H, W) in 0..255, resized to a square.
            texts: (N, E), as `embed_texts` returns them.
            redundant: as of `feature_surgery`.

        Returns:
            Maps float32 (B, N, h, w) at the resolution of the patches, not scaled (see `min_max`),
            and the similarity of the class token, float32 (B, N).
        """
        side = self.clip.surgical_size
        pixels = self.clip.to_input(images.to(self.clip.device).float(), side)
        cls, patches = surgical_tokens(self.visual, pixels, self.blocks)
        cls, patches = F.normalize(cls, dim=-1), F.normalize(patches, dim=-1)
        maps = feature_surgery(cls, patches, texts, redundant)
        cells = side // self.visual.patch_size[0]
        return maps.transpose(1, 2).unflatten(-1, (-1, cells)).float(), (cls @ texts.T).float()
