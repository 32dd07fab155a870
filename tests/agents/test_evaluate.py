"""Baselines and the evaluation that all agents share."""

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from agents.baselines import BASELINES
from agents.evaluate import evaluate, load_agent, main
from sam_gym.envs.core import ClickConfig


def settings_of(env: dict[str, Any], **more: Any) -> ClickConfig:
    return ClickConfig(split="test", obs="handle", **(env | more))


def core_of(settings: dict[str, Any], count: int = 4, **more: Any) -> Any:
    env = gym.make_vec(
        "SamSeg-v0",
        count,
        vectorization_mode="vector_entry_point",
        obs="handle",
        **(settings | more),
    )
    observations, _ = env.reset(seed=0)
    return env, env.unwrapped.core, observations


@pytest.mark.parametrize("name", BASELINES.names())
def test_baselines_play_valid_actions(tiny_env: dict[str, Any], name: str) -> None:
    env, core, observations = core_of(tiny_env, stop=True)
    agent = BASELINES.get(name)(0)
    for _ in range(3):
        actions = agent.act(core, observations)
        assert actions.shape == (4,)
        observations, *_ = env.step(actions)


def test_center_clicks_the_middle(tiny_env: dict[str, Any]) -> None:
    _, core, observations = core_of(tiny_env, grid=9)
    actions = BASELINES.get("center")(0).act(core, observations)
    middle = (core.backbone.image_size - 1) / 2
    assert core.click_of(actions[0]) == (pytest.approx(middle), pytest.approx(middle), True)


def test_confident_plays_the_click_of_highest_predicted_iou(tiny_env: dict[str, Any]) -> None:
    env, core, observations = core_of(tiny_env, count=3)
    actions = BASELINES.get("confident")(0).act(core, observations)
    env.step(actions)
    chosen = core.predicted_ious[np.arange(3), core.num_clicks].copy()
    for x, y in [(5.0, 5.0), (32.0, 32.0), (60.0, 20.0)]:
        env.reset(seed=0)
        # A click of the tried grid can at best tie with the chosen one.
        step = 64 / 6
        at = [(np.floor(v / step) + 0.5) * step - 0.5 for v in (x, y)]
        env.step(np.full(3, core.action_at(*at, True)))
        assert (core.predicted_ious[np.arange(3), core.num_clicks] <= chosen + 1e-5).all()


def test_oracle_clicks_inside_the_error_it_means(tiny_env: dict[str, Any]) -> None:
    _, core, observations = core_of(tiny_env, count=6, grid=32)
    actions = BASELINES.get("oracle")(0).act(core, observations)
    for slot, action in enumerate(actions):
        x, y, positive = core.click_of(action)
        column, row = core.to_image(slot, x, y)
        assert positive and core.ground_truth(slot).mask[row, column]


def test_all_agents_meet_the_same_episodes(tiny_env: dict[str, Any]) -> None:
    runs = [
        evaluate(
            BASELINES.get(name)(0), settings_of(tiny_env, max_steps=2), episodes=10, num_envs=4
        )
        for name in ("random", "oracle", "random")
    ]
    assert runs[0].sources == runs[1].sources and runs[0].targets == runs[1].targets
    assert np.array_equal(runs[0].ious, runs[2].ious)
    assert len(runs[0].ious) == 12
    assert (runs[0].clicks == 2).all()
    assert np.allclose(runs[0].rewards, runs[0].ious)


def test_summary_holds_mean_and_interval(tiny_env: dict[str, Any]) -> None:
    result = evaluate(BASELINES.get("center")(0), settings_of(tiny_env), episodes=8, num_envs=8)
    summary = result.summary()
    assert summary["episodes"] == 8
    assert summary["mean_iou"] == pytest.approx(result.ious.mean(), abs=1e-4)
    spread = result.ious.std(ddof=1) / np.sqrt(8)
    assert summary["ci95"] == pytest.approx(2.3646 * spread, abs=1e-4)


def test_unknown_policies_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'oracle'"):
        load_agent("orakle")
    with pytest.raises(FileNotFoundError, match="policy.zip"):
        load_agent(str(tmp_path / "policy.zip"))
    (tmp_path / "broken.zip").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="broken.zip: not a readable policy"):
        load_agent(str(tmp_path / "broken.zip"))


def test_command_line_writes_its_files(tiny_env: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--policy", "random", "--out", str(out), "--episodes", "8", "--num-envs", "4"]
    arguments += ["--backbone", "tiny", "--checkpoint", tiny_env["checkpoint"], "--device", "cpu"]
    summary = main(arguments)
    results = json.loads((out / "results.json").read_text())
    assert results["random"] == summary
    rows = (out / "episodes.csv").read_text().splitlines()
    assert len(rows) == 9
    mean = np.mean([float(row.split(",")[2]) for row in rows[1:]])
    assert mean == pytest.approx(summary["mean_iou"], abs=1e-3)
    assert (out / "episodes.gif").read_bytes()[:3] == b"GIF"
