"""Votes within masks, by hand."""

import numpy as np
import torch

from sam_gym.mask_generation.masks import Masks, to_counts
from sam_gym.mask_generation.voting import voted_labels


def masks_of(every: list[np.ndarray]) -> Masks:
    count = len(every)
    numbers = np.zeros(count, np.float32)
    corners = np.zeros((count, 4), np.float32)
    return Masks(
        size=(4, 6),
        counts=[to_counts(own) for own in every],
        boxes=corners,
        predicted_iou=numbers,
        stability=numbers,
        points=corners[:, :2],
        crop_boxes=corners,
        probabilities=np.zeros((count, 0), np.float32),
    )


def test_a_mask_has_the_class_of_the_highest_mean_probability() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (3, 4, 6)).astype(np.float32)
    large, small, empty = (np.zeros((4, 6), bool) for _ in range(3))
    large[:, :4] = True
    small[1:3, 1:3] = True
    labels = voted_labels(torch.from_numpy(logits), masks_of([small, empty, large]))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=0)

    def vote(mask: np.ndarray) -> int:
        sums = [sum(probabilities[k, y, x] for y, x in np.argwhere(mask)) for k in range(3)]
        return int(np.argmax(sums))

    assert (labels[small] == vote(small)).all()
    assert (labels[large & ~small] == vote(large)).all()
    np.testing.assert_array_equal(labels[:, 4:], logits.argmax(axis=0)[:, 4:])
    none = voted_labels(torch.from_numpy(logits), masks_of([]))
    np.testing.assert_array_equal(none, logits.argmax(axis=0))
