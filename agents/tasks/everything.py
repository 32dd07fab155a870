"""The task of `SamEverything-v0`: find all objects with few points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agents.baselines.everything import BASELINES
from agents.sharing.markdown import text
from agents.sharing.run import TrainingRun
from agents.tasks.base import CardFacts, Task, backbone_arguments, register
from sam_gym.envs.base_core import BaseCore
from sam_gym.envs.config import EnvConfig
from sam_gym.envs.everything import EverythingConfig


@register
class EverythingTask(Task):
    """Points on the images of one dataset, until all objects are found."""

    env_id = "SamEverything-v0"
    config_class = EverythingConfig
    policies = ("everything",)
    baselines = BASELINES
    supports = frozenset({"categories", "hub"})

    def check_run(self, run: Any) -> None:
        super().check_run(run)
        if run.env_config.actions != "points":
            raise ValueError(
                f"actions={run.env_config.actions!r}: PPO chooses one point in a step. Leave it at "
                "points."
            )

    def policy_arguments(
        self, run: Any, env_config: EnvConfig, core: BaseCore[Any, Any]
    ) -> dict[str, Any]:
        own: Any = env_config
        return {
            "features": {"backbone": backbone_arguments(env_config), "budget": own.budget},
            "grid": own.grid,
            "stop": own.stop,
        }

    def compare(self, results: dict[str, Any], names: Sequence[str]) -> list[str]:
        """Add `share_of_grid_iou` and `share_of_grid_points`: numbers over those of "grid"."""
        grid = results["grid"]
        for name in names:
            for share, number in (("iou", "mean_iou"), ("points", "mean_points")):
                whole = grid[number]
                ratio = round(results[name][number] / whole, 4) if whole else 0.0
                results[name][f"share_of_grid_{share}"] = ratio
        own = results["agent"]
        return [
            f"against the full grid: {own['share_of_grid_iou']:.1%} of its IoU with "
            f"{own['share_of_grid_points']:.1%} of its points"
        ]

    def card_facts(self, run: TrainingRun, policy: str) -> CardFacts:
        own = run.config["env_config"]
        stop = ", stop" * own["stop"]
        options = ("dataset", "backbone", "grid", "budget", "stop")
        return CardFacts(
            summary=(
                "An agent that finds all objects of an image with few points: at each step it "
                "looks at the features of a Segment Anything Model (SAM) and at the masks found "
                "so far, and places the next point."
            ),
            dataset=own["dataset"],
            facts=[
                *self._card_basics(run.config),
                f"**Actions**: points on {text(own['grid'])} x {text(own['grid'])} cells{stop}; "
                f"at most {text(own['budget'])} per image.",
            ],
            command=self._card_evaluation(run, policy, *options),
            limits=self._card_limits(own),
            counts=("points", "found"),
            task_name="everything mode segmentation",
            metric="Mean IoU on SAM's low-res masks",
        )
