"""What a browser draws: images, outlines and heat maps."""

from __future__ import annotations

import base64

import cv2
import numpy as np

from sam_gym.backbones.zoom import Window
from sam_gym.utils.render import NEGATIVE_COLOUR, POSITIVE_COLOUR

#: Longest side of what is sent to a browser, in pixels; clicks are those of the image itself.
_LONGEST = 1280
#: Side of a heat map in pixels.
_HEAT = 256


def shown_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) in which an image of (H, W) is shown."""
    scale = min(1.0, _LONGEST / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def measures(size: tuple[int, int]) -> dict[str, int]:
    """Return the size (H, W) of an image as the page takes it.

    Returns:
        `width` and `height` of the image, in whose pixels paths are, and the width in which it is
        `shown`.
    """
    return {"width": size[1], "height": size[0], "shown": shown_size(size)[1]}


def jpeg(image: np.ndarray) -> bytes:
    """Return an image uint8 (H, W, 3), RGB, as the JPEG that is shown."""
    height, width = shown_size(image.shape[:2])
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    # Colours of single pixels are looked at, too.
    options = [cv2.IMWRITE_JPEG_QUALITY, 90]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return cv2.imencode(".jpg", small[..., ::-1], options)[1].tobytes()


def jpeg_of(image: np.ndarray, window: Window) -> bytes | None:
    """Return a part of an image uint8 (H, W, 3) as it is shown; None: it has no such part."""
    height, width = image.shape[:2]
    if not (0 <= window.x0 < window.x1 <= width and 0 <= window.y0 < window.y1 <= height):
        return None
    return jpeg(image[window.slices])


def outline(
    mask: np.ndarray, start: tuple[int, int] = (0, 0), scale: tuple[float, float] = (1.0, 1.0)
) -> str:
    """Return a mask bool (H, W) as the path of an SVG, filled by the even-odd rule.

    It runs along the edges of pixels; of a mask above 1,280 pixels, along those of a smaller one.

    Args:
        mask: of the image, or of a part of it.
        start: (x, y) of its first pixel in the image.
        scale: pixels of the image per pixel of the mask, in x and y.
    """
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    if not width:
        return ""
    small = at_shown_size(mask[y : y + height, x : x + width]).astype(np.uint8)
    size = np.array([width / small.shape[1], height / small.shape[0]]) * scale
    corner = np.array([x, y]) * scale + start
    # Each pixel becomes four, so that its edges are apart.
    large = cv2.resize(small, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(large, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    parts = []
    for contour in contours:
        ring = (contour[:, 0] + 1) // 2
        ring = ring[np.any(ring != np.roll(ring, 1, axis=0), axis=1)]
        step = np.roll(ring, -1, axis=0) - ring
        corners = ring[np.any(step != np.roll(step, 1, axis=0), axis=1)] * size + corner
        # Horizontal and vertical edges alternate.
        first = int(corners[0, 1] != corners[1, 1])
        ends = [
            "HV"[(first + i) % 2] + f"{end[(first + i) % 2]:g}"
            for i, end in enumerate(corners[1:].tolist())
        ]
        parts.append("M{:g},{:g}".format(*corners[0]) + "".join(ends) + "Z")
    return "".join(parts)


def at_shown_size(mask: np.ndarray) -> np.ndarray:
    """Return a mask bool (H, W) at the size in which its image is shown."""
    height, width = shown_size((mask.shape[0], mask.shape[1]))
    if (height, width) == mask.shape:
        return mask
    return cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_AREA) > 0


def heat_map(chances: np.ndarray, content: tuple[float, float]) -> str:
    """Return click probabilities as the data URL of a PNG that covers the image.

    Positive clicks are green, negative ones red; the likeliest cell is opaque.

    Args:
        chances: float32 (2, grid, grid), of positive and of negative clicks.
        content: part of the rows and of the columns that the image fills; the rest is padding.
    """
    scaled = chances / max(float(chances.max()), 1e-9)
    large = [cv2.resize(own, (_HEAT, _HEAT), interpolation=cv2.INTER_LINEAR) for own in scaled]
    positive, negative = (np.clip(own, 0, 1) for own in large)
    colours = np.where((positive >= negative)[..., None], POSITIVE_COLOUR, NEGATIVE_COLOUR)
    alpha = 230 * np.sqrt(np.maximum(positive, negative))
    rows, columns = (max(1, round(_HEAT * part)) for part in content)
    pixels = np.dstack([colours[..., ::-1], alpha]).astype(np.uint8)[:rows, :columns]
    data = base64.b64encode(cv2.imencode(".png", pixels)[1].tobytes()).decode()
    return f"data:image/png;base64,{data}"
