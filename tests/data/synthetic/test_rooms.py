"""Rooms: always the same, disjoint by split, whole objects of parts that stand out."""

import re

import numpy as np
import pytest

from sam_gym.data import Dataset, Sample, make_dataset
from sam_gym.data.synthetic.base import SPLITS
from sam_gym.data.synthetic.rooms.dataset import (
    MIN_AREA,
    MIN_VISIBLE,
    PART_AREA,
    PART_SHARE,
    Rooms,
    furnished_room,
)
from sam_gym.data.synthetic.rooms.drawing import Build
from sam_gym.data.synthetic.rooms.furniture import FURNITURE


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [Rooms()[index] for index in range(24)]


def test_is_a_registered_dataset() -> None:
    dataset = make_dataset("rooms", split="val", length=5, size=96)
    assert isinstance(dataset, Dataset)
    assert (dataset.name, len(dataset)) == ("rooms", 5)
    assert dataset[4].image.shape == (96, 96, 3)


def test_categories_are_named_and_all_occur(samples: list[Sample]) -> None:
    assert Rooms.categories == FURNITURE.names()
    assert len(Rooms.categories) >= 10
    seen = {int(category) for sample in samples for category in sample.categories}
    assert seen == set(range(len(Rooms.categories)))


def test_same_index_gives_the_same_sample(samples: list[Sample]) -> None:
    again = Rooms(length=100)
    for index in (7, 0):
        one, two = samples[index], again[index]
        for name in ("image", "masks", "categories", "parts"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
        assert one.source == two.source == f"rooms/train/{index}"
    assert not np.shares_memory(samples[0].image, again[0].image)


def test_splits_seeds_and_indices_are_disjoint() -> None:
    images = {
        (split, seed, index): Rooms(split, size=64, seed=seed)[index].image.tobytes()
        for split in SPLITS
        for seed in (0, 1)
        for index in range(6)
    }
    assert len(set(images.values())) == len(images) == 36


def test_fields_have_the_declared_form(samples: list[Sample]) -> None:
    for sample in samples:
        count = len(sample.masks)
        assert sample.image.shape == (256, 256, 3) and sample.image.dtype == np.uint8
        assert sample.masks.shape == (count, 256, 256) and sample.masks.dtype == bool
        assert sample.categories.shape == (count,) and sample.categories.dtype == np.int64
        assert sample.parts is not None and sample.parts.dtype == bool
        assert sample.parts.shape[1:] == (256, 256)
        assert sample.ignore is None
        assert 4 <= count <= 9


@pytest.mark.parametrize("size", [64, 256])
def test_objects_are_visible_and_do_not_overlap(size: int) -> None:
    for sample in map(Rooms(size=size).__getitem__, range(24)):
        assert sample.masks.sum(axis=0).max() == 1
        assert sample.masks.sum(axis=(1, 2)).min() >= MIN_AREA * size**2


def test_objects_hide_each_other_but_not_too_much() -> None:
    shares = []
    for seed in range(12):
        room = furnished_room([seed], 256, 256, Rooms.categories)
        masks = room.sample("").masks
        for item, mask in zip(room.objects, masks, strict=True):
            shares.append(mask.sum() / np.count_nonzero(item.silhouette()[1]))
    assert min(shares) >= MIN_VISIBLE
    assert max(shares) == 1
    assert 0.2 < np.mean(np.array(shares) < 0.95) < 0.8


def test_a_part_lies_in_one_thing_and_is_not_all_of_it(samples: list[Sample]) -> None:
    for sample in samples:
        assert sample.parts is not None
        for part in sample.parts:
            (owner,) = np.flatnonzero((sample.masks & part).any(axis=(1, 2)))
            assert not (part & ~sample.masks[owner]).any()
            assert PART_AREA <= part.sum() < PART_SHARE * sample.masks[owner].sum()
        assert sample.parts.sum(axis=0).max() == 1


def test_most_objects_have_several_parts_of_unlike_colours(samples: list[Sample]) -> None:
    several, distances = [], []
    for sample in samples:
        assert sample.parts is not None
        for mask in sample.masks:
            own = sample.parts[(sample.parts & mask).any(axis=(1, 2))]
            several.append(len(own) >= 2)
            colors = [sample.image[part].mean(axis=0) for part in own]
            if len(own) >= 2:
                distances.append(max(np.linalg.norm(a - b) for a in colors for b in colors))
    assert np.mean(several) > 0.9
    assert np.median(distances) > 80


@pytest.mark.parametrize("name", FURNITURE.names())
def test_furniture_has_parts_wherever_it_is(name: str) -> None:
    kind = FURNITURE.get(name)
    assert kind.places and set(kind.places) <= {"floor", "wall", "top"}
    for place in kind.places:
        for turn in (-0.7, 0.7):
            rng = np.random.default_rng(3)
            build = Build(rng, turn, light=1.0, place=place)
            kind.make(rng, build)
            points, ends = build.outlines
            assert len(ends) == len(build.faces) and ends[-1] == len(points)
            assert {piece for piece, _ in build.faces} == set(range(len(build.coats)))
            assert len({tuple(coat.color) for coat in build.coats}) >= 3
            width, height = points.max(axis=0) - points.min(axis=0)
            assert 0.3 < width < 3.5 and 0.3 < height < 2.2
            assert points[:, 1].max() < 0.35  # nothing reaches far below where it stands


def test_draw_is_seeded_and_stays_inside() -> None:
    rooms = Rooms(length=6)
    drawn = [rooms.draw(np.random.default_rng(seed)) for seed in range(40)]
    assert {category for _, category in drawn} == {None}
    assert {index for index, _ in drawn} == set(range(6))


@pytest.mark.parametrize("index", [-1, 6, 2**31])
def test_index_outside_is_an_error(index: int) -> None:
    with pytest.raises(IndexError, match=re.escape(f"room {index} is not in range(6)")):
        Rooms(length=6)[index]


def test_endless_by_default() -> None:
    rooms = Rooms(size=64)
    assert len(rooms) == 2**31 - 1
    assert rooms[2**31 - 2].masks.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "trian"}, r"Unknown split 'trian'\. Did you mean 'train'\?"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"size": 63}, "size must be from 64 to 1024 pixels, got 63"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"categories": "tabel"}, r"Unknown category 'tabel'\. Did you mean 'table'\?"),
        ({"categories": []}, "categories is empty"),
    ],
)
def test_impossible_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rooms(**arguments)


@pytest.mark.parametrize("categories", ["clock, bear", *((name,) for name in FURNITURE.names())])
def test_limited_categories(categories: str | tuple[str, ...]) -> None:
    rooms = Rooms(categories=categories, size=64)
    found = {int(category) for index in range(6) for category in rooms[index].categories}
    assert found <= set(range(len(rooms.categories))) and found
