"""PPO over a stream of domains: when each is learned, and how good the policy is at all then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from stable_baselines3.common.callbacks import BaseCallback

from agents.evaluate import Evaluation
from agents.ppo.distributed import ALONE, ProcessGroup
from sam_gym.metrics import continual as continual_metrics


@dataclass(frozen=True)
class Stages:
    """Equal shares of a run, one for each domain, each of which begins with a rollout.

    Attributes:
        total: environment steps of the run.
        rollout: environment steps of a rollout, over all processes.
        count: how many stages.
    """

    total: int
    rollout: int
    count: int

    def validate(self) -> None:
        """Raise `ValueError` if a stage would have no rollout."""
        if self.total < self.count * self.rollout:
            raise ValueError(
                f"{self.total} environment steps are too few for {self.count} domains: a rollout "
                f"has {self.rollout} steps, and each domain needs one. Pass --total-timesteps of "
                f"at least {self.count * self.rollout}, or a smaller --n-steps or --num-envs."
            )

    def at(self, step: int) -> int:
        """Number of the stage of a rollout that begins at an environment step."""
        return min(step * self.count // self.total, self.count - 1)

    def remaining(self, step: int) -> float:
        """What is left of its stage when a rollout has ended at an environment step: 1 to 0."""
        stage = self.at(max(step - self.rollout, 0))
        return 1.0 - min(max(step * self.count / self.total - stage, 0.0), 1.0)


@dataclass(frozen=True)
class PerStageSchedule:
    """A learning rate schedule that begins anew in every stage.

    Otherwise the domains would be learned, and forgotten, ever more slowly.

    Attributes:
        schedule: of what is left of a stage, 1 to 0.
        stages: of the run.
    """

    schedule: Callable[[float], float]
    stages: Stages

    def __call__(self, progress_remaining: float) -> float:
        step = round((1.0 - progress_remaining) * self.stages.total)
        return self.schedule(self.stages.remaining(step))


class Walks(Protocol):
    """An environment that goes to a domain with its next resets."""

    def set_task(self, task: int) -> None: ...


class StreamCallback(BaseCallback):
    """Leads the environments from domain to domain, and evaluates the policy on all after each.

    A domain changes where a rollout begins; episodes that are under way end in the old one.

    Args:
        env: the environments of this rank, with a schedule that changes nothing by itself.
        names: of the domains.
        stages: when each is learned.
        evaluate: called without arguments, plays held-out episodes of all domains; may not touch
            the random numbers of the training.
        ranks: the processes of the run; the first one evaluates.
    """

    def __init__(
        self,
        env: Walks,
        names: Sequence[str],
        stages: Stages,
        evaluate: Callable[[], Evaluation],
        ranks: ProcessGroup = ALONE,
    ) -> None:
        super().__init__()
        self.env, self.names, self.stages = env, list(names), stages
        self.evaluate, self.ranks = evaluate, ranks
        #: The domain that is being learned.
        self.stage = 0
        #: Mean IoU of each domain, after each domain so far.
        self.matrix: list[list[float]] = []

    def get_state(self) -> dict[str, Any]:
        """How far the walk is, for `set_state`; the environments know their own domains."""
        return {"stage": self.stage, "matrix": [list(row) for row in self.matrix]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `get_state`."""
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
        """Evaluate the policy after a domain and note the result."""
        outcome = self.evaluate()
        by_domain = outcome.iou_by_domain()
        self.matrix.append([by_domain[name] for name in self.names])
        for name, value in by_domain.items():
            self.logger.record(f"continual/iou_{name}", value)
        return outcome

    def results(self) -> dict[str, Any]:
        """What stands in results.json, once the last domain has been learned."""
        return {
            "domains": self.names,
            "iou": [[round(value, 4) for value in row] for row in self.matrix],
            "last_iou": round(continual_metrics.last(self.matrix), 4),
            "avg_iou": round(continual_metrics.average(self.matrix), 4),
            "ff_iou": round(continual_metrics.forgetting(self.matrix), 4),
            "definitions": DEFINITIONS,
        }


#: What the numbers of `StreamCallback.results` mean, for those who read only them.
DEFINITIONS = {
    "iou": "row: after learning that domain; column: mean IoU on held-out episodes of a domain",
    "last_iou": "mean over domains after the last stage",
    "avg_iou": "mean over stages t of the mean over domains 1..t after stage t",
    "ff_iou": "mean over domains but the last of (value just after it was learned - at the end)",
}
