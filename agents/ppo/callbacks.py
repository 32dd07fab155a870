"""Callbacks of a training run: pinned embeddings, progress, periodic evaluation, pictures."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from agents.ppo.tracking import PictureFile
from sam_gym.backbones.embeddings.store import EmbeddingStore
from sam_gym.utils.process_group import ALONE, ProcessGroup
from sam_gym.utils.progress import ProgressBar


class PinRolloutsCallback(BaseCallback):
    """Pins the embeddings of a rollout in the store until its update is over.

    Args:
        store: of the environment; None: that of the policy.
    """

    def __init__(self, store: EmbeddingStore | None = None) -> None:
        super().__init__()
        self.store: Any = store

    def _init_callback(self) -> None:
        if self.store is None:
            extractor: Any = self.model.policy.features_extractor
            self.store = extractor.store

    def _on_rollout_start(self) -> None:
        self.store.pin_new_epoch()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self.store.end_epoch()


class MonitorCallback(BaseCallback):
    """Shows progress, records the IoU of finished episodes, evaluates periodically, and draws.

    The functions passed in must not draw from the random generators of the training.

    Args:
        total_timesteps: length of the run, for the progress bar.
        evaluate_every: environment steps between evaluations.
        evaluate: returns the mean IoU on validation data.
        ranks: the processes of the run; the first one evaluates, draws and shows the bar.
        draw: takes the number of environment steps, after each evaluation; returns a picture.
        film_every: finished training episodes between films; 0: no films.
        film: takes the number of environment steps; returns an animation.
    """

    def __init__(
        self,
        total_timesteps: int,
        evaluate_every: int,
        evaluate: Callable[[], float],
        ranks: ProcessGroup = ALONE,
        draw: Callable[[int], Path] | None = None,
        film_every: int = 0,
        film: Callable[[int], Path] | None = None,
    ) -> None:
        super().__init__()
        self.draw, self.film_every, self.film = draw, film_every, film
        self.total_timesteps, self.evaluate_every = total_timesteps, evaluate_every
        self.evaluate, self.ranks = evaluate, ranks
        self._finished: list[tuple[int, int, float]] = []
        self._episodes = self._episodes_before = 0
        self.recent: deque[float] = deque(maxlen=512)
        #: (environment steps, mean IoU of recent training episodes).
        self.train_curve: list[tuple[int, float]] = []
        #: (environment steps, mean IoU on validation episodes).
        self.eval_curve: list[tuple[int, float]] = []
        self._due = evaluate_every
        #: Start of the run on the clock of `time.monotonic`, without interruptions.
        self.started = time.monotonic()
        self.bar = ProgressBar(disable=not ranks.is_first)

    def get_state(self) -> dict[str, Any]:
        """Return the curves and counters, for `set_state`."""
        return {
            "recent": list(self.recent),
            "train_curve": self.train_curve,
            "eval_curve": self.eval_curve,
            "due": self._due,
            "episodes": (self._episodes, self._episodes_before),
            "seconds": time.monotonic() - self.started,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore the state that `get_state` returned."""
        self.recent.extend(state["recent"])
        self.train_curve[:], self.eval_curve[:] = state["train_curve"], state["eval_curve"]
        self._due = state["due"]
        self._episodes, self._episodes_before = state["episodes"]
        self.started = time.monotonic() - state["seconds"]

    def _on_training_start(self) -> None:
        self._task = self.bar.add_task("training", total=self.total_timesteps)

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
        finished = self.ranks.merge(self._finished)
        self._finished = []
        self.recent.extend(finished)
        self._episodes += len(finished)
        if self.recent:
            mean = float(np.mean(self.recent))
            self.train_curve.append((self.num_timesteps, mean))
            self.logger.record("rollout/iou", mean)
        self._show()

    def _on_rollout_start(self) -> None:
        if self.num_timesteps >= self._due:
            self._due = (self.num_timesteps // self.evaluate_every + 1) * self.evaluate_every
            if self.ranks.is_first:
                self.evaluate_now()
        if self.film is not None and self.film_every > 0 and self.ranks.is_first:
            if self._episodes // self.film_every > self._episodes_before // self.film_every:
                path = self.film(self.num_timesteps)
                self.logger.record("eval/video", PictureFile(path))
        self._episodes_before = self._episodes

    def evaluate_now(self) -> None:
        """Evaluate the policy and record the result."""
        value = self.evaluate()
        self.eval_curve.append((self.num_timesteps, value))
        self.logger.record("eval/iou", value)
        if self.draw is not None:
            path = self.draw(self.num_timesteps)
            self.logger.record("eval/policy_plots", PictureFile(path))

    def _show(self) -> None:
        curves = {"IoU train": self.train_curve, "held-out": self.eval_curve}
        numbers = "  ".join(f"{name} {curve[-1][1]:.3f}" for name, curve in curves.items() if curve)
        self.bar.update(self._task, completed=self.num_timesteps, numbers=numbers)

    def _on_training_end(self) -> None:
        self._show()
