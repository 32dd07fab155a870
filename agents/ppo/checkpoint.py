"""Checkpoints of a training run.

A checkpoint is taken at the start of a rollout, so it holds no rollout. Resuming is bit-exact on a
CPU; on a GPU, up to nondeterministic kernels.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecMonitor

from agents.policies import SamPolicy
from agents.ppo.config import flat, with_present_names
from agents.ppo.distributed import DistributedPPO
from agents.ppo.encoding import encoded, unpacked
from agents.ppo.sb3 import progress, rollout_start, set_progress, set_rollout_start
from agents.ppo.vec_env import VectorEnvAdaptor
from sam_gym.backbones.spec import FIRST_MICRO, renamed_backbone
from sam_gym.utils.files import write_atomic
from sam_gym.utils.text import reason_of

#: Number of checkpoints kept: the newest, and the previous one in case the newest is damaged.
KEPT = 2
#: Age in seconds from which an unfinished file counts as left by a killed process.
_UNFINISHED_FOR = 600.0
#: Largest number of threads of a run; torch would try any number.
_MAX_THREADS = 1024
#: Options that may change when a run is resumed: paths, memory limits, pictures, tracking,
#: checkpoint frequency and device.
FREE_OPTIONS = (
    *("out", "overwrite", "resume", "checkpoint_every", "policy_plots", "video_every"),
    "pictures",
    *("mlflow", "mlflow_uri", "mlflow_experiment", "register_model"),
    *("env_config.data", "env_config.device"),
    *("env_config.cache_mib", "env_config.store_gib", "env_config.disk_gib"),
)
#: A state that takes longer than `_SLOW` seconds to collect is not collected after every rollout,
#: but only once in `_RARELY` times its duration.
_SLOW, _RARELY = 0.1, 50.0
#: Options that earlier checkpoints lack -> the value that they stand for.
ADDED_OPTIONS = {
    "env_config.on_error": "raise",
    "env_config.initial_mask": "empty",
    "env_config.augmentations": 1,
    "search": 0,
}
_BACKBONE = "env_config.backbone"
#: Attributes of SB3's logger with values not written yet: those of an update are written after the
#: next rollout.
_PENDING = ("name_to_value", "name_to_count", "name_to_excluded")


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, the newest first."""
    return sorted(folder.glob("*.ckpt"), reverse=True)


def write_checkpoint(folder: Path, state: Mapping[str, Any]) -> Path:
    """Write a checkpoint atomically and delete outdated ones.

    Args:
        folder: of the run's checkpoints.
        state: of the run; its `step` is the number of environment steps, and its `settings` decide
            whether the run can be resumed.
    """
    buffer = io.BytesIO()
    buffer.write(json.dumps(state.get("settings", {})).encode() + b"\n")
    torch.save(encoded({k: own for k, own in state.items() if k != "settings"}), buffer)
    body = buffer.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{state['step']:012d}.ckpt"
    write_atomic(path, hashlib.sha256(body).digest() + body, durable=True)
    # Files of killed processes. A requeued job may run beside the one that it replaces.
    unfinished = [own for own in folder.glob(".*.ckpt.*") if _age(own) > _UNFINISHED_FOR]
    for outdated in [*checkpoints(folder)[KEPT:], *unfinished]:
        outdated.unlink(missing_ok=True)
    return path


