"""Masks on SAM's input frame and on its low-res grid."""

from __future__ import annotations

import cv2
import numpy as np


def frame_mask(mask: np.ndarray, content: tuple[int, int], side: int) -> np.ndarray:
    """Place a mask in SAM's square input frame, as images are: resized, then padded with zeros.

    Args:
        mask: bool (H, W), of an image.
        content: (height, width) of the resized image, see `Backbone.input_size`.
        side: of the frame, in pixels.

    Returns:
        float32 (side, side), the fraction of each pixel that the mask covers, 0 to 1.
    """
    height, width = content
    resized: np.ndarray = mask.astype(np.float32)
    if mask.shape != content:
        resized = cv2.resize(resized, (width, height), interpolation=cv2.INTER_AREA)
    return np.pad(resized, ((0, side - height), (0, side - width)))


def low_res(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return the fraction of each low-res pixel that a mask covers.

    Args:
        mask: bool or float32 (H, W), fractions of pixels.
        shape: (h, w) of the result, not larger than the mask.

    Returns:
        float32 (h, w), 0 to 1.
    """
    return cv2.resize(mask.astype(np.float32), shape[::-1], interpolation=cv2.INTER_AREA)
