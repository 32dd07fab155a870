"""Whole objects out of SAM's own masks, without training: parts are merged, and left out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

from sam_gym.mask_generation.masks import Masks, to_counts
from sam_gym.metrics.panoptic import Overlaps, encoded
from sam_gym.utils.lowres import low_res


@dataclass(frozen=True)
class MergeOptions:
    """When masks belong together."""

    merge_similarity: float = 0.8
    """Neighbours of at least this cosine similarity of their mean embedding are merged."""
    merge_reach: int = 3
    """Masks that come as near to each other as this, in pixels, are neighbours."""
    merge_inside: float = 0.85
    """A mask of which this share lies in a larger one is a part of it, and left out."""
    merge_largest: float = 0.5
    """Masks of more than this share of the image take in no parts: they are background."""


def merge_masks(masks: Masks, embedding: np.ndarray, options: MergeOptions | None = None) -> Masks:
    """Merge neighbours that look alike, then leave out what lies in something larger.

    A merged mask is trusted as much as the least of its parts. It joins those that it is made of,
    which then count as parts.

    Args:
        masks: of one image, best first.
        embedding: float32 (C, H, W), the image's features at its own size or coarser, of the image
            without padding.
        options: when masks belong together.
    """
    options = options or MergeOptions()
    if not len(masks):
        return masks
    means = _mean_features(masks, embedding)
    alike = means @ means.T >= options.merge_similarity
    touches = _near(masks, options.merge_reach)
    small = masks.areas <= options.merge_largest * masks.size[0] * masks.size[1]
    joined = alike & touches & touches.T & small[:, None] & small[None]
    groups = _components(joined)
    merged = [members for members in groups if len(members) > 1]
    if merged:
        unions = masks.take(np.array([members[0] for members in merged]))
        trust = np.array([masks.predicted_iou[members].min() for members in merged], np.float32)
        boxes = np.stack([_box(masks.boxes[members]) for members in merged])
        counts = [to_counts(_union(masks, members)) for members in merged]
        unions = replace(unions, counts=counts, boxes=boxes, predicted_iou=trust)
        masks = Masks.joined([masks, unions])
    return masks.take(_without_parts(masks, options))


def _mean_features(masks: Masks, embedding: np.ndarray) -> np.ndarray:
    """Normalised mean features of N masks: float32 (N, C)."""
    low = [low_res(masks.mask(i), embedding.shape[1:]).ravel() for i in range(len(masks))]
    means = np.stack(low) @ embedding.reshape(len(embedding), -1).T
    return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-6)


def _near(masks: Masks, reach: int) -> np.ndarray:
    """Which of N masks come near to which: bool (N, N)."""
    kernel = np.ones((2 * reach + 1,) * 2, np.uint8)
    grown = [
        encoded(cv2.dilate(masks.mask(index).astype(np.uint8), kernel)[None])[0]
        for index in range(len(masks))
    ]
    return Overlaps.of(grown, masks.coco()).shared > 0


def _union(masks: Masks, members: np.ndarray) -> np.ndarray:
    """All that some of the masks cover: bool (H, W)."""
    union = np.zeros(masks.size, bool)
    for index in members:
        union |= masks.mask(index)
    return union


def _box(boxes: np.ndarray) -> np.ndarray:
    """The box (4,) around boxes (N, 4)."""
    return np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])


def _components(joined: np.ndarray) -> list[np.ndarray]:
    """Connected components of a relation bool (N, N): the members of each."""
    from scipy.sparse.csgraph import connected_components

    _, labels = connected_components(joined, directed=False)
    return [np.flatnonzero(labels == k) for k in range(labels.max() + 1)]


def _without_parts(masks: Masks, options: MergeOptions) -> np.ndarray:
    """Index of masks that do not lie in another that is larger, in their order."""
    own = masks.coco()
    overlaps = Overlaps.of(own, own)
    areas = overlaps.masks
    inside = overlaps.shared / np.maximum(areas[:, None], 1) >= options.merge_inside
    whole = areas <= options.merge_largest * masks.size[0] * masks.size[1]
    number = np.arange(len(areas))
    # Of masks that are equal, the first is the larger one.
    earlier = (areas[None] == areas[:, None]) & (number[None] < number[:, None])
    larger = ((areas[None] > areas[:, None]) | earlier) & whole[None]
    return np.flatnonzero(~(inside & larger).any(axis=1))
