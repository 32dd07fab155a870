"""One SAM as a batched service, shared by everybody and changed by nobody."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from torch.nn import functional as F

from sam_gym.backbones.attention import fuse_attention
from sam_gym.backbones.decode import Prompts, decode_tokens
from sam_gym.backbones.hq import embedding_channels, encode_pixels

#: Precisions by name, of models and of embeddings on disk.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Backbone:
    """A frozen SAM on one device.

    Args:
        name: the registered name.
        sam: the model; this object owns it from now on.
        device: where it runs.
        dtype: float32, or a lower precision for autocast.
    """

    def __init__(self, name: str, sam: Sam, device: torch.device, dtype: torch.dtype) -> None:
        self.name, self.device, self.dtype = name, device, dtype
        self.sam = sam.to(device).eval().requires_grad_(False)
        fuse_attention(self.sam.image_encoder)
        self.image_size: int = sam.image_encoder.img_size
        grid = sam.prompt_encoder.image_embedding_size
        #: (C, h, w) of one embedding.
        self.embedding_shape = (embedding_channels(sam), *grid)
        #: (hm, wm) of a low-res mask.
        self.mask_shape = (4 * grid[0], 4 * grid[1])
        self._resizer = ResizeLongestSide(self.image_size)

    def __repr__(self) -> str:
        return f"Backbone({self.name!r}, device={str(self.device)!r}, dtype={self.dtype})"

    @cached_property
    def identity(self) -> str:
        """Hex digest of the name and all weights: tells whose embedding an embedding is."""
        digest = hashlib.sha256(f"{self.name}/{self.dtype}".encode())
        for key, value in sorted(self.sam.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:32]

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
        pixels = torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2)
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
        with self._autocast():
            return encode_pixels(self.sam, self.prepare(images)).float().contiguous()

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
        with self._autocast():
            tokens = decode_tokens(self.sam, embeddings, prompts)
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
        with self._autocast():
            logits, iou = decode_tokens(self.sam, embeddings, prompts).draw_best(multimask)
        return logits.float(), iou.float()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
        )
