"""PPO over a stream of domains: a stage per domain, and an evaluation after each stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from agents.evaluate import Evaluation
from sam_gym.metrics import continual as continual_metrics
from sam_gym.utils.process_group import ALONE, ProcessGroup


@dataclass(frozen=True)
class Stages:
    """Equal parts of a run, one per domain. A stage starts with a rollout.

    Attributes:
        total: environment steps of the run.
        rollout: environment steps of a rollout, over all processes.
        count: number of stages.
    """

    total: int
    rollout: int
    count: int

    def validate(self) -> None:
        """Raise `ValueError` if a stage would be shorter than a rollout."""
        if self.total < self.count * self.rollout:
            raise ValueError(
                f"{self.total} environment steps are too few for {self.count} domains: a rollout "
                f"has {self.rollout} steps, and each domain needs one. Pass --total-timesteps of "
                f"at least {self.count * self.rollout}, or a smaller --n-steps or --num-envs."
            )

    def at(self, step: int) -> int:
        """Return the index of the stage of a rollout that starts at an environment step."""
        return min(step * self.count // self.total, self.count - 1)

    def remaining(self, step: int) -> float:
        """Return the remaining fraction of the stage, 1 to 0, after the rollout that ends here."""
        stage = self.at(max(step - self.rollout, 0))
        return 1.0 - min(max(step * self.count / self.total - stage, 0.0), 1.0)


@dataclass(frozen=True)
class PerStageSchedule:
    """A learning rate schedule that restarts in every stage.

    With a single schedule, later domains would be learned, and forgotten, more slowly.

    Attributes:
        schedule: learning rate as a function of the remaining fraction of a stage, 1 to 0.
        stages: of the run.
    """

    schedule: Callable[[float], float]
    stages: Stages

    def __call__(self, progress_remaining: float) -> float:
        step = round((1.0 - progress_remaining) * self.stages.total)
        return self.schedule(self.stages.remaining(step))


class StreamCallback(BaseCallback):
    """Switches environments to the next domain after each stage, and evaluates on all domains.

    The domain changes at the start of a rollout; running episodes end in the previous domain.

    Args:
        env: the environments of this rank, which switch domains by `set_task` only.
        names: of the domains.
        stages: of the run.
        evaluate: plays held-out episodes of all domains; must not draw from the random generators
            of the training.
        ranks: the processes of the run; the first one evaluates.
    """

    def __init__(
        self,
        env: Any,
        names: Sequence[str],
        stages: Stages,
        evaluate: Callable[[], Evaluation],
        ranks: ProcessGroup = ALONE,
    ) -> None:
        super().__init__()
        self.env, self.names, self.stages = env, list(names), stages
        self.evaluate, self.ranks = evaluate, ranks
        #: Index of the current domain.
        self.stage = 0
        #: Mean IoU by completed stage (row) and domain (column).
        self.matrix: list[list[float]] = []

    def get_state(self) -> dict[str, Any]:
        """Return the stage and the results, for `set_state`; environments keep their domains."""
        return {"stage": self.stage, "matrix": [list(row) for row in self.matrix]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore the state that `get_state` returned."""
        self.stage, self.matrix = state["stage"], [list(row) for row in state["matrix"]]

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        stage = self.stages.at(self.num_timesteps)
        if stage > self.stage:
            if self.ranks.is_first:
                self.evaluate_now()
            self.stage = stage
            self.env.set_task(stage)

    def evaluate_now(self) -> Evaluation:
        """Evaluate the policy on all domains and record the result."""
        outcome = self.evaluate()
        by_domain = outcome.iou_by_domain()
        self.matrix.append([by_domain[name] for name in self.names])
        for name, value in by_domain.items():
            self.logger.record(f"continual/iou_{name}", value)
        return outcome

    def results(self) -> dict[str, Any]:
        """Return the entry of results.json, after the last stage."""
        return {
            "domains": self.names,
            "iou": [[round(value, 4) for value in row] for row in self.matrix],
            "last_iou": round(continual_metrics.last(self.matrix), 4),
            "avg_iou": round(continual_metrics.average(self.matrix), 4),
            "ff_iou": round(continual_metrics.forgetting(self.matrix), 4),
            "definitions": DEFINITIONS,
        }


#: Definitions of the numbers of `StreamCallback.results`, for readers of results.json.
DEFINITIONS = {
    "iou": "row: after learning that domain; column: mean IoU on held-out episodes of a domain",
    "last_iou": "mean over domains after the last stage",
    "avg_iou": "mean over stages t of the mean over domains 1..t after stage t",
    "ff_iou": "mean over domains but the last of (value just after it was learned - at the end)",
}
