"""SAM's image-encoder attention through PyTorch's fused kernels, relative positions included."""

from __future__ import annotations

import torch
from segment_anything.modeling.image_encoder import Attention, get_rel_pos
from torch import Tensor, nn
from torch.nn import functional as F


class FusedAttention(nn.Module):
    """segment_anything's attention, without materialising the attention matrix.

    Its decomposed relative positions add `rel_h[query, row of key] + rel_w[query, column of key]`
    to every score. That is a dot product too: of (rel_h, rel_w) of the query with the one-hot row
    and column of the key. So they become more channels of queries and keys, which any fused kernel
    takes, where a bias would be a matrix of the size of the attention itself (0.4 GB per image and
    block for ViT-B in bfloat16).

    Args:
        attention: takes over its modules and parameters, under the same names.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.num_heads, self.use_rel_pos = attention.num_heads, attention.use_rel_pos
        self.qkv, self.proj = attention.qkv, attention.proj
        if self.use_rel_pos:
            self.rel_pos_h, self.rel_pos_w = attention.rel_pos_h, attention.rel_pos_w
        self.train(attention.training)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        channels = q.shape[-1]
        if self.use_rel_pos:
            q, k = self._with_positions(q, k, height, width)
            v = F.pad(v, (0, q.shape[-1] - channels))
        out = F.scaled_dot_product_attention(q, k, v, scale=channels**-0.5)[..., :channels]
        return self.proj(out.transpose(1, 2).reshape(batch, height, width, -1))

    def _with_positions(
        self, q: Tensor, k: Tensor, height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """Append relative positions as channels to queries and keys (B, heads, N, C)."""
        grid = q.unflatten(2, (height, width))
        rows = get_rel_pos(height, height, self.rel_pos_h)
        columns = get_rel_pos(width, width, self.rel_pos_w)
        # The kernel scales scores by 1 / sqrt(C), which does not apply to positions.
        unscaled = grid * q.shape[-1] ** 0.5
        by_row = torch.einsum("bnhwc,hkc->bnhwk", unscaled, rows)
        by_column = torch.einsum("bnhwc,wkc->bnhwk", unscaled, columns)
        place = torch.cat(
            [
                torch.eye(height, dtype=k.dtype, device=k.device).repeat_interleave(width, 0),
                torch.eye(width, dtype=k.dtype, device=k.device).repeat(height, 1),
            ],
            dim=1,
        )
        q = torch.cat([grid, by_row, by_column], dim=-1).flatten(2, 3)
        k = torch.cat([k, place.expand(*k.shape[:2], -1, -1)], dim=-1)
        # Fused kernels on GPUs need a multiple of eight channels.
        missing = -q.shape[-1] % 8
        return F.pad(q, (0, missing)), F.pad(k, (0, missing))


def fuse_attention(encoder: nn.Module) -> None:
    """Replace every `Attention` within an image encoder by `FusedAttention`, in place."""
    for part in list(encoder.modules()):
        for name, child in part.named_children():
            if type(child) is Attention:
                setattr(part, name, FusedAttention(child))
