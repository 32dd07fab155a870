"""Operating points: what is kept, which are best, and what all that comes to."""

from collections.abc import Callable

import numpy as np
import pytest

from benchmarks.everything.scores import (
    ALL,
    EVERYTHING,
    PREDICTED_IOU,
    STABILITY,
    Candidates,
    OperatingPoint,
    Split,
    Tried,
    best_of,
    best_within,
)
from sam_gym.backbones import Backbone
from sam_gym.data import Sample
from sam_gym.data.synthetic.rooms.dataset import Rooms
from sam_gym.mask_generation.generator import GeneratorOptions, MaskGenerator
from sam_gym.mask_generation.masks import Masks
from sam_gym.metrics.panoptic import Overlaps, encoded

MakeMasks = Callable[..., Masks]


@pytest.fixture
def candidates(make_masks: MakeMasks) -> Candidates:
    """Two objects, trusted 0.9 and 0.77, and two parts of the first, trusted 0.63 and 0.5."""
    masks = make_masks((0, 0, 7, 7), (8, 8, 15, 15), (0, 0, 3, 7), (0, 4, 7, 7))
    truth = masks.binary()[:2]
    sample = Sample(np.zeros((16, 16, 3), np.uint8), truth, np.array([0, 1]), "one")

    class Dataset:
        name, categories = "two", ("a", "b")

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Sample:
            return sample

    return Candidates.of([masks], Split.of(Dataset(), 1))


def test_an_operating_point_says_what_is_kept(candidates: Candidates) -> None:
    assert candidates.kept(EVERYTHING)[0].tolist() == [0, 1, 2, 3]
    assert candidates.kept(OperatingPoint(0.7, 0.0))[0].tolist() == [0, 1]
    assert candidates.kept(OperatingPoint(0.0, 1.01))[0].tolist() == []
    numbers = candidates.at(OperatingPoint(0.7, 0.0)).numbers()
    assert numbers["miou"] == numbers["macc"] == numbers["pq"] == numbers["found"] == 100
    assert numbers["masks_per_object"] == 1 and numbers["part_share"] == 0
    assert candidates.at(EVERYTHING).numbers()["part_share"] == 0
    assert candidates.at(EVERYTHING).numbers()["masks_per_object"] == 2


def test_the_best_points_are_found(candidates: Candidates) -> None:
    tried = candidates.tried()
    assert len(tried) == len(PREDICTED_IOU) * len(STABILITY)
    best = best_of(tried)
    assert best.pq == 1 and best.masks_per_object == 1 and 0.63 <= best.point.predicted_iou < 0.77
    # With half a mask per object, one of two objects is found.
    half = best_within(tried, 0.5)
    assert half.masks_per_object == 0.5 and half.miou == 0.5
    assert best_within(tried, 10).miou == 1
    # Where nothing is so frugal, the most frugal is taken.
    points = [Tried(OperatingPoint(k, 0), 0.1, 0.2, 3.0 - k) for k in range(2)]
    assert best_within(points, 0.5).masks_per_object == 2


def test_the_first_of_equal_points_keeps_the_fewest() -> None:
    nothing = [Tried(OperatingPoint(k / 10, 0), 0.0, 0.0, 3.0 - k) for k in range(3)]
    assert best_of(nothing).masks_per_object == 1


def test_sams_own_thresholds_are_tried() -> None:
    assert 0.88 in PREDICTED_IOU and 0.95 in STABILITY


def test_what_is_left_out_of_the_metrics_does_not_count(make_masks: MakeMasks) -> None:
    masks = make_masks((0, 0, 15, 7), (16, 16, 31, 31))
    truth, ignore = np.zeros((1, 32, 32), bool), np.zeros((32, 32), bool)
    truth[0, :8, :8], ignore[:8, 8:16], ignore[16:, 16:] = True, True, True
    sample = Sample(np.zeros((32, 32, 3), np.uint8), truth, np.array([0]), "one", ignore)
    split = Split("one", ("a",), [sample], [encoded(truth)])
    numbers = Candidates.of([masks], split).at(EVERYTHING).numbers()
    assert numbers["miou"] == numbers["pq"] == 100 and numbers["masks_per_object"] == 1


def test_test_has_no_image_of_val() -> None:
    rooms = Rooms("val", length=3, size=64)
    val = Split.of(rooms, 2)
    test = Split.of(rooms, 2, but=val)
    assert len(val) == 2 and len(test) == 1 and not val.digests & test.digests
    with pytest.raises(ValueError, match="no image shows an object but those of val: lower --val"):
        Split.of(rooms, 2, but=Split.of(rooms, 3))


@pytest.mark.parametrize("trust", [0.0, None])
def test_what_is_kept_is_what_the_generator_keeps(tiny: Backbone, trust: float | None) -> None:
    """Masks that are filtered and cleared of duplicates afterwards are those of one run."""
    image = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    truth = np.zeros((1, 40, 64), bool)
    truth[0, 5:20, 5:30] = True
    objects: list[list[dict[str, object]]] = [[]]
    split = Split("one", ("thing",), [Sample(image, truth, np.array([0]), "one")], objects)
    everything = MaskGenerator(tiny, GeneratorOptions(grid=(8, 8), **ALL)).generate_masks([image])
    candidates = Candidates(split, everything, [Overlaps.of(everything[0].coco(), [])])
    assert len(everything[0]) > 100
    if trust is None:
        trust = float(np.median(everything[0].predicted_iou))
    stability = float(np.quantile(everything[0].stability, 0.3))
    assert stability > 0 and (everything[0].predicted_iou < 0).any()
    got = candidates.at(OperatingPoint(trust, stability)).masks[0]
    expected = MaskGenerator(
        tiny,
        GeneratorOptions(grid=(8, 8), pred_iou_thresh=trust, stability_score_thresh=stability),
    ).generate_masks([image])[0]
    assert 0 < len(got) == len(expected) < len(everything[0])
    np.testing.assert_array_equal(got.points, expected.points)
    assert got.coco() == expected.coco()
