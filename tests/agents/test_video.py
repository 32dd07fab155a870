"""Agents for `SamVideo-v0`: the policy, the baselines, and a training from end to end."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.baselines.video import BASELINES, BY_TASK
from agents.baselines.video.memory import BoxFilter, DistractorAware, Samurai
from agents.evaluate import PolicyAgent, evaluate, load_agent
from agents.policies import VideoPolicy, VideoPromptPolicy
from agents.ppo.command_line import read_config
from agents.ppo.config import TrainPPOConfig
from agents.ppo.encoding import encoded, unpacked
from agents.ppo.run import train
from agents.ppo.vec_env import make_vector_env
from agents.tasks import task_of
from sam_gym.envs.video import MemoryCore, SamVideoConfig

pytestmark = pytest.mark.usefixtures("own_references")

ENV = "SamVideo-v0"


@pytest.fixture
def settings(tiny_video_env: dict[str, Any]) -> SamVideoConfig:
    return SamVideoConfig(**tiny_video_env, obs="handle")


@pytest.fixture
def policy(settings: SamVideoConfig) -> VideoPolicy:
    env, core = make_vector_env(ENV, 1, settings)
    torch.manual_seed(0)
    return VideoPolicy(
        core.observation_space,
        env.single_action_space,  # type: ignore[arg-type]
        lambda _: 1e-3,
        features={"backbone": {"name": settings.backbone, "device": "cpu"}},
        rule_bias=1.5,
    )


# The policy ------------------------------------------------------------------------------------


def test_the_policy_begins_near_the_rule_of_sam2(
    policy: VideoPolicy, settings: SamVideoConfig
) -> None:
    env, core = make_vector_env(ENV, 3, settings)
    observations, _ = env.reset(seed=0)
    for _ in range(4):
        logits, values = policy.logits_and_value(policy.to_tensors(observations))
        assert logits.shape == (3, 7) and values.shape == (3, 1)
        assert (logits.argmax(dim=1) == core.sam2_action).all()  # type: ignore[attr-defined]
        actions, log_probs, entropy, _ = policy.get_action_and_value(observations)
        judged = policy.get_action_and_value(observations, actions)
        torch.testing.assert_close(judged[1], log_probs)
        assert torch.isfinite(entropy).all()
        observations, *_ = env.step(actions.numpy())


def test_slots_are_told_apart_by_what_they_hold(
    policy: VideoPolicy, settings: SamVideoConfig
) -> None:
    env, _ = make_vector_env(ENV, 1, settings)
    observations, _ = env.reset(seed=0)
    for action in (6, 6, 6):
        observations, *_ = env.step(np.array([action]))
    with torch.no_grad():
        policy.features_extractor.position.zero_()  # type: ignore[operator,union-attr]
        for layer in policy.action_net.children():
            layer.weight.mul_(100.0)  # type: ignore[operator,union-attr]
    policy.rule_bias = 0.0
    swapped = {key: own.copy() for key, own in observations.items()}
    for name in ("places", "memories"):
        swapped[name][:, [1, 3]] = observations[name][:, [3, 1]]
    before, after = (
        policy.logits_and_value(policy.to_tensors(own))[0][0] for own in (observations, swapped)
    )
    torch.testing.assert_close(after[[0, 3, 2, 1, 4, 5, 6]], before, atol=1e-5, rtol=1e-5)
    assert abs(float(before[1] - before[3])) > 1e-4


# Baselines -------------------------------------------------------------------------------------


def test_every_baseline_keeps_to_its_rules(settings: SamVideoConfig) -> None:
    assert task_of(ENV).baselines is BASELINES
    outcomes = {
        name: evaluate(load_agent(name, env_id=ENV), settings, env_id=ENV, episodes=6, num_envs=3)
        for name in BY_TASK["memory"].names()
    }
    steps = settings.max_episode_steps
    assert (outcomes["sam2"].counts["kept"] == steps).all()
    np.testing.assert_allclose(outcomes["sam2"].counts["gain"], 0.0, atol=1e-9)
    assert (outcomes["first"].counts["kept"] == 0).all()
    assert (outcomes["spaced"].counts["kept"] == 3).all()  # of frames 1 to 6, the even ones
    for name, own in outcomes.items():
        assert own.sources == outcomes["sam2"].sources
        gains = own.ious - outcomes["sam2"].ious
        np.testing.assert_allclose(own.counts["gain"], gains, atol=1e-3, err_msg=name)


def test_the_best_frames_stay(settings: SamVideoConfig) -> None:
    core = MemoryCore(replace(settings, frames=12), 1)
    core.reset([0], [np.random.default_rng(0)])
    agent, seen = BASELINES.get("best")(0), []
    for predicted in (0.2, 0.9, 0.4, 0.8, 0.7, 0.6, 0.3, 0.95, 0.1):
        core.bank.ious[0, -1] = predicted
        seen.append(predicted)
        core.step(np.arange(1), agent.act(core, {}))
    held = sorted(core.bank.ious[0, core.bank.slots].tolist())
    np.testing.assert_allclose(held, sorted(seen)[-6:])


def test_a_box_filter_follows_constant_motion() -> None:
    """After a few frames of constant velocity, the filter expects the next box."""
    box, velocity = np.array([10.0, 20.0, 30.0, 60.0]), np.array([3.0, -1.0, 3.0, -1.0])
    own = BoxFilter(box)
    for frame in range(1, 25):
        expected = own.predict()
        own.update(box + frame * velocity)
        # A covariance stays symmetric and positive.
        np.testing.assert_allclose(own.covariance, own.covariance.T, atol=1e-9)
        assert np.linalg.eigvalsh(own.covariance).min() > 0
    np.testing.assert_allclose(expected, box + 24 * velocity, atol=0.5)
    still = own.predict()
    np.testing.assert_allclose(still, box + 25 * velocity, atol=0.5)


def test_samurai_drops_frames_that_do_not_fit(settings: SamVideoConfig) -> None:
    core = MemoryCore(replace(settings, frames=12), 1)
    core.reset([0], [np.random.default_rng(0)])
    agent, frames = Samurai(0), []
    for predicted in (0.9, 0.2, 0.9, 0.3, 0.3, 0.9):
        core.bank.ious[0, -1], core.bank.scores[0, -1] = predicted, 5.0
        core.step(np.arange(1), agent.act(core, {}))
        frames.append([f for f in core.bank.frames[0, core.bank.slots].tolist() if f >= 0])
    # The latest frame is always there; of the others only frames 1 and 3 fit.
    assert frames == [[1], [2, 1], [3, 1], [4, 3, 1], [5, 3, 1], [6, 3, 1]]


def test_dam4sam_keeps_every_fifth_frame_and_distractors(settings: SamVideoConfig) -> None:
    core = MemoryCore(replace(settings, frames=20), 1)
    core.reset([0], [np.random.default_rng(0)])
    agent = DistractorAware(0)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[2:6, 2:6] = True
    other = mask.clone()
    other[2:6, 10:14] = True
    for frame in range(1, 17):
        core.bank.masks[0, -1] = mask if frame != 9 else False
        core.bank.ious[0, -1] = 0.95
        core.rival_masks[0] = other if frame in (4, 12) else mask
        core.step(np.arange(1), agent.act(core, {}))
    held = {f for f in core.bank.frames[0, core.bank.slots].tolist() if f >= 0}
    # Two frames with a distractor; the latest one, and the last frames at multiples of five.
    assert held == {4, 12, 16, 15, 10}


# Training --------------------------------------------------------------------------------------


def test_training_from_end_to_end(
    settings: SamVideoConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainPPOConfig(
        env=ENV,
        policy="video",
        out=str(tmp_path / "run"),
        env_config=replace(settings, dataset_kwargs={"length": 3, "size": 64}),
        num_envs=2,
        n_steps=4,
        batch_size=8,
        n_epochs=1,
        total_timesteps=16,
        eval_every=16,
        eval_episodes=2,
        final_episodes=2,
        video_every=0,
    )
    results = train(config)
    assert {"agent", *BY_TASK["memory"].names()} <= set(results)
    assert {"mean_iou", "mean_sam2_iou", "mean_gain", "ci95_gain"} <= set(results["agent"])
    assert "gain in J over the rule of SAM 2: " in capsys.readouterr().out
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert written["agent"] == results["agent"]
    agent = PolicyAgent.load(tmp_path / "run" / "policy.zip", device="cpu")
    held_out = replace(config.env_config, split="test")
    again = evaluate(agent, held_out, env_id=ENV, episodes=2, num_envs=2, seed=2)
    assert again.summary()["mean_iou"] == pytest.approx(results["agent"]["mean_iou"], abs=1e-3)


def test_the_command_knows_the_environment() -> None:
    config = read_config(["--env", ENV, "--frames", "12"])
    assert config.policy == "video" and config.env_config.frames == 12  # type: ignore[attr-defined]
    task = task_of(ENV)
    assert task.training_config(config).dataset_kwargs == {"length": 1024}  # type: ignore[attr-defined]
    assert task.held_out_config(config).split == "test"
    run = read_config(["--config", "video_prompt"])
    assert (run.policy, run.env_config.task, run.env_config.frames) == (
        "video_prompt",
        "prompt",
        16,
    )  # type: ignore[attr-defined]
    task.check_run(run)
    with pytest.raises(ValueError, match="Pass --policy video_prompt .--config video_prompt sets"):
        task.check_run(replace(run, policy="video"))
    task.check_run(read_config(["--config", "video_when"]))
    named = read_config(["--config", "video_memory"])
    assert (named.env, named.policy, named.train_images) == (ENV, "video", 64)


# The other tasks -------------------------------------------------------------------------------


def small(settings: SamVideoConfig, task: Any) -> SamVideoConfig:
    kwargs = {"length": 3, "size": 64}
    return replace(
        settings, task=task, frames=4, grid=8, budget=2, click_cost=0.125, dataset_kwargs=kwargs
    )


@pytest.mark.parametrize("task", ["when", "prompt"])
def test_each_task_is_trained_and_compared(
    settings: SamVideoConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    config = TrainPPOConfig(
        env=ENV,
        policy="video_prompt" if task == "prompt" else "video",
        out=str(tmp_path / "run"),
        env_config=small(settings, task),
        num_envs=2,
        n_steps=4,
        batch_size=8,
        n_epochs=1,
        total_timesteps=8,
        eval_every=8,
        eval_episodes=1,
        final_episodes=2,
        video_every=0,
        pictures=task == "prompt",
    )
    results = train(config)
    assert "clicks, oracle " in capsys.readouterr().out
    for name in ("agent", *BY_TASK[task].names()):
        own = results[name]
        paid = own["mean_gain"] - 0.125 * own["mean_clicks"]  # rounded
        assert own["mean_reward"] == pytest.approx(paid, abs=1e-3), name
        assert 0 <= own["mean_clicks"] <= 2
    clicks = [results[name]["mean_clicks"] for name in ("sam2", "spaced", "oracle_worst")]
    assert clicks == [0, 2, 2] and results["sam2"]["mean_gain"] == 0
    agent = PolicyAgent.load(tmp_path / "run" / "policy.zip", device="cpu")
    held_out = replace(config.env_config, split="test")
    again = evaluate(agent, held_out, env_id=ENV, episodes=2, num_envs=2, seed=2)
    assert again.summary()["mean_iou"] == pytest.approx(results["agent"]["mean_iou"], abs=1e-3)
    # An agent of another task is refused.
    with pytest.raises(ValueError, match=f"The policy was trained with.*task {task}"):
        other = replace(held_out, task="memory", budget=4, click_cost=0.01)
        evaluate(agent, other, env_id=ENV, episodes=1, num_envs=1)
    with pytest.raises(ValueError, match=f"Unknown baseline of the task {task} 'best'"):
        evaluate(load_agent("best", env_id=ENV), held_out, env_id=ENV, episodes=1, num_envs=1)


def test_no_click_is_bought_beyond_the_budget(settings: SamVideoConfig) -> None:
    own = small(settings, "when")
    env, core = make_vector_env(ENV, 2, own)
    policy = VideoPolicy(
        core.observation_space,
        env.single_action_space,  # type: ignore[arg-type]
        lambda _: 1e-3,
        features={"backbone": {"name": own.backbone, "device": "cpu"}},
        task="when",
        rule_bias=2.0,
    )
    observations, _ = env.reset(seed=0)
    logits, _ = policy.logits_and_value(policy.to_tensors(observations))
    assert (logits[:, 0] > logits[:, 1] + 1.5).all()
    for _ in range(own.budget):
        observations, *_ = env.step(np.ones(2, int))
    logits, _ = policy.logits_and_value(policy.to_tensors(observations))
    assert (logits[:, 1] < -1e6).all()


def test_choices_of_the_prompt_policy_are_the_actions(settings: SamVideoConfig) -> None:
    own = small(settings, "prompt")
    env, core = make_vector_env(ENV, 2, own)
    torch.manual_seed(0)
    policy = VideoPromptPolicy(
        core.observation_space,
        env.single_action_space,  # type: ignore[arg-type]
        lambda _: 1e-3,
        features={"backbone": {"name": own.backbone, "device": "cpu"}},
        grid=8,
    )
    observations, _ = env.reset(seed=0)
    choices = torch.arange(policy.num_clicks + 1)
    actions = policy._to_actions(choices, {})
    assert torch.equal(policy._to_choices(actions.float()), choices)
    assert actions[[0, 1, 2, 128, -1]].tolist() == [
        *([0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 2]),
    ]
    # What was clicked is not clicked again; the head knows frames and cells apart.
    clicked = np.array([[3, 17, 1], [2, 40, 0]])
    observations, *_ = env.step(clicked)
    logits, values = policy.logits_and_value(policy.to_tensors(observations))
    assert logits.shape == (2, policy.num_clicks + 1) and values.shape == (2, 1)
    never = policy._to_choices(torch.from_numpy(clicked))
    assert (logits < -1e6).nonzero().tolist() == [[0, int(never[0])], [1, int(never[1])]]
    # A checkpoint holds the state of an episode.
    content = io.BytesIO()
    torch.save(encoded({"envs": env.unwrapped.get_state()}), content)  # type: ignore[attr-defined]
    resumed = env.unwrapped.set_state(unpacked(content.getvalue())["envs"])  # type: ignore[attr-defined]
    for key in set(observations) - {"handle"}:
        np.testing.assert_array_equal(resumed[key], observations[key], err_msg=key)
