"""Everything mode on large images: overlapping tiles, whose masks are joined across their borders.

A SAM sees an image at the size of its input frame, so small objects of a large image vanish. Each
tile is segmented as an image of its own, and so is the whole image at the size of a tile, for what
is larger than the overlap of tiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import cv2
import numpy as np
from pycocotools import mask as rle

from sam_gym.mask_generation.generator import MaskGenerator
from sam_gym.mask_generation.masks import Masks, to_counts, united_counts
from sam_gym.utils.settings import check_settings, real, whole

#: A mask that ends this close to a border of its tile, as a fraction of the tile, is cut there.
_NEAR = 0.02
#: IoU in the overlap of two tiles from which two masks are one object.
_SAME = 0.5

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class TileOptions:
    """Where tiles lie.

    Attributes:
        side: of a tile, in pixels.
        overlap: minimum overlap of neighbours, as a fraction of `side`.
    """

    side: Annotated[int, whole(64)]
    overlap: Annotated[float, real(0.1, 0.5)] = 0.25


def tile_boxes(size: tuple[int, int], options: TileOptions) -> list[Box]:
    """Return the boxes (x0, y0, x1, y1) of tiles that cover an image of (H, W), row by row.

    Tiles are evenly spread. An image of at most one tile is one tile.
    """
    check_settings(options)
    spans = []
    for length in size:
        side = min(options.side, length)
        step = max(1, int(options.side * (1 - options.overlap)))
        count = 1 + -(-(length - side) // step)
        starts = np.linspace(0, length - side, count).round().astype(int).tolist()
        spans.append([(start, start + side) for start in starts])
    rows, columns = spans
    return [(x0, y0, x1, y1) for y0, y1 in rows for x0, x1 in columns]


class TiledGenerator:
    """Generates all masks of images in tiles; otherwise as `MaskGenerator`.

    Args:
        generator: segments a tile. Tiles replace its crops.
        options: where tiles lie.

    Raises:
        ValueError: the generator crops, or an option is wrong.
    """

    def __init__(self, generator: MaskGenerator, options: TileOptions) -> None:
        check_settings(options)
        if generator.options.crop_n_layers:
            raise ValueError("Tiles and crops exclude each other: leave crop_n_layers at 0.")
        self.generator, self.options = generator, options
        self.backbone, self.names = generator.backbone, generator.names
        self.thresholds = generator.thresholds

    def stream(self, images: Iterable[np.ndarray]) -> Iterator[Masks]:
        """Yield the masks of each image uint8 (H, W, 3)."""
        for image in images:
            yield self._of_image(image)

    def _of_image(self, image: np.ndarray) -> Masks:
        height, width = size = (image.shape[0], image.shape[1])
        boxes = tile_boxes(size, self.options)
        views = [image[y0:y1, x0:x1] for x0, y0, x1, y1 in boxes]
        if len(views) == 1:
            return next(self.generator.stream(views))
        scale = self.options.side / max(size)
        small = cv2.resize(
            image,
            (max(1, round(width * scale)), max(1, round(height * scale))),
            interpolation=cv2.INTER_AREA,
        )
        large, *found = self.generator.stream([small, *views])
        placed = [
            replace(
                own.placed(box[:2], size),
                crop_boxes=np.tile(np.array(box, np.float32), (len(own), 1)),
            )
            for own, box in zip(found, boxes, strict=True)
        ]
        joined = join_tiles(placed, boxes)
        # The tiles show better what fits into their overlap.
        least = self.options.overlap * self.options.side * scale
        extent = (large.boxes[:, 2:] - large.boxes[:, :2]).max(axis=1, initial=0.0)
        large = _enlarged(large.take(np.flatnonzero(extent >= least)), size)
        return _without_doubles(
            Masks.joined([joined, large]), self.generator.options.box_nms_thresh
        )


def join_tiles(tiles: Sequence[Masks], boxes: Sequence[Box]) -> Masks:
    """Join the masks of tiles.

    Where two tiles overlap, a mask of one and a mask of the other that match (each is the best
    match of the other) are parts of one object if one of them is cut at a border between tiles. A
    mask that is cut, and has no match, is dropped. Predicted IoU and stability of a joined mask are
    the minima over its parts. Objects in an overlap that both tiles show whole remain doubles.

    Args:
        tiles: masks of each tile, in pixels of the image.
        boxes: (x0, y0, x1, y1) of each tile.
    """
    first = np.cumsum([0, *map(len, tiles)])
    every = Masks.joined(tiles)
    codes = every.coco()
    is_cut = np.concatenate(
        [_is_cut(own, box) for own, box in zip(tiles, boxes, strict=True)], dtype=bool
    )
    group = np.arange(len(every))
    for i in range(len(tiles)):
        for j in range(i):
            shared = _overlap(boxes[i], boxes[j])
            if shared is None:
                continue
            one, other = (
                first[k] + np.flatnonzero(_reaches(tiles[k].boxes, shared)) for k in (i, j)
            )
            for a, b in _matches(codes, one, other, shared, every.size):
                if is_cut[a] or is_cut[b]:
                    group[group == group[a]] = group[b]
    kept, unions = [], []
    for number in np.unique(group):
        members = np.flatnonzero(group == number)
        if len(members) > 1:
            unions.append(_union(every, members))
        elif not is_cut[members[0]]:
            kept.append(members[0])
    return Masks.joined([every.take(np.array(kept, np.int64)), *unions])


def _is_cut(masks: Masks, box: Box) -> np.ndarray:
    """Return which masks of a tile end near a border that is not the image's: bool (N,)."""
    height, width = masks.size
    x0, y0, x1, y1 = box
    near = _NEAR * max(x1 - x0, y1 - y0)
    own = masks.boxes
    left, top = (x0 > 0) & (own[:, 0] < x0 + near), (y0 > 0) & (own[:, 1] < y0 + near)
    right = (x1 < width) & (own[:, 2] >= x1 - 1 - near)
    bottom = (y1 < height) & (own[:, 3] >= y1 - 1 - near)
    return np.asarray(left | top | right | bottom)


