"""The protocol of SAOM's released code, with prompts derived from the ground truth."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

from adaptation.frame_transform import low_res_target
from adaptation.strategies.nearest import nearest_points
from benchmarks.everything.scores import Split
from sam_gym.backbones import Backbone, Prompts
from sam_gym.data import Sample
from sam_gym.metrics.masks import iou
from sam_gym.metrics.panoptic import mean_over_classes
from sam_gym.utils.lowres import low_res
from sam_gym.utils.transfer import to_device


def released(backbone: Backbone, split: Split, grid: tuple[int, int]) -> dict[str, float]:
    """Score the protocol of the released code, whose prompts come from the ground truth.

    One point per object, by nearest neighbour in the embedding; the mask of the highest predicted
    IoU.
    """
    ious, accuracies = [], []
    for sample in split.samples:
        features = backbone.encode([sample.image])
        points = _points_from_truth(backbone, features.embedding, sample, grid)
        prompts = Prompts(
            points=points[:, None],
            labels=torch.ones((len(points), 1), dtype=torch.int64, device=points.device),
            rows=torch.zeros(len(points), dtype=torch.int64, device=points.device),
        )
        ambiguous = torch.ones(len(points), dtype=torch.bool, device=points.device)
        logits, _ = backbone.decode_best(features, prompts, ambiguous)
        for own, truth in zip(logits, sample.masks, strict=True):
            mask = (backbone.masks_at(own[None], truth.shape)[0] > 0).cpu().numpy()
            if sample.ignore is not None:
                mask &= ~sample.ignore
            ious.append(iou(mask, truth))
            accuracies.append(np.count_nonzero(mask & truth) / np.count_nonzero(truth))
    return {
        "released_miou": 100 * mean_over_classes(np.array(ious), split.classes),
        "released_macc": 100 * mean_over_classes(np.array(accuracies), split.classes),
    }


def _points_from_truth(
    backbone: Backbone, embedding: Tensor, sample: Sample, grid: tuple[int, int]
) -> Tensor:
    """Return the prompt of each object: float32 (N, 2), pixels of the input frame."""
    size, shape = backbone.image_size, backbone.mask_shape
    height, width = sample.image.shape[:2]
    side = backbone.input_size((height, width))
    framed = np.zeros((len(sample.masks) + 1, size, size), bool)
    for frame, mask in zip(framed, [*sample.masks, np.ones((height, width), bool)], strict=True):
        small = cv2.resize(mask.astype(np.uint8), side[::-1], interpolation=cv2.INTER_NEAREST)
        frame[: side[0], : side[1]] = small > 0
    targets = np.stack([low_res_target(mask, shape) for mask in framed[:-1]])
    shown = low_res(framed[-1], shape) > 0.5
    count, device = len(targets), backbone.device
    return nearest_points(
        embedding,
        torch.zeros(count, dtype=torch.int64, device=device),
        to_device(targets, device).float() / 255.0,
        to_device(shown, device).float()[None].expand(count, -1, -1),
        grid,
        size,
    )
