"""What a training run watches: progress, periodic evaluation, its curve, its logs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Image, Logger, TensorBoardOutputFormat
from torch.utils.tensorboard import SummaryWriter

from agents.distributed import ALONE, Ranks
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
    """Progress bar, mean IoU of finished episodes and periodic evaluation.

    Args:
        total_timesteps: length of the run, for the bar.
        evaluate_every: environment steps between evaluations.
        evaluate: called without arguments, returns the mean IoU on validation data. It must leave
            the random numbers of the training alone.
        ranks: the processes of the run; the first one evaluates and shows the bar.
        draw: called without arguments after each evaluation, returns a picture for TensorBoard,
            uint8 (H, W, 3).
    """

    def __init__(
        self,
        total_timesteps: int,
        evaluate_every: int,
        evaluate: Callable[[], float],
        ranks: Ranks = ALONE,
        draw: Callable[[], np.ndarray] | None = None,
    ) -> None:
        super().__init__()
        self.draw = draw
        self.total_timesteps, self.evaluate_every = total_timesteps, evaluate_every
        self.evaluate, self.ranks = evaluate, ranks
        self._finished: list[tuple[int, int, float]] = []
        self.recent: deque[float] = deque(maxlen=512)
        #: (environment steps, mean IoU of recent training episodes).
        self.train_curve: list[tuple[int, float]] = []
        #: (environment steps, mean IoU on validation episodes).
        self.eval_curve: list[tuple[int, float]] = []
        self._due = evaluate_every
        #: When the run would have begun, had it never stopped, on the clock of `time.monotonic`.
        self.started = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.completed}/{task.total} steps"),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            disable=not ranks.is_first,
        )

    def get_state(self) -> dict[str, Any]:
        """The course of the run so far, for `set_state`."""
        return {
            "recent": list(self.recent),
            "train_curve": self.train_curve,
            "eval_curve": self.eval_curve,
            "due": self._due,
            "seconds": time.monotonic() - self.started,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `get_state`."""
        self.recent.extend(state["recent"])
        self.train_curve[:], self.eval_curve[:] = state["train_curve"], state["eval_curve"]
        self._due = state["due"]
        self.started = time.monotonic() - state["seconds"]

    def _on_training_start(self) -> None:
        self._task = self.bar.add_task("", total=self.total_timesteps, numbers="")

    def _on_step(self) -> bool:
        dones, infos = self.locals["dones"], self.locals["infos"]
        first = self.ranks.rank * len(dones)
        self._finished += [
            (self.num_timesteps, first + i, info["iou"])
            for i, (done, info) in enumerate(zip(dones, infos, strict=True))
            if done
        ]
        return True

    def _on_rollout_end(self) -> None:
        self.recent.extend(self.ranks.merge(self._finished))
        self._finished = []
        if self.recent:
            mean = float(np.mean(self.recent))
            self.train_curve.append((self.num_timesteps, mean))
            self.logger.record("rollout/iou", mean)
        self._show()

    def _on_rollout_start(self) -> None:
        if self.num_timesteps >= self._due:
            self._due += self.evaluate_every
            if self.ranks.is_first:
                self.evaluate_now()

    def evaluate_now(self) -> None:
        """Evaluate the policy as it is and note the result."""
        value = self.evaluate()
        self.eval_curve.append((self.num_timesteps, value))
        self.logger.record("eval/iou", value)
        if self.draw is not None:
            self.logger.record("eval/views", Image(self.draw(), "HWC"))

    def _show(self) -> None:
        parts = []
        if self.train_curve:
            parts.append(f"IoU train {self.train_curve[-1][1]:.3f}")
        if self.eval_curve:
            parts.append(f"held-out {self.eval_curve[-1][1]:.3f}")
        self.bar.update(self._task, completed=self.num_timesteps, numbers="  ".join(parts))

    def _on_training_end(self) -> None:
        self._show()


class _ContinuedTensorBoard(TensorBoardOutputFormat):
    """Writes to TensorBoard; what the folder holds from some step on is superseded."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self.writer = SummaryWriter(str(folder), purge_step=first_step)
        self._is_closed = False


def make_logger(folder: Path, done: int, ranks: Ranks = ALONE) -> Logger:
    """A logger to TensorBoard, on the first of the ranks.

    Args:
        folder: of the event files; a run that goes on adds one to those that are there.
        done: environment steps before this point, whose records are kept.
        ranks: the processes of the run.
    """
    outputs = [_ContinuedTensorBoard(folder, done + 1)] if ranks.is_first else []
    return Logger(str(folder), list(outputs))


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
