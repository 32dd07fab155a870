"""The loop of the small trainings: progress, log, checkpoints, weight files."""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from sam_gym.utils.fields import documented
from sam_gym.utils.files import write_atomic, write_json
from sam_gym.utils.progress import ProgressBar
from sam_gym.utils.settings import Count, Natural, Positive, Seed
from sam_gym.utils.text import reason_of

#: Steps averaged into a row of the log.
LOG_EVERY = 20


@documented
@dataclass(frozen=True, kw_only=True)
class SmallTrainerConfig:
    """Options of the small trainings. Subclasses set their own defaults."""

    out: str
    """Folder for the checkpoint, the weights and the evaluation."""
    steps: Count
    """Optimizer steps."""
    images: Count
    """Images per step."""
    learning_rate: Positive = 2e-3
    """Peak learning rate of Muon, for matrices and convolutions."""
    vector_learning_rate: Positive = 1e-3
    """Peak learning rate of AdamW, for everything else."""
    save_every: Count = 100
    """Steps between checkpoints."""
    seed: Seed = 0
    """Seed of data and initial weights."""
    workers: Natural = 1
    """Processes that prepare the data."""
    device: str = "auto"
    """Device: auto (CUDA, then MPS, then CPU), cpu, mps, cuda."""


class SmallTrainer:
    """Base class of the small trainings: models, optimizers, the step counter, checkpoints.

    A subclass sets the attributes, and defines `schedule` and `train_step`.

    Attributes:
        config: a `SmallTrainerConfig`.
        device: of the models.
        parts: name in checkpoints -> module or parameter.
        parameters: all that is trained.
        optimizers: Muon, and AdamW.
    """

    config: Any
    device: torch.device
    parts: dict[str, Any]
    parameters: list[nn.Parameter]
    optimizers: tuple[torch.optim.Optimizer, ...]
    step = 0

    def schedule(self) -> float:
        """Return the fraction of the peak learning rate at this step."""
        raise NotImplementedError

    def train_step(self, batch: Any) -> dict[str, float]:
        """Take one optimizer step on a batch; return numbers for the log."""
        raise NotImplementedError

    def descend(self, loss: Tensor) -> Tensor:
        """Take and count an optimizer step; return the norm of the gradients."""
        peaks = (self.config.learning_rate, self.config.vector_learning_rate)
        for optimizer, peak in zip(self.optimizers, peaks, strict=True):
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = peak * group.get("scale", 1.0) * self.schedule()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        return norm

    def resume(self, out: Path) -> None:
        """Write the config into an existing folder, and load its checkpoint if there is one."""
        checkpoint = out / "checkpoint.pt"
        if checkpoint.exists():
            self.load(checkpoint)
            print(f"Resuming from step {self.step} of {checkpoint}.")
        write_json(out / "config.json", asdict(self.config))

    def run(
        self, batches: Iterable[Any], out: Path, headline: Callable[[dict[str, float]], str]
    ) -> None:
        """Train up to `config.steps` steps; write `checkpoint.pt` and `log.jsonl`.

        Args:
            batches: at least one per remaining step.
            out: an existing folder.
            headline: maps a row of the log to the text beside the progress bar.
        """
        window: list[dict[str, float]] = []
        steps, started = self.config.steps, time.monotonic()
        with (out / "log.jsonl").open("a") as log, ProgressBar() as progress:
            task = progress.add_task("training", total=steps, completed=self.step)
            for batch in batches:
                if self.step >= steps:
                    break
                window.append(self.train_step(batch))
                if self.step % LOG_EVERY == 0:
                    row = {k: round(float(np.mean([n[k] for n in window])), 4) for k in window[0]}
                    row |= {"step": self.step, "seconds": round(time.monotonic() - started, 1)}
                    window.clear()
                    print(json.dumps(row), file=log, flush=True)
                    progress.update(task, completed=self.step, numbers=headline(row))
                if self.step % self.config.save_every == 0:
                    self.save(out / "checkpoint.pt")
        self.save(out / "checkpoint.pt")

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically."""
        state: dict[str, Any] = {"step": self.step}
        for name, part in self.parts.items():
            state[name] = part.state_dict() if isinstance(part, nn.Module) else part.detach()
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        save_state(state, path)

    def load(self, path: Path) -> None:
        """Restore a checkpoint.

        Raises:
            ValueError: it is of another model.
        """
        try:
            self._restore(read_state(path, self.device))
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"{path}: a checkpoint of another model ({reason_of(error)}). Choose another --out."
            ) from error

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]
        for name, part in self.parts.items():
            if isinstance(part, nn.Module):
                part.load_state_dict(state[name])
            else:
                part.data.copy_(state[name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def warm_up_and_decay(step: int, steps: int, warmup: int, decay: float) -> float:
    """Return the fraction of the peak learning rate: linear warm-up, constant, linear decay.

    Args:
        step: number of steps taken.
        steps: of the training.
        warmup: steps of warm-up.
        decay: final fraction of the steps over which the learning rate falls to zero.
    """
    warm = min(1.0, (step + 1) / max(1, warmup))
    return warm * min(1.0, (steps - step) / max(1.0, decay * steps))


def single_thread(_: int) -> None:
    """Let a data worker compute on one thread."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """Write a file for `torch.load` atomically."""
    buffer = BytesIO()
    torch.save(dict(state), buffer)
    write_atomic(path, buffer.getvalue())


def read_state(file: Path | BytesIO, device: torch.device | str = "cpu") -> Any:
    """Read a file of `torch.save`: no code in it runs, and it unpacks to no more than its size.

    Args:
        file: its path, or its content.
        device: where tensors go.

    Raises:
        ValueError: it would unpack to more.
        Exception: of many kinds, where the file is damaged.
    """
    check_unpacked(file, times=1)  # torch.save compresses nothing
    if isinstance(file, BytesIO):
        file.seek(0)
    return torch.load(file, map_location=device, weights_only=True)


def check_unpacked(file: Path | BytesIO, times: float) -> None:
    """Raise `ValueError` if a zip file would unpack to more than some times its size."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        size = file.stat().st_size if isinstance(file, Path) else len(file.getbuffer())
        if unpacked > times * size:
            raise ValueError(f"{size:,} bytes that unpack to {unpacked:,}")


def save_half(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write weights as float16 safetensors atomically; integers keep their type."""
    from safetensors.torch import save

    half = {
        key: (value.half() if value.is_floating_point() else value).contiguous().cpu()
        for key, value in state.items()
    }
    write_atomic(path, save(half, metadata=metadata))
