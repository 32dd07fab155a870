"""Segment objects by simulated clicks, with a SAM and with grabCut."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.interactive.grabcut import GrabCut
from sam_gym.backbones import Backbone
from sam_gym.data import Sample
from sam_gym.data.cache import SampleCache
from sam_gym.metrics.masks import iou
from sam_gym.simulation.clicks import Click
from sam_gym.simulation.interactive import Target, click_out, segment_boxes


@dataclass(frozen=True)
class Item:
    """One object: image and instance number, source of the image, category name."""

    image: int
    instance: int
    source: str
    category: str


@dataclass
class Result:
    """Clicks and IoU of one object.

    Attributes:
        item: the object.
        clicks: in order; fewer than configured if the mask became perfect.
        ious: IoU after each click.
        box_iou: IoU from the box of the object, without clicks.
        seconds: model time per click.
        baseline: IoU of grabCut after each of its clicks; empty if it did not run.
        baseline_seconds: time of grabCut per click.
    """

    item: Item
    clicks: list[Click]
    ious: list[float]
    box_iou: float
    seconds: float
    baseline: list[float]
    baseline_seconds: float = 0.0


def target_of(sample: Sample, item: Item) -> Target:
    """Return the object of a sample as a target of `click_out`."""
    return Target(sample.image, sample.masks[item.instance], sample.ignore)


def click_batch(
    backbone: Backbone,
    samples: SampleCache,
    items: Sequence[Item],
    clicks: int,
    zoom: bool = False,
) -> list[Result]:
    """Segment objects in one batch, by clicks and by boxes; see `click_out`, `segment_boxes`."""
    targets = [target_of(samples[item.image], item) for item in items]
    sessions = click_out(backbone, targets, clicks, zoom=zoom)
    results = []
    boxed = segment_boxes(backbone, targets)
    for item, target, session, mask in zip(items, targets, sessions, boxed, strict=True):
        box_iou = iou(mask, target.mask, target.ignore)
        results.append(Result(item, session.clicks, session.ious, box_iou, session.seconds, []))
    return results


def run_grabcut(samples: SampleCache, result: Result, clicks: int) -> None:
    """Replay the SAM's clicks with grabCut and record the IoU after each."""
    target = target_of(samples[result.item.image], result.item)
    grabcut = GrabCut(target.image)
    mask = np.zeros(target.mask.shape, bool)
    seconds = 0.0
    for count in range(1, min(clicks, len(result.ious)) + 1):
        if count <= len(result.clicks):
            started = time.perf_counter()
            mask = grabcut.cut(result.clicks[:count])
            seconds += time.perf_counter() - started
        result.baseline.append(iou(mask, target.mask, target.ignore))
    result.baseline_seconds = seconds / max(1, min(clicks, len(result.clicks)))
