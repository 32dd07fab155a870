"""Rewards, datasets, backbones and policies by "module:name", in worker processes too."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.vec_env import SubprocVecEnv

from agents.evaluate import PolicyAgent, training_images
from agents.policies import POLICIES, ImplicitPolicy, register_policy
from agents.policies.saved import load_policy
from agents.ppo.config import TrainPPOConfig
from agents.ppo.run import train
from agents.tasks.base import tasks_of_policy
from sam_gym import Transition, load_backbone, make_dataset, register_reward
from sam_gym.backbones.spec import BACKBONES, find_spec
from sam_gym.data import DATASETS, Dataset
from sam_gym.data.options import DatasetOptions
from sam_gym.envs.click import SamSegConfig
from sam_gym.envs.rewards import REWARDS
from sam_gym.utils.registry import load_entry_point

#: Code of a user, in a module of their own.
OUTSIDE = '''
from functools import partial
from pathlib import Path

import numpy as np
import torch
from agents.policies import ImplicitPolicy
from sam_gym import BackboneSpec, DatasetSpec, Sample


def seven(steps):
    return np.full(len(steps.iou_after), 7.0)


class Squares:
    """Squares of one size."""

    name, categories = "squares", ("square",)

    def __init__(self, split="train", *, side: int = 24, length: int | None = None):
        self.side, self.length = side, length or 100

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        mask = np.zeros((1, 64, 64), bool)
        mask[0, 10 : 10 + self.side, 20 : 20 + self.side] = True
        image = np.where(mask[0, :, :, None], 200, 40).astype(np.uint8).repeat(3, axis=2)
        return Sample(image, mask, np.zeros(1, np.int64), f"squares/{index}")

    def draw(self, rng):
        return int(rng.integers(len(self))), None


class FromFiles(Squares):
    def __init__(self, split="train", *, root: str):
        super().__init__(split)


SPEC = DatasetSpec(
    name="x", entry_point="outside:Squares", description="Squares.", held_out_split="val"
)


def build():
    from sam_gym.backbones.micro.model import build_micro

    return build_micro()


from sam_gym.backbones import BACKBONES

SAM = BackboneSpec(
    name="y", build=build, description="A copy of micro", weights=BACKBONES.get("micro").weights
)


class Clicker(ImplicitPolicy):
    """The implicit policy, under another name."""


number = 3
'''


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module `outside` that no process has imported yet."""
    (tmp_path / "outside.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    for registry in (REWARDS, DATASETS, BACKBONES, POLICIES):
        monkeypatch.setattr(registry, "_items", dict(registry._items))
        monkeypatch.setattr(registry, "_adopted", {})
    yield
    sys.modules.pop("outside", None)


def test_names_of_each_kind_are_imported(outside: None) -> None:
    dataset = make_dataset("outside:Squares", "val", side=8)
    assert isinstance(dataset, Dataset) and dataset[0].masks.sum() == 64
    spec = DATASETS.get("outside:Squares")
    assert spec.description == "Squares of one size." and spec.procedural and not spec.reads_files
    assert DATASETS.get("outside:FromFiles").reads_files
    assert DATASETS.get("outside:SPEC").held_out_split == "val"
    assert load_backbone("outside:SAM").name == "outside:SAM"
    assert REWARDS.name_of(sys.modules["outside"].seven) is None
    REWARDS.get("outside:seven")
    assert REWARDS.name_of(sys.modules["outside"].seven) == "outside:seven"
    # Listings and help texts have registered names only.
    assert "outside:Squares" in DATASETS and "outside:Squares" not in DATASETS.names()


@pytest.mark.parametrize(
    ("registry", "name", "message"),
    [
        (REWARDS, "outsidr:seven", "No module 'outsidr' is found. .*PYTHONPATH"),
        (REWARDS, "outside:sevn", "Unknown attribute of 'outside' 'sevn'. Did you mean 'seven'"),
        (REWARDS, "outside:number", "'outside:number' is no function of a Transition, got 3"),
        (REWARDS, "sevn", "Unknown reward 'sevn'"),
        (
            DATASETS,
            "outside:build",
            "is no dataset: expected a class with __len__, __getitem__, dr",
        ),
        (DATASETS, "subprocess:Popen", "is no dataset: expected a class with"),
        (BACKBONES, "outside:build", "is no BackboneSpec"),
        (POLICIES, "outside:Squares", "is no subclass of SamPolicy"),
    ],
)
def test_wrong_names_are_told(outside: None, registry: Any, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.get(name)


def test_an_import_that_fails_in_the_module_is_not_hidden(outside: None, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_package")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        load_entry_point("broken:thing")


def test_names_of_the_hub_are_no_entry_points() -> None:
    assert find_spec("hf:owner/name") is None and find_spec("hf:folder") is None


def play() -> gym.Env:
    own = {"dataset": "outside:Squares", "reward": "outside:seven", "backbone": "outside:SAM"}
    return gym.make("SamSeg-v0", **own)


def test_async_workers_import_the_module(outside: None) -> None:
    envs = gym.vector.AsyncVectorEnv([play], context="forkserver")
    envs.reset(seed=0)
    _, rewards, _, _, infos = envs.step(envs.action_space.sample())
    assert rewards == [7.0] and infos["target_name"] == ["square"]
    envs.close()


def test_workers_of_stable_baselines3_import_the_module(outside: None) -> None:
    envs = SubprocVecEnv([play], start_method="forkserver")
    envs.seed(0)
    envs.reset()
    assert envs.step(np.array([5]))[1] == [7.0]
    envs.close()


def test_a_registered_reward_and_policy_have_names(outside: None) -> None:
    def half(steps: Transition) -> np.ndarray:
        return np.full(len(steps.iou_after), 0.5)

    assert register_reward("half", half) is half
    env = gym.make("SamSeg-v0", reward="half")
    env.reset(seed=0)
    assert env.step(3)[1] == 0.5
    with pytest.raises(ValueError, match="reward 'half' is registered already"):
        register_reward("half", half)

    class Mine(ImplicitPolicy):
        pass

    register_policy("mine", Mine)
    assert POLICIES.get("mine") is Mine


@pytest.mark.slow
def test_a_policy_from_outside_is_trained_and_loaded(outside: None, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = TrainPPOConfig(
        env_config=SamSegConfig(
            obs="handle", dataset="outside:Squares", backbone="outside:SAM", reward="outside:seven"
        ),
        policy="outside:Clicker",
        total_timesteps=32,
        num_envs=2,
        batch_size=8,
        train_images=2,
        eval_episodes=1,
        final_episodes=1,
        pictures=False,
        out=str(out),
    )
    results = train(config)
    assert results["agent"]["mean_reward"] == 35.0
    path = out / "policy.zip"
    policy = PolicyAgent.load(path).policy
    assert type(policy).__name__ == "Clicker"
    assert "SamSeg-v0" in [task.env_id for task in tasks_of_policy(policy)]
    assert training_images(str(path)) is not None

    # In another process, the file does not import the module by itself.
    for registry in (POLICIES, BACKBONES, DATASETS):
        registry._adopted.clear()
    del sys.modules["outside"]
    with pytest.raises(ValueError, match=r"policy 'outside:Clicker' is code outside of the file"):
        load_policy(path, "cpu")
    assert training_images(str(path)) is None
    assert "outside" not in sys.modules


def test_commands_import_plugins(
    outside: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sam_gym.utils import cli

    (tmp_path / "outside_plugin.py").write_text(
        "import numpy as np\nfrom sam_gym import register_reward\n"
        "register_reward('plugged', lambda steps: np.zeros(len(steps.iou_after)))\n"
    )
    monkeypatch.setitem(os.environ, "SAM_GYM_PLUGINS", "outside, outside_plugin,")
    cli.run(lambda: REWARDS.get("plugged"))
    monkeypatch.setitem(os.environ, "SAM_GYM_PLUGINS", "outside_plugim")
    with pytest.raises(SystemExit, match="SAM_GYM_PLUGINS: No module 'outside_plugim' is found"):
        cli.run(lambda: None)
    monkeypatch.delitem(sys.modules, "outside_plugin")


def test_options_take_entry_points(outside: None) -> None:
    options = DatasetOptions(dataset="outside:Squares", dataset_kwargs={"side": 5})
    assert options.make_dataset("train", length=3)[0].masks.sum() == 25
