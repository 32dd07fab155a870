"""One SAM as a batched service, shared by everybody and changed by nobody."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from torch.nn import functional as F

from sam_gym.backbones.adapters.adapter import Adapter, Model, digest_of
from sam_gym.backbones.attention import fuse_attention
from sam_gym.backbones.compiled import FixedShapes, padded_size
from sam_gym.backbones.decode import NO_POINT, Prompts
from sam_gym.backbones.memory import keep_freed_memory
from sam_gym.utils.transfer import to_device

#: Precisions by name, of models and of embeddings on disk.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Points of a compiled call: this many, or twice, four times, ... as many.
_POINTS = 8


class Backbone:
    """A frozen SAM on one device.

    Args:
        name: the registered name.
        sam: the model; this object owns it from now on.
        device: where it runs.
        dtype: float32, or a lower precision for autocast.
        compile: run `encode` and `decode_best` compiled, with CUDA graphs on CUDA; batches are
            padded to a few fixed shapes, each of which compiles at its first call.
        adapter: what was learned on top of it.

    Raises:
        ValueError: the adapter was made for another model, or cannot be compiled.
    """

    def __init__(
        self,
        name: str,
        sam: Sam,
        device: torch.device,
        dtype: torch.dtype,
        compile: bool = False,
        adapter: Adapter | None = None,
    ) -> None:
        self.name, self.device, self.dtype = name, device, dtype
        if device.type == "cpu":
            keep_freed_memory()
        self.sam = sam.to(device).eval().requires_grad_(False)
        fuse_attention(self.sam.image_encoder)
        #: The model at work: that SAM, or what an adapter has made of it.
        self.model = Model(self.sam)
        self.adapter = adapter
        if adapter is not None:
            adapter.check_fits(name, self.weights_digest)
            self.model = adapter.model(self.sam).to(device)
        self.image_size: int = sam.image_encoder.img_size
        grid = sam.prompt_encoder.image_embedding_size
        #: (C, h, w) of one embedding.
        self.embedding_shape = (self.model.channels, *grid)
        #: (hm, wm) of a low-res mask.
        self.mask_shape = (4 * grid[0], 4 * grid[1])
        self._resizer = ResizeLongestSide(self.image_size)
        self._encode: Callable[..., Sequence[Tensor]] = partial(_encode, self.model)
        self._decode_best: Callable[..., Sequence[Tensor]] = partial(_decode_best, self.model)
        self.compiled = compile
        if compile and not self.model.fixed_shapes:
            raise ValueError(
                "An adapter that chooses among experts does not compile: compile=False."
            )
        if compile:
            self._encode = FixedShapes(self._encode)
            self._decode_best = FixedShapes(self._decode_best)

    def __repr__(self) -> str:
        compiled = ", compiled" if self.compiled else ""
        adapted = f", adapted by {self.adapter.method}" if self.adapter is not None else ""
        device = str(self.device)
        return f"Backbone({self.name!r}, device={device!r}, dtype={self.dtype}{compiled}{adapted})"

    @cached_property
    def weights_digest(self) -> str:
        """Hex digest of the weights of the SAM, whatever its precision: tells adapters apart."""
        return digest_of(self.sam.state_dict())

    @cached_property
    def identity(self) -> str:
        """Hex digest of the name and all weights: tells whose embedding an embedding is."""
        state = self.sam.state_dict()
        if self.adapter is not None:
            state |= self.adapter.state
        return digest_of(state, f"{self.name}/{self.dtype}")

    def with_model(self, model: Model) -> Backbone:
        """The same SAM with another model at work on it, as a trainer has it; not compiled."""
        own = copy.copy(self)
        own.model, own.compiled = model, False
        own.embedding_shape = (model.channels, *self.embedding_shape[1:])
        own._encode, own._decode_best = partial(_encode, model), partial(_decode_best, model)
        return own

    def private_copy(self) -> Sam:
        """A copy of the model that a trainer may change; all its parameters require gradients."""
        return copy.deepcopy(self.sam).requires_grad_(True)

    # Frames ------------------------------------------------------------------------------------

    def input_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) that an image of (height, width) has once its longest side fits."""
        return self._resizer.get_preprocess_shape(*image_size, self.image_size)

    def to_input_frame(self, points: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
        """Scale (x, y) pixels of an image of (height, width) to the model's input frame.

        Args:
            points: (..., 2), (x, y). A box is two points.
            image_size: (height, width) of the image.

        Returns:
            float32, same shape.
        """
        height, width = self.input_size(image_size)
        scale = np.array([width / image_size[1], height / image_size[0]])
        return (np.asarray(points, np.float64) * scale).astype(np.float32)

    def masks_at(self, logits: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Low-res logits (..., hm, wm) as logits at an image's size (..., height, width)."""
        height, width = self.input_size(image_size)
        flat = logits.reshape(-1, 1, *logits.shape[-2:]).float()
        full = F.interpolate(flat, (self.image_size,) * 2, mode="bilinear", align_corners=False)
        if (height, width) != tuple(full.shape[-2:]) or (height, width) != tuple(image_size):
            full = full[..., :height, :width]
            full = F.interpolate(full, image_size, mode="bilinear", align_corners=False)
        return full.reshape(*logits.shape[:-2], *image_size)

    def resize(self, image: np.ndarray) -> np.ndarray:
        """Scale uint8 (H, W, 3) so that its longest side is the model's, as SAM does."""
        if max(image.shape[:2]) == self.image_size:
            return image
        return self._resizer.apply_image(image)

    def framed(self, image: np.ndarray) -> np.ndarray:
        """An image as SAM sees it, uint8 (S, S, 3): longest side resized, padded with black."""
        size = self.image_size
        if image.shape[:2] == (size, size):
            return image
        frame = np.zeros((size, size, 3), np.uint8)
        resized = self.resize(image)
        frame[: resized.shape[0], : resized.shape[1]] = resized
        return frame

    # Work --------------------------------------------------------------------------------------

    def prepare(self, images: Sequence[np.ndarray]) -> Tensor:
        """Resize the longest side, normalise and pad: float32 (B, 3, S, S) on the device."""
        batch = np.zeros((len(images), self.image_size, self.image_size, 3), np.uint8)
        sizes = []
        for slot, image in zip(batch, images, strict=True):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(
                    f"An image must be uint8 (H, W, 3), got {image.dtype} {image.shape}."
                )
            resized = self.resize(image)
            height, width = resized.shape[:2]
            slot[:height, :width] = resized
            sizes.append((height, width))
        pixels = to_device(batch, self.device).permute(0, 3, 1, 2)
        pixels = (pixels - self.sam.pixel_mean) / self.sam.pixel_std
        for slot, (height, width) in zip(pixels, sizes, strict=True):
            slot[:, height:] = 0.0
            slot[:, :, width:] = 0.0
        return pixels

    @torch.no_grad()
    def encode(self, images: Sequence[np.ndarray]) -> Tensor:
        """Encode images of any size.

        Args:
            images: B arrays uint8 (H, W, 3), RGB; sizes may differ.

        Returns:
            Embeddings, float32 (B, C, h, w), on the device.

        Raises:
            ValueError: an image has another dtype or shape.
        """
        with self.autocast():
            return self._encode(self.prepare(images))[0].float().contiguous()

    @torch.no_grad()
    def decode(
        self, embeddings: Tensor, prompts: Prompts, *, multimask: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Decode P prompt sets in one call; every row gives what it would give alone.

        Args:
            embeddings: (B, C, h, w) from `encode`.
            prompts: P prompt sets (see `Prompts`).
            multimask: the three masks for ambiguous prompts, instead of the single one.

        Returns:
            Mask logits float32 (P, M, hm, wm) and predicted IoU float32 (P, M); M is 3 or 1.
        """
        with self.autocast():
            tokens = self.model.decode(embeddings, prompts)
            chosen = slice(1, None) if multimask else slice(0, 1)
            logits = tokens.draw(tokens.vectors[:, chosen])
        return logits.float(), tokens.iou[:, chosen].float()

    @torch.no_grad()
    def decode_best(
        self, embeddings: Tensor, prompts: Prompts, multimask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Decode one mask per prompt set: of three by predicted IoU, or the single one.

        Args:
            embeddings: (B, C, h, w) from `encode`.
            prompts: P prompt sets.
            multimask: bool (P,), which rows are ambiguous (a first click).

        Returns:
            Mask logits float32 (P, hm, wm) and predicted IoU float32 (P,).
        """
        if self.compiled and len(prompts):
            embeddings, prompts = _whole(embeddings, prompts)
        work = self._decode_best if len(prompts) else partial(_decode_best, self.model)
        with self.autocast():
            logits, iou = work(
                embeddings,
                prompts.points,
                prompts.labels,
                prompts.boxes,
                prompts.has_box,
                prompts.masks,
                prompts.has_mask,
                prompts.rows,
                multimask,
            )
        return logits.float(), iou.float()

    def autocast(self) -> torch.autocast:
        """The context in which the model runs in the precision of the backbone."""
        return torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
        )


def _encode(model: Model, pixels: Tensor) -> tuple[Tensor]:
    return (model.encode(pixels),)


def _decode_best(
    model: Model, embeddings: Tensor, *prompts_and_multimask: Any
) -> tuple[Tensor, Tensor]:
    *prompts, multimask = prompts_and_multimask
    return model.decode(embeddings, Prompts(*prompts)).draw_best(multimask)


def _whole(embeddings: Tensor, prompts: Prompts) -> tuple[Tensor, Prompts]:
    """The same prompts in a form of few shapes.

    Every prompt set has its own embedding, `_POINTS` points or a larger power of two, a box and,
    if any of them has one, a mask; what it does not have is marked as absent.
    """
    count, device = len(prompts), embeddings.device
    points, labels = prompts.points, prompts.labels
    if points is None or labels is None:
        points = torch.zeros((count, 0, 2), device=device)
        labels = torch.zeros((count, 0), dtype=torch.int64, device=device)
    missing = max(_POINTS, padded_size(points.shape[1])) - points.shape[1]
    boxes, masks = prompts.boxes, prompts.masks
    has_box, has_mask = prompts.has_box, prompts.has_mask
    if has_box is None:
        has_box = torch.full((count,), boxes is not None, device=device)
    if has_mask is None and masks is not None:
        has_mask = torch.ones(count, dtype=torch.bool, device=device)
    return embeddings if prompts.rows is None else embeddings[prompts.rows], Prompts(
        points=F.pad(points, (0, 0, 0, missing)),
        labels=F.pad(labels, (0, missing), value=NO_POINT),
        boxes=torch.zeros((count, 4), device=device) if boxes is None else boxes,
        has_box=has_box,
        masks=masks,
        has_mask=has_mask,
    )
