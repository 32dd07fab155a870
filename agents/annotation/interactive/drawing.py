"""What a browser draws: images, outlines and heat maps."""

from __future__ import annotations

import base64

import cv2
import numpy as np

from sam_gym.utils.render import NEGATIVE_COLOUR, POSITIVE_COLOUR

#: Longest side of what is sent to a browser, in pixels; clicks are those of the image itself.
_LONGEST = 1280
#: Side of a heat map in pixels.
_HEAT = 256


def shown_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) in which an image of (H, W) is shown."""
    scale = min(1.0, _LONGEST / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def jpeg(image: np.ndarray) -> bytes:
    """Return an image uint8 (H, W, 3), RGB, as the JPEG that is shown."""
    height, width = shown_size(image.shape[:2])
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def outline(mask: np.ndarray) -> str:
    """Return a mask bool (H, W) as the path of an SVG in pixels, filled by the even-odd rule."""
    # Doubled, so that outlines run along the edges of pixels.
    large = cv2.resize(mask.astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(large, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_TC89_L1)
    parts = []
    for contour in contours:
        if len(contour) > 2:
            points = " ".join(f"{x / 2:g},{y / 2:g}" for x, y in contour[:, 0].tolist())
            parts.append(f"M{points}Z")
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
