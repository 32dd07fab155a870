"""The tasks of `SamVideo-v0`: what a video tracker remembers, and when it is helped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from agents.baselines.base import Agent
from agents.baselines.video import BASELINES, BY_TASK
from agents.tasks.base import C, Task, backbone_arguments, register
from sam_gym.data import VIDEO_DATASETS
from sam_gym.envs.base_core import BaseCore
from sam_gym.envs.config import EnvConfig
from sam_gym.envs.video import SamVideoConfig

#: Task -> the config that trains it.
_CONFIGS = {"memory": "video_memory", "when": "video_when", "prompt": "video_prompt"}
#: Initial advantage of SAM 2's own action, as a logit.
RULE_BIAS = 2.0


@register
class VideoTask(Task):
    """One object in a video."""

    env_id = "SamVideo-v0"
    config_class = SamVideoConfig
    policies = ("video", "video_prompt")
    baselines = BASELINES

    def check_run(self, run: Any) -> None:
        super().check_run(run)
        task = run.env_config.task
        wanted = "video_prompt" if task == "prompt" else "video"
        if run.policy in self.policies and run.policy != wanted:
            raise ValueError(
                f"The policy {run.policy!r} does not play the task {task!r}. Pass --policy "
                f"{wanted} (--config {_CONFIGS[task]} sets it), or another --task."
            )

    def training_config(self, run: Any) -> EnvConfig:
        own: Any = self._handles(run)
        if VIDEO_DATASETS.get(own.dataset).procedural:
            kwargs = {"length": run.train_images} | own.dataset_kwargs
            return replace(own, dataset_kwargs=kwargs)
        return own

    def scored_at(self, env_config: C, score: str) -> C:
        own: Any = env_config
        return replace(own, score=score)

    def players(self, env_config: EnvConfig) -> dict[str, Callable[[int], Agent]]:
        own: Any = env_config
        return {name: self.baselines.get(name) for name in BY_TASK[own.task].names()}

    def policy_arguments(
        self, run: Any, env_config: EnvConfig, core: BaseCore[Any, Any]
    ) -> dict[str, Any]:
        own: Any = env_config
        features = {"backbone": backbone_arguments(env_config)}
        if own.task == "prompt":
            return {"features": features, "grid": own.grid}
        return {"features": features, "task": own.task, "rule_bias": RULE_BIAS}

    def compare(self, results: dict[str, Any], names: Sequence[str]) -> list[str]:
        """Say what each gains over SAM 2's own rule; the oracle stands beside it."""
        lines = ["gain in J over the rule of SAM 2: " + _gain(results, "agent")]
        others = [name for name in names if name != "agent" and not name.startswith("oracle")]
        best = max(others, key=lambda name: results[name]["mean_gain"])
        return [*lines, ", ".join(f"{name} {_gain(results, name)}" for name in (best, "oracle"))]


def _gain(results: dict[str, Any], name: str) -> str:
    """Return the mean gain of an agent, with its interval over episodes."""
    own = results[name]
    mean, half = own["mean_gain"], own["ci95_gain"]
    clicks = f" with {own['mean_clicks']:.1f} clicks" if "mean_clicks" in own else ""
    return f"{mean:+.3f}" + ("" if half is None else f" ± {half:.3f}") + clicks
