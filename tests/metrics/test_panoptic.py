"""Matching masks and objects, against numbers worked out by hand."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sam_gym.metrics.panoptic import (
    Overlaps,
    average_recall,
    encoded,
    match,
    mean_over_classes,
    panoptic_quality,
)


def squares(*places: tuple[int, int, int, int], size: int = 20) -> np.ndarray:
    """Masks bool (N, size, size) of (top, left, height, width) each."""
    masks = np.zeros((len(places), size, size), bool)
    for mask, (top, left, height, width) in zip(masks, places, strict=True):
        mask[top : top + height, left : left + width] = True
    return masks


def overlaps_of(masks: np.ndarray, objects: np.ndarray) -> Overlaps:
    return Overlaps.of(encoded(masks), encoded(objects))


def test_codes_hold_the_masks() -> None:
    masks = np.random.default_rng(0).random((3, 7, 11)) > 0.5
    for code, mask in zip(encoded(masks), masks, strict=True):
        assert np.array_equal(coco_mask.decode(code).astype(bool), mask)
    assert encoded(masks[:0]) == []


def test_overlaps_are_those_of_the_pixels() -> None:
    rng = np.random.default_rng(1)
    masks, objects = rng.random((4, 9, 9)) > 0.4, rng.random((3, 9, 9)) > 0.6
    got = overlaps_of(masks, objects)
    shared = (masks[:, None] & objects[None]).sum(axis=(2, 3))
    union = (masks[:, None] | objects[None]).sum(axis=(2, 3))
    np.testing.assert_allclose(got.shared, shared)
    np.testing.assert_allclose(got.iou, shared / union)


def test_each_mask_counts_for_one_object() -> None:
    # One mask over two objects of the same size, and a smaller one inside of the first.
    objects = squares((0, 0, 10, 10), (0, 10, 10, 10))
    masks = squares((0, 0, 10, 20), (0, 0, 10, 4))
    found = match(overlaps_of(masks, objects))
    assert found.masks.tolist() == [1, 0]
    assert found.iou.tolist() == pytest.approx([0.4, 0.5])
    assert found.accuracy.tolist() == pytest.approx([0.4, 1.0])


def test_an_object_without_a_mask_scores_nothing() -> None:
    objects = squares((0, 0, 5, 5), (10, 10, 5, 5))
    found = match(overlaps_of(squares((0, 0, 5, 5)), objects))
    assert found.masks.tolist() == [0, -1] and found.iou.tolist() == [1.0, 0.0]
    nothing = match(overlaps_of(squares((0, 10, 2, 2)), objects))
    assert nothing.masks.tolist() == [-1, -1]
    empty = match(overlaps_of(squares(), objects))
    assert empty.iou.tolist() == [0.0, 0.0]


def test_parts_lie_in_an_object_and_cover_little_of_it() -> None:
    objects = squares((0, 0, 10, 10))
    masks = squares((0, 0, 4, 10), (0, 0, 6, 10), (0, 6, 4, 8), (0, 0, 20, 20), (15, 15, 3, 3))
    # 40% of it; 60%; half of the mask outside; more than the object; elsewhere.
    assert overlaps_of(masks, objects).is_part.tolist() == [True, False, False, False, False]
    assert overlaps_of(masks, squares()).is_part.tolist() == [False] * 5


def test_classes_count_the_same() -> None:
    values, categories = np.array([1.0, 0.0, 0.5, 0.5]), np.array([3, 3, 3, 1])
    assert mean_over_classes(values, categories) == pytest.approx((0.5 + 0.5) / 2)


def test_average_recall_counts_thresholds_and_limits() -> None:
    objects = squares((0, 0, 10, 10), (10, 10, 10, 10))
    # IoU 1 with the first object; 0.7 with the second.
    masks = squares((0, 0, 10, 10), (10, 10, 10, 7))
    scores = np.array([0.2, 0.9])
    both, one = encoded(objects), encoded(masks)
    # Thresholds 0.5, 0.55, ... 0.95: all ten, and five (0.5 to 0.7).
    assert average_recall([one], [scores], [both]) == pytest.approx([0.75, 0.75])
    # With one mask an image, the one that is trusted more counts.
    assert average_recall([one], [scores], [both], (1, 2)) == pytest.approx([0.25, 0.75])
    # An image without masks, and none anywhere.
    two = average_recall([one, []], [scores, np.zeros(0)], [both, both])
    assert two == pytest.approx([0.375, 0.375])
    assert average_recall([[]], [np.zeros(0)], [both]) == [0.0, 0.0]


def test_panoptic_quality_by_hand() -> None:
    objects = squares((0, 0, 10, 10), (10, 10, 10, 10), (0, 12, 4, 4))
    # A match of 0.8; one of 0.4, which is too little; outside; two thirds outside.
    masks = squares((0, 0, 10, 8), (10, 10, 10, 4), (0, 16, 4, 4), (0, 10, 4, 3))
    overlaps = overlaps_of(masks, objects)
    # Of the masks without a match, only the second counts: the others lie on nothing annotated.
    assert panoptic_quality([overlaps]) == pytest.approx(0.8 / (1 + 0.5 * (1 + 2)))
    assert panoptic_quality([overlaps, overlaps]) == panoptic_quality([overlaps])
    assert panoptic_quality([overlaps_of(squares(), objects)]) == 0.0
