"""What a training run watches: progress, checkpoints, periodic evaluation, its curve."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from stable_baselines3.common.callbacks import BaseCallback

from sam_gym.backbones.store import EmbeddingStore


class PinRollouts(BaseCallback):
    """Keeps every embedding that a rollout refers to until the update after it has ended."""

    def __init__(self, store: EmbeddingStore) -> None:
        super().__init__()
        self.store = store

    def _on_rollout_start(self) -> None:
        self.store.pin_new_epoch()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self.store.end_epoch()


class WatchTraining(BaseCallback):
    """Progress bar, mean IoU of finished episodes, checkpoints and periodic evaluation.

    Args:
        total_timesteps: length of the run, for the bar.
        out: folder for `checkpoints/`.
        evaluate_every: environment steps between evaluations.
        checkpoint_every: environment steps between checkpoints.
        evaluate: called without arguments, returns the mean IoU on validation data.
    """

    def __init__(
        self,
        total_timesteps: int,
        out: Path,
        evaluate_every: int,
        checkpoint_every: int,
        evaluate: Callable[[], float],
    ) -> None:
        super().__init__()
        self.total_timesteps, self.out = total_timesteps, out
        self.evaluate_every, self.checkpoint_every = evaluate_every, checkpoint_every
        self.evaluate = evaluate
        self.recent: deque[float] = deque(maxlen=512)
        #: (environment steps, mean IoU of recent training episodes).
        self.train_curve: list[tuple[int, float]] = []
        #: (environment steps, mean IoU on validation episodes).
        self.eval_curve: list[tuple[int, float]] = []
        self._due = {"evaluate": evaluate_every, "checkpoint": checkpoint_every}
        self.bar = Progress(
            TextColumn("{task.completed}/{task.total} steps"),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
        )

    def _on_training_start(self) -> None:
        self._task = self.bar.add_task("", total=self.total_timesteps, numbers="")

    def _on_step(self) -> bool:
        for done, info in zip(self.locals["dones"], self.locals["infos"], strict=True):
            if done:
                self.recent.append(info["iou"])
        return True

    def _on_rollout_end(self) -> None:
        if self.recent:
            mean = float(np.mean(self.recent))
            self.train_curve.append((self.num_timesteps, mean))
            self.logger.record("rollout/iou", mean)
        if self.num_timesteps >= self._due["checkpoint"]:
            self._due["checkpoint"] += self.checkpoint_every
            folder = self.out / "checkpoints"
            folder.mkdir(exist_ok=True)
            self.model.save(folder / f"policy_{self.num_timesteps}.zip")
        self._show()

    def _on_rollout_start(self) -> None:
        if self.num_timesteps >= self._due["evaluate"]:
            self._due["evaluate"] += self.evaluate_every
            self.evaluate_now()

    def evaluate_now(self) -> None:
        """Evaluate the policy as it is and note the result."""
        value = self.evaluate()
        self.eval_curve.append((self.num_timesteps, value))
        self.logger.record("eval/iou", value)

    def _show(self) -> None:
        parts = []
        if self.train_curve:
            parts.append(f"IoU train {self.train_curve[-1][1]:.3f}")
        if self.eval_curve:
            parts.append(f"held-out {self.eval_curve[-1][1]:.3f}")
        self.bar.update(self._task, completed=self.num_timesteps, numbers="  ".join(parts))

    def _on_training_end(self) -> None:
        self._show()


def plot_learning_curve(
    path: Path,
    train: list[tuple[int, float]],
    evaluations: list[tuple[int, float]],
    baselines: dict[str, float],
) -> None:
    """Mean IoU over environment steps, with a line for each baseline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    if train:
        axes.plot(*zip(*train, strict=True), color="#9ec5e8", lw=1.5, label="training (exploring)")
    if evaluations:
        axes.plot(*zip(*evaluations, strict=True), color="#1464b4", lw=2.5, marker="o", ms=4)
        axes.plot([], [], color="#1464b4", lw=2.5, marker="o", ms=4, label="agent, held-out")
    colours = {
        "random": "#999999",
        "center": "#c08040",
        "confident": "#b04a9a",
        "oracle": "#2e8b57",
    }
    label_height = -1.0
    for name, value in sorted(baselines.items(), key=lambda item: item[1]):
        label_height = max(value, label_height + 0.04)
        axes.axhline(value, color=colours.get(name, "black"), ls="--", lw=1.2)
        axes.annotate(
            name,
            (1.0, label_height),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=colours.get(name, "black"),
        )
    axes.set(xlabel="environment steps", ylabel="mean IoU at the end of an episode", ylim=(0, 1))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if train or evaluations:
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
