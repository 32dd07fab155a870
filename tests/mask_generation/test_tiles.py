"""Tiles of large images: run lengths of larger images, joined masks, and the whole thing."""

from itertools import pairwise

import cv2
import numpy as np
import pytest

from sam_gym.backbones import Backbone
from sam_gym.data import make_dataset
from sam_gym.mask_generation.generator import GeneratorOptions, MaskGenerator
from sam_gym.mask_generation.masks import (
    Masks,
    from_counts,
    placed_counts,
    to_counts,
    united_counts,
)
from sam_gym.mask_generation.tiles import TiledGenerator, TileOptions, join_tiles, tile_boxes


def blobs(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    noise = cv2.GaussianBlur(rng.random(size), (0, 0), 2)
    return np.asarray(noise > np.quantile(noise, rng.uniform(0, 1)))


def test_run_lengths_of_larger_images_and_of_unions() -> None:
    rng = np.random.default_rng(0)
    shapes = [blobs(rng, (rng.integers(1, 30), rng.integers(1, 30))) for _ in range(60)]
    shapes += [np.zeros((4, 5), bool), np.ones((4, 5), bool), np.ones((40, 5), bool)]
    for small in shapes:
        y, x = rng.integers(0, [41 - small.shape[0], 51 - small.shape[1]])
        large = np.zeros((40, 50), bool)
        large[y : y + small.shape[0], x : x + small.shape[1]] = small
        placed = placed_counts(to_counts(small), small.shape, (int(x), int(y)), large.shape)
        np.testing.assert_array_equal(placed, to_counts(large))
    for _ in range(30):
        masks = [blobs(rng, (20, 30)) for _ in range(3)] + [np.zeros((20, 30), bool)]
        united = united_counts([to_counts(mask) for mask in masks])
        np.testing.assert_array_equal(united, to_counts(np.any(masks, axis=0)))


def test_tiles_cover_the_image_and_overlap() -> None:
    for size, side in (((300, 500), 128), ((128, 128), 128), ((90, 700), 100), ((64, 65), 64)):
        boxes = tile_boxes(size, TileOptions(side))
        seen = np.zeros(size, int)
        for x0, y0, x1, y1 in boxes:
            assert (x1 - x0, y1 - y0) == (min(side, size[1]), min(side, size[0]))
            seen[y0:y1, x0:x1] += 1
        assert seen.min() == 1
        columns = sorted({(x0, x1) for x0, _, x1, _ in boxes})
        for (_, end), (start, _) in pairwise(columns):
            assert end - start >= 0.25 * side


def perfect(objects: list[np.ndarray], box: tuple[int, int, int, int]) -> Masks:
    """What of some objects is in a tile, as masks in pixels of the image."""
    x0, y0, x1, y1 = box
    parts = [part for mask in objects if (part := mask[y0:y1, x0:x1]).any()]
    count, size = len(parts), (y1 - y0, x1 - x0)
    places = [np.nonzero(part) for part in parts]
    own = Masks.none(size)
    return Masks(
        size,
        [to_counts(part) for part in parts],
        np.array([[x.min(), y.min(), x.max(), y.max()] for y, x in places], np.float32).reshape(
            -1, 4
        ),
        np.full(count, 0.9, np.float32),
        np.full(count, 0.9, np.float32),
        np.zeros((count, 2), np.float32),
        np.tile(np.float32(box), (count, 1)),
        np.zeros((count, 0), np.float32),
        own.names,
    ).placed((x0, y0), objects[0].shape)


def disc(x: int, y: int, radius: int) -> np.ndarray:
    canvas = np.zeros((200, 300), np.uint8)
    cv2.circle(canvas, (x, y), radius, 1, -1)
    return canvas.astype(bool)


def test_objects_are_joined_across_borders_and_none_is_double() -> None:
    options = TileOptions(100)
    boxes = tile_boxes((200, 300), options)
    bar = np.zeros((200, 300), bool)
    bar[96:104, 10:290] = True  # through all tiles of two rows
    objects = [disc(x, y, 9) for y in range(12, 200, 22) for x in range(12, 300, 22) if y != 100]
    objects += [bar]
    joined = join_tiles([perfect(objects, box) for box in boxes], boxes)
    found = {tuple(counts.tolist()) for counts in joined.counts}
    # Each object is found, whole, and nothing else is; what two tiles show whole is there twice.
    assert found == {tuple(to_counts(mask).tolist()) for mask in objects}
    for counts, (x0, y0, x1, y1) in zip(joined.counts, joined.boxes, strict=True):
        y, x = from_counts(counts, (200, 300)).nonzero()
        assert (x.min(), y.min(), x.max(), y.max()) == (x0, y0, x1, y1)


def test_a_fragment_without_continuation_is_dropped() -> None:
    boxes = tile_boxes((100, 175), TileOptions(100))
    assert boxes == [(0, 0, 100, 100), (75, 0, 175, 100)]
    whole = np.zeros((100, 175), bool)
    whole[40:60, 60:120] = True
    one, none = perfect([whole], boxes[0]), Masks.none((100, 175))
    assert len(join_tiles([one, none], boxes)) == 0
    (counts,) = join_tiles([one, perfect([whole], boxes[1])], boxes).counts
    np.testing.assert_array_equal(counts, to_counts(whole))


def test_small_objects_of_a_large_image(shipped: Backbone) -> None:
    scenes = make_dataset("scenes", "test", length=4, size=128)
    samples = [scenes[index] for index in range(4)]
    rows = [np.hstack([one.image for one in samples[k : k + 2]]) for k in (0, 2)]
    image = np.vstack(rows)
    generator = MaskGenerator(shipped, GeneratorOptions((6, 6)))
    tiled = TiledGenerator(generator, TileOptions(160))
    (masks,) = tiled.stream([image])
    assert masks.size == (256, 256) and len(masks) > 4
    assert (np.diff(masks.predicted_iou) <= 0).all()
    binary = masks.binary().reshape(len(masks), -1).astype(np.float32)
    shared = binary @ binary.T
    areas = binary.sum(axis=1)
    ious = shared / (areas[:, None] + areas[None] - shared)
    assert (ious - np.eye(len(masks))).max() <= 0.7
    # An image of one tile is segmented as without tiles.
    (small,), (expected,) = tiled.stream([image[:150, :160]]), generator.stream([image[:150, :160]])
    assert small.coco() == expected.coco() and len(small) > 0


def test_wrong_options(shipped: Backbone) -> None:
    with pytest.raises(ValueError, match="side must be at least 64"):
        TiledGenerator(MaskGenerator(shipped), TileOptions(10))
    with pytest.raises(ValueError, match="exclude each other"):
        TiledGenerator(MaskGenerator(shipped, GeneratorOptions(crop_n_layers=1)), TileOptions(100))
