"""An environment, its policy and its baselines, added from outside of the package."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from agents import evaluate, train_ppo
from agents.baselines import Agent
from agents.evaluate import PolicyAgent
from agents.policies import POLICIES, SamPolicy
from agents.policies.base import SplitFeatures
from agents.policies.implicit import ClickFeatures, ImplicitPolicy, SpatialHead
from agents.sharing.push import HubPushConfig, push
from agents.tasks import TASKS, Task, register, task_of
from agents.tasks.base import backbone_arguments
from sam_gym.envs.click import ClickCore, SamSegConfig, SamSegEnv, SamSegVectorEnv
from sam_gym.utils.registry import Registry

ENV = "Point-v0"


@dataclass(frozen=True)
class PointConfig(SamSegConfig):
    """Positive clicks only."""

    max_steps: int = 2
    """Clicks per episode."""


class PointCore(ClickCore):
    """The click task without negative clicks."""

    def __init__(self, config: PointConfig, num_envs: int) -> None:
        super().__init__(config, num_envs)
        self.action_space = spaces.Discrete(config.grid**2)


class PointEnv(SamSegEnv):
    """`Point-v0`."""

    env_id, config_class, core_class = ENV, PointConfig, PointCore


class PointVectorEnv(SamSegVectorEnv):
    """`Point-v0`, batched."""

    env_id, config_class, core_class = ENV, PointConfig, PointCore


BASELINES: Registry[Callable[[int], Agent]] = Registry("baseline of Point-v0")


@BASELINES.register("random")
class RandomPoints:
    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def act(self, core: PointCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        return self.rng.integers(core.config.grid**2, size=core.num_envs)


@BASELINES.register("oracle")
class Oracle:
    def __init__(self, seed: int) -> None:
        del seed

    def act(self, core: PointCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        actions = []
        for i in range(core.num_envs):
            mask = core.ground_truth(i).mask
            cells = [core.click_of(cell)[:2] for cell in range(core.config.grid**2)]
            inside = [mask[tuple(reversed(core.to_image(i, x, y)))] for x, y in cells]
            actions.append(int(np.argmax(inside)))
        return np.array(actions)


class PointPolicy(SamPolicy):
    """A policy of its own, with a logit for every cell."""

    extractor_class = ClickFeatures
    arguments = (*SamPolicy.arguments, "grid")

    def __init__(self, *args: Any, grid: int, **kwargs: Any) -> None:
        self.grid = grid
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Any) -> None:
        self.mlp_extractor = SplitFeatures(self.features_dim)  # type: ignore[assignment]
        head = SpatialHead(self.features_dim, self.grid, 1, 0)
        self._build_heads(head, self.grid**2, lr_schedule)

    def action_config(self, num_actions: int) -> dict[str, Any]:
        return {"grid": self.grid}

    def set_categories(self, categories: Any) -> None:
        self.features_extractor.set_categories(categories)  # type: ignore[operator]


class PointTask(Task):
    env_id = ENV
    config_class = PointConfig
    policies = ("points",)
    baselines = BASELINES
    supports = frozenset({"hub"})

    def policy_arguments(self, run: Any, env_config: Any, core: Any) -> dict[str, Any]:
        names = list(core.dataset.categories)
        return {
            "features": {
                "backbone": backbone_arguments(env_config),
                "vocabulary": names,
                "categories": names,
                "max_steps": env_config.max_steps,
            },
            "grid": env_config.grid,
        }


@pytest.fixture(scope="module", autouse=True)
def added() -> None:
    gym.register(ENV, entry_point=PointEnv, vector_entry_point=PointVectorEnv)
    POLICIES.add("points", PointPolicy)
    register(PointTask)


def test_it_trains_evaluates_and_is_pushed(
    tiny_env: dict[str, Any], arguments: Callable[..., list[str]], hub: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--env", ENV, "--total-timesteps", "64", "--grid", "8", "--video-every", "0")
    results = train_ppo.main(arguments(out, *options))
    assert {"agent", "random", "oracle", "gap_closed"} <= results.keys()
    assert results["config"]["policy"] == "points"
    assert results["config"]["env_config"]["max_steps"] == 2

    agent = PolicyAgent.load(out / "policy.zip", "cpu")
    assert type(agent.policy) is PointPolicy
    own = results["config"]["env_config"]
    place = [x for name in ("backbone", "checkpoint") for x in (f"--{name}", own[name])]
    summary = evaluate.main(
        [
            *("--env", ENV, "--policy", str(out / "policy.zip"), "--out", str(tmp_path / "again")),
            *(*place, "--device", "cpu", "--grid", "8", "--seed", "2", "--episodes", "2"),
        ]
    )
    assert summary["mean_iou"] == results["agent"]["mean_iou"]

    push(HubPushConfig(str(out), "me/points"))
    files = hub.repos["me/points"].commits[-1]
    assert files["policy.zip"] == (out / "policy.zip").read_bytes()
    card = files["README.md"].decode()
    command = next(line for line in card.splitlines() if line.startswith("python -m agents.eval"))
    assert "at the size of the image" not in card and "Mean IoU, with its 95% interval" in card
    given = command.replace("--checkpoint PATH", f"--checkpoint {own['checkpoint']}").split()[3:]
    given += ["--out", str(tmp_path / "card"), "--device", "cpu"]
    assert 0 <= evaluate.main([*given, "--episodes", "2", "--no-pictures"])["mean_iou"] <= 1
    assert command == (
        "python -m agents.evaluate --policy hf://me/points --backbone tiny --grid 8 "
        f"--dataset scenes --checkpoint PATH --split test --env {ENV}"
    )
    assert json.loads(files["results.json"])["agent"] == results["agent"]


class OwnPolicy(ImplicitPolicy):
    """A policy from outside for an environment of the package."""


def test_a_policy_from_outside_trains_and_is_loaded(
    tiny_env: dict[str, Any], arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    POLICIES.add("own", OwnPolicy)
    options = ("--policy", "own", "--total-timesteps", "64", "--max-steps", "2")
    train_ppo.main(arguments(tmp_path, *options))
    assert type(PolicyAgent.load(tmp_path / "policy.zip", "cpu").policy) is OwnPolicy


def test_what_it_does_not_support_is_refused(tmp_path: Path) -> None:
    out = ["--env", ENV, "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="--recalibrate does not work with Point-v0"):
        train_ppo.main([*out, "--recalibrate"])
    with pytest.raises(ValueError, match="--categories does not work with Point-v0.*SamSeg-v0"):
        train_ppo.main([*out, "--categories", "star"])
    with pytest.raises(ValueError, match="'implicit' does not play Point-v0"):
        train_ppo.main([*out, "--policy", "implicit"])
    with pytest.raises(ValueError, match="Did you mean 'export'"):
        task_of(ENV).require("exports")


def test_an_environment_without_a_task_is_an_error() -> None:
    with pytest.raises(ValueError, match="Did you mean 'SamSeg-v0'.*SamContinual-v0"):
        task_of("SamSegg-v0")
    with pytest.raises(ValueError, match="registered already"):
        register(type(TASKS.get("SamSeg-v0")))
