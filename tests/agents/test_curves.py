"""What the curves of agents show."""

import json
from pathlib import Path
from typing import Any

import pytest

from agents import curves
from agents.evaluate import evaluate
from agents.ppo.config import VALIDATION_SEED, TrainPPOConfig
from agents.ppo.plan import Plan
from agents.ppo.results import baselines_on_validation
from sam_gym.envs.click import SamSegConfig


def test_curves_are_of_one_length(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[Any] = []
    save = curves.save_figure
    monkeypatch.setattr(curves, "save_figure", lambda p, f: drawn.append(f) or save(p, f))
    path = tmp_path / "curves.png"
    own = {"agent": [0.1, 0.4, 0.5], "oracle": [0.6, 0.8], "grid": [0.9]}
    assert curves.plot_iou_after_steps(path, own) == path
    assert path.read_bytes()[:4] == b"\x89PNG"
    (axes,) = drawn[0].axes
    lines = {tuple(map(float, line.get_ydata())) for line in axes.lines}
    assert lines == {(0.1, 0.4, 0.5), (0.6, 0.8, 0.8), (0.9, 0.9)}
    assert list(axes.lines[0].get_xdata()) == [1, 2, 3]
    names = {text.get_text(): text.xy[1] for text in axes.texts}
    assert names == {"agent": 0.5, "oracle": 0.8, "grid": 0.9}


def test_agent_and_baselines_of_a_learning_curve_are_of_one_split(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[Any] = []
    save = curves.save_figure
    monkeypatch.setattr(curves, "save_figure", lambda p, f: drawn.append(f) or save(p, f))
    curves.plot_learning_curve(
        tmp_path / "curve.png", [(1, 0.2)], [(1, 0.3), (2, 0.4)], {"random": 0.1}, "val"
    )
    (axes,) = drawn[0].axes
    named = [text.get_text() for text in axes.get_legend().get_texts()]
    assert named == ["training (exploring)", "agent, val", "baselines, val"]


def test_baselines_of_a_learning_curve_play_the_episodes_of_the_agent(
    tiny_env: dict[str, Any], squares: Path
) -> None:
    data = {"dataset": "folder", "data": str(squares), "dataset_kwargs": {}}
    own = SamSegConfig(**(tiny_env | data))
    lists = {"train": ["0", "1"], "val": ["2", "3"], "test": ["4", "5"]}
    (squares / "splits.json").write_text(json.dumps(lists))
    plan = Plan.of(TrainPPOConfig(env_config=own, eval_episodes=2))
    found = baselines_on_validation(plan)
    # One that decodes many times per step is left out.
    assert set(found) == set(plan.task.baselines.names()) - {"confident"}
    again = evaluate(
        plan.task.baselines.get("oracle")(0), plan.validation, episodes=2, seed=VALIDATION_SEED
    )
    assert found["oracle"] == float(again.ious.mean())
    assert all("/2" in source or "/3" in source for source in again.sources)
