"""RL Zoo trains, tunes and plays the agents of `agents/zoo/ppo.yml`."""

import importlib
import sys
from pathlib import Path

import pytest
import yaml
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

import agents
import sam_gym  # noqa: F401
from agents.evaluate import PolicyAgent
from agents.ppo.callbacks import PinRolloutsCallback
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
    env = make_vec_env(
        "SamSeg-v0", n_envs=2, env_kwargs={"device": "cpu", **settings["env_kwargs"]}
    )
    model = PPO(
        getattr(importlib.import_module(module), name),
        env,
        n_steps=4,
        batch_size=8,
        n_epochs=1,
        policy_kwargs=settings["policy_kwargs"],
        device="cpu",
    )
    callback = PinRolloutsCallback()
    model.learn(8, callback=callback)
    assert model.num_timesteps == 8
    assert callback.store is env.envs[0].unwrapped.core.store
    env.close()


def test_without_rl_zoo_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "agents.zoo", raising=False)
    monkeypatch.setitem(sys.modules, "rl_zoo3.hyperparams_opt", None)
    with pytest.raises(ImportError, match=r"pip install 'sam-gym\[zoo\]'"):
        importlib.import_module("agents.zoo")


def test_rl_zoo_tunes_trains_and_plays(
    shipped: Backbone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("rl_zoo3")
    pytest.importorskip("pandas")
    from rl_zoo3.enjoy import enjoy
    from rl_zoo3.train import train

    monkeypatch.chdir(tmp_path)
    common = "rl_zoo --algo ppo --env SamSeg-v0 --gym-packages agents.zoo -f logs".split()
    study = ["--storage", "logs/study.log", "--study-name", "sam"]
    training = [*common, *"--seed 0 -n 32 -params n_envs:1".split(), *study]
    tuning = "-optimize --n-trials 2 --n-startup-trials 1 --eval-episodes 1 --pruner none".split()
    evaluation = ["--eval-env-kwargs", "split:'val'", "obs:'handle'", "--no-optim-plots"]
    monkeypatch.setattr(sys, "argv", [*training, *tuning, *evaluation, "--conf-file", "agents.zoo"])
    train()
    assert "Best trial:" in capsys.readouterr().out
    assert len(list(Path("logs/ppo").glob("report_*.csv"))) == 1

    monkeypatch.setattr(
        sys, "argv", [*training, *"--trial-id 1 --eval-freq -1 --conf-file".split(), str(ZOO)]
    )
    train()
    run = max(Path("logs/ppo").glob("SamSeg-v0_*"))
    config = (run / "SamSeg-v0" / "config.yml").read_text()
    assert "- lin_0.00" in config and "grid: 16" in config
    policy = run / "SamSeg-v0.zip"
    assert PolicyAgent.load(policy).policy.grid == 16

    monkeypatch.setattr(sys, "argv", [*common, "--no-render", "-n", "5"])
    enjoy()
    assert "Episode Length 5" in capsys.readouterr().out
