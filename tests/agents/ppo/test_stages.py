"""PPO over a stream of domains."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.utils import LinearSchedule

from agents import evaluate
from agents.ppo.command_line import read_config
from agents.ppo.config import TrainPPOConfig
from agents.ppo.run import train
from agents.ppo.stages import PerStageSchedule, Stages, StreamCallback
from agents.train_ppo import main
from sam_gym.envs.click import SamSegConfig
from sam_gym.envs.continual import ContinualConfig
from sam_gym.metrics import continual as continual_metrics

#: A stream of three domains of four small images.
STREAM = (
    *("--env", "SamContinual-v0", "--stream-kwargs", "domains", "cells,night,sonar"),
    *("train_images", "4", "val_images", "4", "test_images", "4", "size", "64"),
)


# When each domain is learned -------------------------------------------------------------------


def test_stages_are_equal_and_begin_with_rollouts() -> None:
    stages = Stages(total=192, rollout=32, count=3)
    assert [stages.at(step) for step in range(0, 192, 32)] == [0, 0, 1, 1, 2, 2]
    assert [stages.remaining(step) for step in range(0, 193, 32)] == [1, 0.5, 0, 0.5, 0, 0.5, 0]
    # A rollout that reaches into the next stage belongs to the one that it began in.
    uneven = Stages(total=100, rollout=20, count=2)
    assert [uneven.at(step) for step in range(0, 100, 20)] == [0, 0, 0, 1, 1]
    remaining = [uneven.remaining(step) for step in range(20, 101, 20)]
    assert remaining == pytest.approx([0.6, 0.2, 0.0, 0.4, 0.0])
    for total in range(60, 200, 7):
        stages = Stages(total, 20, 3)
        stages.validate()
        assert {stages.at(step) for step in range(0, total, 20)} == {0, 1, 2}


def test_the_learning_rate_begins_anew_with_each_domain() -> None:
    schedule = PerStageSchedule(LinearSchedule(1.0, 0.1, 0.5), Stages(192, 32, 3))
    rates = [schedule(1 - step / 192) for step in range(0, 193, 32)]
    assert rates == pytest.approx([1.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    schedule = PerStageSchedule(LinearSchedule(1.0, 0.0, 1.0), Stages(192, 32, 3))
    rates = [schedule(1 - step / 192) for step in range(0, 193, 32)]
    assert rates == pytest.approx([1.0, 0.5, 0.0, 0.5, 0.0, 0.5, 0.0])


# The command -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_reports_what_is_kept_and_a_stopped_one_comes_to_the_same(
    tiny_env: dict[str, Any],
    arguments: Callable[..., list[str]],
    start_training: Callable[..., Any],
    assert_same: Callable[[Path, Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, set[str]]] = []

    def on_step(self: StreamCallback) -> bool:
        infos = self.locals["infos"]
        assert not any({"boundary", "domain", "task_id", "source"} & info.keys() for info in infos)
        seen.append((self.num_timesteps, {self.names[task] for task in self.env.task}))
        return True

    monkeypatch.setattr(StreamCallback, "_on_step", on_step)
    options = (*STREAM, "--boundaries", "hidden", "--final-episodes", "3", "--max-steps", "3")
    options += ("--total-timesteps", "96", "--checkpoint-every", "32")
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    results = main(arguments(through, *options, "--pictures"))

    stored = json.loads((through / "results.json").read_text())
    continual = stored["continual"]
    assert continual == results["continual"]
    assert continual["domains"] == ["cells", "night", "sonar"]
    matrix = np.array(continual["iou"])
    assert matrix.shape == (3, 3) and (matrix >= 0).all() and (matrix <= 1).all()
    assert len(np.unique(matrix)) > 3
    for name, metric in (
        ("last_iou", continual_metrics.last),
        ("avg_iou", continual_metrics.average),
        ("ff_iou", continual_metrics.forgetting),
    ):
        assert continual[name] == pytest.approx(metric(matrix), abs=2e-4)
        assert name in continual["definitions"]
    assert stored["agent"]["by_domain"] == dict(zip(continual["domains"], matrix[-1], strict=True))
    assert stored["agent"]["mean_iou"] == pytest.approx(continual["last_iou"], abs=2e-4)
    assert stored["agent"]["episodes"] == 3 and set(stored["oracle"]["by_domain"]) == {
        *continual["domains"]
    }
    assert (through / "forgetting.png").read_bytes()[:4] == b"\x89PNG"

    # Of 96 steps, each domain has 32, and what was under way when they were over.
    for step, domains in seen:
        stage = (step - 1) // 32
        allowed = {continual["domains"][stage]}
        if stage and step - 32 * stage <= 4 * 3:
            allowed.add(continual["domains"][stage - 1])
        assert domains <= allowed, step

    # Killed in the second domain, after the checkpoint at the boundary.
    command = arguments(stopped, *options)
    done = start_training("--die-at", "40", *command).finish()
    assert done.returncode == -9, done
    main([*command, "--resume"])
    assert_same(stopped, through)


def test_an_environment_with_a_stream_has_its_own_options(tmp_path: Path) -> None:
    config = read_config([*STREAM, "--order", "random:3", "--data", "a,b"])
    assert config.env_config == ContinualConfig(
        obs="handle",
        order="random:3",
        data="a,b",
        stream_kwargs={
            **{"domains": "cells,night,sonar", "size": 64},
            **{"train_images": 4, "val_images": 4, "test_images": 4},
        },
    )
    path = tmp_path / "run.yaml"
    path.write_text("env: SamContinual-v0\norder: random:1\nstream_kwargs: {domains: cells}\n")
    config = read_config(["--config", str(path), "--order", "random:2"])
    assert config.env == "SamContinual-v0" and isinstance(config.env_config, ContinualConfig)
    assert config.env_config.order == "random:2"
    assert config.env_config.stream_kwargs == {"domains": "cells"}
    # The command line has the last word, on the environment too.
    assert isinstance(read_config([f"--env={TrainPPOConfig.env}"]).env_config, SamSegConfig)
    with pytest.raises(ValueError, match="Unknown option 'order'"):
        read_config(["--config", str(path), "--env", "SamSeg-v0"])
    with pytest.raises(ValueError, match="Did you mean 'SamContinual-v0'"):
        read_config(["--env", "SamContinual"])


def test_wrong_input_is_an_error_before_work_starts(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out"), "--n-steps", "8", "--num-envs", "4", *STREAM]
    with pytest.raises(ValueError, match="95 environment steps are too few for 3 domains"):
        main([*out, "--total-timesteps", "95"])
    with pytest.raises(ValueError, match=r"warm_start .* the first of 3 domains \(40\), got 41"):
        main([*out, "--total-timesteps", "120", "--warm-start", "41"])
    with pytest.raises(ValueError, match="--categories does not work with SamContinual-v0"):
        main([*out, "--categories", "star"])
    with pytest.raises(ValueError, match=r"order lacks night"):
        main([*out, "--order", "cells,sonar"])
    with pytest.raises(ValueError, match="env_config of class ContinualConfig, got SamSegConfig"):
        train(replace(TrainPPOConfig(), env="SamContinual-v0"))
    assert not (tmp_path / "out").exists()


def test_evaluation_by_domain(tiny_env: dict[str, Any], tmp_path: Path) -> None:
    options = [
        *("--backbone", "tiny", "--checkpoint", tiny_env["checkpoint"], "--device", "cpu"),
        *("--out", str(tmp_path), "--policy", "oracle", *STREAM, "--max-steps", "2"),
    ]
    summary = evaluate.main([*options, "--episodes", "10", "--num-envs", "3"])
    with (tmp_path / "episodes.csv").open() as file:
        rows = list(csv.DictReader(file))
    # 10 of 3 domains are 4 of each, and those are 2 of each of 3 slots.
    assert len(rows) == summary["episodes"] == 18
    for name in ("cells", "night", "sonar"):
        own = [float(row["iou"]) for row in rows if row["domain"] == name]
        assert len(own) == 6
        assert summary["by_domain"][name] == pytest.approx(np.mean(own), abs=1e-4)
        assert all(
            row["source"].startswith(f"{name}/test/") for row in rows if row["domain"] == name
        )
    assert (tmp_path / "episodes.gif").read_bytes()[:3] == b"GIF"
