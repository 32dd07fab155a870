"""A training run as a file: what it takes to go on exactly where it was.

A checkpoint is taken where a rollout begins, so that no rollout is in it. On a CPU the run then
goes on bit for bit as if it had never stopped; on a GPU, up to what its kernels leave open.
"""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecMonitor

from agents.ppo.config import flat
from agents.ppo.distributed import DistributedPPO
from agents.ppo.sb3 import progress, rollout_start, set_progress, set_rollout_start
from agents.ppo.vec_env import VectorEnvAdaptor
from sam_gym.utils.files import write_atomic

#: How many checkpoints are kept: the newest, and the one before in case that one is damaged.
KEPT = 2
#: Settings that may differ between a run and its resumption: where its own files and the data lie,
#: how much memory is used, pictures, tracking, checkpoints, and the device.
FREE_OPTIONS = (
    *("out", "resume", "checkpoint_every", "policy_plots", "video_every"),
    *("mlflow", "mlflow_uri", "mlflow_experiment", "register_model"),
    *("env_config.data", "env_config.device"),
    *("env_config.cache_mib", "env_config.store_gib", "env_config.disk_gib"),
)
#: What was recorded but not yet written: SB3 writes what an update logs after the next rollout.
_PENDING = ("name_to_value", "name_to_count", "name_to_excluded")


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a folder, the newest first."""
    return sorted(folder.glob("*.ckpt"), reverse=True)


def write_checkpoint(folder: Path, state: Mapping[str, Any]) -> Path:
    """Write a checkpoint whole or not at all, and delete those that are no longer needed.

    Args:
        folder: of the run's checkpoints; nobody else may write there.
        state: with the environment steps so far as `step`.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    body = buffer.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{state['step']:012d}.ckpt"
    write_atomic(path, hashlib.sha256(body).digest() + body, durable=True)
    unfinished = folder.glob(".*.ckpt.*")
    for outdated in [*checkpoints(folder)[KEPT:], *unfinished]:
        outdated.unlink()
    return path


def newest_checkpoint(folder: Path) -> dict[str, Any]:
    """The newest checkpoint that is whole; says so if a newer one is damaged.

    Raises:
        FileNotFoundError: there is none.
    """
    for path in checkpoints(folder):
        content = path.read_bytes()
        digest, body = content[:32], content[32:]
        if hashlib.sha256(body).digest() == digest:
            return torch.load(io.BytesIO(body), map_location="cpu", weights_only=False)
        print(f"{path} is damaged: going back to the checkpoint before it.")
    raise FileNotFoundError(
        f"{folder}: no checkpoint to resume from. Delete the folder and start the run without "
        "--resume."
    )


def check_same_config(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a run cannot be resumed because its options have changed.

    Args:
        then, now: configs as nested dicts, of the checkpoint and of this run.
    """
    before, after = flat(then), flat(now)
    changed = [
        f"{name} ({before.get(name)!r} then, {after.get(name)!r} now)"
        for name in sorted(before.keys() | after.keys())
        if name not in FREE_OPTIONS and before.get(name) != after.get(name)
    ]
    if changed:
        raise ValueError(
            f"The run cannot be resumed with other options: {'; '.join(changed)}. Pass the ones "
            "that it was started with, or start another run with another --out."
        )


class HasState(Protocol):
    """A part of a run that a checkpoint keeps."""

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class Checkpoint(BaseCallback):
    """Writes checkpoints, and puts a run back to where one was taken.

    It has to be the first callback: what the others do at the beginning of a rollout is done again
    after resuming, with the same outcome.

    Args:
        folder: for the checkpoints.
        settings: of the run, as nested dicts.
        every: environment steps between checkpoints.
        env: the environments of this rank.
        parts: by name, what else of the run has a state to keep.
    """

    model: DistributedPPO

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        every: int,
        env: VecMonitor,
        parts: Mapping[str, HasState],
    ) -> None:
        super().__init__()
        self.folder, self.settings, self.every = folder, settings, every
        self.env, self.parts = env, parts
        self.envs = cast(VectorEnvAdaptor, env.venv)
        # The first one follows the first rollout.
        self._due = 1

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        step = self.model.num_timesteps
        if step >= self._due:
            self._due = (step // self.every + 1) * self.every
            state = self.get_state()
            if self.model.ranks.is_first:
                write_checkpoint(self.folder, state)

    def get_state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on; all ranks must call this."""
        model = self.model
        return {
            "step": model.num_timesteps,
            "settings": dict(self.settings),
            "threads": torch.get_num_threads(),
            "parameters": model.get_parameters(),
            "progress": progress(model),
            "pending": {name: dict(getattr(model.logger, name)) for name in _PENDING},
            "slots": [slot for own in model.ranks.gather(self._slots()) for slot in own],
            "parts": {name: part.get_state() for name, part in self.parts.items()},
            "due": self._due,
            "rng": _rng_state(model.device),
        }

    def _slots(self) -> list[dict[str, Any]]:
        """The state of each slot of this rank."""
        _, starts = rollout_start(self.model)
        return [
            {
                "env": env,
                "generator": generator.bit_generator.state,
                "return": self.env.episode_returns[i],
                "length": self.env.episode_lengths[i],
                "starts": starts[i],
            }
            for i, (env, generator) in enumerate(
                zip(self.envs.get_state(), self.model.generators, strict=True)
            )
        ]

    def restore(self, model: DistributedPPO, state: Mapping[str, Any]) -> None:
        """Put a run that is set up but not begun to where a checkpoint was taken.

        Args:
            model: made with the same settings; its logger is set already.
            state: of the checkpoint.

        Raises:
            ValueError: the dataset has changed.
        """
        # Sums are split by threads, so their number shows in the last bits.
        torch.set_num_threads(state["threads"])
        model.set_parameters(state["parameters"], device=model.device)
        set_progress(model, state["progress"])
        first = model.first_slot
        self._restore_slots(model, state["slots"][first : first + self.env.num_envs])
        for name, values in state["pending"].items():
            getattr(model.logger, name).update(values)
        for name, part in self.parts.items():
            if name in state["parts"]:
                part.set_state(state["parts"][name])
        self._due = state["due"]
        # Last, since nothing of the above may count as drawn.
        _set_rng_state(state["rng"], model.device)

    def _restore_slots(self, model: DistributedPPO, slots: list[dict[str, Any]]) -> None:
        observations = self.envs.set_state([slot["env"] for slot in slots])
        set_rollout_start(model, observations, np.array([slot["starts"] for slot in slots]))
        self.env.episode_returns = np.array([slot["return"] for slot in slots])
        self.env.episode_lengths = np.array([slot["length"] for slot in slots])
        for slot, generator in zip(slots, model.generators, strict=True):
            generator.bit_generator.state = slot["generator"]


def _rng_state(device: torch.device) -> dict[str, Any]:
    """The state of all random numbers that do not belong to a slot."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if device.type == "cuda" else None,
    }


def _set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
