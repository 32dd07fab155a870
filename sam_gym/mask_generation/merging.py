"""Merge the masks of parts to whole objects, without training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import cv2
import numpy as np

from sam_gym.mask_generation.masks import Masks, to_counts
from sam_gym.metrics.panoptic import Overlaps, encoded
from sam_gym.utils.fields import documented
from sam_gym.utils.lowres import low_res
from sam_gym.utils.settings import Fraction, Natural, real


@documented
@dataclass(frozen=True)
class MergeOptions:
    """Thresholds of merging."""

    merge_similarity: Annotated[float, real(-1, 1)] = 0.8
    """Minimum cosine similarity of the mean embeddings of merged neighbours."""
    merge_reach: Natural = 3
    """Maximum distance between neighbours, in pixels."""
    merge_inside: Fraction = 0.85
    """Remove a mask if at least this fraction of it lies in a larger one."""
    merge_largest: Fraction = 0.5
    """Masks of more than this fraction of the image count as background and absorb no parts."""


def merge_masks(masks: Masks, embedding: np.ndarray, options: MergeOptions | None = None) -> Masks:
    """Merge similar neighbours, then remove masks that lie in a larger one.

    The predicted IoU of a merged mask is the minimum over its parts.

    Args:
        masks: of one image, best first.
        embedding: float32 (C, H, W), features of the image without padding, at image size or
            coarser.
        options: thresholds.
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
        predicted = np.array([masks.predicted_iou[members].min() for members in merged], np.float32)
        boxes = np.stack([_box(masks.boxes[members]) for members in merged])
        counts = [to_counts(_union(masks, members)) for members in merged]
        unions = replace(unions, counts=counts, boxes=boxes, predicted_iou=predicted)
        masks = Masks.joined([masks, unions])
    return masks.take(_without_parts(masks, options))


def _mean_features(masks: Masks, embedding: np.ndarray) -> np.ndarray:
    """Return the normalised mean features of N masks: float32 (N, C)."""
    low = [low_res(masks.mask(i), embedding.shape[1:]).ravel() for i in range(len(masks))]
    means = np.stack(low) @ embedding.reshape(len(embedding), -1).T
    return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-6)


def _near(masks: Masks, reach: int) -> np.ndarray:
    """Return which of N masks are neighbours: bool (N, N)."""
    kernel = np.ones((2 * reach + 1,) * 2, np.uint8)
    grown = [
        encoded(cv2.dilate(masks.mask(index).astype(np.uint8), kernel)[None])[0]
        for index in range(len(masks))
    ]
    return Overlaps.of(grown, masks.coco()).shared > 0


def _union(masks: Masks, members: np.ndarray) -> np.ndarray:
    """Return the union of some masks: bool (H, W)."""
    union = np.zeros(masks.size, bool)
    for index in members:
        union |= masks.mask(index)
    return union


def _box(boxes: np.ndarray) -> np.ndarray:
    """Return the box (4,) around boxes (N, 4)."""
    return np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])


def _components(joined: np.ndarray) -> list[np.ndarray]:
    """Return the members of each connected component of a relation bool (N, N)."""
    from scipy.sparse.csgraph import connected_components

    _, labels = connected_components(joined, directed=False)
    return [np.flatnonzero(labels == k) for k in range(labels.max() + 1)]


def _without_parts(masks: Masks, options: MergeOptions) -> np.ndarray:
    """Return the index of masks that lie in no larger mask, in order."""
    own = masks.coco()
    overlaps = Overlaps.of(own, own)
    areas = overlaps.masks
    inside = overlaps.shared / np.maximum(areas[:, None], 1) >= options.merge_inside
    whole = areas <= options.merge_largest * masks.size[0] * masks.size[1]
    number = np.arange(len(areas))
    # Of equally large masks, the first counts as larger.
    earlier = (areas[None] == areas[:, None]) & (number[None] < number[:, None])
    larger = ((areas[None] > areas[:, None]) | earlier) & whole[None]
    return np.flatnonzero(~(inside & larger).any(axis=1))
