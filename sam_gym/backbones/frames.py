"""How images fill the square input frame: padded, as in SAM, or squashed, as in SAM 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

import numpy as np
import torch
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from torch.nn import functional as F

from sam_gym.utils.transfer import to_device

#: (x0, y0, x1, y1) in pixels, without x1 and y1.
Window = tuple[int, int, int, int]


class Frame(Protocol):
    """A square input frame of S x S pixels."""

    #: Whether images are stretched to the whole frame, so that it has no padding.
    squashes: ClassVar[bool]

    def input_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in the frame of an image of (height, width)."""

    def masks_at(
        self, logits: Tensor, image_size: tuple[int, int], window: Window | None = None
    ) -> Tensor:
        """Resize low-res logits (..., hm, wm) to an image's size, (..., height, width).

        Args:
            logits: of masks.
            image_size: (height, width).
            window: compute this part of the result only.
        """

    def framed(self, image: np.ndarray) -> np.ndarray:
        """Bring an image uint8 (H, W, 3) into the frame: uint8 (S, S, 3)."""

    def pixels(
        self, images: Sequence[np.ndarray], mean: Tensor, deviation: Tensor, device: torch.device
    ) -> Tensor:
        """Normalised pixels of B images uint8 (H, W, 3): float32 (B, 3, S, S) on a device.

        Args:
            images: sizes may differ.
            mean: of each channel, (3, 1, 1), for values from 0 to 255.
            deviation: of each channel, (3, 1, 1).
            device: where the result is.
        """


class PaddedFrame:
    """SAM's frame: the longest side is resized to S, the rest is padded at the bottom or right."""

    squashes: ClassVar[bool] = False

    def __init__(self, size: int) -> None:
        self.size = size
        self._resizer = ResizeLongestSide(size)

    def input_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        return self._resizer.get_preprocess_shape(*image_size, self.size)

    def masks_at(
        self, logits: Tensor, image_size: tuple[int, int], window: Window | None = None
    ) -> Tensor:
        height, width = self.input_size(image_size)
        full = _resized(logits, (self.size, self.size))
        if window is not None:
            return _resized_window(full[..., :height, :width], image_size, window)
        if (height, width) != tuple(full.shape[-2:]) or (height, width) != tuple(image_size):
            full = _resized(full[..., :height, :width], image_size)
        return full

    def framed(self, image: np.ndarray) -> np.ndarray:
        if image.shape[:2] == (self.size, self.size):
            return image
        frame = np.zeros((self.size, self.size, 3), np.uint8)
        resized = self._resize(image)
        frame[: resized.shape[0], : resized.shape[1]] = resized
        return frame

    def pixels(
        self, images: Sequence[np.ndarray], mean: Tensor, deviation: Tensor, device: torch.device
    ) -> Tensor:
        batch = np.zeros((len(images), self.size, self.size, 3), np.uint8)
        sizes = []
        for frame, image in zip(batch, images, strict=True):
            resized = self._resize(image)
            height, width = resized.shape[:2]
            frame[:height, :width] = resized
            sizes.append((height, width))
        pixels = (to_device(batch, device).permute(0, 3, 1, 2) - mean) / deviation
        for frame, (height, width) in zip(pixels, sizes, strict=True):
            frame[:, height:] = 0.0
            frame[:, :, width:] = 0.0
        return pixels

    def _resize(self, image: np.ndarray) -> np.ndarray:
        if max(image.shape[:2]) == self.size:
            return image
        return self._resizer.apply_image(image)


class SquashedFrame:
    """SAM 2's frame: images are stretched to S x S."""

    squashes: ClassVar[bool] = True

    def __init__(self, size: int) -> None:
        self.size = size

    def input_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        return self.size, self.size

    def masks_at(
        self, logits: Tensor, image_size: tuple[int, int], window: Window | None = None
    ) -> Tensor:
        if window is not None:
            return _resized_window(logits.float(), image_size, window)
        return _resized(logits, image_size)

    def framed(self, image: np.ndarray) -> np.ndarray:
        if image.shape[:2] == (self.size, self.size):
            return image
        return self._resize(image)[0].permute(1, 2, 0).round().to(torch.uint8).numpy()

    def pixels(
        self, images: Sequence[np.ndarray], mean: Tensor, deviation: Tensor, device: torch.device
    ) -> Tensor:
        batch = torch.empty((len(images), 3, self.size, self.size))
        for frame, image in zip(batch, images, strict=True):
            frame[:] = self._resize(image)[0]
        return batch.to(device).sub_(mean).div_(deviation)

    def _resize(self, image: np.ndarray) -> Tensor:
        """Resize uint8 (H, W, 3), without rounding: float32 (1, 3, S, S), 0 to 255."""
        pixels = torch.from_numpy(np.ascontiguousarray(image, np.float32)).permute(2, 0, 1)[None]
        size = (self.size, self.size)
        if pixels.shape[-2:] == size:
            return pixels
        return F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)


def _resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize logits (..., h, w) bilinearly to (..., height, width), float32."""
    flat = logits.reshape(-1, 1, *logits.shape[-2:]).float()
    full = F.interpolate(flat, size, mode="bilinear", align_corners=False)
    return full.reshape(*logits.shape[:-2], *size)


def _resized_window(logits: Tensor, size: tuple[int, int], window: Window) -> Tensor:
    """Return a window of `_resized`, but for rounding."""

    def neighbours(cells: int, pixels: int, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """The two cells that pixels from `first` to `last` lie between, and the second's weight."""
        places = torch.arange(first, last, dtype=torch.float64, device=logits.device) + 0.5
        places = (places * (cells / pixels) - 0.5).clamp(min=0)
        one = places.long().clamp(max=cells - 1)
        return one, (one + 1).clamp(max=cells - 1), (places - one).float()

    x0, y0, x1, y1 = window
    one, other, weight = neighbours(logits.shape[-2], size[0], y0, y1)
    rows = torch.lerp(logits[..., one, :], logits[..., other, :], weight[:, None])
    one, other, weight = neighbours(logits.shape[-1], size[1], x0, x1)
    return torch.lerp(rows[..., one], rows[..., other], weight)
