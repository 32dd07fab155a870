"""What a SAM 2 remembers of an object, which memories a frame attends to, and how.

Ravi et al. 2024; the rules are those of the authors' `SAM2Base` in evaluation mode. A memory is a
map of the frame, (D, h, w), or, with the perceiver of EdgeTAM, a short row of tokens, (T, D).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from segment_anything.modeling.mask_decoder import MLP
from torch import Tensor, nn
from torch.nn import functional as F

from sam_gym.backbones.cpu import infers_on_cpu
from sam_gym.backbones.video.modules import (
    MemoryAttention,
    MemoryEncoder,
    TokenLayout,
    Workspace,
    sine_time,
)
from sam_gym.backbones.video.perceiver import Perceiver

#: Logit of every pixel of an object that is not in the frame.
ABSENT = -1024.0
#: Factor and offset from probabilities to what the memory encoder reads.
SCALE, OFFSET = 20.0, -10.0
#: Precision of stored memories, whatever that of the model.
STORED = torch.bfloat16
#: Masks that are encoded together on a CPU.
PIECE = 4
#: Largest number of cells of a memory whose keys are kept.
KEPT_CELLS = 1024


@dataclass
class Entry:
    """What is known of an object in one frame.

    Attributes:
        logits: float32 (hm, wm), low-res mask.
        iou: float32 (), predicted IoU.
        score: float32 (), logit that the object is in the frame.
        pointer: (C,), object pointer.
        memory: bfloat16, of `VideoMemory.memory_shape`, or None before it is encoded.
    """

    logits: Tensor
    iou: Tensor
    score: Tensor
    pointer: Tensor
    memory: Tensor | None = None


@dataclass(frozen=True)
class MemoryKeys:
    """What the layers of the attention need of a memory, whatever its age.

    Attributes:
        memory: the memory, an attribute of an `Entry`.
        values: (T, D), its tokens in the precision of the model.
        keys: (T, C) of each layer: rotated, without the memory's time.
    """

    memory: Tensor
    values: Tensor
    keys: Sequence[Tensor]


@dataclass(frozen=True)
class Recall:
    """The memories that a frame attends to.

    Attributes:
        frames: (frame, slot) of each spatial memory; slot is the row of `maskmem_tpos_enc`.
        pointers: (frame, distance) of each object pointer, in frames.
        span: longest distance of a pointer, by which distances are divided.
    """

    frames: tuple[tuple[int, int], ...]
    pointers: tuple[tuple[int, int], ...]
    span: int

    @property
    def size(self) -> tuple[int, int]:
        """Number of spatial memories and of pointers: rows of equal size share a batch."""
        return len(self.frames), len(self.pointers)


def closest_frames(frame: int, frames: Sequence[int], limit: int) -> list[int]:
    """Select the conditioning frames that a frame attends to.

    Args:
        frame: number of the frame.
        frames: numbers of the conditioning frames.
        limit: maximum number, at least 2; -1: all. The closest one before `frame`, the closest one
            from `frame` on, then the others by distance.
    """
    if limit == -1 or len(frames) <= limit:
        return list(frames)
    before = max((other for other in frames if other < frame), default=None)
    after = min((other for other in frames if other >= frame), default=None)
    chosen = [other for other in (before, after) if other is not None]
    rest = sorted(
        (other for other in frames if other not in chosen), key=lambda other: abs(other - frame)
    )
    return chosen + rest[: limit - len(chosen)]


def recall(
    frame: int,
    conditioning: Sequence[int],
    tracked: Mapping[int, Entry],
    *,
    reverse: bool = False,
    num_frames: int | None = None,
    memories: int = 7,
    pointers: int = 16,
    limit: int = -1,
) -> Recall:
    """Decide what a frame attends to.

    Args:
        frame: number of the frame.
        conditioning: prompted frames, whose memories are always attended to.
        tracked: entries of tracked frames, by number; some may have lost their memory.
        reverse: track backwards.
        num_frames: of the video, if it is known; short videos divide distances by less.
        memories: number of slots: one for conditioning frames, the others for the frames before.
        pointers: maximum number of pointers of tracked frames, plus one.
        limit: maximum number of conditioning frames, see `closest_frames`.
    """
    chosen = closest_frames(frame, conditioning, limit)
    others = {other for other in conditioning if other not in chosen}
    sign = -1 if reverse else 1

    frames = [(other, memories - 1) for other in chosen]
    for distance in range(memories - 1, 0, -1):
        other = frame - sign * distance
        if other in others or (other in tracked and tracked[other].memory is not None):
            frames.append((other, distance - 1))
    many = pointers if num_frames is None else min(num_frames, pointers)
    # Pointers of later conditioning frames would mislead, though their memories do not.
    past = [(other, sign * (frame - other)) for other in chosen if sign * (frame - other) >= 0]
    for distance in range(1, many):
        other = frame - sign * distance
        if other < 0 or (num_frames is not None and other >= num_frames):
            break
        if other in others or other in tracked:
            past.append((other, distance))
    return Recall(tuple(frames), tuple(past), many - 1)


class VideoMemory(nn.Module):
    """The parts of a SAM 2 that images do not need, under the authors' names.

    Args:
        grid: (h, w) of the embedding.
        width: C, channels of the embedding.
        memory_width: D, channels of a memory.
        hidden: channels of the MLPs of the attention.
        depth: its layers.
        slots: number of temporal positions of memories.
        strides: of the mask encoder; their product is the number of pixels of a mask per cell.
        base: factor of the channels of the mask encoder.
        perceiver: compresses memories, or None.
        dates_pointers: whether object pointers have the distance of their frames.
        marks_absence: whether memories of frames without the object are marked.

    Raises:
        ValueError: the grid has no whole number of cells for each window of the perceiver.
    """

    no_obj_embed_spatial: nn.Parameter | None

    def __init__(
        self,
        grid: tuple[int, int] = (64, 64),
        width: int = 256,
        memory_width: int = 64,
        hidden: int = 2048,
        depth: int = 4,
        slots: int = 7,
        strides: Sequence[int] = (2, 2, 2, 2),
        base: int = 1,
        perceiver: Perceiver | None = None,
        dates_pointers: bool = True,
        marks_absence: bool = True,
    ) -> None:
        super().__init__()
        self.grid, self.slots = grid, slots
        #: Of the tokens of a memory.
        self.layout = TokenLayout(grid) if perceiver is None else perceiver.layout
        if any(own % side for own, side in zip(grid, self.layout.grid, strict=True)):
            raise ValueError(
                f"A grid of {grid} cells cannot be divided into {self.layout.grid} windows: take a "
                "Perceiver whose side divides both."
            )
        #: (height, width) of the masks that are encoded.
        self.mask_size = (grid[0] * math.prod(strides), grid[1] * math.prod(strides))
        self.memory_attention = MemoryAttention(width, memory_width, hidden, depth)
        self.memory_encoder = MemoryEncoder(width, memory_width, strides, base)
        self.maskmem_tpos_enc = nn.Parameter(torch.zeros(slots, 1, 1, memory_width))
        self.no_mem_pos_enc = nn.Parameter(torch.zeros(1, 1, width))  # published, but never used
        self.no_obj_ptr = nn.Parameter(torch.zeros(1, width))
        absent = nn.Parameter(torch.zeros(1, memory_width)) if marks_absence else None
        self.register_parameter("no_obj_embed_spatial", absent)
        for parameter in (self.maskmem_tpos_enc, self.no_obj_ptr, absent):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)
        self.mask_downsample = nn.Conv2d(1, 1, 4, stride=4)
        self.obj_ptr_proj = MLP(width, width, width, 3)
        self.obj_ptr_tpos_proj = nn.Linear(width, memory_width) if dates_pointers else None
        self.spatial_perceiver = perceiver

    @property
    def memory_shape(self) -> tuple[int, ...]:
        """Shape of a memory: (D, h, w), or (T, D) with a perceiver."""
        width = self.maskmem_tpos_enc.shape[-1]
        return (width, *self.grid) if self.spatial_perceiver is None else (self.layout.count, width)

    def tokens(self, memories: Tensor) -> Tensor:
        """Tokens of memories (..., *memory_shape): (..., T, D)."""
        return memories.flatten(-2).mT if self.spatial_perceiver is None else memories

    def map_of(self, memories: Tensor) -> Tensor:
        """The tokens of memories (..., *memory_shape) that have a place: (..., D, h', w')."""
        placed = self.tokens(memories)[..., self.layout.free :, :]
        return placed.mT.unflatten(-1, self.layout.grid)

    def point_to(self, tokens: Tensor, appears: Tensor) -> Tensor:
        """Object pointers (P, C) of mask tokens (P, C); `appears` is bool (P,)."""
        return torch.where(appears[:, None], self.obj_ptr_proj(tokens), self.no_obj_ptr)

    def condition(
        self,
        prepared: Tensor,
        recalls: Sequence[Recall],
        entries: Sequence[Mapping[int, Entry]],
        rows: Tensor | None = None,
        kept: Sequence[dict[int, MemoryKeys]] | None = None,
        work: Workspace | None = None,
    ) -> Tensor:
        """Condition the embedding of frames on memories.

        Args:
            prepared: (B, h * w, C), of `memory_attention.prepare`.
            recalls: of P objects, all of one size.
            entries: frame number -> entry, of each object.
            rows: int64 (P,), the frame of each object; None: P equals B and they correspond.
            kept: of each object, frame number -> keys, which are used again and replaced by those
                that this frame recalls. On a CPU, without gradients, and where `keeps_keys`.
            work: of a series of calls with `kept`.

        Returns:
            (P, C, h, w).
        """
        objects = list(zip(recalls, entries, strict=True))
        slots = torch.tensor([[slot for _, slot in own.frames] for own in recalls])
        pointers = ages = None
        if recalls[0].pointers:
            pointers = torch.stack(
                [
                    torch.stack([known[frame].pointer for frame, _ in own.pointers])
                    for own, known in objects
                ]
            )
            ages = torch.tensor([[age / own.span for _, age in own.pointers] for own in recalls])
        if kept is not None and self.keeps_keys and infers_on_cpu(prepared):
            keys = [
                self._keys_of(prepared, own, known, before)
                for (own, known), before in zip(objects, kept, strict=True)
            ]
            work = Workspace() if work is None else work
            return self._attend_to_keys(prepared, keys, slots, pointers, ages, rows, work)
        spatial = [
            torch.stack([_encoded(known[frame]) for frame, _ in own.frames])
            for own, known in objects
        ]
        if rows is not None:
            prepared = prepared[rows]
        return self.attend(prepared, torch.stack(spatial), slots, pointers, ages)

    @property
    def keeps_keys(self) -> bool:
        """Whether the keys of memories are worth their space.

        Making them takes at most D / (h * w) of the time in which the h * w cells of a frame attend
        to them. In float32 they are 2 * depth * C / D times as large as a memory in bfloat16.
        """
        return self.grid[0] * self.grid[1] <= KEPT_CELLS

    def _keys_of(
        self,
        prepared: Tensor,
        recalled: Recall,
        known: Mapping[int, Entry],
        kept: dict[int, MemoryKeys],
    ) -> list[MemoryKeys]:
        """The keys of the memories that a row recalls; `kept` has these afterwards."""
        place = self.layout.position(self.maskmem_tpos_enc.shape[-1]).to(prepared)
        before = dict(kept)
        kept.clear()
        for frame, _ in recalled.frames:
            memory, own = _encoded(known[frame]), before.get(frame)
            if own is None or own.memory is not memory:
                values = self.tokens(memory.to(prepared)).contiguous()
                layers = self.memory_attention.layers
                placed = (values + place)[None]
                keys = [layer.cross_attn_image.keys(placed, self.layout)[0] for layer in layers]
                own = MemoryKeys(memory, values, keys)
            kept[frame] = own
        return [kept[frame] for frame, _ in recalled.frames]

    def _attend_to_keys(
        self,
        prepared: Tensor,
        keys: Sequence[Sequence[MemoryKeys]],
        slots: Tensor,
        pointers: Tensor | None,
        ages: Tensor | None,
        rows: Tensor | None,
        work: Workspace,
    ) -> Tensor:
        """`attend` to keys that are known but for the time of their memories, which changes."""
        cells, attention = self.layout.count, self.memory_attention
        layers = [layer.cross_attn_image for layer in attention.layers]
        times = work.constant("times", self._times)
        further: list[Tensor] = []
        tokens = prepared.new_empty(len(keys), 0, self.maskmem_tpos_enc.shape[-1])
        if pointers is not None and ages is not None:
            tokens, age = self._pointer_tokens(prepared, pointers, ages)
            further = [cross.k_proj(tokens + age) for cross in layers]
        count, places = slots.shape[1] * cells, slots.tolist()

        def recalled(number: int, piece: slice) -> tuple[Tensor, Tensor]:
            objects = range(*piece.indices(len(keys)))
            total = count + tokens.shape[1]
            width = times[number].shape[-1]
            k = work.empty("keys", (len(objects), total, width), times[number])
            v = work.empty("values", (len(objects), total, tokens.shape[-1]), tokens)
            for row, placed, plain in zip(objects, k, v, strict=True):
                parts = placed[:count].split(cells), plain[:count].split(cells)
                for own, value, memory, slot in zip(*parts, keys[row], places[row], strict=True):
                    torch.add(memory.keys[number], times[number][slot], out=own)
                    if number == 0:
                        value.copy_(memory.values)
            if further:
                k[:, count:], v[:, count:] = further[number][piece], tokens[piece]
            return k, v

        return attention.attend(prepared, recalled, self.grid, rows, work=work)

    def _times(self) -> list[Tensor]:
        """Of each layer, the part of keys that each slot adds: (slots, T, C)."""
        times = []
        for layer in self.memory_attention.layers:
            time = F.linear(self.maskmem_tpos_enc[:, 0], layer.cross_attn_image.k_proj.weight)
            times.append(self.layout.rotate(time.expand(-1, self.layout.count, -1).contiguous()))
        return times

    def attend(
        self,
        prepared: Tensor,
        spatial: Tensor,
        slots: Tensor,
        pointers: Tensor | None = None,
        ages: Tensor | None = None,
        exists: Tensor | None = None,
    ) -> Tensor:
        """Condition the embedding of frames on memories; differentiable.

        Args:
            prepared: (P, h * w, C), rows of `memory_attention.prepare`.
            spatial: (P, N, *memory_shape), memories.
            slots: int64 (P, N), the row of `maskmem_tpos_enc` of each.
            pointers: (P, M, C), object pointers, or None.
            ages: float32 (P, M), how far their frames are, as a fraction of the longest distance.
            exists: bool (P, N + M), memories and pointers that a row has; None: all.

        Returns:
            (P, C, h, w).
        """
        width = self.maskmem_tpos_enc.shape[-1]
        memory = self.tokens(spatial.to(prepared))
        place = self.layout.position(width).to(prepared)
        time = self.maskmem_tpos_enc[slots.to(prepared.device), 0]
        tokens, positions = [memory.flatten(1, 2)], [(place + time).flatten(1, 2)]
        repeats, count = [place.shape[0]] * spatial.shape[1], 0
        if pointers is not None and ages is not None:
            own, age = self._pointer_tokens(prepared, pointers, ages)
            tokens.append(own)
            positions.append(age)
            count = tokens[-1].shape[1]
            repeats += [pointers.shape[-1] // width] * pointers.shape[1]
        if exists is not None:
            of_each = torch.tensor(repeats, device=exists.device)
            exists = exists.repeat_interleave(of_each, dim=1)
        memories, places = torch.cat(tokens, dim=1), torch.cat(positions, dim=1)
        return self.memory_attention(
            prepared, memories, places, self.grid, self.layout, count, exists
        )

    def _pointer_tokens(
        self, prepared: Tensor, pointers: Tensor, ages: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens of pointers (P, M, C) of some ages (P, M), and their times: (P, M * C / D, D)."""
        width, ages = self.maskmem_tpos_enc.shape[-1], ages.to(prepared.device)
        pieces = pointers.shape[-1] // width
        tokens = pointers.to(prepared).unflatten(2, (pieces, width)).flatten(1, 2)
        if self.obj_ptr_tpos_proj is None:
            return tokens, torch.zeros_like(tokens)
        age = self.obj_ptr_tpos_proj(sine_time(ages.flatten(), pointers.shape[-1]))
        age = age.unflatten(0, ages.shape).repeat_interleave(pieces, dim=1)
        return tokens, age.to(prepared)

    def memorize(
        self,
        embedding: Tensor,
        logits: Tensor,
        scores: Tensor,
        binary: bool = False,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Encode frames with the masks of objects; differentiable.

        Args:
            embedding: (B, C, h, w), frames, without memories.
            logits: float32 (P, hm, wm).
            scores: float32 (P,), logit that the object is in the frame.
            binary: whether masks are binarised, as those of prompted frames may be.
            rows: int64 (P,), the frame of each object; None: P equals B and they correspond.

        Returns:
            bfloat16 (P, *memory_shape).
        """
        frames = self.memory_encoder.project(embedding)
        size = PIECE if infers_on_cpu(logits) else max(1, len(logits))
        parts = []
        for first in range(0, len(logits), size):
            piece = slice(first, first + size)
            own = frames[piece] if rows is None else frames[rows[piece]]
            parts.append(self._memorize(own, logits[piece, None], scores[piece], binary))
        return torch.cat(parts)

    def _memorize(self, frames: Tensor, masks: Tensor, scores: Tensor, binary: bool) -> Tensor:
        if masks.shape[-2:] != self.mask_size:
            masks = F.interpolate(masks, self.mask_size, mode="bilinear", align_corners=False)
        masks = (masks > 0).to(masks.dtype) if binary else masks.sigmoid()
        memory = self.memory_encoder(frames, (masks * SCALE).add_(OFFSET).to(frames.dtype))
        if self.no_obj_embed_spatial is not None:
            absent = (scores <= 0)[:, None, None, None].to(memory.dtype)
            memory = memory + absent * self.no_obj_embed_spatial[..., None, None]
        if self.spatial_perceiver is not None:
            memory = self.spatial_perceiver(memory)
        return memory.to(STORED)


def _encoded(entry: Entry) -> Tensor:
    assert entry.memory is not None, "the memory of a frame is encoded before others recall it"
    return entry.memory
