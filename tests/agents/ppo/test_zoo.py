"""The hyperparameters in RL-Zoo's form fit the environment and the policy."""

import importlib
from pathlib import Path

import pytest
import yaml
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

import agents
import sam_gym  # noqa: F401
from agents.ppo.command_line import read_config
from sam_gym.backbones import Backbone
from sam_gym.data.synthetic.scenes import Scenes

ZOO = Path(agents.__file__).parent / "zoo" / "ppo.yml"


def test_it_is_no_config_of_train_ppo() -> None:
    with pytest.raises(ValueError, match=r"ppo.yml: a file of RL Zoo.*rl_zoo3.train"):
        read_config(["--config", str(ZOO)])


def test_a_policy_is_made_and_learns(shipped: Backbone) -> None:
    settings = yaml.safe_load(ZOO.read_text())["SamSeg-v0"]
    features = settings["policy_kwargs"]["features"]
    # The policy knows categories by their numbers, so their order counts.
    assert tuple(features["categories"]) == Scenes.categories
    module, _, name = settings["policy"].rpartition(".")
    settings["policy_kwargs"]["features"]["backbone"]["device"] = "cpu"
    env = make_vec_env("SamSeg-v0", n_envs=2, env_kwargs={"device": "cpu"})
    model = PPO(
        getattr(importlib.import_module(module), name),
        env,
        n_steps=4,
        batch_size=8,
        n_epochs=1,
        policy_kwargs=settings["policy_kwargs"],
        device="cpu",
    )
    model.learn(8)
    assert model.num_timesteps == 8
    env.close()
