"""The third phase: an agent that corrects the label maps of a head, class by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from pycocotools import mask as rle

from agents.annotation.clicks import ClickAnnotator
from agents.evaluate import PolicyAgent
from agents.tasks import task_of_policy
from benchmarks.semantic.heads import TrainedHead
from sam_gym.backbones import Backbone
from sam_gym.data.base import select_categories
from sam_gym.utils.digest import digest_of

#: Masks that are corrected side by side.
_PARALLEL = 16
#: Smallest part of an image that a class covers, for the agent to be asked about it.
_SMALLEST = 0.002


def with_agent(
    heads: Sequence[tuple[TrainedHead, Backbone]],
    policy: str,
    device: str,
    classes: str | None = None,
) -> tuple[TrainedHead, TrainedHead]:
    """Return a head, and the same head with label maps that an agent corrects.

    The agent is asked about each of its classes that the head finds. What it clicks for replaces
    the class; smaller masks lie on top of larger ones, and pixels that a class loses get the next
    likely one.

    Args:
        heads: with the SAMs that carry them.
        policy: path of a policy that was trained on one of them with `initial_mask="semantic"`.
        device: of the policy.
        classes: comma-separated names of the classes that it corrects (None: all).

    Raises:
        ValueError, FileNotFoundError: the policy is unreadable, or was trained otherwise; or a
            class is unknown.
    """
    agent = PolicyAgent.load(policy, device)
    task_of_policy(agent.policy).require("annotate")
    if agent.policy.initial_mask != "semantic":
        raise ValueError(
            f"--agent {policy}: it begins with empty masks. Train one with python -m "
            "agents.train_ppo --initial-mask semantic --adapter ADAPTER --stop --undo."
        )
    weights = digest_of(agent.policy.features_extractor.backbone.model.state_dict())
    matching = [own for own in heads if digest_of(own[1].model.state_dict()) == weights]
    if not matching:
        own = agent.policy.features["backbone"]["adapter"]
        raise ValueError(
            f"--agent {policy} corrects the head of {own}: pass --adapters {own}, to measure it."
        )
    head, backbone = matching[0]
    known = backbone.semantic_classes
    asked = {known.index(name) for name in select_categories(classes, known)}
    annotator = ClickAnnotator(agent, backbone.semantic_classes, _PARALLEL)

    def segment(images: Sequence[np.ndarray]) -> list[np.ndarray]:
        logits = [own.cpu().numpy() for own in backbone.pixel_logits(images)]
        items = []
        for number, (image, own) in enumerate(zip(images, logits, strict=True)):
            areas = np.bincount(own.argmax(axis=0).ravel(), minlength=len(own))
            for category in np.flatnonzero(areas >= _SMALLEST * areas.sum()).tolist():
                if category in asked:
                    items.append(((str(number), category), image))
        corrected: list[dict[int, np.ndarray]] = [{} for _ in images]
        for item in annotator.stream(iter(items)):
            number, category = item.key
            for annotation in item.annotations:
                if annotation["clicks"]:
                    mask = rle.decode(annotation["segmentation"]).astype(bool)
                    corrected[int(number)][category] = mask
        return [corrected_labels(*own) for own in zip(logits, corrected, strict=True)]

    return head, replace(head, name=f"{head.name}_agent", segment=segment)


def corrected_labels(logits: np.ndarray, masks: Mapping[int, np.ndarray]) -> np.ndarray:
    """Replace classes of a label map by masks.

    Args:
        logits: class logits (C, H, W), whose largest make the label map.
        masks: class -> bool (H, W), of the classes to replace.

    Returns:
        Label map uint8 (H, W). Smaller classes lie on top of larger ones; where none is left, a
        pixel has the likeliest class without a mask, or if all have one, its own.
    """
    before = logits.argmax(axis=0)
    others = [number for number in range(len(logits)) if number not in masks]
    labels = before.copy()
    if others:
        labels = np.array(others)[logits[others].argmax(axis=0)]
    layers = {number: before == number for number in others} | dict(masks)
    for number in sorted(layers, key=lambda own: -np.count_nonzero(layers[own])):
        labels[layers[number]] = number
    return labels.astype(np.uint8)
