"""Agents for `SamEverything-v0`: the policy, the baselines, and a training from end to end."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from agents import evaluate as evaluate_command
from agents.baselines.everything import BASELINES
from agents.evaluate import PolicyAgent, evaluate, load_agent
from agents.policies.base import NEVER
from agents.policies.everything import EverythingPolicy, PixelShuffleHead
from agents.ppo.callbacks import PinRolloutsCallback
from agents.ppo.command_line import read_config
from agents.ppo.config import TrainPPOConfig
from agents.ppo.run import train
from agents.ppo.vec_env import make_vector_env
from agents.tasks import task_of
from agents.train_ppo import main
from sam_gym.backbones import Prompts, load_backbone, service
from sam_gym.backbones.features import ImageFeatures
from sam_gym.envs.click import SamSegConfig
from sam_gym.envs.everything import EverythingConfig, EverythingCore

ENV = "SamEverything-v0"
#: A task of four points, of which SAM keeps whatever it finds.
TASK = (
    *("--env", ENV, "--dataset", "scenes", "--grid", "8", "--budget", "4"),
    *("--keep-iou", "0", "--duplicate-iou", "0.97"),
)


@pytest.fixture
def settings(tiny_env: dict[str, Any]) -> EverythingConfig:
    own = {"dataset": "scenes", "dataset_kwargs": {"size": 64, "length": 8}}
    return EverythingConfig(
        **{**tiny_env, **own},
        **{"grid": 8, "budget": 6, "keep_iou": 0.0, "duplicate_iou": 0.97, "obs": "handle"},
    )


@pytest.fixture
def policy(settings: EverythingConfig) -> EverythingPolicy:
    env, core = make_vector_env(ENV, 1, settings)
    names = ("name", "checkpoint", "device")
    values = (settings.backbone, settings.checkpoint, "cpu")
    torch.manual_seed(0)
    return EverythingPolicy(
        core.observation_space,
        env.single_action_space,  # type: ignore[arg-type]
        lambda _: 1e-3,
        features={"backbone": dict(zip(names, values, strict=True)), "budget": 6},
        grid=8,
        stop=True,
    )


# The policy ------------------------------------------------------------------------------------


def test_a_point_is_never_tried_twice(policy: EverythingPolicy, settings: EverythingConfig) -> None:
    env, core = make_vector_env(ENV, 3, replace(settings, budget=60))
    observations, _ = env.reset(seed=0)
    for step in range(12):
        tensors = policy.to_tensors(observations)
        logits, values = policy.logits_and_value(tensors)
        assert logits.shape == (3, 65) and values.shape == (3, 1)
        tried = core.tried(np.arange(3)).reshape(3, -1)
        assert (tried.sum(axis=1) == step).all()
        np.testing.assert_array_equal(logits[:, :64].numpy(force=True) == NEVER, tried)
        assert (logits[:, 64] > NEVER).all()
        actions, log_probs, entropy, _ = policy.get_action_and_value(observations)
        judged = policy.get_action_and_value(observations, actions)
        torch.testing.assert_close(judged[1], log_probs)
        assert torch.isfinite(log_probs).all() and torch.isfinite(entropy).all()
        playing = np.where(actions.numpy() == 64, tried.argmin(axis=1), actions.numpy())
        observations, *_ = env.step(playing)


def test_both_forms_of_observations_are_alike(
    policy: EverythingPolicy, settings: EverythingConfig
) -> None:
    logits = []
    for obs in ("handle", "full"):
        core = EverythingCore(replace(settings, obs=obs), 2)  # type: ignore[arg-type]
        core.reset(range(2), [np.random.default_rng(seed) for seed in range(2)])
        for cell in (9, 30):
            core.step(np.arange(2), np.array([cell, cell + 5]))
        logits.append(policy.logits_and_value(policy.to_tensors(core.observe([0, 1])))[0])
    torch.testing.assert_close(logits[0], logits[1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("cells", "grid"), [((4, 4), 8), ((4, 4), 4), ((8, 8), 4), ((4, 4), 6)])
def test_the_head_reads_logits_where_they_belong(cells: tuple[int, int], grid: int) -> None:
    head = PixelShuffleHead(3, cells, grid, 1)
    features = torch.zeros(1, 3, *cells)
    features[0, :, 1, 2] = 1.0
    with torch.no_grad():
        for layer in head.children():
            layer.weight.fill_(1.0)  # type: ignore[operator,union-attr]
            layer.bias.zero_()  # type: ignore[operator,union-attr]
        logits = head(features)
    assert logits.shape == (1, grid**2 + 1)
    lit = logits[0, :-1].reshape(1, 1, grid, grid)
    side = head.finer * cells[0]
    expected = torch.zeros(1, 1, *cells)
    expected[0, 0, 1, 2] = 3.0
    expected = F.interpolate(expected, (side, side), mode="nearest")
    torch.testing.assert_close(lit, F.adaptive_avg_pool2d(expected, grid))


# Baselines -------------------------------------------------------------------------------------


def test_every_baseline_keeps_to_its_rules(settings: EverythingConfig) -> None:
    assert BASELINES.names() == ("greedy", "grid", "oracle", "random")
    assert task_of(ENV).baselines is BASELINES
    assert task_of("SamSeg-v0").baselines.names() == ("center", "confident", "oracle", "random")
    outcomes = {}
    for name in BASELINES.names():
        runs = [
            evaluate(load_agent(name, env_id=ENV), settings, env_id=ENV, episodes=4, num_envs=2)
            for _ in range(2)
        ]
        np.testing.assert_array_equal(runs[0].ious, runs[1].ious)
        outcomes[name] = runs[0]
    assert (outcomes["grid"].counts["points"] == 64).all()
    assert (outcomes["random"].counts["points"] == 6).all()
    for name in ("oracle", "greedy"):
        assert (outcomes[name].counts["points"] <= 6).all()
    assert outcomes["grid"].ious.mean() >= outcomes["random"].ious.mean()
    assert outcomes["grid"].sources == outcomes["oracle"].sources
    summary = outcomes["grid"].summary()
    assert {"mean_iou", "mean_points", "mean_masks", "mean_found"} <= set(summary)
    assert outcomes["grid"].rows()[0].keys() == {
        *("source", "iou", "reward", "points", "masks", "duplicates", "parts", "found")
    }


def test_the_oracle_points_into_objects_that_are_missing(settings: EverythingConfig) -> None:
    core = EverythingCore(replace(settings, keep_iou=1.0, grid=16, budget=30), 2)
    core.reset(range(2), [np.random.default_rng(seed) for seed in range(2)])
    oracle = BASELINES.get("oracle")(0)
    tried = []
    for _ in range(8):
        actions = oracle.act(core, {})
        tried.append(actions)
        core.step(np.arange(2), actions)
    for slot in range(2):
        cells = [int(actions[slot]) for actions in tried]
        assert len(set(cells)) == 8
        masks = core.ground_truth(slot).masks
        hit = {int(masks[:, y, x].argmax()) for x, y in core.points(slot)}
        assert all(masks[:, y, x].any() for x, y in core.points(slot)) and len(hit) > 1


def test_greedy_takes_what_sam_trusts_most(settings: EverythingConfig) -> None:
    core = EverythingCore(replace(settings, grid=16), 1)
    core.reset([0], [np.random.default_rng(0)])
    greedy = BASELINES.get("greedy")(0)
    trust = core._decode(np.array([0]), np.arange(256)[None])[1][0].numpy()
    assert trust[greedy.act(core, {})[0]] == pytest.approx(trust.max(), abs=1e-4)
    core.config = replace(core.config, keep_iou=1.0)  # nothing is trusted
    greedy = BASELINES.get("greedy")(0)
    greedy.predicted_ious = {core.ground_truth(0).source: np.zeros(256)}  # type: ignore[attr-defined]
    assert greedy.act(core, {})[0] == core.stop_action


@pytest.mark.parametrize("name", ["grid", "greedy"])
def test_no_baseline_decodes_all_episodes_at_once(
    name: str, settings: EverythingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A final evaluation took 15 GB while the prompts of all episodes were decoded together."""
    model = load_backbone(settings.backbone, settings.checkpoint, "cpu").model
    decode, counts = model.decode, []

    def counted(features: ImageFeatures, prompts: Prompts) -> Any:
        counts.append(len(prompts))
        return decode(features, prompts)

    monkeypatch.setattr(model, "decode", counted)
    agent = BASELINES.get(name)(0)
    evaluate(agent, settings, env_id=ENV, episodes=16, num_envs=16)
    # 64 points of each episode; 256 of each image.
    assert sum(counts) >= 16 * 64 and max(counts) <= service._DECODED