def _overlap(one: Box, other: Box) -> Box | None:
    """Return the intersection of two boxes, or None if it is empty."""
    x0, y0 = max(one[0], other[0]), max(one[1], other[1])
    x1, y1 = min(one[2], other[2]), min(one[3], other[3])
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def _reaches(boxes: np.ndarray, shared: Box) -> np.ndarray:
    """Return which boxes of masks (N, 4) reach into a box: bool (N,)."""
    x0, y0, x1, y1 = shared
    inside_x = (boxes[:, 0] < x1) & (boxes[:, 2] >= x0)
    return np.asarray(inside_x & (boxes[:, 1] < y1) & (boxes[:, 3] >= y0))


def _matches(
    codes: Sequence[dict],
    one: np.ndarray,
    other: np.ndarray,
    shared: Box,
    size: tuple[int, int],
) -> list[tuple[int, int]]:
    """Return pairs of masks that are each other's best match within a box.

    Args:
        codes: compressed RLE of all masks.
        one, other: indices of the masks of two tiles.
        shared: the box.
        size: (H, W) of the image.
    """
    if not len(one) or not len(other):
        return []
    x0, y0, x1, y1 = shared
    window: dict = rle.frPyObjects([[x0, y0, x1, y0, x1, y1, x0, y1]], *size)[0]
    inside = [
        [rle.merge([codes[k], window], intersect=True) for k in indices] for indices in (one, other)
    ]
    ious = np.asarray(rle.iou(*inside, [False] * len(other)))
    best, back = ious.argmax(axis=1), ious.argmax(axis=0)
    return [
        (int(one[a]), int(other[b]))
        for a, b in enumerate(best)
        if back[b] == a and ious[a, b] >= _SAME
    ]


def _union(masks: Masks, members: np.ndarray) -> Masks:
    """Return the union of some masks as one mask, with the best click."""
    best = members[masks.predicted_iou[members].argmax()]
    boxes = masks.boxes[members]
    return replace(
        masks.take(np.array([best])),
        counts=[united_counts([masks.counts[k] for k in members])],
        boxes=np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])[None],
        predicted_iou=masks.predicted_iou[members].min(keepdims=True),
        stability=masks.stability[members].min(keepdims=True),
    )


def _enlarged(masks: Masks, size: tuple[int, int]) -> Masks:
    """Scale masks to a larger image of (H, W)."""
    scale = np.array([size[1] / masks.size[1], size[0] / masks.size[0]], np.float32)
    counts, boxes = [], np.zeros((len(masks), 4), np.float32)
    for index in range(len(masks)):
        grown = np.asarray(cv2.resize(masks.mask(index).astype(np.float32), size[::-1]) > 0.5)
        counts.append(to_counts(grown))
        x, y = (np.flatnonzero(grown.any(axis=axis)) for axis in (0, 1))
        if len(x):
            boxes[index] = x[0], y[0], x[-1], y[-1]
    return replace(
        masks,
        size=size,
        counts=counts,
        boxes=boxes,
        points=masks.points * scale,
        crop_boxes=np.tile(np.array([0, 0, *size[::-1]], np.float32), (len(masks), 1)),
    )


def _without_doubles(masks: Masks, threshold: float) -> Masks:
    """Remove masks whose IoU with an earlier one is above a threshold, and sort by predicted IoU.

    Masks of small crops come first, then those of high predicted IoU.
    """
    if not len(masks):
        return masks
    x0, y0, x1, y1 = masks.crop_boxes.T
    order = np.lexsort((-masks.predicted_iou, (x1 - x0) * (y1 - y0)))
    codes = masks.coco()
    ious = np.asarray(rle.iou(codes, codes, [False] * len(codes)))
    kept: list[int] = []
    for index in order:
        if not (ious[index, kept] > threshold).any():
            kept.append(int(index))
    kept.sort(key=lambda index: -masks.predicted_iou[index])
    return masks.take(np.array(kept))
