"""Zoom-in: look at an object again in a window around its mask, at a higher resolution.

After RITM (Sofiiuk et al. 2021, "Reviving Iterative Training with Mask Guidance", `ZoomIn` in the
authors' code): the window is the bounding box of mask and clicks, with a margin.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from torch import Tensor
from torch.nn import functional as F

from sam_gym.backbones.protocols import BackboneService
from sam_gym.utils.transfer import to_device

#: Sides of the window in those of the bounding box.
MARGIN = 1.4
#: Smallest side of a window, as a fraction of the longer side of the image.
SMALLEST = 0.1
#: A window whose longer side is a larger fraction of the image's shows the whole image instead.
LARGEST = 0.8
#: A window is kept while its IoU with the one that a new mask asks for is larger.
KEEP = 0.5


class Window(NamedTuple):
    """Pixels of an image: columns x0 to x1 and rows y0 to y1, half-open."""

    x0: int
    y0: int
    x1: int
    y1: int

    @classmethod
    def whole(cls, size: tuple[int, int]) -> Window:
        """The window that shows an image of (height, width)."""
        return cls(0, 0, size[1], size[0])

    @classmethod
    def around(cls, mask: np.ndarray, points: np.ndarray) -> Window:
        """The window that shows a mask and clicks.

        Args:
            mask: bool (H, W).
            points: float (N, 2), (x, y) in pixels of the image.
        """
        whole, sides = cls.whole(mask.shape), np.array(mask.shape[::-1])
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(rows):
            return whole
        corners = np.array([[columns[0], rows[0]], [columns[-1], rows[-1]]], float)
        corners = np.concatenate([corners, points])
        low, high = corners.min(axis=0), corners.max(axis=0) + 1
        extent = np.maximum(MARGIN * (high - low), SMALLEST * sides.max())
        if extent.max() > LARGEST * sides.max():
            return whole
        # A window keeps its size at the border of the image.
        extent = np.minimum(extent, sides)
        start = np.clip((low + high - extent) / 2, 0, sides - extent)
        x0, y0 = np.floor(start).astype(int).tolist()
        x1, y1 = np.minimum(np.ceil(start + extent).astype(int), sides).tolist()
        return cls(x0, y0, x1, y1)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.y1 - self.y0, self.x1 - self.x0

    @property
    def start(self) -> tuple[int, int]:
        """(x, y) of the first pixel."""
        return self.x0, self.y0

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns, to index an image."""
        return slice(self.y0, self.y1), slice(self.x0, self.x1)

    def inside(self, points: np.ndarray) -> np.ndarray:
        """Return which points (N, 2) lie in the window: bool (N,)."""
        within = (points >= self.start) & (points < (self.x1, self.y1))
        return np.all(within, axis=1)

    def iou(self, other: Window) -> float:
        """Return the intersection over union with another window."""
        width = max(0, min(self.x1, other.x1) - max(self.x0, other.x0))
        height = max(0, min(self.y1, other.y1) - max(self.y0, other.y0))
        areas = [own.size[0] * own.size[1] for own in (self, other)]
        return width * height / (sum(areas) - width * height)


def low_res_logits(backbone: BackboneService, logits: Tensor, window: Window) -> Tensor:
    """Resample logits of an image to the low-res frame of a window of it.

    Args:
        backbone: the SAM.
        logits: float32 (H, W).
        window: the part that the frame shows.

    Returns:
        float32 (hm, wm), as the backbone takes mask prompts.
    """
    height, width = backbone.input_size(window.size)
    side = backbone.image_size
    frame = logits.new_full((side, side), float(logits.min()))
    own = logits[window.slices][None, None]
    frame[:height, :width] = F.interpolate(own, (height, width), mode="bilinear")[0, 0]
    return F.interpolate(frame[None, None], backbone.mask_shape, mode="area")[0, 0]


def mask_prompt(backbone: BackboneService, mask: np.ndarray) -> Tensor:
    """Return a mask of an image as SAM takes mask prompts.

    Args:
        backbone: the SAM.
        mask: bool (H, W).

    Returns:
        float32 (hm, wm), logits from -10 to 10, on the device of the backbone.
    """
    height, width = backbone.input_size((mask.shape[0], mask.shape[1]))
    framed = np.zeros((backbone.image_size,) * 2, np.float32)
    framed[:height, :width] = cv2.resize(mask.astype(np.float32), (width, height))
    small = cv2.resize(framed, backbone.mask_shape[::-1], interpolation=cv2.INTER_AREA)
    return to_device(20 * small - 10, backbone.device)
