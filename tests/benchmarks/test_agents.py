"""The agents benchmark: episodes, counts and refused runs."""

import csv
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents import train_ppo
from agents.ppo import config
from benchmarks.agents import AgentsBenchmarkConfig, Row, gaps_closed, read_run
from benchmarks.run import main
from sam_gym.envs.click import SamSegConfig


@pytest.fixture(scope="module")
def trained(
    tiny_checkpoint: str,
    build_tiny: Callable[[], Any],
    backbone_added: Callable[..., AbstractContextManager[None]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Folder of a run of two rollouts, on scenes of two things."""
    out = tmp_path_factory.mktemp("trained") / "run"
    env: dict[str, Any] = {"backbone": "tiny", "checkpoint": tiny_checkpoint, "device": "cpu"}
    env |= {"dataset_kwargs": {"length": 8, "size": 128}}
    run = config.TrainPPOConfig(
        out=str(out), num_envs=4, n_steps=8, batch_size=16, total_timesteps=64, eval_episodes=2,
        final_episodes=2, video_every=0, pictures=False, categories="ring,star",
        env_config=SamSegConfig(obs="handle", **env),
    )  # fmt: skip
    with backbone_added("tiny", build=build_tiny):
        train_ppo.train(run)
    return out


@pytest.mark.usefixtures("tiny_env")
def test_agents_are_compared_on_words(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "compared"
    results = main(
        [
            *("agents", "--run", f"mine={trained},{trained}", "--out", str(out)),
            *("--words", "seen=ring,star", "--words", "unseen=mug", "--episodes", "4"),
            *("--iou-target", "0.05", "--device", "cpu"),
        ]
    )
    assert json.loads((out / "results.json").read_text()) == results
    assert (out / "report.html").stat().st_size > 10_000
    with open(out / "agents.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["agent"], row["words"], row["runs"]) for row in rows] == [
        *(("mine", "seen", "2"), ("random", "seen", "1"), ("oracle", "seen", "1")),
        *(("mine", "unseen", "2"), ("random", "unseen", "1"), ("oracle", "unseen", "1")),
    ]
    mine, random, oracle = results["rows"][:3]
    # Twice the same run: no spread.
    assert mine["ious_ci95"] == 0.0 and random["ious_ci95"] is None
    assert 0 < oracle["ious"] < 1 and mine["used"] == 5.0
    assert 1 <= oracle["needed"] <= 5.0 and 0 < oracle["reached"] <= 1
    assert set(results["gap_closed"]) == {"seen", "unseen"}


def test_held_out_images_are_not_restricted(tmp_path: Path) -> None:
    kwargs = {"categories": "ring,star", "length": 8, "size": 128}
    saved = {"config": {"settings": asdict(SamSegConfig(dataset_kwargs=kwargs))}}
    (tmp_path / "policy.zip").touch()
    (tmp_path / "results.json").write_text(json.dumps(saved))
    settings, policy = read_run(tmp_path, AgentsBenchmarkConfig(run=[], words=[], device="cpu"))
    assert settings.dataset_kwargs == {"size": 128}
    assert settings.split == "test" and settings.open_dataset().categories[0] == "cross"
    assert len(settings.open_dataset().categories) == 10 and policy.is_file()


@pytest.mark.usefixtures("tiny_env")
def test_clicks_are_counted_on_request_only(trained: Path, tmp_path: Path) -> None:
    args = ["--run", f"mine={trained}", "--out", str(tmp_path / "out"), "--episodes", "4"]
    results = main(["agents", *args, "--device", "cpu"])
    assert [row["words"] for row in results["rows"]] == ["all"] * 3
    assert "needed" not in results["rows"][0] and results["rows"][0]["used"] == 5.0


def test_gap_closed() -> None:
    def row(name: str, *ious: float) -> Row:
        return Row(name, "all", list(ious), [], [], [])

    rows = [row("agent", 0.4, 0.6), row("random", 0.1), row("oracle", 0.9)]
    assert gaps_closed(rows) == {"all": {"agent": 0.5}}


def test_interval_over_runs() -> None:
    numbers = Row("a", "all", [0.5, 0.6, 0.7], [5.0] * 3, [2.0, 3.0, 4.0], [1.0] * 3).as_dict()
    assert numbers["ious"] == 0.6 and numbers["ious_ci95"] == pytest.approx(0.2484, abs=1e-4)
    assert numbers["needed_ci95"] == pytest.approx(4.302653 / np.sqrt(3), abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Nothing to compare"),
        (("--run", "runs/x"), "expected NAME=VALUE"),
        (("--run", "oracle=runs/x"), "'oracle' is taken"),
        (("--run", "a=runs/nowhere"), "nowhere.results.json: not there"),
    ],
)
def test_wrong_runs_are_named(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(["agents", *arguments])


def test_results_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "policy.zip").touch()
    (tmp_path / "results.json").write_text('{"benchmark": "pointing"}')
    with pytest.raises(ValueError, match="not the results of train_ppo"):
        main(["agents", "--run", f"a={tmp_path}"])