def _age(path: Path) -> float:
    """Return the seconds since a file was written; 0 if it has vanished."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def newest_checkpoint(
    folder: Path, check: Callable[[dict[str, Any]], None] = lambda settings: None
) -> dict[str, Any]:
    """Return the newest intact checkpoint; print the paths of damaged ones. No code in them runs.

    Args:
        folder: of the run's checkpoints.
        check: takes the settings of the run, before its state is read; raises an error if the run
            cannot be resumed.

    Raises:
        FileNotFoundError: there is no intact checkpoint.
        ValueError: the newest intact one holds no state of a run.
    """
    for path in checkpoints(folder):
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # another process has written newer ones
            continue
        digest, body = content[:32], content[32:]
        if hashlib.sha256(body).digest() != digest:
            print(f"{path} is damaged: trying the checkpoint before it.")
            continue
        with _described(path):
            # Earlier versions kept the settings with the rest.
            header, _, packed = body.partition(b"\n") if body[:1] == b"{" else (b"", b"", body)
            state = {"settings": json.loads(header)} if header else unpacked(packed)
            settings = dict(state["settings"])
        check(settings)
        with _described(path):
            return unpacked(packed) | state if header else state
    raise FileNotFoundError(
        f"{folder}: no checkpoint to resume from. Delete the folder and start the run without "
        "--resume."
    )


@contextmanager
def _described(path: Path) -> Iterator[None]:
    """Turn errors about the content of a checkpoint into one of one line."""
    try:
        yield
    except Exception as error:  # torch raises errors of many kinds
        raise ValueError(
            f"{path}: not a checkpoint of train_ppo ({reason_of(error)}). Delete it "
            "to resume from the checkpoint before it."
        ) from error


def check_same_config(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a run cannot be resumed because its options have changed.

    Args:
        then, now: configs as nested dicts, of the checkpoint and of this run.
    """
    # Tuples become lists, as in files.
    before, after = (flat(json.loads(json.dumps(config))) for config in (then, now))
    before |= {n: v for n, v in ADDED_OPTIONS.items() if n in after and n not in before}
    if (before.get(_BACKBONE), after.get(_BACKBONE)) == ("micro", renamed_backbone(FIRST_MICRO)):
        before[_BACKBONE] = after[_BACKBONE]  # `restore` compares the weights
    # A run goes on with the precision and the search that it began with.
    for name, default in (("precision", "auto"), ("search", None)):
        if after.get(name) == default:
            before[name] = default
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
    """A part of a run whose state checkpoints hold."""

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class Checkpoint(BaseCallback):
    """Writes checkpoints and restores runs from them.

    Must be the first callback: after resuming, the others repeat what they do at the start of a
    rollout, with the same outcome.

    Args:
        folder: for the checkpoints.
        config: of the run, as nested dicts.
        every: environment steps between checkpoints; the first one follows the first rollout.
        env: the sub-environments of this rank.
        parts: name -> other part of the run with a state.
        on_write: called after each checkpoint.
    """

    model: DistributedPPO

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        every: int,
        env: VecMonitor,
        parts: Mapping[str, HasState],
        on_write: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.on_write = on_write
        self.folder, self.config, self.every = folder, config, every
        self.env, self.parts = env, parts
        self.envs = cast(VectorEnvAdaptor, env.venv)
        self._due = 1
        #: The state to write if the run is interrupted; None: there is none, or it is written.
        self._last: dict[str, Any] | None = None
        #: When the next one is taken.
        self._next = 0.0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        step = self.model.num_timesteps
        if not step:
            return
        started, ranks = time.perf_counter(), self.model.ranks
        is_due = step >= self._due
        if not is_due and not ranks.gather(started >= self._next)[0]:
            return
        if is_due:
            self._due = (step // self.every + 1) * self.every
        state = encoded(self.get_state())
        ended = time.perf_counter()
        if ended - started > _SLOW:
            self._next = ended + _RARELY * (ended - started)
        if ranks.is_first:
            self._last = state
            if is_due:
                self._write_last()

    def _write_last(self) -> None:
        if self._last is not None:
            write_checkpoint(self.folder, self._last)
            self._last = None
            self.on_write()

    @contextmanager
    def written_when_interrupted(self) -> Iterator[None]:
        """Write a checkpoint of the last finished rollout if Ctrl-C or SIGTERM ends the context.

        Where taking a state is slow, it may be that of an earlier rollout, some seconds ago.
        """
        try:
            yield
        except KeyboardInterrupt as stop:
            self._write_last()
            newest = next(iter(checkpoints(self.folder)), None)
            where = f" at step {int(newest.stem)}" if newest else " from its start"
            stop.add_note(f"Pass --resume to resume {self.folder.parent}{where}.")
            raise

    def get_state(self) -> dict[str, Any]:
        """Return the state of the whole run; all ranks must call this."""
        model = self.model
        return {
            "step": model.num_timesteps,
            "settings": dict(self.config),
            "threads": torch.get_num_threads(),
            "weights": _frozen_weights(model),
            "parameters": model.get_parameters(),
            "progress": progress(model),
            "pending": {name: dict(getattr(model.logger, name)) for name in _PENDING},
            "slots": [row for own in model.ranks.gather(self._env_states()) for row in own],
            "parts": {name: part.get_state() for name, part in self.parts.items()},
            "due": self._due,
            "rng": _rng_state(model.device),
        }

    def _env_states(self) -> list[dict[str, Any]]:
        """Return the state of each sub-environment of this rank."""
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
        """Restore a run that is set up but not started.

        Args:
            model: made with the same config; its logger must be set.
            state: of the checkpoint.

        Raises:
            ValueError: the dataset, or the weights of a frozen model, have changed; or the state is
                not that of such a run.
        """
        _check_same_weights(self._weights_of(state), _frozen_weights(model))
        try:
            self._restore(model, state)
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"{self.folder}: the checkpoint does not fit this run ({reason_of(error)})."
            ) from error

    def _weights_of(self, state: Mapping[str, Any]) -> dict[str, str]:
        """Return the digests of the frozen models of a checkpoint, as far as it tells them."""
        if "weights" in state:
            return dict(state["weights"])
        own = flat(with_present_names(state.get("settings", {}), str(self.folder)))
        is_first = own.get(_BACKBONE) == "micro" and own.get("env_config.checkpoint") is None
        return {"backbone": FIRST_MICRO} if is_first else {}

    def _restore(self, model: DistributedPPO, state: Mapping[str, Any]) -> None:
        if not 0 < state["threads"] <= _MAX_THREADS:
            raise ValueError(f"{self.folder}: a checkpoint of {state['threads']} threads.")
        # Sums are split over threads: their number changes the last bits.
        torch.set_num_threads(state["threads"])
        model.set_parameters(state["parameters"], device=model.device)
        set_progress(model, state["progress"])
        first = model.first_env
        self._restore_envs(model, state["slots"][first : first + self.env.num_envs])
        for name, values in state["pending"].items():
            getattr(model.logger, name).update(values)
        for name, part in self.parts.items():
            if name in state["parts"]:
                part.set_state(state["parts"][name])
        self._due = state["due"]
        # Last, since restoring draws random numbers.
        _set_rng_state(state["rng"], model.device)

    def _restore_envs(self, model: DistributedPPO, states: list[dict[str, Any]]) -> None:
        observations = self.envs.set_state([row["env"] for row in states])
        set_rollout_start(model, observations, np.array([row["starts"] for row in states]))
        self.env.episode_returns = np.array([row["return"] for row in states])
        self.env.episode_lengths = np.array([row["length"] for row in states])
        for row, generator in zip(states, model.generators, strict=True):
            generator.bit_generator.state = row["generator"]


def _frozen_weights(model: DistributedPPO) -> dict[str, str]:
    return cast(SamPolicy, model.policy).frozen_weights()


def _check_same_weights(then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise `ValueError` if a frozen model has other weights than in the checkpoint."""
    changed = [name for name in then if then[name] != now.get(name)]
    renamed = renamed_backbone(then.get("backbone", "")) if "backbone" in changed else None
    if renamed is not None:
        raise ValueError(
            f"The run was started with the backbone that is now called {renamed!r}. Pass "
            f"--backbone {renamed} to resume it, or start another run with another --out."
        )
    if changed:
        raise ValueError(
            f"The run cannot be resumed with other weights of the {' and the '.join(changed)}: a "
            "file has changed since the run was started. Restore it, or start another run with "
            "another --out."
        )


def _rng_state(device: torch.device) -> dict[str, Any]:
    """Return the state of the process-wide random generators."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if device.type == "cuda" else None,
    }


def _set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    if not 0 <= state["numpy"][2] <= len(state["numpy"][1]):  # numpy does not check its position
        raise ValueError(f"The checkpoint has no state of numpy's generator: {state['numpy'][2]}.")
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
