"""Inference of SAM 2's Hiera on a CPU: the numbers of timm's `HieraDet`, in less time.

The weights are those of timm's modules, read in place. Three things differ. Windows at the edge of
the grid are not padded: all cells of the padding have the same key and value, so one of them stands
for all. Windows are not put together again, but added where they belong. And what nobody else needs
is overwritten.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from timm.models.hieradet_sam2 import MultiScaleBlock
from torch import Tensor
from torch.nn import functional as F

from sam_gym.backbones.cpu import gelu


def hiera_stages(trunk: Any, pixels: Tensor) -> list[Tensor]:
    """Run timm's `HieraDet` without gradients.

    Args:
        trunk: the module whose weights are used.
        pixels: float32 (B, 3, S, S), S a multiple of 32.

    Returns:
        The stages (B, D, S / s, S / s) of the strides s 4, 8, 16, 32, channels-last in memory.
    """
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    cells = trunk.patch_embed(pixels)
    position = trunk._pos_embed(torch.zeros_like(cells[:1])).contiguous()
    x, stages = cells + position, []
    for number, block in enumerate(trunk.blocks):
        x = _block(block, x) if type(block) is MultiScaleBlock else block(x)  # an adapter's
        if number in trunk.stage_ends:
            stages.append(x.permute(0, 3, 1, 2))
    return stages


def _block(block: Any, x: Tensor) -> Tensor:
    """Run a block of timm on cells (B, H, W, C), which are overwritten: (B, h, w, D)."""
    own = block.norm1(x)
    if block.dim != block.dim_out:
        x = block.proj(own)
        if block.pool is not None:
            x = block.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    (_, height, width, _), stride = own.shape, own.shape[1] // x.shape[1]
    window = block.window_size if block.is_windowed else (height, width)
    for top, bottom, high in _spans(height, window[0]):
        for left, right, wide in _spans(width, window[1]):
            part = _windows(own[:, top:bottom, left:right], high, wide).flatten(0, 2).contiguous()
            attended = block.ls1(_attend(block.attn, part, math.prod(window) - high * wide))
            cells = x[:, top // stride : bottom // stride, left // stride : right // stride]
            place = _windows(cells, high // stride, wide // stride)
            place.add_(attended.view(place.shape))
    mlp = block.mlp
    return x.add_(block.ls2(mlp.fc2(gelu(mlp.fc1(block.norm2(x))))))


def _spans(cells: int, window: int) -> Iterator[tuple[int, int, int]]:
    """(first, last, side) of the whole windows along an axis, and of the rest."""
    whole = cells - cells % window
    if whole:
        yield 0, whole, window
    if whole < cells:
        yield whole, cells, cells - whole


def _windows(x: Tensor, high: int, wide: int) -> Tensor:
    """View cells (B, H, W, C) as windows (B, rows, columns, high, wide, C)."""
    return x.unflatten(2, (-1, wide)).unflatten(1, (-1, high)).transpose(2, 3)


def _attend(attention: Any, x: Tensor, absent: int) -> Tensor:
    """Attention within windows (N, high, wide, C) that lack some cells: (N, high, wide, D).

    The result is that of the cells that are there, pooled if queries are.
    """
    queries, keys, values = attention.qkv(x).chunk(3, dim=-1)
    if attention.q_pool is not None:
        queries = attention.q_pool(queries.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def heads(cells: Tensor) -> Tensor:
        return cells.flatten(1, 2).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

    q, k, v, repeats = heads(queries), heads(keys), heads(values), None
    if absent:
        # timm pads windows with zeros before it projects them.
        _, key, value = attention.qkv(x.new_zeros(len(x), 1, 1, x.shape[-1])).chunk(3, dim=-1)
        k, v = torch.cat([k, heads(key)], dim=2), torch.cat([v, heads(value)], dim=2)
        repeats = F.pad(q.new_zeros(1, 1, 1, k.shape[2] - 1), (0, 1), value=math.log(absent))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=repeats)
    return attention.proj(out.transpose(1, 2).flatten(2)).view(*queries.shape[:3], -1)
