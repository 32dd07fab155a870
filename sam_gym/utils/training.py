"""The loop of our own small trainings: progress, a log, checkpoints, weights as files."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

#: Steps whose numbers are averaged to a row of the log.
LOG_EVERY = 20


class Learner(Protocol):
    """What `run_steps` runs."""

    step: int

    def train_step(self, batch: Any) -> dict[str, float]:
        """Take one optimizer step, count it, and return numbers for the log."""
        ...

    def save(self, path: Path) -> None:
        """Write a checkpoint that training can go on from."""
        ...


def run_steps(
    learner: Learner,
    batches: Iterable[Any],
    steps: int,
    out: Path,
    save_every: int,
    headline: Callable[[dict[str, float]], str],
) -> None:
    """Train until `steps` steps are done, and leave a checkpoint.

    Writes `checkpoint.pt` and `log.jsonl` into `out`.

    Args:
        learner: who learns; its `step` says how many steps it has taken already.
        batches: one for each step that is left, or more.
        steps: of the whole training.
        out: an existing folder.
        save_every: steps between checkpoints.
        headline: a row of the log -> what stands beside the progress bar.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    window: list[dict[str, float]] = []
    started = time.monotonic()
    with (out / "log.jsonl").open("a") as log, Progress(*columns) as progress:
        task = progress.add_task("", total=steps, completed=learner.step, numbers="")
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
    """Write what `torch.load` reads, whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(dict(state), partial)
    os.replace(partial, path)


def save_half(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write weights as float16 safetensors, whole or not at all; integers stay as they are."""
    from safetensors.torch import save_file

    half = {
        key: (value.half() if value.is_floating_point() else value).contiguous().cpu()
        for key, value in state.items()
    }
    partial = path.with_suffix(".partial")
    save_file(half, partial, metadata=metadata)
    os.replace(partial, path)
