"""Simulated clicks against a brute-force reference with scipy's exact distance transform."""

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt, gaussian_filter

from sam_gym.simulation.clicks import (
    Click,
    cell_centres,
    error_click,
    interior_distance,
    point_grid,
    relative_grid,
)


def blobs(rng: np.random.Generator, shape: tuple[int, int], share: float = 0.5) -> np.ndarray:
    noise = gaussian_filter(rng.normal(size=shape), rng.uniform(0.5, 3.0))
    return noise > np.quantile(noise, 1 - share)


def squared_distance(region: np.ndarray) -> np.ndarray:
    """Exact squared distances to the border as integers; beyond the image lies border."""
    padded = np.pad(region, 1)
    return np.rint(distance_transform_edt(padded) ** 2).astype(int)[1:-1, 1:-1]


def reference_click(
    target: np.ndarray, prediction: np.ndarray, clicked: np.ndarray, ignore: np.ndarray
) -> Click | None:
    missed = squared_distance(target & ~prediction & ~ignore) * ~clicked
    extra = squared_distance(prediction & ~target & ~ignore) * ~clicked
    positive = missed.max() > extra.max()
    region = missed if positive else extra
    if not region.any():
        return None
    y, x = np.argwhere(region == region.max())[0]
    return Click(int(x), int(y), bool(positive))


def test_interior_distance_is_exact() -> None:
    rng = np.random.default_rng(0)
    filled = [np.zeros((37, 53), bool), np.ones((37, 53), bool), np.ones((1500, 1900), bool)]
    for region in (*filled, *(blobs(rng, (75, 91), share) for share in np.linspace(0.1, 0.9, 40))):
        # To the last bit: it decides between pixels that are equally far inside.
        exact = np.sqrt(squared_distance(region)).astype(np.float32)
        np.testing.assert_array_equal(interior_distance(region), exact, strict=True)


def test_click_equals_the_reference() -> None:
    rng = np.random.default_rng(1)
    signs = []
    for _ in range(300):
        shape = tuple(rng.integers(8, 48, 2))
        target, prediction = (blobs(rng, shape, rng.uniform(0.1, 0.9)) for _ in range(2))
        clicked = rng.random(shape) < rng.choice([0.0, 0.02, 0.5])
        ignore = blobs(rng, shape, 0.2) if rng.random() < 0.5 else np.zeros(shape, bool)
        expected = reference_click(target, prediction, clicked, ignore)
        assert error_click(target, prediction, clicked, ignore) == expected
        signs.append(expected.positive)
    assert 0.2 < np.mean(signs) < 0.8


def test_click_goes_on_until_every_wrong_pixel_was_clicked() -> None:
    rng = np.random.default_rng(2)
    target, prediction = blobs(rng, (7, 9)), blobs(rng, (7, 9))
    clicked = np.zeros((7, 9), bool)
    while (click := error_click(target, prediction, clicked)) is not None:
        assert not clicked[click.y, click.x]
        assert click.positive == target[click.y, click.x] != prediction[click.y, click.x]
        clicked[click.y, click.x] = True
    np.testing.assert_array_equal(clicked, target ^ prediction)


def test_no_click_without_error() -> None:
    mask = blobs(np.random.default_rng(3), (20, 20))
    assert error_click(mask, mask) is None
    assert error_click(mask, ~mask, ignore=np.ones_like(mask)) is None


def test_tie_is_negative_and_the_first_pixel_wins() -> None:
    target, prediction = np.zeros((12, 12), bool), np.zeros((12, 12), bool)
    target[1:4, 1:4] = prediction[6:9, 6:9] = True
    assert error_click(target, prediction) == Click(7, 7, False)
    target[1:4, 1:5] = True
    assert error_click(target, prediction) == Click(7, 7, False)  # wider, yet no farther inside
    target[1:6, 1:6] = True
    assert error_click(target, prediction) == Click(3, 3, True)


def test_image_border_counts_as_border() -> None:
    assert error_click(np.ones((5, 9), bool), np.zeros((5, 9), bool)) == Click(2, 2, True)


def test_arguments_are_not_changed() -> None:
    rng = np.random.default_rng(4)
    arguments = [blobs(rng, (16, 16)) for _ in range(4)]
    copies = [argument.copy() for argument in arguments]
    error_click(*arguments)
    for argument, copy in zip(arguments, copies, strict=True):
        np.testing.assert_array_equal(argument, copy)


def test_point_grid() -> None:
    points = point_grid(2, 3, height=20, width=60)
    assert points.dtype == np.float32
    expected = [[9.5, 4.5], [29.5, 4.5], [49.5, 4.5], [9.5, 14.5], [29.5, 14.5], [49.5, 14.5]]
    np.testing.assert_array_equal(points, expected)


@pytest.mark.parametrize("size", [1, 4, 7])
def test_point_grid_of_every_pixel(size: int) -> None:
    points = point_grid(size, size, size, size).reshape(size, size, 2)
    ys, xs = np.mgrid[:size, :size]
    np.testing.assert_allclose(points, np.stack([xs, ys], axis=-1), atol=1e-6)


def test_cell_centres_count_row_by_row() -> None:
    centres = cell_centres(np.arange(6), 3, (20.0, 10.0))
    assert centres[:4].tolist() == [[9.5, 4.5], [29.5, 4.5], [49.5, 4.5], [9.5, 14.5]]
    np.testing.assert_array_equal(point_grid(2, 3, height=20, width=60), centres)
    relative = relative_grid(3, 2) * [60, 20] - 0.5
    np.testing.assert_allclose(relative, centres)
