"""The memory of SAM 2: an encoder of predicted masks, and attention to what it encoded.

Ravi et al. 2024, "SAM 2: Segment Anything in Images and Videos", sections 4 and D. Parameters have
the authors' names, so that published weights load strictly. What depends only on the frame is
computed once for all of its objects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from sam_gym.backbones.cpu import gelu, infers_on_cpu
from sam_gym.backbones.sam2 import pointwise

_Constant = TypeVar("_Constant")


@lru_cache(maxsize=16)
def sine_position(channels: int, height: int, width: int) -> Tensor:
    """Sine and cosine position encoding of a grid (Carion et al. 2020): float32 (h * w, C).

    Half of the channels encode the row, the other half the column.
    """
    half = channels // 2
    frequency = 10000 ** (2 * (torch.arange(half) // 2) / half)

    def encoded(count: int) -> Tensor:
        angle = 2 * math.pi * torch.arange(1, count + 1) / (count + 1e-6)
        angle = angle[:, None] / frequency
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1)

    rows = encoded(height)[:, None].expand(-1, width, -1)
    columns = encoded(width)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


def sine_time(times: Tensor, channels: int) -> Tensor:
    """Sine and cosine encoding of times (T,) -> float32 (T, C)."""
    half = channels // 2
    frequency = 10000 ** (2 * (torch.arange(half, device=times.device) // 2) / half)
    angle = times[:, None] / frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


@lru_cache(maxsize=16)
def _rotations(channels: int, height: int, width: int) -> Tensor:
    """Axial rotary embeddings as complex numbers: complex64 (h * w, C / 2).

    The first half of the pairs turns with the column, the second with the row.
    """
    frequency = 10000.0 ** -(torch.arange(0, channels, 4)[: channels // 4].float() / channels)
    cells = torch.arange(height * width)
    column, row = (cells % width).float(), (cells // width).float()
    angle = torch.cat([torch.outer(column, frequency), torch.outer(row, frequency)], dim=1)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Apply axial rotary embeddings (Su et al. 2021; Heo et al. 2024).

    Args:
        x: (..., n * h * w, C), n grids after another; neighbouring channels form a pair.
        grid: (h, w).
    """
    # One complex product: on a CPU, four times as fast as sines and cosines of strided halves.
    turn = _rotations(x.shape[-1], *grid).to(x.device)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs.unflatten(-2, (-1, len(turn))) * turn)
    return turned.flatten(-2).flatten(-3, -2).to(x.dtype)


@dataclass(frozen=True)
class TokenLayout:
    """What the tokens of a memory stand for: first those without a place, then those of a grid.

    Attributes:
        grid: (h, w) of the tokens that have a place.
        free: number of tokens without one.
    """

    grid: tuple[int, int]
    free: int = 0

    @property
    def count(self) -> int:
        """Number of tokens."""
        return self.free + self.grid[0] * self.grid[1]

    def position(self, channels: int) -> Tensor:
        """Position encoding, zero for tokens without a place: float32 (tokens, C)."""
        placed = sine_position(channels, *self.grid)
        return F.pad(placed, (0, 0, self.free, 0)) if self.free else placed

    def rotate(self, x: Tensor) -> Tensor:
        """Apply rotary embeddings to the tokens that have a place.

        Args:
            x: (..., n * tokens, C), n memories after another.
        """
        if not self.free:
            return rotate(x, self.grid)
        memories = x.unflatten(-2, (-1, self.count))
        free, placed = memories.split([self.free, self.count - self.free], dim=-2)
        return torch.cat([free, rotate(placed, self.grid)], dim=-2).flatten(-3, -2)


