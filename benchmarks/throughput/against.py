"""Play the vector environment of this checkout and of another one in turn, each in a process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from benchmarks.checkouts import OTHER, OURS, check_imported, checkouts_of, environment_of
from benchmarks.throughput import stepping
from benchmarks.throughput.config import KINDS, ThroughputBenchmarkConfig
from sam_gym.utils.provenance import commit_of


class Player:
    """A process that runs `stepping.main` in a checkout. Use it as a context manager.

    Args:
        checkout: its folder.
        job: arguments of `stepping.Player`.

    Raises:
        RuntimeError: the process failed; the message has what it wrote.
    """

    def __init__(self, checkout: Path, job: dict[str, Any]) -> None:
        self.checkout = checkout
        self._errors: IO[str] = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, stepping.__file__],
            env=environment_of(checkout),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            about = self.ask(job)
            check_imported(about["checkout"], checkout)
        except BaseException:
            self.close()
            raise
        #: Number of actions.
        self.actions: int = about["actions"]

    def __enter__(self) -> Player:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, request: Any) -> dict[str, Any]:
        """Send a request and return the reply."""
        try:
            cast(IO[str], self._process.stdin).write(json.dumps(request) + "\n")
            cast(IO[str], self._process.stdin).flush()
        except BrokenPipeError:
            pass  # it has ended; the reply is missing
        reply = cast(IO[str], self._process.stdout).readline()
        if not reply:
            self._process.wait()
            self._errors.seek(0)
            written = self._errors.read()[-4000:]
            raise RuntimeError(f"Playing SamSeg-v0 of {self.checkout} failed:\n{written}")
        return json.loads(reply)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def compare_builds(
    config: ThroughputBenchmarkConfig, advance: Callable[[], None]
) -> dict[str, Any] | None:
    """Play the same actions in both checkouts in turn.

    Args:
        config: the settings.
        advance: called after each turn; there are `turns(config)`.

    Returns:
        Checkouts and numbers, see `_numbers`; None without another checkout.

    Raises:
        ValueError: `config.against` is no checkout, or its environment has other actions.
        RuntimeError: a process failed.
    """
    if config.against is None:
        return None
    checkouts = checkouts_of(config.against)
    backbones = {OURS: config.backbone, OTHER: config.against_backbone or config.backbone}
    return {
        "sides": {
            side: {
                "checkout": str(folder),
                "commit": commit_of(folder),
                "backbone": backbones[side],
            }
            for side, folder in checkouts.items()
        },
        "by_num_envs": {
            str(num_envs): {
                kind: _play(config, checkouts, backbones, num_envs, kind, advance) for kind in KINDS
            }
            for num_envs in config.num_envs
        },
    }


def turns(config: ThroughputBenchmarkConfig) -> int:
    """Return how often `compare_builds` advances."""
    return 0 if config.against is None else len(config.num_envs) * len(KINDS) * (config.repeats + 1)


def _play(
    config: ThroughputBenchmarkConfig,
    checkouts: dict[str, Path],
    backbones: dict[str, str],
    num_envs: int,
    kind: str,
    advance: Callable[[], None],
) -> dict[str, Any]:
    own = {k: v for k, v in config.env_settings(kind == "fresh").items() if v is not None}
    images = config.images if kind == "cached" else 0
    job = {"num_envs": num_envs, "seed": config.seed, "images": images}
    rng = np.random.default_rng(config.seed)
    played: dict[str, list[dict[str, Any]]] = {side: [] for side in checkouts}
    with ExitStack() as stack:
        players = {
            side: stack.enter_context(
                Player(folder, job | {"settings": own | {"backbone": backbones[side]}})
            )
            for side, folder in checkouts.items()
        }
        counts = {side: player.actions for side, player in players.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"--against {config.against}: its SamSeg-v0 has {counts[OTHER]} actions, and this "
                f"one {counts[OURS]}. Both play the same actions: pass another checkout."
            )
        for repeat in range(config.repeats + 1):
            actions = rng.integers(0, counts[OURS], (config.steps, num_envs)).tolist()
            # The order alternates too. The first turn is a warm-up.
            for side in list(players)[:: 2 * (repeat % 2) - 1]:
                played[side].append(players[side].ask(actions))
            advance()
    return _numbers(played, config.steps * num_envs)


def _numbers(played: dict[str, list[dict[str, Any]]], env_steps: int) -> dict[str, Any]:
    """Return environment steps per second and peak memory of each side, and their ratios.

    Args:
        played: replies of each side, the first of which is a warm-up.
        env_steps: steps of all sub-environments in a turn.
    """
    rewards = {side: np.array([turn["rewards"] for turn in own]) for side, own in played.items()}
    speeds = {
        side: [env_steps / turn["seconds"] for turn in own[1:]] for side, own in played.items()
    }
    ratios = (np.array(speeds[OURS]) / np.array(speeds[OTHER])).tolist()
    peaks = {side: float(own[-1]["peak_mib"]) for side, own in played.items()}
    return {
        **{f"{side}_steps_per_second": float(np.median(own)) for side, own in speeds.items()},
        **{f"{side}_peak_mib": peak for side, peak in peaks.items()},
        "ratios": ratios,
        "ratio": float(np.median(ratios)),
        "memory_ratio": peaks[OURS] / peaks[OTHER],
        "max_reward_difference": float(np.abs(rewards[OURS] - rewards[OTHER]).max()),
        "mean_reward_difference": float(np.abs(rewards[OURS] - rewards[OTHER]).mean()),
    }
