"""Measure models in everything mode."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.everything.released import released
from benchmarks.everything.scores import (
    ALL,
    EVERYTHING,
    PREDICTED_IOU,
    Candidates,
    OperatingPoint,
    Split,
    best_of,
    best_within,
    merged,
    without_padding,
)
from sam_gym.backbones import Backbone
from sam_gym.mask_generation.generator import GeneratorOptions, MaskGenerator
from sam_gym.mask_generation.merging import MergeOptions

ZERO_SHOT, MERGED = "zero_shot", "merged"
#: Numbers reported at the budgets of one mask per object, and of the masks of the pretrained SAM.
WITHIN = ("miou", "macc", "masks_per_object")
#: Budgets of the curve, in masks per object.
BUDGETS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)
#: Number of images in pictures and for timing the generator.
SHOWN = 4


class Measuring:
    """Measures models on splits of images.

    Args:
        splits: images by name: val (to choose operating points on), test, and others.
        grid: columns and rows of the point grid.
        merging: options of merging the masks of the pretrained SAM.
        advance: called after each image.
    """

    def __init__(
        self,
        splits: Mapping[str, Split],
        grid: tuple[int, int],
        merging: MergeOptions,
        advance: Callable[[], None],
    ) -> None:
        self.splits, self.grid, self.merging, self.advance = splits, grid, merging, advance
        #: Split -> model -> numbers of each run; curves likewise.
        self.scores, self.curves = (
            {split: defaultdict[str, list[Any]](list) for split in splits if split != "val"}
            for _ in range(2)
        )
        #: Model -> masks bool (K, H, W) of the first images of test.
        self.shown: dict[str, list[np.ndarray]] = {}
        self._budget = 0.0

    def model(self, name: str, backbone: Backbone) -> None:
        """Measure a model; the pretrained SAM has to come first."""
        on_val = self._candidates(backbone, "val")
        tried = on_val.tried()
        best = best_of(tried)
        merge_point = None
        if name == ZERO_SHOT:
            self._budget = best.masks_per_object
            merge_point = self._merge_point(backbone, on_val, best.point.stability)
        for split in self.scores:
            found = self._candidates(backbone, split)
            masks, seconds = self._generated(backbone, split, best.point)
            numbers = found.at(best.point).numbers() | found.at(EVERYTHING).recalls()
            numbers |= {"seconds_per_image": seconds, **asdict(best.point)}
            for name_of, within in (("one", 1.0), ("same", self._budget)):
                at_most = found.at(best_within(tried, within).point).numbers()
                numbers |= {f"{name_of}_{key}": at_most[key] for key in WITHIN}
            numbers |= released(backbone, self.splits[split], self.grid)
            self.scores[split][name].append(numbers)
            self.curves[split][name].append(
                [
                    {"budget": budget, **asdict(point), **found.at(point).numbers()}
                    for budget in BUDGETS
                    for point in [best_within(tried, budget).point]
                ]
            )
            if split == "test":
                self.shown.setdefault(name, masks)
            if merge_point is not None:
                own = merged(found.at(merge_point), self._embeddings(backbone, split), self.merging)
                numbers = own.numbers() | own.recalls() | asdict(merge_point)
                self.scores[split][MERGED].append(numbers)

    def _merge_point(
        self, backbone: Backbone, on_val: Candidates, stability: float
    ) -> OperatingPoint:
        """Choose the operating point of merging on val, by panoptic quality."""
        points = [OperatingPoint(value, stability) for value in PREDICTED_IOU[::2]]
        embeddings = self._embeddings(backbone, "val")

        def quality(point: OperatingPoint) -> float:
            return merged(on_val.at(point), embeddings, self.merging).numbers()["pq"]

        return max(points, key=quality)

    def _embeddings(self, backbone: Backbone, split: str) -> list[np.ndarray]:
        return [without_padding(backbone, sample.image) for sample in self.splits[split].samples]

    def _candidates(self, backbone: Backbone, split: str) -> Candidates:
        """Return all masks of a model on a split."""
        generator = MaskGenerator(backbone, GeneratorOptions(grid=self.grid, **ALL))
        found, images = [], self.splits[split]
        for masks in generator.stream(sample.image for sample in images.samples):
            found.append(masks)
            self.advance()
        return Candidates.of(found, images)

    def _generated(
        self, backbone: Backbone, split: str, point: OperatingPoint
    ) -> tuple[list[np.ndarray], float]:
        """Generate the masks of the first images; returns them and the seconds per image."""
        generator = MaskGenerator(
            backbone,
            GeneratorOptions(
                grid=self.grid,
                pred_iou_thresh=point.predicted_iou,
                stability_score_thresh=point.stability,
            ),
        )
        images = [sample.image for sample in self.splits[split].samples[:SHOWN]]
        started = time.perf_counter()
        masks = generator.generate_masks(images)
        seconds = (time.perf_counter() - started) / len(images)
        return [own.binary() for own in masks], seconds
