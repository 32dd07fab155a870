"""Confusion matrices against cityscapesScripts, and against masks one class at a time."""

import numpy as np
import pytest

from sam_gym.metrics.masks import boundary, boundary_iou, iou
from sam_gym.metrics.semantic import (
    SemanticMetric,
    boundary_overlaps,
    category_iou,
    class_iou,
    confusion,
    mean_score,
    pixel_accuracy,
)

CLASSES, GROUPS = ("a", "b", "c", "d"), ("left", "right", "left", "rest")


def random_maps(rng: np.random.Generator, count: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """A prediction and a label map, some of whose pixels are void and ignored."""
    maps = rng.integers(0, count + 1, (2, 21, 17)).astype(np.uint8)
    maps[maps == count] = 255
    return maps[0], maps[1]


def test_counts_are_those_of_the_pixels() -> None:
    prediction, target = random_maps(np.random.default_rng(0))
    counts = confusion(prediction, target, 4)
    assert counts.dtype == np.int64 and counts.shape == (4, 5)
    for row in range(4):
        for column, value in enumerate((0, 1, 2, 3, 255)):
            assert counts[row, column] == ((target == row) & (prediction == value)).sum()
    assert counts.sum() == (target != 255).sum()


def test_scores_are_those_of_masks() -> None:
    prediction, target = random_maps(np.random.default_rng(1))
    counts, ignore = confusion(prediction, target, 4), target == 255
    expected = [iou(prediction == k, target == k, ignore) for k in range(4)]
    np.testing.assert_allclose(class_iou(counts), expected, rtol=0, atol=1e-15)
    in_group = [np.array([g == name for g in (*GROUPS, "")]) for name in ("left", "right", "rest")]
    index = np.minimum([prediction, target], 4)
    expected = [iou(own[index[0]], own[index[1]], ignore) for own in in_group]
    np.testing.assert_allclose(category_iou(counts, GROUPS), expected, rtol=0, atol=1e-15)
    assert pixel_accuracy(counts) == (prediction == target)[~ignore].mean()


def test_void_on_a_valid_pixel_is_a_false_negative() -> None:
    target = np.array([[0, 0, 1, 255]], np.uint8)
    prediction = np.array([[0, 255, 1, 0]], np.uint8)
    counts = confusion(prediction, target, 2)
    np.testing.assert_array_equal(class_iou(counts), [0.5, 1.0])
    assert pixel_accuracy(counts) == 2 / 3


def test_absent_classes_are_nan_and_false_positives_are_not() -> None:
    target, prediction = np.zeros((2, 2), np.uint8), np.array([[0, 0], [0, 1]], np.uint8)
    scores = class_iou(confusion(prediction, target, 3))
    np.testing.assert_array_equal(scores, [0.75, 0.0, np.nan])
    assert mean_score(scores) == 0.375
    np.testing.assert_array_equal(
        category_iou(confusion(prediction, target, 3), "xxy"), [1.0, np.nan]
    )
    nothing = confusion(prediction, np.full((2, 2), 255, np.uint8), 3)
    assert np.isnan(class_iou(nothing)).all() and np.isnan(pixel_accuracy(nothing))
    assert np.isnan(mean_score(class_iou(nothing)))


def test_a_dataset_is_the_sum_of_its_images() -> None:
    rng = np.random.default_rng(2)
    maps = [random_maps(rng) for _ in range(5)]
    metric = SemanticMetric(CLASSES, GROUPS)
    scores = [metric.update(*own) for own in maps]
    whole = confusion(*(np.concatenate(side) for side in zip(*maps, strict=True)), 4)
    np.testing.assert_array_equal(metric.counts, whole)
    numbers = metric.summary()
    assert numbers["mean_iou"] == class_iou(whole).mean()
    assert numbers["image_mean_iou"] == pytest.approx(np.mean(scores), abs=1e-15)
    assert numbers["image_mean_iou"] != numbers["mean_iou"]
    assert list(metric.category_iou) == ["left", "right", "rest"]
    # An image of ignored pixels changes nothing.
    assert np.isnan(metric.update(maps[0][0], np.full((21, 17), 255, np.uint8)))
    assert metric.summary() == numbers


def test_boundaries_are_those_of_masks() -> None:
    rng = np.random.default_rng(3)
    blocks = rng.integers(0, 4, (2, 5, 6)).astype(np.uint8)
    prediction, target = np.kron(blocks, np.ones((20, 20), np.uint8))
    target[:15, :30] = 255
    overlaps, ignore = boundary_overlaps(prediction, target, 5), target == 255
    for k in range(4):
        expected = boundary_iou(prediction == k, target == k, ignore)
        assert overlaps[0, k] / overlaps[1, k] == expected
    assert overlaps[:, 4].tolist() == [0, 0]
    metric = SemanticMetric("abcde")
    for maps in ((prediction, target), (target, prediction)):
        metric.update(*maps)
    swapped = boundary_overlaps(target, prediction, 5)
    total = overlaps + swapped
    np.testing.assert_array_equal(
        metric.boundary_iou, np.append(total[0, :4] / total[1, :4], np.nan)
    )
    assert boundary(target == 0).any()
    unmeasured = SemanticMetric("abcde", boundaries=False)
    unmeasured.update(prediction, target)
    assert unmeasured.boundary_iou is None and "mean_boundary_iou" not in unmeasured.summary()


def test_wrong_label_maps_are_refused() -> None:
    labels = np.zeros((4, 6), np.uint8)
    with pytest.raises(ValueError, match=r"\(6, 4\), the label map \(4, 6\): resize"):
        confusion(labels.T, labels, 3)
    with pytest.raises(ValueError, match="The prediction holds 3; expected 0 to 2, or 255"):
        confusion(labels + np.uint8(3), labels, 3)
    with pytest.raises(ValueError, match="The label map holds 7"):
        confusion(labels, labels + np.uint8(7), 3)


@pytest.mark.parametrize("seed", range(3))
def test_equals_cityscapesscripts_on_random_label_ids(seed: int) -> None:
    name = "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling"
    evaluation = pytest.importorskip(name, reason="cityscapesScripts is not installed")
    from cityscapesscripts.helpers.labels import labels

    valid = [label for label in labels if label.id >= 0 and not label.ignoreInEval]
    index = np.full(34, 255, np.uint8)
    for number, label in enumerate(valid):
        index[label.id] = number
    rng = np.random.default_rng(seed)
    present = rng.permutation(34)[:20]  # some classes are absent, some void ones are there
    args = evaluation.args
    theirs = evaluation.generateMatrix(args)
    metric = SemanticMetric([own.name for own in valid], [own.category for own in valid])
    for _ in range(3):
        prediction, target = rng.choice(present, (2, 40, 50))
        target[rng.random(target.shape) < 0.1] = 0
        np.add.at(theirs, (target, prediction), 1)
        metric.update(index[prediction], index[target])
    for number, label in enumerate(valid):
        expected = evaluation.getIouScoreForLabel(label.id, theirs, args)
        np.testing.assert_allclose(metric.class_iou[number], expected, rtol=0, atol=1e-12)
    scores = {
        category: evaluation.getIouScoreForCategory(category, theirs, args)
        for category in metric.category_iou
    }
    for category, expected in scores.items():
        np.testing.assert_allclose(metric.category_iou[category], expected, rtol=0, atol=1e-12)
    numbers = metric.summary()
    assert abs(numbers["mean_category_iou"] - evaluation.getScoreAverage(scores, args)) < 1e-12
