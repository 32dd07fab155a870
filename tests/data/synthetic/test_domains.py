"""Procedural domains: always the same, annotated without contradiction, and unlike each other."""

import pickle
import re

import cv2
import numpy as np
import pytest

from sam_gym.data import Dataset, Sample, make_dataset
from sam_gym.data.synthetic.base import SPLITS
from sam_gym.data.synthetic.domains.dataset import (
    DOMAINS,
    MIN_AREA,
    MIN_AREA_THIN,
    ProceduralDomain,
)

KINDS = DOMAINS.names()
#: Domains in which the whole of a hidden object counts, or things may lie across each other.
MAY_OVERLAP = {"xray", "cracks", "vessels", "defects", "sonar"}


@pytest.fixture(scope="module")
def samples() -> dict[str, list[Sample]]:
    return {kind: [ProceduralDomain(kind)[index] for index in range(6)] for kind in KINDS}


def test_there_are_enough_and_some_are_thin() -> None:
    assert len(KINDS) >= 8
    assert 2 <= sum(DOMAINS.get(kind).thin for kind in KINDS) <= len(KINDS) // 2


def test_is_a_registered_dataset() -> None:
    dataset = make_dataset("domain", "val", kind="cells", length=5, size=96, seed=3)
    assert isinstance(dataset, Dataset)
    assert (dataset.name, len(dataset), dataset.categories) == ("cells", 5, ("object",))
    sample = dataset[4]
    assert sample.image.shape == (96, 96, 3)
    assert sample.source == "cells/val/4"


@pytest.mark.parametrize("kind", KINDS)
def test_the_category_does_not_tell_the_domain(kind: str) -> None:
    assert ProceduralDomain(kind).categories == ("object",)


@pytest.mark.parametrize("kind", KINDS)
def test_fields_have_the_declared_form(kind: str, samples: dict[str, list[Sample]]) -> None:
    least = MIN_AREA_THIN if DOMAINS.get(kind).thin else MIN_AREA
    for sample in samples[kind]:
        count = len(sample.masks)
        assert sample.image.shape == (256, 256, 3) and sample.image.dtype == np.uint8
        assert sample.masks.shape == (count, 256, 256) and sample.masks.dtype == bool
        assert sample.categories.tolist() == [0] * count and sample.categories.dtype == np.int64
        assert count and (sample.masks.mean(axis=(1, 2)) >= least).all()
        assert sample.masks.mean(axis=(1, 2)).max() <= 0.4
        if kind not in MAY_OVERLAP:
            assert sample.masks.sum(axis=0).max() == 1


def test_xray_counts_what_lies_behind(samples: dict[str, list[Sample]]) -> None:
    assert max(sample.masks.sum(axis=0).max() for sample in samples["xray"]) >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_same_index_gives_the_same_sample(kind: str, samples: dict[str, list[Sample]]) -> None:
    again = ProceduralDomain(kind, length=50)
    for index in (4, 0):
        one, two = samples[kind][index], again[index]
        np.testing.assert_array_equal(one.image, two.image)
        np.testing.assert_array_equal(one.masks, two.masks)
        assert one.source == two.source == f"{kind}/train/{index}"


@pytest.mark.parametrize("kind", KINDS)
def test_splits_seeds_and_indices_are_disjoint(kind: str) -> None:
    images = {
        ProceduralDomain(kind, split, size=64, seed=seed)[index].image.tobytes()
        for split in SPLITS
        for seed in (0, 1)
        for index in range(3)
    }
    assert len(images) == 3 * 2 * 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [64, 512])
def test_scale_follows_the_size(kind: str, size: int, samples: dict[str, list[Sample]]) -> None:
    """Another size shows the same kind of objects, not larger or smaller ones."""
    other = ProceduralDomain(kind, size=size)
    areas = [np.median(other[index].masks.mean(axis=(1, 2))) for index in range(4)]
    usual = [np.median(sample.masks.mean(axis=(1, 2))) for sample in samples[kind]]
    assert 0.25 < np.mean(areas) / np.mean(usual) < 4


def test_samples_are_fresh() -> None:
    domain = ProceduralDomain("sonar", length=2, size=64)
    sample = domain[0]
    sample.image[:] = 0
    sample.masks[:] = False
    assert domain[0].image.any() and domain[0].masks.any()


