"""The third phase: an agent that corrects the label maps of a head, class by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from pycocotools import mask as rle

from agents.annotation.clicks import ClickAnnotator
from agents.evaluate import PolicyAgent
from agents.tasks import task_of_policy
from benchmarks.semantic.heads import TrainedHead, gain_of_counts
from sam_gym.backbones import Backbone
from sam_gym.data import Dataset
from sam_gym.data.base import select_categories
from sam_gym.metrics.semantic import class_iou, confusion, mean_score
from sam_gym.utils.digest import digest_of
from sam_gym.utils.progress import ProgressBar

#: Masks that are corrected side by side.
_PARALLEL = 16
#: Smallest part of an image that a class covers, for the agent to be asked about it.
_SMALLEST = 0.002


class Proposal(NamedTuple):
    """A mask that an agent proposes for a class.

    Attributes:
        mask: bool (H, W).
        score: its predicted IoU.
    """

    mask: np.ndarray
    score: float


@dataclass(frozen=True)
class Trial:
    """What a proposed mask of a class does to the label map of an image with a ground truth.

    Attributes:
        image: index among the images of the trials.
        score: predicted IoU of the mask.
        change: int64 (C, C + 1), by which the image's confusion matrix changes.
    """

    image: int
    score: float
    change: np.ndarray


@dataclass(frozen=True)
class Acceptance:
    """Which masks of a class are accepted, and what this gained on the images of the choice.

    Attributes:
        threshold: lowest predicted IoU of an accepted mask; None: no mask is accepted.
        proposed: number of masks on the images of the choice.
        best: number of those that raise mean IoU most, whether or not they are accepted.
        gain: their gain in mean IoU, and the bounds of its 95% interval over images; None without
            masks that gain.
    """

    threshold: float | None
    proposed: int
    best: int = 0
    gain: list[float] | None = None


@dataclass
class Corrector:
    """Corrects the label maps of a head: an agent proposes masks of the classes that it finds.

    Attributes:
        head: the head.
        backbone: the SAM with it.
        annotator: plays the agent.
        asked: classes that the agent is asked about.
        thresholds: class -> lowest predicted IoU of an accepted mask, or None for no mask; all
            masks of other classes are accepted.
        proposed, accepted: int64 (C,), masks of each class so far.
    """

    head: TrainedHead
    backbone: Backbone
    annotator: ClickAnnotator
    asked: frozenset[int]
    thresholds: dict[int, float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.proposed = np.zeros(len(self.classes), np.int64)
        self.accepted = np.zeros(len(self.classes), np.int64)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.backbone.semantic_classes

    def trained(self) -> TrainedHead:
        """Return the head with the corrected label maps, as one that is measured."""
        return replace(self.head, name=f"{self.head.name}_agent", segment=self.segment)

    def segment(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return corrected label maps, uint8 (H, W), of images, uint8 (H, W, 3)."""
        labels = []
        for logits, proposals in self.propose(images):
            masks = {}
            for category, (mask, score) in proposals.items():
                self.proposed[category] += 1
                threshold = self.thresholds.get(category, -np.inf)
                if threshold is not None and score >= threshold:
                    self.accepted[category] += 1
                    masks[category] = mask
            labels.append(corrected_labels(logits, masks))
        return labels

    def propose(self, images: Sequence[np.ndarray]) -> list[tuple[np.ndarray, dict[int, Proposal]]]:
        """Let the agent click for each of its classes that the head finds.

        Args:
            images: uint8 (H, W, 3) each.

        Returns:
            For each image: the class logits of the head, float32 (C, H, W), and the masks that the
            agent changed, by class.
        """
        logits = [own.cpu().numpy() for own in self.backbone.pixel_logits(images)]
        items = []
        for number, (image, own) in enumerate(zip(images, logits, strict=True)):
            areas = np.bincount(own.argmax(axis=0).ravel(), minlength=len(own))
            for category in np.flatnonzero(areas >= _SMALLEST * areas.sum()).tolist():
                if category in self.asked:
                    items.append(((str(number), category), image))
        proposals: list[dict[int, Proposal]] = [{} for _ in images]
        for item in self.annotator.stream(iter(items)):
            number, category = item.key
            for annotation in item.annotations:
                if annotation["clicks"]:
                    mask = rle.decode(annotation["segmentation"]).astype(bool)
                    proposals[int(number)][category] = Proposal(mask, annotation["score"])
        return list(zip(logits, proposals, strict=True))

    def choose(
        self, dataset: Dataset, indices: Sequence[int], batch_size: int, seed: int
    ) -> dict[str, Acceptance]:
        """Choose the thresholds of all classes on images that are not measured.

        Args:
            dataset: training images, with label maps.
            indices: of the images.
            batch_size: images that are read at once.
            seed: of the bootstrap.

        Returns:
            The choice for each class that the agent is asked about, by name.
        """
        counts: list[np.ndarray] = []
        trials: dict[int, list[Trial]] = {category: [] for category in sorted(self.asked)}
        with ProgressBar() as progress:
            task = progress.add_task("choosing which masks to accept", total=len(indices))
            for first in range(0, len(indices), batch_size):
                samples = [dataset[index] for index in indices[first : first + batch_size]]
                found = self.propose([sample.image for sample in samples])
                for sample, (logits, proposals) in zip(samples, found, strict=True):
                    truth = sample.label_map(len(dataset.categories))
                    own = confusion(corrected_labels(logits, {}), truth, len(self.classes))
                    for category, (mask, score) in proposals.items():
                        labels = corrected_labels(logits, {category: mask})
                        change = confusion(labels, truth, len(self.classes)) - own
                        trials[category].append(Trial(len(counts), score, change))
                    counts.append(own)
                progress.advance(task, len(samples))
        chosen = {
            category: choose_threshold(np.stack(counts), own, seed)
            for category, own in trials.items()
        }
        self.thresholds = {category: own.threshold for category, own in chosen.items()}
        return {self.classes[category]: own for category, own in chosen.items()}

    def counts(self) -> dict[str, dict[str, int]]:
        """Return how many masks of each class were proposed and accepted so far."""
        return {
            self.classes[category]: {
                "proposed": int(self.proposed[category]),
                "accepted": int(self.accepted[category]),
            }
            for category in sorted(self.asked)
        }


