"""Metrics against numbers worked out by hand and against closed forms."""

import math

import numpy as np
import pytest

from sam_gym.metrics import (
    dice,
    iou,
    mean_and_ci95,
    number_of_clicks,
    number_of_failures,
    with_interval,
)


def square(top: int, left: int, side: int) -> np.ndarray:
    mask = np.zeros((10, 10), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_iou_by_hand() -> None:
    # 4 x 4 squares that share 2 x 2: 4 / (16 + 16 - 4).
    assert iou(square(0, 0, 4), square(2, 2, 4)) == pytest.approx(4 / 28)
    assert iou(square(0, 0, 4), square(0, 0, 4)) == 1.0
    assert iou(square(0, 0, 4), square(5, 5, 4)) == 0.0
    assert isinstance(iou(square(0, 0, 4), square(2, 2, 4)), float)


def test_dice_by_hand() -> None:
    assert dice(square(0, 0, 4), square(2, 2, 4)) == pytest.approx(2 * 4 / (16 + 16))
    assert dice(square(0, 0, 4), square(5, 5, 4)) == 0.0


def test_empty_masks() -> None:
    empty = np.zeros((10, 10), bool)
    assert iou(empty, empty) == dice(empty, empty) == 1.0
    assert iou(empty, square(0, 0, 4)) == iou(square(0, 0, 4), empty) == 0.0


def test_ignored_pixels_count_for_neither() -> None:
    # Ignoring the top two rows leaves 2 x 4 pixels of the first square, all of the second.
    ignore = np.zeros((10, 10), bool)
    ignore[:2] = True
    one, two = square(0, 0, 4), square(2, 2, 4)
    assert iou(one, two, ignore) == pytest.approx(4 / (8 + 16 - 4))
    assert dice(one, two, ignore) == pytest.approx(2 * 4 / (8 + 16))
    assert iou(one, two, np.ones_like(ignore)) == 1.0
    np.testing.assert_array_equal(one, square(0, 0, 4))


def test_random_masks_against_pixel_counts() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        one, two, ignore = rng.random((3, 13, 17)) < rng.random((3, 1, 1))
        pairs = [(a, b) for a, b, i in zip(one.flat, two.flat, ignore.flat, strict=True) if not i]
        both = sum(a and b for a, b in pairs)
        either = sum(a or b for a, b in pairs)
        total = sum(a for a, _ in pairs) + sum(b for _, b in pairs)
        assert iou(one, two, ignore) == pytest.approx(both / either if either else 1.0)
        assert dice(one, two, ignore) == pytest.approx(2 * both / total if total else 1.0)


def test_number_of_clicks_and_failures() -> None:
    ious = np.array(
        [
            [0.9, 0.2, 0.3, 0.4],  # at once, although it gets worse
            [0.5, 0.89, 0.95, 0.5],
            [0.1, 0.2, 0.3, 0.4],  # never
            [0.1, 0.2, 0.3, 0.9],
        ]
    )
    assert number_of_clicks(ious, 0.9).tolist() == [1, 3, 4, 4]
    assert number_of_failures(ious, 0.9) == 1
    assert number_of_clicks(ious, 0.3).tolist() == [1, 1, 3, 3]
    assert number_of_failures(ious, 0.3) == 0
    assert number_of_failures(ious, 0.96) == 4


def test_confidence_interval() -> None:
    # Student's t for 3 degrees of freedom at 97.5%: 3.182446.
    mean, half = mean_and_ci95(np.array([1, 2, 3, 4]))
    assert mean == 2.5
    assert half == pytest.approx(3.182446 * math.sqrt(5 / 3) / 2, abs=1e-4)
    assert mean_and_ci95(np.array([2.0, 2.0])) == (2.0, 0.0)


def test_confidence_interval_of_one_value_is_unknown() -> None:
    assert mean_and_ci95(np.array([0.7])) == (0.7, None)


def test_confidence_interval_covers_the_mean_19_times_out_of_20() -> None:
    rng = np.random.default_rng(0)
    covered = []
    for values in rng.normal(3.0, 2.0, (400, 6)):
        mean, half = mean_and_ci95(values)
        assert half is not None
        covered.append(abs(mean - 3.0) <= half)
    assert 0.92 < np.mean(covered) < 0.98


def test_a_mean_for_people() -> None:
    assert with_interval(0.81234, 0.02) == "0.812 +- 0.020"
    assert with_interval(0.5, None) == "0.500"
    assert with_interval(0.5, 0.1, "±") == "0.500 ± 0.100"
