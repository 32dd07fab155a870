"""Whole objects without training: what is merged, what is left out."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from sam_gym.mask_generation.masks import Masks
from sam_gym.mask_generation.merging import MergeOptions, merge_masks

MakeMasks = Callable[..., Masks]
SIZE = 32


def halves() -> np.ndarray:
    """An embedding (2, 8, 8) that knows two kinds of places: left and right of the middle."""
    embedding = np.zeros((2, 8, 8), np.float32)
    embedding[0, :, :4] = 1.0
    embedding[1, :, 4:] = 1.0
    return embedding


def test_neighbours_that_look_alike_become_one(make_masks: MakeMasks) -> None:
    # Two boxes side by side on the left, one far from them, one on the right that touches.
    masks = make_masks((0, 0, 7, 7), (8, 0, 15, 7), (0, 24, 7, 31), (16, 0, 23, 7))
    merged = merge_masks(masks, halves())
    boxes = merged.boxes.astype(int).tolist()
    assert boxes == [[0, 24, 7, 31], [16, 0, 23, 7], [0, 0, 15, 7]]
    # The whole is trusted as little as its less trusted part.
    assert merged.predicted_iou[2] == masks.predicted_iou[1]
    assert merged.mask(2).sum() == 16 * 8
    assert len(masks) == 4


def test_neighbours_are_no_farther_than_the_reach(make_masks: MakeMasks) -> None:
    alike = np.ones((2, 8, 8), np.float32)
    near = make_masks((0, 0, 7, 7), (11, 0, 15, 7))  # three pixels lie between
    for reach, count in ((3, 2), (4, 1)):
        assert len(merge_masks(near, alike, MergeOptions(merge_reach=reach))) == count


def test_parts_of_something_larger_are_left_out(make_masks: MakeMasks) -> None:
    masks = make_masks((0, 0, 7, 7), (0, 0, 15, 15), (0, 0, 31, 31))
    far = MergeOptions(merge_similarity=1.1)
    # The largest covers all of the image: it is background, which has no parts.
    kept = merge_masks(masks, halves(), far)
    assert kept.boxes.astype(int).tolist() == [[0, 0, 15, 15], [0, 0, 31, 31]]
    everything = merge_masks(masks, halves(), replace(far, merge_largest=1.0))
    assert everything.boxes.astype(int).tolist() == [[0, 0, 31, 31]]


def test_nothing_stays_nothing() -> None:
    assert len(merge_masks(Masks.none((SIZE, SIZE)), halves())) == 0


def test_a_whole_that_was_there_already_stays_once(make_masks: MakeMasks) -> None:
    # The union of a mask and its part is the mask.
    masks = make_masks((0, 0, 15, 15), (0, 0, 7, 15))
    merged = merge_masks(masks, np.ones((2, 8, 8), np.float32))
    assert merged.boxes.astype(int).tolist() == [[0, 0, 15, 15]]
    assert merged.predicted_iou[0] == masks.predicted_iou[0]