class RotaryAttention(nn.Module):
    """Attention of one head with rotary embeddings.

    Args:
        width: channels of queries and of the result.
        key_width: channels of keys and values.
    """

    def __init__(self, width: int, key_width: int | None = None) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(key_width or width, width)
        self.v_proj = nn.Linear(key_width or width, width)
        self.out_proj = nn.Linear(width, width)

    def keys(self, x: Tensor, layout: TokenLayout, others: int = 0) -> Tensor:
        """Project and rotate keys: (B, n * tokens + others, D) -> (..., C).

        Args:
            x: what is attended to, with its position.
            layout: of the tokens of each memory.
            others: number of keys at the end that belong to no memory, which are not rotated.
        """
        k = self.k_proj(x)
        if not others:
            return layout.rotate(k)
        return torch.cat([layout.rotate(k[:, :-others]), k[:, -others:]], dim=1)

    def queries(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Project and rotate queries: (B, h * w, C) -> same."""
        return rotate(self.q_proj(x), grid)

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        exists: Tensor | None = None,
        work: Workspace | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            queries: (B, h * w, C), of `queries`.
            keys: (B, T, C), of `keys`.
            values: (B, T, D), not projected.
            exists: bool (B, T), keys that count; None: all.
            work: of a series of calls without gradients on a CPU.
        """
        if not infers_on_cpu(queries):
            seen = None if exists is None else exists[:, None]
            out = F.scaled_dot_product_attention(queries, keys, self.v_proj(values), attn_mask=seen)
            return self.out_proj(out)
        work = Workspace() if work is None else work
        attended = queries.new_empty(*queries.shape[:2], values.shape[2])
        for row, out in enumerate(attended):
            seen = None if exists is None else exists[row]
            _attend(queries[row], keys[row], values[row], seen, work, out)
        return F.linear(attended, *work.folded(self))


class Workspace:
    """What calls without gradients on a CPU share, as long as weights do not change.

    Buffers, since large tensors that are allocated anew are cleared page by page, which takes as
    long as to compute them; and what depends on weights only.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._constants: dict[Hashable, Any] = {}

    def empty(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return a tensor of any content; it is valid until the next of this name."""
        size, held = math.prod(shape), self._buffers.get(name)
        if held is None or held.numel() < size or held.dtype != like.dtype:
            held = self._buffers[name] = like.new_empty(size)
        return held[:size].view(shape)

    def constant(self, key: Hashable, make: Callable[[], _Constant]) -> _Constant:
        """Return what `make` made of weights when this key was first asked for."""
        if key not in self._constants:
            self._constants[key] = make()
        return self._constants[key]

    def folded(self, attention: RotaryAttention) -> tuple[Tensor, Tensor]:
        """Weight and bias of the projections of values and of the result, as one.

        The weights of a query have the sum 1: attention to projected values is the projection of
        attention to the values themselves, which are narrower.
        """
        v_proj, out_proj = attention.v_proj, attention.out_proj
        return self.constant(
            ("folded", attention), lambda: (out_proj.weight @ v_proj.weight, out_proj(v_proj.bias))
        )


#: Weights of attention that are computed together on a CPU, for this number of queries or more.
_PIECE, _LEAST = 2**19, 64


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, exists: Tensor | None, work: Workspace, out: Tensor
) -> None:
    """Attention of N queries (N, C) to T keys (T, C) and values (T, D) -> `out` (N, D)."""
    q, keys, values = q * keys.shape[1] ** -0.5, keys.to(q.dtype), values.to(q.dtype)
    size = max(_LEAST, _PIECE // len(keys))
    for piece, result in zip(q.split(size), out.split(size), strict=True):
        shape = len(piece), len(keys)
        scores = torch.mm(piece, keys.T, out=work.empty("scores", shape, q))
        if exists is not None:
            scores.masked_fill_(~exists, -torch.inf)
        torch.mm(torch.softmax(scores, 1, out=scores), values, out=result)


#: (number of a layer, rows) -> keys (B, T, C) of the layer and values (B, T, D) of these rows. The
#: layers of the same rows are asked for in order.
Recalled = Callable[[int, slice], tuple[Tensor, Tensor]]


class MemoryAttentionLayer(nn.Module):
    """Self-attention of the frame, attention to the memory, and an MLP.

    Args:
        width: channels of the frame.
        memory_width: channels of the memory.
        hidden: channels of the MLP.
    """

    def __init__(self, width: int, memory_width: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = RotaryAttention(width)
        self.cross_attn_image = RotaryAttention(width, memory_width)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def attend_to_frame(
        self, x: Tensor, grid: tuple[int, int], work: Workspace | None = None
    ) -> Tensor:
        """Self-attention with its residual: (B, h * w, C) -> same."""
        own = self.norm1(x)
        queries = self.self_attn.queries(own, grid)
        keys = self.self_attn.keys(own, TokenLayout(grid))
        return x + self.self_attn(queries, keys, own, work=work)

    def queries(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Queries of the attention to the memory: (B, h * w, C) -> same."""
        return self.cross_attn_image.queries(self.norm2(x), grid)

    def attend_to_memory(
        self,
        x: Tensor,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        exists: Tensor | None = None,
        work: Workspace | None = None,
    ) -> Tensor:
        """Attention to the memory and the MLP, with residuals; see `RotaryAttention`."""
        x = x + self.cross_attn_image(queries, keys, values, exists, work)
        return x + self.linear2(self.linear1(self.norm3(x)).relu_())


#: Cells of frames that are conditioned together on a CPU.
_CELLS = 1024


class MemoryAttention(nn.Module):
    """Conditions the embeddings of frames on memories.

    Args:
        width: channels of the frame.
        memory_width: channels of the memory.
        hidden: channels of the MLPs.
        depth: number of layers.
    """

    def __init__(self, width: int, memory_width: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(
            MemoryAttentionLayer(width, memory_width, hidden) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def prepare(self, embedding: Tensor) -> Tensor:
        """Compute what depends on the frame only: (B, C, h, w) -> (B, h * w, C)."""
        grid = (embedding.shape[-2], embedding.shape[-1])
        position = sine_position(embedding.shape[1], *grid).to(embedding)
        x = embedding.flatten(2).transpose(1, 2) + 0.1 * position
        return self.layers[0].attend_to_frame(x, grid)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        position: Tensor,
        grid: tuple[int, int],
        layout: TokenLayout,
        pointers: int,
        exists: Tensor | None = None,
    ) -> Tensor:
        """Condition prepared frames.

        Args:
            x: (P, h * w, C), rows of `prepare`.
            memory: (P, T, D): spatial memories, then tokens of pointers.
            position: (P, T, D), position and time of each token.
            grid: (h, w).
            layout: of the tokens of each spatial memory.
            pointers: number of tokens of pointers.
            exists: bool (P, T), tokens that count; None: all.

        Returns:
            (P, C, h, w).
        """

        def recalled(number: int, rows: slice) -> tuple[Tensor, Tensor]:
            placed = memory[rows] + position[rows]
            keys = self.layers[number].cross_attn_image.keys(placed, layout, pointers)
            return keys, memory[rows]

        return self.attend(x, recalled, grid, exists=exists)

    def attend(
        self,
        x: Tensor,
        recalled: Recalled,
        grid: tuple[int, int],
        rows: Tensor | None = None,
        exists: Tensor | None = None,
        work: Workspace | None = None,
    ) -> Tensor:
        """Condition prepared frames on keys and values.

        Args:
            x: (B, h * w, C), of `prepare`.
            recalled: returns keys and values.
            grid: (h, w).
            rows: int64 (P,), the frame of each object; None: P equals B and they correspond.
            exists: bool (P, T), keys that count; None: all.
            work: of a series of calls without gradients on a CPU.

        Returns:
            (P, C, h, w).
        """
        count = len(x) if rows is None else len(rows)
        step = max(1, _CELLS // x.shape[1] if infers_on_cpu(x) else count)
        work, parts = Workspace() if work is None else work, []
        first_queries = self.layers[0].queries(x, grid)  # of the frame only
        for first in range(0, count, step):
            piece = slice(first, first + step)
            of_frame = piece if rows is None else rows[piece]
            own, queries = x[of_frame], first_queries[of_frame]
            seen = None if exists is None else exists[piece]
            for number, layer in enumerate(self.layers):
                if number:
                    own = layer.attend_to_frame(own, grid, work)
                    queries = layer.queries(own, grid)
                own = layer.attend_to_memory(own, queries, *recalled(number, piece), seen, work)
            parts.append(own)
        return self.norm(torch.cat(parts)).transpose(1, 2).unflatten(2, grid)


class _ChannelNorm(LayerNorm2d):
    """segment_anything's norm of channels in fewer passes; results are channels-last in memory."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] < 8 and x.is_contiguous():
            # Rows of a few channels do not fill a vector: here, pixels do.
            x = x - x.mean(1, keepdim=True)
            x = x * (x.square().mean(1, keepdim=True) + self.eps).rsqrt()
            x = x * self.weight[:, None, None] + self.bias[:, None, None]
            return x.contiguous(memory_format=torch.channels_last)
        own = x.permute(0, 2, 3, 1)
        own = F.layer_norm(own, self.weight.shape, self.weight, self.bias, self.eps)
        return own.permute(0, 3, 1, 2)


class _Gelu(nn.GELU):
    """GELU of tensors that nobody else needs."""

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x)


class _ConvNextBlock(nn.Module):
    """A ConvNeXt block (Liu et al. 2022): (B, C, h, w) -> same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = _ChannelNorm(width)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(1e-6 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        own = self.norm(self.dwconv(x)).permute(0, 2, 3, 1)
        own = self.gamma * self.pwconv2(gelu(self.pwconv1(own)))
        return x + own.permute(0, 3, 1, 2)


class _MaskDownsampler(nn.Module):
    """Encodes masks (B, 1, S, S) as (B, C, S / stride, S / stride).

    Args:
        width: C.
        strides: of the convolutions, each of which multiplies channels by its square.
        base: factor of all channels.
    """

    def __init__(self, width: int, strides: Sequence[int], base: int) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        channels, after = 1, base
        for stride in strides:
            after *= stride**2
            parts += [
                nn.Conv2d(channels, after, stride + 1, stride, stride // 2),
                _ChannelNorm(after),
                _Gelu(),
            ]
            channels = after
        self.encoder = nn.Sequential(*parts, nn.Conv2d(channels, width, 1))

    def forward(self, masks: Tensor) -> Tensor:
        *rest, last = cast(Any, self.encoder)
        for part in rest:
            masks = part(masks)
        return pointwise(masks, last)


class _Fuser(nn.Module):
    """A row of ConvNeXt blocks."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_ConvNextBlock(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class MemoryEncoder(nn.Module):
    """Encodes a frame with the mask of an object.

    Args:
        width: channels of the frame's embedding.
        memory_width: channels of a memory.
        strides: of the mask encoder; their product is the number of pixels of a mask per cell.
        base: factor of the channels of the mask encoder.
    """

    def __init__(
        self,
        width: int,
        memory_width: int,
        strides: Sequence[int] = (2, 2, 2, 2),
        base: int = 1,
    ) -> None:
        super().__init__()
        self.mask_downsampler = _MaskDownsampler(width, strides, base)
        self.pix_feat_proj = nn.Conv2d(width, width, 1)
        self.fuser = _Fuser(width, depth=2)
        self.out_proj = nn.Conv2d(width, memory_width, 1)

    def project(self, embedding: Tensor) -> Tensor:
        """Compute what depends on the frame only: (B, C, h, w) -> same."""
        return pointwise(embedding, self.pix_feat_proj)

    def forward(self, frames: Tensor, masks: Tensor) -> Tensor:
        """Encode.

        Args:
            frames: (P, C, h, w), rows of `project`.
            masks: (P, 1, S, S), scaled probabilities.

        Returns:
            (P, D, h, w).
        """
        return pointwise(self.fuser(frames + self.mask_downsampler(masks)), self.out_proj)
