"""The task of `SamVideo-v0`: what a video tracker remembers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from agents.baselines.video import BASELINES
from agents.tasks.base import C, Task, backbone_arguments, register
from sam_gym.data import VIDEO_DATASETS
from sam_gym.envs.base_core import BaseCore, EnvConfig
from sam_gym.envs.video import SamVideoConfig

#: Initial advantage of SAM 2's own action, as a logit.
RULE_BIAS = 2.0


@register
class VideoTask(Task):
    """The memories of one object in a video."""

    env_id = "SamVideo-v0"
    config_class = SamVideoConfig
    policies = ("video",)
    baselines = BASELINES

    def training_config(self, run: Any) -> EnvConfig:
        own: Any = self._handles(run)
        if VIDEO_DATASETS.get(own.dataset).procedural:
            kwargs = {"length": run.train_images} | own.dataset_kwargs
            return replace(own, dataset_kwargs=kwargs)
        return own

    def scored_at(self, env_config: C, score: str) -> C:
        own: Any = env_config
        return replace(own, score=score)

    def policy_arguments(
        self, run: Any, env_config: EnvConfig, core: BaseCore[Any, Any]
    ) -> dict[str, Any]:
        features = {"backbone": backbone_arguments(env_config)}
        return {"features": features, "rule_bias": RULE_BIAS}

    def compare(self, results: dict[str, Any], names: Sequence[str]) -> list[str]:
        """Say what each gains over SAM 2's own rule; the oracle stands beside it."""
        lines = ["gain in J over the rule of SAM 2: " + _gain(results, "agent")]
        others = [name for name in names if name not in ("agent", "oracle")]
        best = max(others, key=lambda name: results[name]["mean_gain"])
        return [*lines, ", ".join(f"{name} {_gain(results, name)}" for name in (best, "oracle"))]


def _gain(results: dict[str, Any], name: str) -> str:
    """Return the mean gain of an agent, with its interval over episodes."""
    mean, half = (results[name][key] for key in ("mean_gain", "ci95_gain"))
    return f"{mean:+.3f}" + ("" if half is None else f" ± {half:.3f}")
