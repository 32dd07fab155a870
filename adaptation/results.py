"""Results of a method on a stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sam_gym.metrics import continual as metrics

#: Measures on each domain: key in results, and attribute of `Scores`.
MEASURES = ("iou", "biou")


def folder_name(method: str, tune: str, seed: int) -> str:
    """Name of a run's folder within the output folder."""
    return f"{method}-{tune}-{seed}"


@dataclass
class RunResult:
    """Results of a method on a stream.

    Attributes:
        method, tune: names.
        domains: names, in the order of learning.
        scores: prompt, or another evaluation -> measure ("iou", "biou") -> matrix of stages by
            domains, in %. A method that learns all domains at once, or nothing, has one stage.
        zero_shot: prompt -> measure -> scores of the pretrained SAM, (domains,); none for
            evaluations that it cannot pass.
        retention: prompt -> IoU on the retention set after the last stage, in %, if there is one.
        routed: fraction of held-out images routed to their own expert after the last stage, mean
            over domains; None without a router.
        trainable: number of parameters that are trained in one domain.
        kept_bytes: bytes kept for all domains, per domain.
        seconds: of training, without evaluation.
        narrow: domain -> fraction of held-out objects that consist of boundary pixels only.
        seed: of the run.
        split: that the scores are of.
        method_options: options of the method, of combined ones those of each.
        facts: domain -> `Strategy.facts` of its training, of methods that have some.
    """

    method: str
    tune: str
    domains: tuple[str, ...]
    scores: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)
    zero_shot: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    retention: dict[str, float] = field(default_factory=dict)
    routed: float | None = None
    trainable: int = 0
    kept_bytes: float = 0.0
    seconds: float = 0.0
    narrow: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    split: str = "test"
    method_options: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def only_stage(self) -> str | None:
        """Name of the stage of a method that learns nothing, or all domains at once, for plots."""
        if not self.trainable:
            return "pretrained"
        stages = len(next(iter(self.scores.values()))["iou"])
        return "all domains at once" if stages < len(self.domains) else None

    def summary(self, prompt: str) -> dict[str, float | None]:
        """Compute the metrics for one prompt; see `sam_gym.metrics.continual`.

        Metrics that need a stage per domain are None for methods with one stage.
        """
        numbers: dict[str, float | None] = {}
        for measure in MEASURES:
            matrix = np.array(self.scores[prompt][measure])
            last = float(matrix[-1].mean())
            stages = len(matrix) == len(self.domains)
            numbers[f"last_{measure}"] = last
            numbers[f"avg_{measure}"] = metrics.average(matrix) if stages else None
            numbers[f"ff_{measure}"] = metrics.forgetting(matrix) if stages else None
            before = self.zero_shot.get(prompt, {}).get(measure)
            transfer = (
                metrics.forward_transfer(matrix, before) if stages and before is not None else None
            )
            numbers[f"forward_{measure}"] = transfer
        if prompt in self.retention:
            numbers["retention_iou"] = self.retention[prompt]
        numbers["selector_accuracy"] = None if self.routed is None else 100 * self.routed
        return numbers