def load_corrector(
    heads: Sequence[tuple[TrainedHead, Backbone]],
    policy: str,
    device: str,
    classes: str | None = None,
) -> Corrector:
    """Load an agent that corrects one of some heads.

    The agent is asked about each of its classes that the head finds. A mask that is accepted
    replaces the class; smaller masks lie on top of larger ones, and pixels that a class loses get
    the next likely one.

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
    asked = frozenset(known.index(name) for name in select_categories(classes, known))
    return Corrector(head, backbone, ClickAnnotator(agent, known, _PARALLEL), asked)


def choose_threshold(counts: np.ndarray, trials: Sequence[Trial], seed: int) -> Acceptance:
    """Choose from which predicted IoU on the masks of a class are accepted.

    The threshold is the one that raises the mean IoU most. Unless the 95% interval of that gain
    lies above 0, no mask is accepted.

    Args:
        counts: int64 (N, C, C + 1), confusion matrix of each image without corrections.
        trials: of the class, at most one for an image.
        seed: of the bootstrap.
    """
    ranked = sorted(trials, key=lambda own: -own.score)
    total = counts.sum(axis=0)
    best, score = 0, mean_score(class_iou(total))
    for number, trial in enumerate(ranked, start=1):
        total = total + trial.change
        last = number == len(ranked) or ranked[number].score < trial.score
        if last and (own := mean_score(class_iou(total))) > score:
            best, score = number, own
    if not best:
        return Acceptance(None, len(trials))
    corrected = counts.copy()
    for trial in ranked[:best]:
        corrected[trial.image] += trial.change
    gain = gain_of_counts(corrected, counts, seed)
    threshold = ranked[best - 1].score if gain[1] > 0 else None
    return Acceptance(threshold, len(trials), best, gain)


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
