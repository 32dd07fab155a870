"""Augmented copies of the images of a dataset."""

import copy
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from sam_gym.data import make_dataset
from sam_gym.data.augmented import Augmented
from sam_gym.data.base import Dataset, Sample
from sam_gym.envs.click import SamSegConfig


class Numbered:
    """Images whose pixels tell where they were, with objects in a corner and in the middle."""

    name, categories, files = "numbered", ("corner", "middle"), ("a.png",)
    count = 40

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        y, x = np.mgrid[:30, :40]
        masks = np.stack([(y < 4) & (x < 4), (abs(y - 15) < 6) & (abs(x - 20) < 6)])
        image = np.stack([y, x, np.full_like(x, index)], axis=-1).astype(np.uint8)
        # Every other image has the object in the middle only.
        kept = slice(index % 2, None)
        return Sample(
            image,
            masks[kept],
            np.arange(2)[kept],
            f"image {index}",
            ignore=x > 30,
            parts=masks[:1],
            digest=b"of the image",
            semantic=(y + x).astype(np.uint8),
        )

    def draw(self, rng: np.random.Generator) -> tuple[int, int | None]:
        return int(rng.integers(self.count)), 1


def test_everything_of_a_sample_is_cut_and_flipped_alike() -> None:
    dataset = Augmented(Numbered(), 3)
    assert len(dataset) == 120 and dataset.files == ("a.png",)
    flipped, sizes = set(), set()
    for index in range(len(dataset)):
        number, copied = divmod(index, 3)
        whole, own = Numbered()[number], dataset[index]
        if copied == 0:
            np.testing.assert_array_equal(own.image, whole.image)
            assert own.digest == whole.digest
            continue
        y, x, values = own.image.astype(int).transpose(2, 0, 1)
        assert (values == number).all() and own.digest is None
        # Whole rows and columns, at the places where they were.
        assert (np.diff(y, axis=0) == 1).all() and (np.diff(y, axis=1) == 0).all()
        step = x[0, 1] - x[0, 0]
        assert step in (-1, 1) and (np.diff(x, axis=1) == step).all()
        assert y.shape[0] >= 15 and abs(y.shape[1] / y.shape[0] - 4 / 3) < 0.1
        assert own.ignore is not None and own.semantic is not None and own.parts is not None
        np.testing.assert_array_equal(own.masks, whole.masks[:, y, x])
        np.testing.assert_array_equal(own.parts, Numbered()[0].masks[:1, y, x])
        np.testing.assert_array_equal(own.ignore, x > 30)
        np.testing.assert_array_equal(own.semantic, y + x)
        np.testing.assert_array_equal(own.categories, whole.categories)
        assert own.masks.any(axis=(1, 2)).all()
        flipped.add(int(step))
        sizes.add(y.shape)
        np.testing.assert_array_equal(dataset[index].image, own.image)
    assert flipped == {-1, 1} and len(sizes) > 5 and (30, 40) in sizes


def test_all_copies_are_drawn_with_the_category_of_the_dataset() -> None:
    dataset, rng = Augmented(Numbered(), 3), np.random.default_rng(0)
    drawn = [dataset.draw(rng) for _ in range(600)]
    assert {category for _, category in drawn} == {1}
    assert {index for index, _ in drawn} >= set(range(60))
    assert max(index for index, _ in drawn) < 120


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda own: pickle.loads(pickle.dumps(own))])
def test_it_is_a_dataset_that_can_be_copied(clone: Any) -> None:
    dataset = clone(Augmented(make_dataset("scenes", "train", length=3), 2))
    assert isinstance(dataset, Dataset) and dataset.name == "scenes" and len(dataset) == 6
    with pytest.raises(IndexError):
        dataset[6]
    with pytest.raises(AttributeError, match="nothing"):
        _ = dataset.nothing


@pytest.mark.parametrize("target", ["category", "instance"])
def test_environments_train_on_augmentations_and_evaluate_without(
    target: str, tiny_env: dict[str, Any]
) -> None:
    settings = {**tiny_env, "augmentations": 4, "target": target}
    env = gym.make("SamSeg-v0", **settings)
    sources = {env.reset(seed=seed)[1]["source"] for seed in range(12)}
    assert any(source.endswith(" (augmented)") for source in sources)
    env.close()
    held_out = SamSegConfig(**settings | {"split": "val"}).open_dataset()
    assert not isinstance(held_out, Augmented)
    with pytest.raises(ValueError, match="augmentations"):
        SamSegConfig(**settings | {"augmentations": 0}).validate()
