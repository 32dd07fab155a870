"""Panoramas of rooms."""

import re

import numpy as np
import pytest

from sam_gym.data import Dataset, make_dataset
from sam_gym.data.synthetic.rooms.dataset import MIN_AREA, Rooms, RoomsPanoramas


@pytest.fixture(scope="module")
def panoramas() -> RoomsPanoramas:
    return RoomsPanoramas(height=128, width=448)


def test_is_a_registered_dataset() -> None:
    dataset = make_dataset("rooms-panoramas", split="val", length=5)
    assert isinstance(dataset, Dataset)
    assert (dataset.name, len(dataset)) == ("rooms-panoramas", 5)
    assert dataset.categories == Rooms.categories
    sample = dataset[4]
    assert sample.image.shape == (256, 1024, 3)
    assert sample.source == "rooms-panoramas/val/4"
    assert 16 <= len(sample.masks) <= 36
    assert sample.masks.sum(axis=0).max() == 1
    assert sample.masks.sum(axis=(1, 2)).min() >= MIN_AREA * 256**2
    assert sample.parts is not None and (sample.parts <= sample.masks.any(axis=0)).all()


def test_same_index_gives_the_same_panorama(panoramas: RoomsPanoramas) -> None:
    again = RoomsPanoramas(height=128, width=448)
    np.testing.assert_array_equal(panoramas[2].image, again[2].image)
    others = [panoramas[3], RoomsPanoramas("test", height=128, width=448)[2]]
    others.append(RoomsPanoramas(height=128, width=448, seed=1)[2])
    assert len({sample.image.tobytes() for sample in [panoramas[2], *others]}) == 4


def test_draw_stays_inside() -> None:
    panoramas = RoomsPanoramas(length=4)
    drawn = {panoramas.draw(np.random.default_rng(seed)) for seed in range(40)}
    assert drawn == {(index, None) for index in range(4)}
    with pytest.raises(IndexError, match=re.escape("panorama 4 is not in range(4)")):
        panoramas[4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "tran"}, "Unknown split 'tran'"),
        ({"height": 32}, "size must be from 64 to 1024 pixels, got 32"),
        ({"width": 200}, "width must be from 256 to 2048 pixels, got 200"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"categories": "sofs"}, "Unknown category 'sofs'. Did you mean 'sofa'"),
    ],
)
def test_impossible_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoomsPanoramas(**arguments)