# The commands ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_from_end_to_end_and_a_stopped_one_comes_to_the_same(
    settings: EverythingConfig,
    arguments: Callable[..., list[str]],
    assert_same: Callable[[Path, Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    small = tmp_path / "small.yaml"
    small.write_text("dataset_kwargs: {size: 64, length: 8}")
    options = (
        *TASK,
        "--config",
        str(small),
        "--warm-start",
        "32",
        "--total-timesteps",
        "128",
        "--video-every",
        "0",
    )
    results = main(arguments(through, *options, "--pictures"))

    stored = json.loads((through / "results.json").read_text())
    assert {"agent", *BASELINES.names()} <= stored.keys()
    assert stored["config"]["policy"] == "everything"
    for name in ("agent", *BASELINES.names()):
        row, grid = stored[name], stored["grid"]
        assert row == results[name]
        share = row["mean_points"] / grid["mean_points"]
        assert row["share_of_grid_points"] == pytest.approx(share, abs=1e-3)
        assert row["share_of_grid_iou"] == pytest.approx(
            row["mean_iou"] / grid["mean_iou"], abs=1e-3
        )
    assert stored["grid"]["share_of_grid_iou"] == 1.0 and stored["grid"]["mean_points"] == 64
    for picture in ("learning_curve.png", "iou_after_steps.png"):
        assert (through / picture).read_bytes()[:4] == b"\x89PNG"
    for name, curve in stored["iou_after_steps"].items():
        assert curve[-1] == pytest.approx(stored[name]["mean_iou"], abs=1e-3)
    assert len(stored["iou_after_steps"]["grid"]) == 1
    assert (through / "episodes.gif").read_bytes()[:3] == b"GIF"

    on_step = PinRolloutsCallback._on_step

    def on_step_or_stop(self: PinRolloutsCallback) -> bool:
        if self.num_timesteps >= 100:
            raise KeyboardInterrupt
        return on_step(self)

    command = arguments(stopped, *options, "--checkpoint-every", "32")
    with monkeypatch.context() as patch:
        patch.setattr(PinRolloutsCallback, "_on_step", on_step_or_stop)
        with pytest.raises(KeyboardInterrupt):
            main(command)
    main([*command, "--resume"])
    assert_same(stopped, through)

    agent = PolicyAgent.load(through / "policy.zip", "cpu")
    assert isinstance(agent.policy, EverythingPolicy)
    fitting = replace(settings, budget=4, split="test")
    played = evaluate(agent, fitting, env_id=ENV, episodes=2, seed=2)
    assert played.summary()["mean_iou"] == stored["agent"]["mean_iou"]
    with pytest.raises(ValueError, match=r"trained with grid 8 \(the environment has 16\)"):
        evaluate(agent, replace(fitting, grid=16), env_id=ENV, episodes=2)
    with pytest.raises(ValueError, match="does not play SamSeg-v0. Pass --env SamEverything-v0"):
        clicks = {name: getattr(settings, name) for name in ("backbone", "checkpoint", "device")}
        evaluate(agent, SamSegConfig(**clicks, grid=8, stop=True), episodes=2)

    place = ("--backbone", "tiny", "--checkpoint", str(settings.checkpoint), "--device", "cpu")
    out = ("--out", str(tmp_path / "evaluated"), "--episodes", "2", "--no-pictures")
    summary = evaluate_command.main([*place, *out, *TASK, "--policy", str(through / "policy.zip")])
    assert summary["mean_points"] <= 4
    assert (tmp_path / "evaluated" / "episodes.csv").is_file()


def test_the_environment_says_which_policy_plays_it() -> None:
    assert read_config(["--env", ENV]).policy == "everything"
    assert isinstance(read_config(["--env", ENV]).env_config, EverythingConfig)
    assert read_config([]).policy == read_config(["--env", "SamContinual-v0"]).policy == "implicit"
    config = read_config(["--config", "everything", "--budget", "50"])
    assert (config.env, config.policy) == (ENV, "everything")
    assert isinstance(config.env_config, EverythingConfig) and config.env_config.budget == 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--policy", "implicit"), r"'implicit' does not play SamEverything-v0\. .*: everything"),
        (("--env", "SamSeg-v0", "--policy", "everything"), "'everything' does not play SamSeg-v0"),
        (("--recalibrate",), "--recalibrate does not work with SamEverything-v0"),
        (("--views",), "--policy-plots does not work with SamEverything-v0"),
        (("--actions", "set"), "PPO chooses one point in a step"),
        (("--budget", "5000"), "budget must be at most the 1024 points"),
    ],
)
def test_wrong_input_is_an_error_before_work_starts(
    options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        main(["--env", ENV, "--out", str(tmp_path / "out"), *options])
    with pytest.raises(ValueError, match="env_config of class EverythingConfig, got SamSegConfig"):
        train(replace(TrainPPOConfig(), env=ENV, policy="everything"))
    assert not (tmp_path / "out").exists()
