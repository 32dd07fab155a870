"""The warm start: a policy that does as the expert does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.ppo.config import TrainPPOConfig
from agents.ppo.imitation import imitate
from agents.ppo.run import make_model
from agents.ppo.sb3 import rollout_start
from agents.ppo.vec_env import VectorEnvAdaptor, make_vector_env
from agents.tasks import task_of
from agents.train_ppo import main
from sam_gym.envs.click import ClickCore, SamSegConfig


class AlwaysThere:
    """An expert of one idea: the same negative click, whatever it sees."""

    action = 64 + 27

    def __init__(self) -> None:
        self.asked = 0

    def act(self, core: ClickCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        self.asked += 1
        return np.full(core.num_envs, self.action)


def test_the_policy_learns_what_the_expert_does(tiny_env: dict[str, Any]) -> None:
    click = SamSegConfig(obs="handle", grid=8, **tiny_env)
    config = TrainPPOConfig(
        num_envs=4, n_steps=8, batch_size=16, learning_rate=0.01, env_config=click
    )
    settings = task_of(config.env).training_config(config)
    env, core = make_vector_env("SamSeg-v0", 4, settings)
    model = make_model(config, settings, VectorEnvAdaptor(env), core)  # type: ignore[arg-type]
    model._setup_learn(1)
    expert = AlwaysThere()

    def chance() -> float:
        observations = model.policy.to_tensors(rollout_start(model)[0])  # type: ignore[operator]
        probs = model.policy.get_distribution(observations).distribution.probs  # type: ignore[union-attr]
        return float(probs[:, expert.action].detach().min())

    assert chance() < 0.1
    imitate(model, core, expert, steps=10 * 32 - 1)
    assert expert.asked == 80 and model.num_timesteps == 320
    # Four places share each cell of the tiny embedding, and so their logit.
    assert chance() > 0.9 / 4
    assert (rollout_start(model)[1] == (core.steps == 0)).all()


def test_the_target_map_learns_from_imitation_too(
    tiny_env: dict[str, Any],
    arguments: Callable[..., list[str]],
    outcome: Callable[[Path], dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Otherwise the search of a policy that has only imitated would judge by chance."""
    main(arguments(tmp_path, "--warm-start", "64", "--total-timesteps", "64"))
    assert [step for step, _ in outcome(tmp_path)["logged"]["target_map/loss"]] == [32, 64]


@pytest.mark.slow
def test_a_warm_start_counts_as_part_of_the_run(
    tiny_env: dict[str, Any],
    arguments: Callable[..., list[str]],
    outcome: Callable[[Path], dict[str, Any]],
    tmp_path: Path,
) -> None:
    main(arguments(tmp_path, "--warm-start", "64", "--total-timesteps", "128", "--max-steps", "2"))
    logged = outcome(tmp_path)["logged"]
    assert [step for step, _ in logged["imitation/loss"]] == [32, 64]
    assert [step for step, _ in logged["rollout/iou"]] == [96, 128]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["config"]["warm_start"] == 64
