"""Place images and objects in the model's frame, with or without augmentation."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from sam_gym.data.base import IGNORED
from sam_gym.metrics.masks import iou
from sam_gym.utils.lowres import low_res

#: Padding colour, near zero after normalisation.
_PADDING = (124, 116, 104)
#: Scales of large-scale jitter.
_JITTER = (0.6, 1.8)
#: Coverages of a pixel at which a target may begin; of equally good ones the first is taken.
_THRESHOLDS = (0.5, 0.4, 0.3, 0.2, 0.1)


@dataclass(frozen=True)
class FrameTransform:
    """An affine map from an image to the model's frame.

    Attributes:
        matrix: float64 (2, 3), from (x, y) in pixels of the image to those of the frame.
        scale: float64 (2,), pixels of the frame per pixel of the image, horizontally and
            vertically.
        size: side of the frame.
    """

    matrix: np.ndarray
    scale: np.ndarray
    size: int

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        image_size: tuple[int, int],
        size: int,
        plain: bool,
        squash: bool = False,
    ) -> FrameTransform:
        """Draw a flip and a scale about a random place, as in CoSAM's release.

        The release has random flips and large-scale jitter, in a wider range of scales.

        Args:
            rng: the generator.
            image_size: (height, width) of the image.
            size: side of the frame.
            plain: only fit the image into the frame.
            squash: fit both sides into the frame, otherwise the longest.
        """
        sides = np.array(image_size[::-1])
        scale = size / (sides if squash else np.full(2, sides.max()))
        flip, shift = False, np.zeros(2)
        if not plain:
            scale *= np.exp(rng.uniform(*np.log(_JITTER)))
            flip = rng.random() < 0.5
            room = size - scale * sides
            shift = rng.uniform(np.minimum(room, 0), np.maximum(room, 0))
        matrix = np.array([[scale[0], 0, shift[0]], [0, scale[1], shift[1]]], np.float64)
        # Pixel centres: (x + 0.5) * scale in continuous coordinates.
        matrix[:, 2] += 0.5 * scale - 0.5
        if flip:
            matrix[0] = [-matrix[0, 0], 0, size - 1 - matrix[0, 2]]
        return cls(matrix, scale, size)

    def frame(self, image: np.ndarray) -> np.ndarray:
        """Map an image uint8 (H, W, 3): uint8 (S, S, 3)."""
        if (self.scale < 1).any():
            # A deviation near zero leaves an axis as it is.
            x, y = np.where(self.scale < 1, 0.4 / self.scale, 1e-3)
            image = cv2.GaussianBlur(image, (0, 0), x, sigmaY=y)
        size = (self.size, self.size)
        return cv2.warpAffine(
            image, self.matrix, size, flags=cv2.INTER_LINEAR, borderValue=_PADDING
        )

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """Map a mask bool (H, W): bool (S, S)."""
        size = (self.size, self.size)
        return cv2.warpAffine(mask.astype(np.uint8) * 255, self.matrix, size) > 127

    def labels(self, labels: np.ndarray) -> np.ndarray:
        """Map a label map uint8 (H, W), by the nearest pixel: uint8 (S, S), `IGNORED` outside."""
        size = (self.size, self.size)
        return cv2.warpAffine(
            labels, self.matrix, size, flags=cv2.INTER_NEAREST, borderValue=IGNORED
        )


def low_res_target(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return the low-res target whose upsampled mask is most like the object.

    It is the fraction of each low-res pixel that the object covers, rescaled so that the threshold
    of the best full-size mask becomes 0.5. That threshold is near 0.5 for a compact object, but far
    lower for a thin one, which fills half of no pixel: from plain fractions, a decoder would learn
    an empty mask.

    Args:
        mask: bool (S, S).
        shape: (hm, wm).

    Returns:
        uint8 (hm, wm), 255 for a whole pixel.
    """
    covered = np.round(255 * low_res(mask, shape)) / 255
    side = mask.shape[::-1]
    large = cv2.resize(covered, side, interpolation=cv2.INTER_LINEAR)
    overlaps = [iou(large > threshold, mask) for threshold in _THRESHOLDS]
    best = _THRESHOLDS[int(np.argmax(overlaps))]
    bent = np.where(covered < best, 0.5 * covered / best, 0.5 + 0.5 * (covered - best) / (1 - best))
    return np.round(255 * bent).astype(np.uint8)
