"""A CLIP with random weights; a tiny training run, here or in other processes, and its outcome."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stable_baselines3.common.save_util import load_from_zip_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.clip.train import ClipTrainer, Config

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `train_clip_micro` writes, untrained: 64 x 64 input, a grid of 8 x 8 patches."""
    folder = tmp_path_factory.mktemp("clip") / "clip_micro"
    with torch.random.fork_rng():
        trainer = ClipTrainer(Config(image_size=64, width=32, layers=2), torch.device("cpu"))
    trainer.export(folder, surgical_blocks=1)
    return folder


@pytest.fixture(scope="session")
def arguments(tiny_checkpoint: str) -> Callable[..., list[str]]:
    """Arguments of a run of six rollouts into a folder, over the tiny SAM; later ones override."""

    def arguments(out: Path, *more: str) -> list[str]:
        return [
            *("--out", str(out), "--backbone", "tiny", "--checkpoint", tiny_checkpoint),
            *("--device", "cpu", "--train-images", "8", "--num-envs", "4", "--n-steps", "8"),
            *("--batch-size", "16", "--total-timesteps", "192", "--checkpoint-every", "64"),
            *("--eval-every", "64", "--eval-episodes", "2", "--final-episodes", "2", *more),
        ]

    return arguments


@pytest.fixture(scope="session")
def start_training() -> Callable[..., subprocess.Popen[str]]:
    """Starts `train_tiny.py` with arguments, and with more environment variables as keywords."""

    def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(HERE / "train_tiny.py"), *arguments],
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def learned(out: Path) -> dict[str, torch.Tensor]:
    """All parameters and the optimizer's moments, by name."""
    _, parameters, _ = load_from_zip_file(out / "policy.zip", device="cpu", load_data=False)
    moments = parameters["policy.optimizer"]["state"]
    return parameters["policy"] | {
        f"optimizer.{number}.{name}": value
        for number, state in moments.items()
        for name, value in state.items()
    }


def logged(out: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows, but for times."""
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith("time/")
    }


def reported(out: Path) -> dict[str, Any]:
    """results.json, but for times and settings."""
    results = json.loads((out / "results.json").read_text())
    return {key: value for key, value in results.items() if key not in _VARYING}


_VARYING = ("training_seconds", "total_seconds", "config")


@pytest.fixture(scope="session")
def outcome() -> Callable[[Path], dict[str, Any]]:
    """Everything that a run has learned, logged and reported."""
    return lambda out: {
        "learned": learned(out),
        "logged": logged(out),
        "reported": reported(out),
    }


@pytest.fixture(scope="session")
def assert_same(outcome: Callable[[Path], dict[str, Any]]) -> Callable[[Path, Path], None]:
    """Asserts that two runs came to the same, to the last bit."""

    def assert_same(out: Path, expected: Path) -> None:
        got, wanted = outcome(out), outcome(expected)
        torch.testing.assert_close(got["learned"], wanted["learned"], rtol=0, atol=0)
        assert got["logged"] == wanted["logged"]
        assert got["reported"] == wanted["reported"]

    return assert_same
