"""Polygons against pycocotools, and against the winding rule that canvases fill with."""

import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as rle

from sam_gym.data.coco_writer import CocoWriter, mask_annotation, polygons


def filled(polygon: list[int], size: tuple[int, int]) -> np.ndarray:
    """Winding number of every pixel."""
    corners = np.reshape(polygon, (-1, 2))
    steps = np.zeros((size[0] + 1, size[1]), int)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        assert (x0 == x1) != (y0 == y1)  # along the edges of pixels, and no point twice
        if y0 == y1:
            steps[y0, min(x0, x1) : max(x0, x1)] += np.sign(x1 - x0)
    return steps.cumsum(axis=0)[:-1]


def check(mask: np.ndarray) -> None:
    found, size = polygons(mask), mask.shape
    regions, _ = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    assert len(found) == regions - 1
    json.dumps(found)
    if found:
        codes = rle.frPyObjects(found, *size)
        np.testing.assert_array_equal(rle.decode(codes).sum(axis=2), mask)
        np.testing.assert_array_equal(rle.decode(rle.merge(codes)), mask)
    for polygon in found:
        assert set(np.unique(filled(polygon, size))) <= {0, 1}
    windings = sum((filled(polygon, size) for polygon in found), np.zeros(size, int))
    np.testing.assert_array_equal(windings, mask)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.7, 0.9])
def test_polygons_of_random_masks(share: float) -> None:
    rng = np.random.default_rng(int(100 * share))
    for _ in range(60):
        check(rng.random(rng.integers(1, 14, 2)) < share)


def test_polygons_of_all_small_masks() -> None:
    for bits in range(2**9):
        check(np.array([bits >> place & 1 for place in range(9)], bool).reshape(3, 3))


def test_polygons_of_nested_islands_and_touching_pixels() -> None:
    y, x = np.mgrid[:61, :57]
    rings = np.hypot(y - 30, x - 28).astype(int) // 4 % 2 == 0
    for mask in (rings, ~rings, (y + x) % 2 == 0, (y // 3 + x // 3) % 2 == 0, y >= 0, y < 0):
        check(mask)
    assert polygons(np.pad(np.ones((2, 3), bool), 1)) == [[1, 1, 4, 1, 4, 3, 1, 3]]


def test_the_writer_writes_polygons_and_results() -> None:
    mask = np.zeros((6, 7), bool)
    mask[1:5, 1:6], mask[2:4, 2:4] = True, False
    writer = CocoWriter({"star": "s"}, segmentation="polygons")
    writer.add("i", "a.png", mask.shape, [mask_annotation(mask, category="star", score=0.5)])
    (annotation,), (result,) = writer.content["annotations"], writer.results
    codes = rle.frPyObjects(annotation["segmentation"], *mask.shape)
    np.testing.assert_array_equal(rle.decode(rle.merge(codes)), mask)
    assert annotation["area"] == mask.sum() and annotation["bbox"] == [1, 1, 5, 4]
    assert set(result) == {"image_id", "category_id", "segmentation", "score"}
    np.testing.assert_array_equal(rle.decode(result["segmentation"]), mask)
