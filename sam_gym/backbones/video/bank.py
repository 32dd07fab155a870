"""A memory whose content somebody decides: objects of many videos, one per row of a batch.

SAM 2 remembers the latest frames. A `MemoryBank` remembers those that it is told to. If it keeps
every frame in place of the oldest one, masks are those of `VideoTracker`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sam_gym.backbones.features import ImageFeatures
from sam_gym.backbones.prompts import PADDING_POINT, Prompts
from sam_gym.backbones.video.memory import Entry
from sam_gym.backbones.video.tracker import VideoTracker
from sam_gym.backbones.video.unroll import POINTERS, Decoded, FirstPrompts, decode_objects
from sam_gym.utils.transfer import to_device, to_host

#: Arrays of a bank with a row per object, on the CPU.
_ARRAYS = ("frames", "ious", "scores", "past_frames")
#: Tensors of a bank with a row per object, on the device.
_TENSORS = ("memories", "pointers", "masks", "pooled", "past", "logits")


class MemoryBank:
    """What is remembered of N objects, each in a video of its own.

    An object has *places*: the prompted frames, K slots for tracked frames, the latest one first,
    and the present frame, which it does not attend to. Empty places have the frame -1.

    As in SAM 2, a frame attends to the memories of all places and to object pointers. Slot `k` has
    the temporal position of a frame `k + 1` before. Pointers are those of prompted frames, and of
    the frames among the last 15 that were kept, even if their slots were overwritten since.

    Args:
        tracker: the model.
        num_rows: N.
        num_prompted: number of places for prompted frames.

    Attributes:
        num_slots: K.
        slots: indices of the slots among the places.
        present: index of the present frame.
        frames: int64 (N, places), frame of each place.
        ious: float32 (N, places), predicted IoU.
        scores: float32 (N, places), logit that the object is in the frame.
        memories: bfloat16 (N, places, *memory_shape), see `VideoMemory`.
        pointers: float32 (N, places, C).
        masks: bool (N, places, hm, wm), low-res.
        pooled: float32 (N, places, D), the memory's mean over the mask, or over the frame where the
            mask is empty.
        past: float32 (N, 15, C), pointers of frames that were kept, the latest first.
        past_frames: int64 (N, 15), their frames.
        logits: float32 (N, hm, wm), of the present frame.
    """

    def __init__(self, tracker: VideoTracker, num_rows: int, num_prompted: int = 1) -> None:
        self.tracker, backbone = tracker, tracker.backbone
        width, *_ = backbone.embedding_shape
        self.num_slots = tracker.memory.slots - 1
        self.slots = np.arange(num_prompted, num_prompted + self.num_slots)
        self.present = num_prompted + self.num_slots
        rows, depth = (num_rows, self.present + 1), tracker.memory.maskmem_tpos_enc.shape[-1]
        self.frames = np.full(rows, -1, np.int64)
        self.ious, self.scores = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
        self.past_frames = np.full((num_rows, POINTERS - 1), -1, np.int64)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=backbone.device)

        self.memories = zeros(*rows, *tracker.memory.memory_shape, dtype=torch.bfloat16)
        self.pointers, self.pooled = zeros(*rows, width), zeros(*rows, depth)
        self.masks = zeros(*rows, *backbone.mask_shape, dtype=torch.bool)
        self.past = zeros(num_rows, POINTERS - 1, width)
        self.logits = zeros(num_rows, *backbone.mask_shape)

    # Frames ------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, rows: np.ndarray, features: ImageFeatures, prompts: FirstPrompts) -> None:
        """Forget some objects, and prompt new ones in frame 0 of their videos.

        Args:
            rows: int64 (S,), without repetition.
            features: of S frames, from `Backbone.encode`.
            prompts: of S objects.
        """
        for name in ("frames", "past_frames"):
            getattr(self, name)[rows] = -1
        sam, memory, raw = self.tracker.sam, self.tracker.memory, self.tracker.raw(features)
        # As in SAM 2, a mask's pointer comes from the frame without the mark of a lone one.
        is_mask = prompts.is_mask[:, None, None, None]
        seen = torch.where(is_mask, raw.embedding, features.embedding)
        with self.tracker.backbone.autocast():
            given, own = prompts.prompts(memory), raw.merge(embedding=seen)
            decoded = decode_objects(sam, memory, own, given, prompts.ambiguous)
        entry = prompts.results(sam, decoded.entry)
        self._arrive(rows, raw, entry, np.zeros(len(rows), np.int64))
        self._move(rows, np.zeros(len(rows), np.int64), self.present)

    @torch.no_grad()
    def track(
        self,
        rows: np.ndarray,
        features: ImageFeatures,
        frames: np.ndarray,
        lengths: np.ndarray,
        *given: Any,
    ) -> Decoded:
        """Find objects in their next frames, which become the present ones, or correct these.

        Args:
            rows: int64 (S,), without repetition.
            features: of S frames, from `Backbone.encode`.
            frames: int64 (S,), their numbers.
            lengths: int64 (S,), number of frames of each video.
            *given: further arguments of `find`, for corrections.

        Returns:
            The decoded objects, with the masks that were not chosen.
        """
        decoded = self.find(rows, features, frames, lengths, *given)
        self._arrive(rows, self.tracker.raw(features), decoded.entry, frames)
        return decoded

    @torch.no_grad()
    def find(
        self,
        rows: np.ndarray,
        features: ImageFeatures,
        frames: np.ndarray,
        lengths: np.ndarray,
        frame_of: Tensor | None = None,
        prompts: Prompts | None = None,
        multimask: Tensor | None = None,
    ) -> Decoded:
        """Find objects in frames, and encode no memory of it; arguments as for `track`.

        Args:
            rows: int64 (S,).
            features: of B frames.
            frames: int64 (S,).
            lengths: int64 (S,).
            frame_of: int64 (S,), the row of `features` of each object; None: B equals S and they
                correspond.
            prompts: of S objects in their frames, in pixels of the input frame; None: none.
            multimask: bool (S,), rows that get the best of three masks; None: all.
        """
        sam, memory, device = self.tracker.sam, self.tracker.memory, self.logits.device
        if prompts is None:
            prompts = Prompts(
                torch.zeros((len(rows), 1, 2), device=device),
                torch.full((len(rows), 1), PADDING_POINT, device=device),
            )
        if multimask is None:
            multimask = torch.ones(len(rows), dtype=torch.bool, device=device)
        features = self.tracker.raw(features)
        with self.tracker.backbone.autocast():
            prepared = memory.memory_attention.prepare(features.embedding)
            if frame_of is not None:
                features, prepared = features[frame_of], prepared[frame_of]
            conditioned = self._attend(rows, prepared, frames, lengths)
            conditional = features.merge(embedding=conditioned)
            return decode_objects(sam, memory, conditional, prompts, multimask)

    def _attend(
        self, rows: np.ndarray, prepared: Tensor, frames: np.ndarray, lengths: np.ndarray
    ) -> Tensor:
        """Condition prepared frames (S, h * w, C) on the memories of their rows: (S, C, h, w)."""
        prompted, places = self.slots[0], self.present
        index, device = to_device(rows, self.logits.device), self.logits.device
        known = self.frames[rows]
        limits = np.minimum(lengths, POINTERS)[:, None]
        behind = frames[:, None] - self.past_frames[rows]
        ages = np.concatenate([frames[:, None] - known[:, :prompted], behind], axis=1)
        exists = [known[:, :places] >= 0, known[:, :prompted] >= 0]
        exists.append((self.past_frames[rows] >= 0) & (behind < limits))
        has_memory, has_pointer = exists[0], np.concatenate(exists[1:], axis=1)
        # Columns that no row has are left out.
        memories, pointers = (np.flatnonzero(own.any(axis=0)) for own in (has_memory, has_pointer))
        steps = np.r_[np.full(prompted, self.num_slots), np.arange(self.num_slots)]
        own = np.concatenate([has_memory[:, memories], has_pointer[:, pointers]], axis=1)
        every = torch.cat([self.pointers[index, :prompted], self.past[index]], dim=1)
        return self.tracker.memory.attend(
            prepared,
            self.memories[index[:, None], to_device(memories, device)],
            torch.from_numpy(np.tile(steps[memories], (len(rows), 1))),
            every[:, to_device(pointers, device)],
            torch.from_numpy((ages[:, pointers] / (limits - 1)).astype(np.float32)),
            None if own.all() else to_device(own, device),
        )

    def _arrive(
        self, rows: np.ndarray, features: ImageFeatures, entry: Entry, frames: np.ndarray
    ) -> None:
        """Encode the memories of decoded objects, and store them as those of the present frame."""
        index, place = to_device(rows, self.logits.device), self.present
        embedding, logits = features.embedding, entry.logits
        memory = self.tracker.memorize(embedding, logits, entry.score, False)
        mask = logits > self.tracker.backbone.mask_threshold
        self.memories[index, place], self.pointers[index, place] = memory, entry.pointer.float()
        self.masks[index, place], self.logits[index] = mask, logits
        placed = self.tracker.memory.map_of(memory.float())
        grid = self.tracker.memory.layout.grid
        cells = F.adaptive_avg_pool2d(mask[:, None].float(), grid)[:, 0]
        cells = torch.where(mask.any(dim=(1, 2))[:, None, None], cells, 1.0)
        weighted = (placed * cells[:, None]).sum(dim=(2, 3))
        self.pooled[index, place] = weighted / cells.sum(dim=(1, 2))[:, None]
        self.frames[rows, place] = frames
        self.ious[rows, place], self.scores[rows, place] = to_host(entry.iou, entry.score)

    # Decisions ---------------------------------------------------------------------------------

    def keep(self, rows: np.ndarray, slots: np.ndarray) -> None:
        """Remember the present frames of objects in slots, whose content is forgotten.

        The frame becomes the first slot; those before the one that is forgotten move up by one.

        Args:
            rows: int64 (S,), without repetition.
            slots: int64 (S,), from 0 to K - 1.
        """
        places = np.arange(self.num_slots)[None]
        shifted = np.where(places <= slots[:, None], places - 1, places) + self.slots[0]
        shifted[:, 0] = self.present
        self._move(rows, self.slots, shifted)
        index = to_device(rows, self.logits.device)
        latest = self.pointers[index, self.present][:, None]
        self.past[index] = torch.cat([latest, self.past[index, :-1]], dim=1)
        now = self.frames[rows, self.present][:, None]
        self.past_frames[rows] = np.concatenate([now, self.past_frames[rows, :-1]], axis=1)

    def keep_prompted(self, rows: np.ndarray) -> None:
        """Remember the present frames of objects as prompted ones, in their next such places.

        As in SAM 2, the slot and the pointer of the frame before are then empty in the next one.

        Args:
            rows: int64 (S,), without repetition, with an empty place for a prompted frame each.
        """
        empty = self.frames[rows, : self.slots[0]] < 0
        self._move(rows, empty.argmax(axis=1), self.present)
        self.keep(rows, np.full(len(rows), self.num_slots - 1))
        self.frames[rows, self.slots[0]] = self.past_frames[rows, 0] = -1

    def _move(self, rows: np.ndarray, to: np.ndarray, source: Any) -> None:
        """Copy places of some rows.

        Args:
            rows: int64 (S,).
            to: int64 (S,), a place of each row; or (M,), places of all rows with `source` (S, M).
            source: the place, or places, to copy from.
        """
        one = np.ndim(source) == 0
        first = rows if one else rows[:, None]
        for name in ("frames", "ious", "scores"):
            array = getattr(self, name)
            array[first, to] = array[first, source]
        device = self.logits.device
        index, target = to_device(first, device), to_device(to, device)
        origin = source if one else to_device(source, device)
        for name in ("memories", "pointers", "masks", "pooled"):
            tensor = getattr(self, name)
            tensor[index, target] = tensor[index, origin]

    def copy(self, rows: np.ndarray, repeats: int) -> MemoryBank:
        """Return a bank with each of some rows `repeats` times, in a row, for experiments."""
        own = object.__new__(MemoryBank)
        own.__dict__.update(self.__dict__)
        chosen = np.repeat(rows, repeats)
        index = to_device(chosen, self.logits.device)
        for name in _ARRAYS:
            setattr(own, name, getattr(self, name)[chosen])
        for name in _TENSORS:
            setattr(own, name, getattr(self, name)[index])
        return own

    # States ------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Leave the model out of copies and pickles: whoever makes them sets `tracker` again."""
        return {key: value for key, value in self.__dict__.items() if key != "tracker"}

    def get_state(self, row: int) -> dict[str, np.ndarray]:
        """Return a copy of what is remembered of an object; memories as the bits of bfloat16."""
        state = {name: getattr(self, name)[row].copy() for name in _ARRAYS}
        for name in _TENSORS:
            tensor = getattr(self, name)[row]
            bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
            state[name] = to_host(bits)[0].copy()
        return state

    def set_state(self, rows: Sequence[int], states: Sequence[dict[str, np.ndarray]]) -> None:
        """Restore what `get_state` has returned."""
        for row, state in zip(rows, states, strict=True):
            for name in _ARRAYS:
                getattr(self, name)[row] = state[name]
            for name in _TENSORS:
                tensor = getattr(self, name)
                value = torch.from_numpy(state[name].copy())
                bits = value.view(torch.bfloat16) if tensor.dtype == torch.bfloat16 else value
                tensor[row] = bits.to(tensor.device)
