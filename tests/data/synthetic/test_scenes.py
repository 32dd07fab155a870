"""Procedural scenes: always the same, disjoint by split, and annotated without contradiction."""

import re

import numpy as np
import pytest

from sam_gym.data import Dataset, Sample, make_dataset
from sam_gym.data.synthetic.base import SPLITS
from sam_gym.data.synthetic.scenes import Scenes
from sam_gym.data.synthetic.shapes import SHAPES


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [Scenes()[index] for index in range(12)]


def test_is_a_registered_dataset() -> None:
    dataset = make_dataset("scenes", split="val", length=5, size=96)
    assert isinstance(dataset, Dataset)
    assert (dataset.name, len(dataset)) == ("scenes", 5)
    assert dataset[4].image.shape == (96, 96, 3)


def test_categories_are_named_and_all_occur() -> None:
    assert len(Scenes.categories) >= 8
    assert len(set(Scenes.categories)) == len(Scenes.categories)
    assert Scenes.categories == SHAPES.names()
    small = Scenes(size=64)
    seen = {int(category) for index in range(60) for category in small[index].categories}
    assert seen == set(range(len(Scenes.categories)))


def test_same_index_gives_the_same_sample(samples: list[Sample]) -> None:
    again = Scenes(length=100)
    for index in (7, 0):
        one, two = samples[index], again[index]
        for name in ("image", "masks", "categories", "parts"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
        assert one.source == two.source == f"scenes/train/{index}"


def test_splits_and_indices_are_disjoint() -> None:
    images = {
        (split, index): Scenes(split, size=64)[index].image.tobytes()
        for split in SPLITS
        for index in range(15)
    }
    assert len(set(images.values())) == len(images) == 45


def test_fields_have_the_declared_form(samples: list[Sample]) -> None:
    for sample in samples:
        count = len(sample.masks)
        assert sample.image.shape == (256, 256, 3) and sample.image.dtype == np.uint8
        assert sample.masks.shape == (count, 256, 256) and sample.masks.dtype == bool
        assert sample.categories.shape == (count,) and sample.categories.dtype == np.int64
        assert sample.parts is not None and sample.parts.dtype == bool
        assert sample.ignore is None
        assert 3 <= count <= 7
        assert 2 <= len(set(sample.categories.tolist())) <= 4


def test_visible_masks_are_not_empty_and_do_not_overlap(samples: list[Sample]) -> None:
    for sample in samples:
        assert sample.masks.any(axis=(1, 2)).all()
        assert sample.masks.sum(axis=0).max() == 1


def test_a_part_lies_in_one_object_or_in_none(samples: list[Sample]) -> None:
    inside = 0
    for sample in samples:
        assert sample.parts is not None
        covered = np.zeros_like(sample.masks)
        for part in sample.parts:
            touched = np.flatnonzero((sample.masks & part).any(axis=(1, 2)))
            assert len(touched) <= 1
            if len(touched):
                assert not (part & ~sample.masks[touched[0]]).any()
                covered[touched[0]] |= part
                inside += 1
        np.testing.assert_array_equal(covered, sample.masks)  # parts make up the object
    assert inside > sum(len(sample.masks) for sample in samples)


def test_category_mask_is_the_union(samples: list[Sample]) -> None:
    several = 0
    for sample in samples:
        for category in set(sample.categories.tolist()):
            masks = [
                m for m, c in zip(sample.masks, sample.categories, strict=True) if c == category
            ]
            union = np.zeros_like(masks[0])
            for mask in masks:
                union |= mask
            np.testing.assert_array_equal(sample.category_mask(category), union)
            several += len(masks) > 1
    assert several


def test_material_fills_the_areas() -> None:
    def red(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
        return np.full((height, width, 3), (250, 0, 0), np.uint8)

    image = Scenes(size=96, material=red)[0].image.astype(float)
    assert image[..., 0].mean() > 4 * image[..., 1:].mean()


def test_draw_is_seeded_and_stays_inside() -> None:
    scenes = Scenes(length=6)
    drawn = [scenes.draw(np.random.default_rng(seed)) for seed in range(40)]
    assert {category for _, category in drawn} == {None}
    assert {index for index, _ in drawn} == set(range(6))
    assert drawn == [scenes.draw(np.random.default_rng(seed)) for seed in range(40)]


@pytest.mark.parametrize("index", [-1, 6, 2**31])
def test_index_outside_is_an_error(index: int) -> None:
    with pytest.raises(IndexError, match=re.escape(f"scene {index} is not in range(6)")):
        Scenes(length=6)[index]


def test_endless_by_default() -> None:
    scenes = Scenes(size=64)
    assert len(scenes) == 2**31 - 1
    assert scenes[2**31 - 2].masks.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "trian"}, r"Unknown split 'trian'\. Did you mean 'train'\?"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"size": 63}, "size must be from 64 to 320 pixels, got 63"),
        ({"size": 321}, "size must be from 64 to 320 pixels, got 321"),
    ],
)
def test_impossible_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scenes(**arguments)


def test_misspelt_dataset() -> None:
    with pytest.raises(ValueError, match=r"Unknown dataset 'scense'\. Did you mean 'scenes'\?"):
        make_dataset("scense")


def test_limited_categories():
    scenes = Scenes(categories="ring, star")
    assert scenes.categories == ("ring", "star")
    found = {int(category) for index in range(20) for category in scenes[index].categories}
    assert found == {0, 1}
    everything = Scenes()
    assert any(not np.array_equal(scenes[i].image, everything[i].image) for i in range(3))
    alone = Scenes(categories=["mug"])[0]
    assert len(alone.masks) and not alone.categories.any()
    with pytest.raises(ValueError, match="Did you mean 'star'"):
        Scenes(categories="starr")
    with pytest.raises(ValueError, match="categories is empty"):
        Scenes(categories=[])


def test_all_categories_draw_the_same_scenes_as_none_named():
    assert np.array_equal(Scenes()[3].image, Scenes(categories=Scenes.categories)[3].image)
