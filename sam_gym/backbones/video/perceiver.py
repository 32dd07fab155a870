"""EdgeTAM's memory: the maps that SAM 2 remembers, compressed to few tokens.

Zhou et al. 2025, "EdgeTAM: On-Device Track Anything Model", section 3.2 (2D Spatial Perceiver).
Parameters have the authors' names.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_gym.backbones.video.modules import TokenLayout, sine_position


def _mlp(width: int) -> nn.Sequential:
    hidden = 4 * width
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, hidden, bias=False),
        nn.GELU(),
        nn.Linear(hidden, width, bias=False),
    )


class _CrossAttention(nn.Module):
    """Attention of latents to a map, with one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_x, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, latents: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        queries = self.to_q(self.norm_latents(latents))
        return self.to_out(F.scaled_dot_product_attention(queries, keys, values))


class _SelfAttention(nn.Module):
    """Attention of latents to each other, with one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, latents: Tensor) -> Tensor:
        own = self.norm(latents)
        keys, values = self.to_kv(own).chunk(2, dim=-1)
        if latents.shape[-2] > 1:  # a lone latent attends to itself
            values = F.scaled_dot_product_attention(self.to_q(own), keys, values)
        return self.to_out(values)


class _PerceiverLayer(nn.Module):
    """Latents attend to a map and to each other; an MLP follows each: (B, N, D) -> same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn, self.ff = _CrossAttention(width), _mlp(width)
        self.self_attn, self.self_ff = _SelfAttention(width), _mlp(width)

    def forward(self, latents: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        latents = latents + self.attn(latents, keys, values)
        latents = latents + self.ff(latents)
        latents = latents + self.self_attn(latents)
        return latents + self.self_ff(latents)


class Perceiver(nn.Module):
    """Compresses maps (P, D, h, w) to tokens (P, T, D): global latents, then one per window.

    Global latents see the whole map with its positions, and each other. The map is divided into
    side x side windows, whose latents see nothing else. Both go through the same layers.

    Args:
        width: D.
        latents: number of global latents.
        side: number of windows along a side, which divides h and w.
        depth: number of layers.
    """

    def __init__(self, width: int = 64, latents: int = 256, side: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.latents_2d = nn.Parameter(torch.randn(side * side, width))
        self.layers: Any = nn.ModuleList(_PerceiverLayer(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    @property
    def layout(self) -> TokenLayout:
        """Layout of the tokens: global latents have no place."""
        side = math.isqrt(len(self.latents_2d))
        return TokenLayout((side, side), len(self.latents))

    def _windows(self, x: Tensor, height: int, width: int) -> Tensor:
        """Cells (P, h * w, D) of each window: (P * side * side, cells, D)."""
        rows, columns = self.layout.grid
        x = x.unflatten(1, (rows, height // rows, columns, width // columns))
        return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def forward(self, maps: Tensor) -> Tensor:
        count, channels, *size = maps.shape
        cells = maps.flatten(2).mT
        place = sine_position(channels, *size).to(maps)
        everywhere = self.latents.expand(count, -1, -1)
        local = self.latents_2d.expand(count, -1, -1).reshape(-1, 1, channels)
        for layer in self.layers:
            keys, values = layer.attn.to_kv(layer.attn.norm_x(cells)).chunk(2, dim=-1)
            # As the authors do, positions are added to values, too.
            everywhere = layer(everywhere, keys + place, values + place)
            local = layer(local, self._windows(keys, *size), self._windows(values, *size))
        return self.norm(torch.cat([everywhere, local.view(count, -1, channels)], dim=1))
