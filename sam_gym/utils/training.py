"""The loop of the small trainings: progress, log, checkpoints, weight files."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sam_gym.utils.files import write_atomic
from sam_gym.utils.progress import ProgressBar

#: Steps averaged into a row of the log.
LOG_EVERY = 20


class Learner(Protocol):
    """A training that `run_steps` runs."""

    step: int

    def train_step(self, batch: Any) -> dict[str, float]:
        """Take one optimizer step, count it, and return numbers for the log."""

    def save(self, path: Path) -> None:
        """Write a checkpoint to resume from."""


def run_steps(
    learner: Learner,
    batches: Iterable[Any],
    steps: int,
    out: Path,
    save_every: int,
    headline: Callable[[dict[str, float]], str],
) -> None:
    """Train up to `steps` steps and write a checkpoint.

    Writes `checkpoint.pt` and `log.jsonl` into `out`.

    Args:
        learner: the training; `learner.step` counts the steps taken.
        batches: at least one per remaining step.
        steps: total number of steps.
        out: an existing folder.
        save_every: steps between checkpoints.
        headline: maps a row of the log to the text beside the progress bar.
    """
    window: list[dict[str, float]] = []
    started = time.monotonic()
    with (out / "log.jsonl").open("a") as log, ProgressBar() as progress:
        task = progress.add_task("training", total=steps, completed=learner.step)
        for batch in batches:
            if learner.step >= steps:
                break
            window.append(learner.train_step(batch))
            if learner.step % LOG_EVERY == 0:
                row = {key: round(float(np.mean([n[key] for n in window])), 4) for key in window[0]}
                row |= {"step": learner.step, "seconds": round(time.monotonic() - started, 1)}
                window.clear()
                print(json.dumps(row), file=log, flush=True)
                progress.update(task, completed=learner.step, numbers=headline(row))
            if learner.step % save_every == 0:
                learner.save(out / "checkpoint.pt")
    learner.save(out / "checkpoint.pt")


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """Write a file for `torch.load` atomically."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_atomic(path, buffer.getvalue())


def save_half(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write weights as float16 safetensors atomically; integers keep their type."""
    from safetensors.torch import save

    half = {
        key: (value.half() if value.is_floating_point() else value).contiguous().cpu()
        for key, value in state.items()
    }
    write_atomic(path, save(half, metadata=metadata))
