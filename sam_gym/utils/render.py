"""Draw images, masks and clicks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from sam_gym.utils.text import printable

if TYPE_CHECKING:
    from sam_gym.data.base import Video

#: Maximum width of drawn images in pixels; JPEG holds no more than 65,500.
_MAX_WIDTH = 2**14
MASK_COLOUR = (30, 144, 255)
TARGET_COLOUR = (255, 255, 255)
POSITIVE_COLOUR = (40, 200, 64)
NEGATIVE_COLOUR = (235, 50, 50)
CUE_COLOUR = (255, 214, 10)
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def draw_episode(
    image: np.ndarray,
    mask: np.ndarray,
    clicks: Sequence[tuple[float, float, bool]] = (),
    *,
    target: np.ndarray | None = None,
    caption: str = "",
    cue: tuple[float, float] | None = None,
    height: int = 384,
) -> np.ndarray:
    """Draw a mask and clicks over an image.

    Args:
        image: uint8 (H, W, 3), RGB.
        mask: bool (H, W), tinted blue.
        clicks: (x, y, positive) in pixels of the image, in order; drawn as green plus or red minus.
        target: bool (H, W), outlined in white, or None.
        caption: one line below the picture; no line if empty.
        cue: (x, y) of a cue click, drawn as a yellow ring.
        height: of the drawn image in pixels; the width keeps the aspect ratio. Very wide images are
            drawn less high.

    Returns:
        uint8 (height [+ caption], W', 3), RGB.
    """
    canvas, size, scale = _enlarged(image, height)
    large = _at_size(mask, size)
    tinted = 0.6 * canvas + 0.4 * np.array(MASK_COLOUR, np.float32)
    canvas = np.where(large[..., None], tinted, 0.62 * canvas).astype(np.uint8)
    _outline(canvas, large, MASK_COLOUR, 2)
    if target is not None:
        _outline(canvas, _at_size(target, size), TARGET_COLOUR, 1)
    if cue is not None:
        cv2.circle(canvas, _at(cue[0], cue[1], scale), height // 32, CUE_COLOUR, 2, cv2.LINE_AA)
    for number, (x, y, positive) in enumerate(clicks, start=1):
        _mark(canvas, _at(x, y, scale), bool(positive), number == len(clicks))
    return _captioned(canvas, caption)


def draw_masks(
    image: np.ndarray,
    masks: Iterable[np.ndarray],
    points: Sequence[tuple[float, float]] = (),
    *,
    targets: np.ndarray | None = None,
    caption: str = "",
    height: int = 384,
) -> np.ndarray:
    """Draw masks in distinct colours, and numbered points, over an image.

    Args:
        image: uint8 (H, W, 3), RGB.
        masks: bool (H, W) each; smaller ones lie on top of larger ones.
        points: (x, y) in pixels of the image, in order.
        targets: bool (N, H, W), outlined in white, or None.
        caption: one line below the picture; no line if empty.
        height: of the drawn image in pixels; the width keeps the aspect ratio. Very wide images are
            drawn less high.

    Returns:
        uint8 (height [+ caption], W', 3), RGB.
    """
    canvas, size, scale = _enlarged(image, height)
    canvas *= 0.62
    original = canvas / 0.62
    large = [_at_size(mask, size) for mask in masks]
    order = sorted(range(len(large)), key=lambda number: -int(large[number].sum()))
    for number in order:
        inside, colour = large[number], np.array(distinct_colour(number), np.float32)
        canvas[inside] = 0.5 * original[inside] + 0.5 * colour
    canvas = canvas.clip(0, 255).astype(np.uint8)
    for number in order:
        _outline(canvas, large[number], distinct_colour(number), 2)
    for target in () if targets is None else targets:
        _outline(canvas, _at_size(target, size), TARGET_COLOUR, 1)
    for number, (x, y) in enumerate(points, start=1):
        _numbered(canvas, _at(x, y, scale), number)
    return _captioned(canvas, caption)


def draw_labels(
    image: np.ndarray, labels: np.ndarray | None, *, caption: str = "", height: int = 256
) -> np.ndarray:
    """Draw a label map over an image, each class in its colour.

    Args:
        image: uint8 (H, W, 3), RGB.
        labels: uint8 (H, W), class of each pixel; pixels of 255 are black. None: only the image.
        caption: one line below the picture; no line if empty.
        height: of the drawn image in pixels; the width keeps the aspect ratio. Very wide images are
            drawn less high.

    Returns:
        uint8 (height [+ caption], W', 3), RGB.
    """
    canvas, size, _ = _enlarged(image, height)
    canvas = canvas.clip(0, 255)
    if labels is not None:
        colours = np.array([*map(distinct_colour, range(255)), (0, 0, 0)], np.float32)
        large = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
        canvas = 0.3 * canvas + 0.7 * colours[large]
        canvas[large == 255] = 0
    return _captioned(canvas.astype(np.uint8), caption)


def distinct_colour(number: int) -> tuple[int, int, int]:
    """Return a bright RGB colour, distinct from those of neighbouring numbers."""
    hue = int(180 * ((0.58 + number * 0.618034) % 1.0))
    pixel = np.array([[[hue, 210 if number % 2 else 150, 255]]], np.uint8)
    red, green, blue = cv2.cvtColor(pixel, cv2.COLOR_HSV2RGB)[0, 0].tolist()
    return red, green, blue


def draw_heat(
    image: np.ndarray,
    heat: np.ndarray,
    *,
    peak: bool = True,
    target: np.ndarray | None = None,
    caption: str = "",
    height: int = 256,
) -> np.ndarray:
    """Draw a map over an image, from dark blue to yellow.

    Args:
        image: uint8 (H, W, 3), RGB.
        heat: float (h, w) in [0, 1], covering the image.
        peak: mark the maximum.
        target: bool (H, W), outlined in white, or None.
        caption: one line below the picture; no line if empty.
        height: of the drawn image in pixels; the width keeps the aspect ratio. Very wide images are
            drawn less high.

    Returns:
        uint8 (height [+ caption], W', 3), RGB.
    """
    canvas, size, _ = _enlarged(image, height)
    smooth = cv2.resize(heat.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    levels = (255 * smooth.clip(0, 1)).astype(np.uint8)
    colours = cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS)[..., ::-1]
    canvas = (0.45 * canvas + 0.55 * colours).astype(np.uint8)
    if target is not None:
        _outline(canvas, _at_size(target, size), TARGET_COLOUR, 2)
    if peak:
        y, x = divmod(int(smooth.argmax()), size[0])
        cv2.drawMarker(canvas, (x, y), (0, 0, 0), cv2.MARKER_CROSS, 22, 5, cv2.LINE_AA)
        cv2.drawMarker(canvas, (x, y), NEGATIVE_COLOUR, cv2.MARKER_CROSS, 20, 2, cv2.LINE_AA)
    return _captioned(canvas, caption)


def _enlarged(image: np.ndarray, height: int) -> tuple[np.ndarray, tuple[int, int], float]:
    """Resize to float32 (H', W', 3); returns the image, (W', H'), and the scale.

    H' is `height`, or less for an image so wide that W' would exceed `_MAX_WIDTH`.
    """
    scale = min(height / image.shape[0], _MAX_WIDTH / image.shape[1])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    canvas = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC).astype(np.float32)
    return canvas, size, scale


def _at_size(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a mask bool (H, W) to (width, height)."""
    return cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0


def _at(x: float, y: float, scale: float) -> tuple[int, int]:
    return round((x + 0.5) * scale), round((y + 0.5) * scale)


def _outline(
    canvas: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int], width: int
) -> None:
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(canvas, contours, -1, colour, width, cv2.LINE_AA)


def _mark(canvas: np.ndarray, center: tuple[int, int], positive: bool, newest: bool) -> None:
    radius = max(6, canvas.shape[0] // (34 if newest else 44))
    colour = POSITIVE_COLOUR if positive else NEGATIVE_COLOUR
    cv2.circle(canvas, center, radius + 2, (255, 255, 255), -1, cv2.LINE_AA)
    cv2.circle(canvas, center, radius, colour, -1, cv2.LINE_AA)
    arm = radius // 2 + 1
    x, y = center
    cv2.line(canvas, (x - arm, y), (x + arm, y), (255, 255, 255), 2, cv2.LINE_AA)
    if positive:
        cv2.line(canvas, (x, y - arm), (x, y + arm), (255, 255, 255), 2, cv2.LINE_AA)


def _numbered(canvas: np.ndarray, center: tuple[int, int], number: int) -> None:
    """Draw a dot and its number, light on dark, visible on any background."""
    x, y = center
    cv2.circle(canvas, center, 4, (20, 20, 20), -1, cv2.LINE_AA)
    cv2.circle(canvas, center, 3, (255, 255, 255), -1, cv2.LINE_AA)
    for colour, width in (((20, 20, 20), 3), ((255, 255, 255), 1)):
        cv2.putText(canvas, str(number), (x + 5, y - 3), _FONT, 0.36, colour, width, cv2.LINE_AA)


def _captioned(canvas: np.ndarray, text: str) -> np.ndarray:
    """Add a line of text below a picture, in letters that fit; nothing if it is empty."""
    if not text:
        return canvas
    text, width, scale = printable(text), canvas.shape[1], 0.5
    while scale > 0.25 and cv2.getTextSize(text, _FONT, scale, 1)[0][0] > width - 12:
        scale -= 0.02
    strip = np.full((30, width, 3), 24, np.uint8)
    cv2.putText(strip, text, (6, 20), _FONT, scale, (240, 240, 240), 1, cv2.LINE_AA)
    return np.concatenate([canvas, strip])


def tile(frames: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Tile frames row by row; smaller ones are padded with black.

    Returns:
        uint8 (rows * H, columns * W, 3), H and W the maximum over frames.
    """
    height, width = (max(frame.shape[axis] for frame in frames) for axis in (0, 1))
    rows = -(-len(frames) // columns)
    sheet = np.zeros((rows * height, columns * width, 3), np.uint8)
    for number, frame in enumerate(frames):
        y, x = divmod(number, columns)
        top, left = y * height, x * width
        sheet[top : top + frame.shape[0], left : left + frame.shape[1]] = frame
    return sheet


def letterbox(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Centre a frame on black; shrink it if it does not fit.

    Returns:
        uint8 (height, width, 3).
    """
    scale = min(1.0, height / frame.shape[0], width / frame.shape[1])
    if scale < 1:
        size = [max(1, int(side * scale)) for side in frame.shape[1::-1]]
        frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    canvas = np.zeros((height, width, 3), np.uint8)
    top, left = (height - frame.shape[0]) // 2, (width - frame.shape[1]) // 2
    canvas[top : top + frame.shape[0], left : left + frame.shape[1]] = frame
    return canvas


def save_image(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Write uint8 (H, W, 3) RGB; raises `OSError` if the file cannot be written."""
    # OpenCV's own writer ends the process at some names.
    encoded, data = cv2.imencode(os.path.splitext(path)[1], image[..., ::-1])
    if not encoded:
        raise OSError(f"{path}: could not be encoded ({image.shape[1]} x {image.shape[0]} pixels).")
    try:
        Path(path).write_bytes(data.tobytes())
    except OSError as error:
        raise OSError(f"{path}: could not be written ({error.strerror}).") from error


def save_gif(
    path: str | os.PathLike[str],
    frames: Sequence[np.ndarray],
    fps: float = 1.5,
    max_width: int = 840,
) -> None:
    """Write frames of one size as an endless GIF, no wider than `max_width` pixels."""
    from PIL import Image

    pictures = []
    for frame in frames:
        picture = Image.fromarray(frame)
        picture.thumbnail((max_width, frame.shape[0]), Image.Resampling.LANCZOS)
        # Every fourth row and column give as good a palette, in a tenth of the time.
        palette = Image.fromarray(np.asarray(picture)[::4, ::4]).quantize(128)
        pictures.append(picture.quantize(palette=palette, dither=Image.Dither.NONE))
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0
    )


def save_video(
    path: str | os.PathLike[str], frames: Iterable[np.ndarray], fps: float = 12.0
) -> None:
    """Write frames as a video: a file of the suffix .gif (see `save_gif`) or .mp4.

    Args:
        path: of the file.
        frames: uint8 (H, W, 3) RGB each, of one size; an MP4 file is written frame by frame,
            without the last row or column of an odd size.
        fps: frames per second.

    Raises:
        ValueError: the suffix is another, there is no frame, or the sizes differ.
        OSError: the file cannot be written.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".gif":
        save_gif(path, list(frames), fps)
        return
    if suffix != ".mp4":
        raise ValueError(f"{path}: videos are written as .gif or .mp4. Choose one of the two.")
    writer: cv2.VideoWriter | None = None
    size = None
    try:
        for frame in frames:
            if writer is None:
                size = frame.shape
                code = cv2.VideoWriter.fourcc(*"mp4v")
                writer = cv2.VideoWriter(os.fspath(path), code, fps, size[1::-1])
                if not writer.isOpened():
                    raise OSError(f"{path}: the video could not be written. Check the folder.")
            if frame.shape != size:
                raise ValueError(f"{path}: frames differ in size ({frame.shape} after {size}).")
            writer.write(np.ascontiguousarray(frame[..., ::-1]))
    finally:
        if writer is not None:
            writer.release()
    if writer is None:
        raise ValueError(f"{path}: there is no frame to write.")


def draw_overlays(
    video: Video, predictions: Iterable[np.ndarray], *, truth: bool = True, height: int = 384
) -> Iterator[np.ndarray]:
    """Draw the masks of a video's objects over its frames, in one colour per object.

    Args:
        video: the video.
        predictions: bool (N, H, W) of each frame from the first on.
        truth: outline the annotated masks in white.
        height: of the drawn frames in pixels, without the caption.

    Yields:
        uint8 (height + caption, W', 3), RGB.
    """
    for number, masks in enumerate(predictions):
        yield draw_masks(
            video.image(number),
            masks,
            targets=video.annotation(number).masks if truth else None,
            caption=f"{video.name} {video.frames[number]}",
            height=height,
        )
