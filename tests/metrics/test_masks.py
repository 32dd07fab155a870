"""Metrics against numbers worked out by hand and against closed forms."""

import math

import cv2
import numpy as np
import pytest
import torch

from sam_gym.metrics.masks import (
    batch_iou,
    boundary,
    boundary_iou,
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
    assert with_interval(0.81234, 0.02) == "0.812 ± 0.020"
    assert with_interval(0.5, None) == "0.500"


def published_boundary(mask: np.ndarray, ratio: float = 0.02) -> np.ndarray:
    """Cheng et al. 2021, as they publish it: many small erosions of the padded mask."""
    reach = max(1, round(ratio * math.sqrt(mask.shape[0] ** 2 + mask.shape[1] ** 2)))
    padded = np.pad(mask.astype(np.uint8), 1)
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=reach)
    return (mask.astype(np.uint8) - eroded[1:-1, 1:-1]).astype(bool)


def blob(rng: np.random.Generator, height: int, width: int, share: float) -> np.ndarray:
    noise = cv2.GaussianBlur(rng.standard_normal((height, width)), (0, 0), min(height, width) / 12)
    return noise > np.quantile(noise, 1 - share)


@pytest.mark.parametrize("shape", [(40, 40), (97, 61), (64, 200), (300, 220)])
@pytest.mark.parametrize("ratio", [0.02, 0.005, 0.06])
def test_boundary_is_the_published_one(shape: tuple[int, int], ratio: float) -> None:
    rng = np.random.default_rng(0)
    # Blobs of this many pixels reach the border of the image, and have holes.
    blobs = [blob(rng, *shape, share) for share in (0.02, 0.3, 0.5, 0.9, 1.0)]
    for one, two in zip(blobs, reversed(blobs), strict=True):
        expected = published_boundary(one, ratio), published_boundary(two, ratio)
        np.testing.assert_array_equal(boundary(one, ratio), expected[0])
        both, either = expected[0] & expected[1], expected[0] | expected[1]
        assert boundary_iou(one, two, None, ratio) == pytest.approx(both.sum() / either.sum())


def test_boundary_of_a_square_by_hand() -> None:
    mask = np.zeros((100, 100), bool)
    mask[10:50, 20:60] = True
    # 2% of the diagonal are 2.83 pixels: three.
    ring = mask.copy()
    ring[13:47, 23:57] = False
    np.testing.assert_array_equal(boundary(mask), ring)
    # The border of the image is outline, too.
    ring[:], ring[3:-3, 3:-3] = True, False
    np.testing.assert_array_equal(boundary(np.ones((100, 100), bool)), ring)


def test_boundary_of_what_is_narrow_or_empty() -> None:
    rng = np.random.default_rng(1)
    thin, other = np.zeros((2, 100, 100), bool)
    thin[40:45, 5:90], other[42:48, 10:99] = True, True
    assert boundary_iou(thin, other) == iou(thin, other) > 0
    empty = np.zeros((100, 100), bool)
    assert boundary_iou(empty, empty) == 1.0
    assert boundary_iou(empty, thin) == boundary_iou(thin, empty) == 0.0
    assert not boundary(empty).any()
    ignore = blob(rng, 100, 100, 0.5)
    assert boundary_iou(thin, other, ignore) == iou(thin, other, ignore)


def test_batch_iou_is_iou_of_each_pair() -> None:
    rng = np.random.default_rng(0)
    predictions, targets, valid = (rng.random((2, 3, 8, 9)) < share for share in (0.5, 0.4, 0.9))
    expected = [
        [iou(*pair) for pair in zip(*row, ~counts, strict=True)]
        for *row, counts in zip(predictions, targets, valid, strict=True)
    ]
    tensors = (torch.from_numpy(masks) for masks in (predictions, targets, valid))
    got = batch_iou(*tensors)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6)
    empty = torch.zeros(1, 4, 4, dtype=torch.bool)
    assert batch_iou(empty, empty).tolist() == [0.0]