def look_of(image: np.ndarray) -> np.ndarray:
    """Mean and spread of the colours, and how rough the surface is."""
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).astype(np.float32)
    rough = np.abs(cv2.Laplacian(lab[..., 0], cv2.CV_32F)).mean()
    return np.array([*lab.mean(axis=(0, 1)), *lab.std(axis=(0, 1)), rough])


def test_domains_look_different(samples: dict[str, list[Sample]]) -> None:
    """Each look is nearer to the mean look of its own domain than to that of any other."""
    looks = {kind: np.array([look_of(s.image) for s in samples[kind]]) for kind in KINDS}
    spread = np.concatenate([own - own.mean(axis=0) for own in looks.values()]).std(axis=0)
    means = np.array([looks[kind].mean(axis=0) for kind in KINDS])
    right = [
        np.argmin((((look - means) / spread) ** 2).sum(axis=1)) == number
        for number, kind in enumerate(KINDS)
        for look in looks[kind]
    ]
    assert np.mean(right) > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_objects_can_be_seen(kind: str, samples: dict[str, list[Sample]]) -> None:
    """Along the outlines the image changes more than where nothing ends."""
    along, elsewhere = [], []
    for sample in samples[kind]:
        grey = cv2.GaussianBlur(cv2.cvtColor(sample.image, cv2.COLOR_RGB2GRAY), (0, 0), 1.5)
        change = np.hypot(*(cv2.Sobel(grey, cv2.CV_32F, *d) for d in ((1, 0), (0, 1))))
        edge = np.zeros((256, 256), bool)
        near = np.zeros((256, 256), bool)
        for mask in sample.masks.astype(np.uint8):
            ring = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
            edge |= ring
            near |= cv2.dilate(mask, np.ones((25, 25), np.uint8)) > 0
        along.append(change[edge].mean())
        elsewhere.append(change[near & ~edge & ~sample.masks.any(axis=0)].mean())
    assert np.mean(along) > 1.05 * np.mean(elsewhere)


def test_annotation_conventions_conflict(samples: dict[str, list[Sample]]) -> None:
    """In sonar the dark beside the echo belongs to the object; a crack is the dark line alone."""
    for kind, dark_inside in (("sonar", True), ("cracks", True), ("thermal", False)):
        inside, outside = [], []
        for sample in samples[kind]:
            grey = cv2.cvtColor(sample.image, cv2.COLOR_RGB2GRAY).astype(np.float32)
            union = sample.masks.any(axis=0)
            inside.append(np.quantile(grey[union], 0.3))
            outside.append(np.quantile(grey[~union], 0.3))
        assert (np.mean(inside) < np.mean(outside)) == dark_inside
    filled = {
        kind: np.mean(
            [m.sum() / (np.ptp(np.argwhere(m), axis=0) + 1).prod() for s in some for m in s.masks]
        )
        for kind, some in samples.items()
    }
    assert max(filled[kind] for kind in KINDS if DOMAINS.get(kind).thin) < 0.2
    assert min(filled[kind] for kind in KINDS if not DOMAINS.get(kind).thin) > 0.3


def test_draw_is_seeded_and_stays_inside() -> None:
    domain = ProceduralDomain("night", length=6)
    drawn = [domain.draw(np.random.default_rng(seed)) for seed in range(40)]
    assert {category for _, category in drawn} == {None}
    assert {index for index, _ in drawn} == set(range(6))


def test_endless_by_default_and_picklable() -> None:
    domain = pickle.loads(pickle.dumps(ProceduralDomain("defects", "test", size=64)))
    assert len(domain) == 2**31 - 1
    assert domain[2**31 - 2].masks.any()


@pytest.mark.parametrize("index", [-1, 6])
def test_index_outside_is_an_error(index: int) -> None:
    with pytest.raises(IndexError, match=re.escape(f"image {index} is not in range(6)")):
        ProceduralDomain("cells", length=6)[index]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "cell"}, r"Unknown domain 'cell'\. Did you mean 'cells'\? Valid names: aerial, "),
        ({"split": "trian"}, r"Unknown split 'trian'\. Did you mean 'train'\?"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"size": 63}, "size must be from 64 to 1024 pixels, got 63"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_impossible_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_dataset("domain", **{"kind": "cells", **arguments})
