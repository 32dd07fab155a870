"""Metrics of semantic segmentation, out of one confusion matrix of a dataset.

A confusion matrix is int64 (C, C + 1): rows are the classes of pixels, columns the predicted ones;
the last column counts pixels that were predicted as none (void). Ignored pixels are in no row.
These are the definitions of cityscapesScripts' `evalPixelLevelSemanticLabeling`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sam_gym.data.base import IGNORED
from sam_gym.metrics.masks import boundary


def confusion(prediction: np.ndarray, target: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the confusion matrix of an image: int64 (C, C + 1).

    Args:
        prediction: uint8 (H, W), class of each pixel, or `IGNORED` (255): void, which on a pixel of
            a class is a false negative.
        target: uint8 (H, W), class of each pixel, or `IGNORED`: the pixel does not count.
        num_classes: C.

    Raises:
        ValueError: the sizes differ, or a label is neither a class nor `IGNORED`.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"The prediction is {prediction.shape}, the label map {target.shape}: resize the "
            "prediction to the size of the label map."
        )
    for name, labels in (("prediction", prediction), ("label map", target)):
        wrong = labels[(labels >= num_classes) & (labels != IGNORED)]
        if wrong.size:
            raise ValueError(
                f"The {name} holds {wrong[0]}; expected 0 to {num_classes - 1}, or {IGNORED}."
            )
    counted = target != IGNORED
    columns = np.minimum(prediction[counted], num_classes).astype(np.int64)
    pairs = target[counted] * np.int64(num_classes + 1) + columns
    counts = np.bincount(pairs, minlength=num_classes * (num_classes + 1))
    return counts.reshape(num_classes, num_classes + 1)


def class_iou(counts: np.ndarray) -> np.ndarray:
    """Return the IoU of each class, float64 (C,); nan where a class is neither there nor predicted.

    Args:
        counts: confusion matrix.
    """
    return category_iou(counts, range(len(counts)))


def category_iou(counts: np.ndarray, categories: Sequence[int | str]) -> np.ndarray:
    """Return the IoU of groups of classes; confusion within a group is no error.

    Args:
        counts: confusion matrix.
        categories: the group of each class.

    Returns:
        float64 (G,), in the order of the groups' first classes; nan for a group that is neither
        there nor predicted.
    """
    groups = np.array([list(dict.fromkeys(categories)).index(own) for own in categories])
    member = (groups == np.arange(groups.max() + 1)[:, None]).astype(np.int64)  # (G, C)
    correct = np.einsum("gi,ij,gj->g", member, counts[:, :-1], member)
    there, predicted = member @ counts.sum(axis=1), member @ counts[:, :-1].sum(axis=0)
    return _ratio(correct, there + predicted - correct)


def pixel_accuracy(counts: np.ndarray) -> float:
    """Return the fraction of pixels with the right class; nan without pixels."""
    return float(_ratio(np.trace(counts[:, :-1]), counts.sum()))


def mean_score(scores: np.ndarray) -> float:
    """Return the mean of the scores that are not nan; nan if all are."""
    known = scores[~np.isnan(scores)]
    return float(known.mean()) if known.size else float("nan")


def boundary_overlaps(prediction: np.ndarray, target: np.ndarray, num_classes: int) -> np.ndarray:
    """Return intersection and union of the boundaries of each class: int64 (2, C), in pixels.

    Boundaries are those of `sam_gym.metrics.masks.boundary`, of masks without ignored pixels. The
    boundary IoU of a dataset is the ratio of sums over its images. Arguments as for `confusion`.
    """
    overlaps = np.zeros((2, num_classes), np.int64)
    counted = target != IGNORED
    for number in range(num_classes):
        masks = [(labels == number) & counted for labels in (prediction, target)]
        if any(mask.any() for mask in masks):
            own, other = map(boundary, masks)
            overlaps[:, number] = np.count_nonzero(own & other), np.count_nonzero(own | other)
    return overlaps


class SemanticMetric:
    """Accumulates the confusion matrix of a dataset.

    Args:
        classes: names of the classes.
        category_groups: the group of each class, or None.
        boundaries: whether boundary IoU is measured, which takes longer than the rest.

    Attributes:
        counts: confusion matrix over all images, int64 (C, C + 1).
        image_ious: mean IoU of each image over the classes in it; an image without any counted
            pixel has none.
    """

    def __init__(
        self,
        classes: Sequence[str],
        category_groups: Sequence[str] | None = None,
        boundaries: bool = True,
    ) -> None:
        self.classes, self.category_groups = tuple(classes), category_groups
        count = len(self.classes)
        self.counts = np.zeros((count, count + 1), np.int64)
        self.image_ious: list[float] = []
        self._overlaps = np.zeros((2, count), np.int64) if boundaries else None

    def update(self, prediction: np.ndarray, target: np.ndarray) -> float:
        """Add an image; arguments as for `confusion`.

        Returns:
            The mean IoU of the image over its classes, those of false positives included; nan if no
            pixel counts.
        """
        counts = confusion(prediction, target, len(self.classes))
        self.counts += counts
        score = mean_score(class_iou(counts))
        if not np.isnan(score):
            self.image_ious.append(score)
        if self._overlaps is not None:
            self._overlaps += boundary_overlaps(prediction, target, len(self.classes))
        return score

    @property
    def class_iou(self) -> np.ndarray:
        """IoU of each class over the dataset: float64 (C,), nan where it is absent."""
        return class_iou(self.counts)

    @property
    def boundary_iou(self) -> np.ndarray | None:
        """Boundary IoU of each class: float64 (C,), nan where absent; None if not measured."""
        return None if self._overlaps is None else _ratio(*self._overlaps)

    @property
    def category_iou(self) -> dict[str, float]:
        """IoU of each group of classes; empty without groups."""
        if self.category_groups is None:
            return {}
        names = dict.fromkeys(self.category_groups)
        scores = category_iou(self.counts, list(self.category_groups))
        return dict(zip(names, scores.tolist(), strict=True))

    def summary(self) -> dict[str, float]:
        """Return the numbers of the dataset; nan for those that are not known."""
        numbers = {
            "mean_iou": mean_score(self.class_iou),
            "pixel_accuracy": pixel_accuracy(self.counts),
            "image_mean_iou": mean_score(np.array(self.image_ious)),
        }
        if self.boundary_iou is not None:
            numbers["mean_boundary_iou"] = mean_score(self.boundary_iou)
        if self.category_groups is not None:
            numbers["mean_category_iou"] = mean_score(np.array([*self.category_iou.values()]))
        return numbers


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return part / whole as float64, nan where the whole is 0."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
