"""Prompts of many images, ragged, in one batch, and SAM's prompt encoder.

Missing points, boxes and masks are masked out of attention, so batching does not change a row's
result. The weights are those of the segment_anything modules, read in place.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from segment_anything.modeling import PromptEncoder
from torch import Tensor

#: Value in `Prompts.labels` for a missing point, which is masked out of every attention.
NO_POINT = -2
#: SAM's own label for padding: a token without a position, which does take part in attention.
PADDING_POINT = -1


def unknown_label(name: str, label: float) -> str:
    """Return the message for a label that is none.

    Args:
        name: of the argument.
        label: the value.
    """
    return (
        f"{name} must be 1 (foreground), 0 (background), {PADDING_POINT} (SAM's padding) or "
        f"{NO_POINT} (no point), got {label:g}."
    )


@dataclass(frozen=True)
class Prompts:
    """P prompt sets, in pixels of the model's input frame (see `Backbone.to_input_frame`).

    Attributes:
        points: float32 (P, N, 2), (x, y).
        labels: int64 (P, N): 1 positive, 0 negative, `PADDING_POINT` for SAM's padding token,
            `NO_POINT` where a row has fewer points.
        boxes: float32 (P, 4), (x0, y0, x1, y1), or None.
        has_box: bool (P,), which rows have a box (None: all, if `boxes` is given).
        masks: float32 (P, hm, wm), previous low-res mask logits, or None.
        has_mask: bool (P,), which rows have a mask (None: all, if `masks` is given).
        rows: int64 (P,), the image of each prompt set (None: prompt set i is for image i).
    """

    points: Tensor | None = None
    labels: Tensor | None = None
    boxes: Tensor | None = None
    has_box: Tensor | None = None
    masks: Tensor | None = None
    has_mask: Tensor | None = None
    rows: Tensor | None = None

    def __len__(self) -> int:
        for item in (self.points, self.boxes, self.masks):
            if item is not None:
                return len(item)
        raise ValueError("A prompt needs at least points, boxes or masks; all of them are None.")

    def check(self, num_images: int, mask_shape: tuple[int, int]) -> None:
        """Raise `ValueError` for wrong types, shapes or labels, and values that are not finite.

        Reads values, so that a GPU has to finish first: not for every step of an environment.

        Args:
            num_images: images that the prompts are for.
            mask_shape: (hm, wm) of a low-res mask.
        """
        for name, value in vars(self).items():
            if value is not None and not isinstance(value, Tensor):
                raise ValueError(f"{name} must be a tensor, got {type(value).__name__}.")
        count = len(self)
        if (self.points is None) != (self.labels is None):
            given, missing = "points", "labels"
            if self.points is None:
                given, missing = missing, given
            raise ValueError(f"{given} were given without {missing}.")
        many = None if self.points is None else self.points.shape[1:2]
        shapes: dict[str, tuple[Any, ...]] = {
            "points": (*(many or ()), 2),
            "labels": tuple(many or ()),
            "boxes": (4,),
            "masks": mask_shape,
        }
        for name, value in vars(self).items():
            if value is None:
                continue
            expected = (count, *shapes.get(name, ()))
            if value.shape != expected:
                raise ValueError(f"{name} must have shape {expected}, got {tuple(value.shape)}.")
            if name in ("has_box", "has_mask"):
                if value.dtype != torch.bool:
                    raise ValueError(f"{name} must be bool, got {value.dtype}.")
            elif name in ("labels", "rows"):
                if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
                    raise ValueError(f"{name} must be integers, got {value.dtype}.")
            elif not value.isfinite().all():
                raise ValueError(f"{name} has values that are NaN or infinite.")
        if self.labels is not None:
            unknown = self.labels[(self.labels > 1) | (self.labels < NO_POINT)]
            if len(unknown):
                raise ValueError(unknown_label("labels", unknown[0].item()))
        rows = self.rows
        if rows is not None and count and not 0 <= int(rows.min()) <= int(rows.max()) < num_images:
            raise ValueError(f"rows must be from 0 to {num_images - 1}, the number of an image.")

    def take(self, index: Tensor) -> Prompts:
        """Select prompt sets by index, int64 (K,)."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return Prompts(**{name: None if v is None else v[index] for name, v in parts.items()})


def encode_points_and_boxes(
    encoder: PromptEncoder, prompts: Prompts, close_boxes: bool = False
) -> tuple[Tensor, Tensor]:
    """Encode prompts as tokens (P, T, C), and which of them exist, bool (P, T).

    Args:
        encoder: the module whose weights are used.
        prompts: P prompt sets.
        close_boxes: close prompts with a box, too, with one "not a point" token, as SAM 2 does.
    """
    tokens, present = [], []
    count = len(prompts)
    weight, padding = encoder.no_mask_embed.weight, encoder.not_a_point_embed.weight
    has_box = torch.zeros(count, dtype=torch.bool, device=weight.device)
    if prompts.boxes is not None:
        has_box = ~has_box if prompts.has_box is None else prompts.has_box
    if prompts.points is not None:
        if prompts.labels is None:
            raise ValueError("points were given without labels.")
        position = encoder.pe_layer.forward_with_coords(
            prompts.points.float() + 0.5, encoder.input_image_size
        )
        kinds = torch.stack([encoder.point_embeddings[k].weight[0] for k in (0, 1)])
        kind = kinds[prompts.labels.clamp(0, 1)]
        tokens.append(
            torch.where((prompts.labels == PADDING_POINT)[..., None], padding, position + kind)
        )
        exists = prompts.labels != NO_POINT
        present.append(exists)
        if not close_boxes and (prompts.boxes is None or prompts.has_box is not None):
            # SAM closes a list of points that has no box with one "not a point" token.
            tokens.append(padding.expand(count, 1, -1))
            present.append((exists.any(dim=1) & ~has_box)[:, None])
    if prompts.boxes is not None:
        corners = prompts.boxes.reshape(-1, 2, 2).float() + 0.5
        position = encoder.pe_layer.forward_with_coords(corners, encoder.input_image_size)
        kinds = torch.stack([encoder.point_embeddings[k].weight[0] for k in (2, 3)])
        tokens.append(position + kinds)
        present.append(has_box[:, None].expand(-1, 2))
    if close_boxes and tokens:
        tokens.append(padding.expand(count, 1, -1))
        present.append(torch.cat(present, dim=1).any(dim=1, keepdim=True))
    if not tokens:
        empty = weight.new_zeros((count, 0, weight.shape[1]))
        return empty, empty.new_zeros((count, 0), dtype=torch.bool)
    return torch.cat(tokens, dim=1), torch.cat(present, dim=1)


def encode_masks(encoder: PromptEncoder, prompts: Prompts, limit: float | None = None) -> Tensor:
    """Encode mask prompts, to be added to the image embedding: (P, C, h, w), or (1, C, 1, 1).

    Args:
        encoder: the module whose weights are used.
        prompts: P prompt sets.
        limit: bound on the absolute value of logits, or None.
    """
    none = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
    if prompts.masks is None:
        return none
    masks = prompts.masks if limit is None else prompts.masks.clamp(-limit, limit)
    *first, last = encoder.mask_downscaling
    dense = masks[:, None]
    for layer in first:
        dense = layer(dense)
    # Channels-last as embeddings are: the sum of both needs no copy.
    dense = last(dense.contiguous(memory_format=torch.channels_last))
    if prompts.has_mask is None:
        return dense
    return torch.where(prompts.has_mask[:, None, None, None], dense, none)
