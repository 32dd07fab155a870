"""Instances of a category, matched to annotations by pycocotools."""

from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from agents.annotation.instances import _regions, split_instances
from sam_gym.backbones import Backbone
from sam_gym.data import make_dataset
from sam_gym.data.coco_writer import CocoWriter, mask_annotation


def coco(masks: dict[int, list[np.ndarray]], size: tuple[int, int]) -> CocoWriter:
    writer = CocoWriter({"thing": 1})
    for number, own in masks.items():
        objects = [mask_annotation(mask, category="thing", score=1.0) for mask in own]
        writer.add(number, f"{number}.png", size, objects)
    return writer


def average_precision(truth: CocoWriter, found: CocoWriter) -> float:
    annotated = COCO()
    annotated.dataset = truth.content
    annotated.createIndex()
    evaluation = COCOeval(annotated, annotated.loadRes(found.results), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return float(evaluation.stats[0])


def test_instances_match_annotations(shipped: Backbone) -> None:
    scenes = make_dataset("scenes", "test", length=10)
    truth: dict[int, list[Any]] = {}
    found: dict[int, list[Any]] = {}
    parts: dict[int, list[Any]] = {}
    for number in range(10):
        sample = scenes[number]
        category = int(np.bincount(sample.categories).argmax())
        own = sample.masks[sample.categories == category]
        if len(own) < 2 or len(truth) == 4:
            continue
        union = own.any(axis=0)
        features = shipped.encode([sample.image])
        instances = split_instances(shipped, features, union, 0.9)
        scores = [one.score for one in instances]
        assert scores == sorted(scores, reverse=True)
        masks = np.stack([one.mask for one in instances])
        assert masks.sum(axis=0).max() == 1 and not (masks & ~union).any()
        truth[number], found[number] = list(own), list(masks)
        parts[number] = _regions(union)
    assert len(truth) == 4
    size = (256, 256)
    reached = average_precision(coco(truth, size), coco(found, size))
    assert reached > 0.75 > average_precision(coco(truth, size), coco(parts, size))


def test_an_empty_mask_and_one_that_no_click_explains(shipped: Backbone) -> None:
    image = np.full((64, 96, 3), 128, np.uint8)
    features = shipped.encode([image])
    empty = np.zeros((64, 96), bool)
    assert split_instances(shipped, features, empty, 0.9) == []
    speck = empty.copy()
    speck[10, 20] = True
    (instance,) = split_instances(shipped, features, speck, 0.9)
    np.testing.assert_array_equal(instance.mask, speck)
    assert instance.score == pytest.approx(0.45) or instance.score > 0.5
