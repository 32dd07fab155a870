"""Semantic recalibration: places from the policy, labels from a module that learns targets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.evaluate import PolicyAgent
from agents.policies.implicit import ImplicitPolicy
from agents.policies.target_map import TrainTargetMap, target_loss
from agents.ppo.config import TrainPPOConfig
from agents.ppo.run import make_model
from agents.ppo.vec_env import VectorEnvAdaptor, make_vector_env
from agents.tasks import task_of
from agents.train_ppo import main
from sam_gym.envs.click import ClickCore, SamSegConfig


@pytest.fixture
def made(tiny_env: dict[str, Any]) -> Callable[..., tuple[Any, ImplicitPolicy, ClickCore, Any]]:
    def made(grid: int = 8, **options: Any) -> tuple[Any, ImplicitPolicy, ClickCore, Any]:
        click = SamSegConfig(obs="handle", grid=grid, stop=True, **tiny_env)
        config = TrainPPOConfig(
            num_envs=4, n_steps=8, batch_size=16, train_images=8, recalibrate=True,
            env_config=click, **options,
        )  # fmt: skip
        settings = task_of(config.env).training_config(config)
        env, core = make_vector_env("SamSeg-v0", 4, settings)
        model = make_model(config, settings, VectorEnvAdaptor(env), core)  # type: ignore[arg-type]
        return model, model.policy, core, env  # type: ignore[return-value]

    return made


def test_loss_against_its_formula() -> None:
    logits = torch.tensor([[[0.0, 2.0]], [[-1.0, 1.0]]])
    target = torch.tensor([[[1.0, 0.0]], [[0.5, 1.0]]])
    scored = torch.tensor([[[1.0, 0.5]], [[1.0, 0.0]]])
    expected = []
    for x, t, w in zip(logits, target, scored, strict=True):
        p = 1 / (1 + np.exp(-x.numpy()[0]))
        t, w = t.numpy()[0], w.numpy()[0]
        entropy = -(w * (t * np.log(p) + (1 - t) * np.log(1 - p))).sum() / max(w.sum(), 1)
        dice = 1 - (2 * (p * t * w).sum() + 1) / ((p * w).sum() + (t * w).sum() + 1)
        expected.append(entropy + dice)
    got = target_loss(logits, target, scored)
    assert float(got) == pytest.approx(np.mean(expected), abs=1e-6)
    truth = (target > 0.5).float()
    everywhere = torch.ones_like(scored)
    assert float(target_loss(40 * truth - 20, truth, everywhere)) < 1e-4
    assert float(target_loss(20 - 40 * truth, truth, everywhere)) > 10


def test_labels_come_from_the_recalibration(made: Callable[..., Any]) -> None:
    _, policy, core, env = made()
    observations, _ = env.reset(seed=0)
    tensors = policy.to_tensors(observations)
    torch.nn.init.normal_(policy.target_map.head.weight, std=3.0)
    assert policy.action_dist.action_dim == 64 + 1
    with torch.no_grad():
        negative = policy._is_negative(tensors)
        target = policy.target_map(tensors)
        logits, _ = policy.logits_and_value(tensors)
        choices = policy.get_distribution(tensors).distribution.probs
    height, width = core.backbone.embedding_shape[1:]
    assert negative.shape == (4, 64) and target.shape == (4, 4 * height, 4 * width)
    assert not negative.all() and negative.any()
    chances = logits.softmax(dim=1)
    assert torch.allclose(chances[:, :64] + chances[:, 64:128], choices[:, :64], atol=1e-6)
    assert torch.equal(chances[:, 64:128] > 0, negative)
    assert torch.allclose(chances[:, 128], choices[:, 64], atol=1e-6)

    seen = set()
    for _ in range(40):
        action, log_prob, _, _ = policy.get_action_and_value(observations)
        clicks = action < 128
        labels = negative.gather(1, (action % 64)[:, None])[:, 0]
        assert torch.equal((action >= 64)[clicks], labels[clicks])
        # Whatever the label, the probability is that of the place.
        turned = torch.where(clicks, (action + 64) % 128, action)
        for judged in (action, turned):
            assert torch.allclose(policy.evaluate_actions(tensors, judged)[1], log_prob, atol=1e-6)
        seen |= set((action >= 64).tolist())
    assert seen == {False, True}
    played = PolicyAgent(policy).act(core, observations)
    np.testing.assert_array_equal(played, logits.argmax(dim=1).numpy())


def test_rewards_teach_the_policy_and_targets_the_recalibration(made: Callable[..., Any]) -> None:
    model, policy, core, _ = made(policy="implicit")
    own = {id(parameter) for parameter in policy.target_map.parameters()}
    assert not own & {id(p) for g in policy.optimizer.param_groups for p in g["params"]}
    before = {name: value.clone() for name, value in policy.target_map.state_dict().items()}
    model.learn(32)
    for name, value in policy.target_map.state_dict().items():
        assert torch.equal(value, before[name]), name

    def loss() -> float:
        observations = policy.to_tensors(core.observe(np.arange(4)))
        with torch.no_grad():
            logits = policy.target_map(observations)
        return float(target_loss(logits, *core.soft_targets(logits.shape[-2:])))

    untaught = loss()
    model.learn(96, callback=TrainTargetMap(policy, core, updates=4, rate=33.0))
    assert loss() < 0.8 * untaught
    moved = [
        name
        for name, value in policy.target_map.state_dict().items()
        if not torch.equal(value, before[name])
    ]
    assert {"head.weight", "features.reduce.weight"} <= set(moved)


def test_soft_targets_are_shares_of_cells(made: Callable[..., Any]) -> None:
    _, _, core, env = made()
    env.reset(seed=1)
    height, width = core.backbone.mask_shape
    target, scored = core.soft_targets((height, width))
    coarse, _ = core.soft_targets((height // 4, width // 4))
    assert torch.equal(scored, torch.ones_like(scored)) and set(target.unique().tolist()) == {0, 1}
    by_hand = target.reshape(4, height // 4, 4, width // 4, 4).mean(dim=(2, 4))
    assert torch.allclose(coarse, by_hand)


@pytest.mark.parametrize("policy", ["implicit", "explicit"])
def test_a_run_with_recalibration_is_saved_and_loaded(
    policy: str,
    tiny_env: dict[str, Any],
    arguments: Callable[..., list[str]],
    outcome: Callable[[Path], dict[str, Any]],
    clip_folder: Path,
    tmp_path: Path,
) -> None:
    more = ["--policy", policy, "--recalibrate", "--reward", "foreground"]
    more += ["--total-timesteps", "96", "--max-steps", "2"]
    if policy == "explicit":
        more += ["--clip-pretrained", str(clip_folder)]
    main(arguments(tmp_path, *more))
    assert len(outcome(tmp_path)["logged"]["target_map/loss"]) == 3
    agent = PolicyAgent.load(tmp_path / "policy.zip", "cpu")
    assert agent.policy.target_map is not None
    again = PolicyAgent.load(tmp_path / "policy.zip", "cpu")
    for left, right in zip(agent.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(left, right)


def test_targets_are_shares_of_what_is_scored(made: Callable[..., Any]) -> None:
    _, _, core, env = made()
    env.reset(seed=1)
    core._low_target[:] = True
    core._low_valid[:] = True
    core._low_valid[:, -2:] = False
    height, width = core.backbone.mask_shape
    target, scored = core.soft_targets((height // 4, width // 4))
    # A cell that is half outside of the image, and all target inside, is all target.
    assert torch.equal(scored[:, -1], torch.full_like(scored[:, -1], 0.5))
    torch.testing.assert_close(target, torch.ones_like(target))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--search", "0", "--recalibration-updates", "2"), "with --recalibrate or --search only"),
        (("--recalibrate", "--recalibration-updates", "0"), "must be at least 1, got 0"),
        (("--warm-start", "1000"), "warm_start must be at most total_timesteps"),
    ],
)
def test_wrong_options_are_refused_before_work(
    more: tuple[str, ...], message: str, tiny_env: dict[str, Any],
    arguments: Callable[..., list[str]], tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(ValueError, match=message):
        main(arguments(tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()
