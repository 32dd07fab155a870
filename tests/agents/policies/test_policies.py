"""The implicit policy: what it sees, what it says, what it leaves alone."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

import sam_gym  # noqa: F401
from agents.policies.base import Mixer, resolve_precision
from agents.policies.implicit import ClickFeatures, ImplicitPolicy
from agents.ppo.callbacks import PinRolloutsCallback
from agents.ppo.vec_env import VectorEnvAdaptor


def make_env(settings: dict[str, Any], obs: str = "handle", count: int = 4, **more: Any) -> Any:
    return gym.make_vec(
        "SamSeg-v0",
        count,
        vectorization_mode="vector_entry_point",
        autoreset_mode="SameStep",
        obs=obs,
        **(settings | more),
    )


def make_model(
    settings: dict[str, Any],
    env: Any,
    options: dict[str, Any] | None = None,
    **features: Any,
) -> PPO:
    core = env.unwrapped.core
    backbone = {
        "name": settings["backbone"],
        "checkpoint": settings["checkpoint"],
        "device": "cpu",
        "dtype": "auto",
    }
    details = {
        "backbone": backbone,
        "vocabulary": list(core.dataset.categories),
        "categories": list(core.dataset.categories),
        "max_steps": 5,
        "width": 8,
    }
    return PPO(
        ImplicitPolicy,
        VectorEnvAdaptor(env),
        n_steps=4,
        batch_size=8,
        n_epochs=1,
        policy_kwargs={"features": details | features, "grid": core.config.grid} | (options or {}),
        seed=0,
        device="cpu",
    )


def test_mixing_is_a_convolution_of_channels_side_by_side() -> None:
    torch.manual_seed(0)
    mixer = Mixer(5, 2, 4).to(memory_format=torch.channels_last)
    image, mask, planes = torch.randn(3, 5, 6, 6), torch.rand(3, 1, 6, 6), torch.rand(3, 2, 6, 6)
    first, second, third = (layer for layer in mixer.children() if hasattr(layer, "weight"))

    def plain() -> torch.Tensor:
        x = first(torch.cat([image, image * mask, planes], dim=1)).relu()
        return third(second(x.relu()).relu()).relu()

    def gradients(output: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(output.square().sum(), list(mixer.parameters())))

    ours = mixer(image, mask, planes)
    torch.testing.assert_close(ours, plain())
    for got, expected in zip(gradients(ours), gradients(plain()), strict=True):
        torch.testing.assert_close(got, expected)
    again = mixer(image.contiguous(memory_format=torch.channels_last), mask, planes)
    torch.testing.assert_close(again, ours)


def test_both_observation_forms_give_the_same_features(tiny_env: dict[str, Any]) -> None:
    full, handle = make_env(tiny_env, "full"), make_env(tiny_env, "handle")
    policy = make_model(tiny_env, handle).policy
    a, _ = full.reset(seed=5)
    b, _ = handle.reset(seed=5)
    for _ in range(2):
        with torch.no_grad():
            features = [policy.extract_features(policy.to_tensors(obs)) for obs in (a, b)]
        # The handle form rounds the mask to 1/255.
        assert torch.allclose(*features, atol=0.02)
        assert not torch.allclose(features[0][0], features[0][1])
        action = np.array([3, 60, 200, 400])
        a, b = full.step(action)[0], handle.step(action)[0]


@pytest.mark.parametrize("obs", ["full", "handle"])
def test_log_probabilities_agree_between_rollout_and_update(
    tiny_env: dict[str, Any], obs: str
) -> None:
    env = make_env(tiny_env, obs, stop=True, undo=True, target="instance")
    model = make_model(tiny_env, env)
    observations, _ = env.reset(seed=0)
    action, log_prob, entropy, value = model.policy.get_action_and_value(observations)
    judged = model.policy.get_action_and_value(observations, action)
    assert torch.equal(judged[0], action)
    for left, right in zip((log_prob, entropy, value), judged[1:], strict=True):
        assert torch.allclose(left, right)
    assert torch.allclose(model.policy.get_value(observations), value)
    tensors = model.policy.to_tensors(observations)
    values, log_probs, _ = model.policy.evaluate_actions(tensors, action)
    assert torch.allclose(values, value) and torch.allclose(log_probs, log_prob)


def test_the_head_reads_logits_off_the_map(tiny_env: dict[str, Any]) -> None:
    """A feature that lights up in one cell raises the logit of that cell alone."""
    env = make_env(tiny_env, grid=4)
    head = make_model(tiny_env, env).policy.action_net
    features = torch.zeros(1, 8, 4, 4)
    base = head(features)
    features[0, 0, 1, 2] = 1.0
    changed = (head(features) - base).abs().reshape(2, 4, 4).sum(dim=0) > 0
    assert changed.nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("others", [["stop"], ["stop", "undo"]])
def test_masks_to_correct_are_soon_left_alone(tiny_env: dict[str, Any], others: list[str]) -> None:
    """A new policy stops, undoes or clicks equally often, wherever, if a mask is there already."""
    env = make_env(tiny_env, grid=4, **dict.fromkeys(others, True))
    observation = {key: torch.from_numpy(own) for key, own in env.reset(seed=0)[0].items()}
    names = ("stop", "undo")[: len(others)]
    policy = make_model(tiny_env, env, {"others": names, "initial_mask": "semantic"}).policy
    chances = policy.get_distribution(observation).distribution.probs.detach()
    expected = torch.full((4, len(others)), 1 / (1 + len(others)))
    torch.testing.assert_close(chances[:, 32:], expected, rtol=0.1, atol=0)
    plain = make_model(tiny_env, env, {"others": names}).policy
    chances = plain.get_distribution(observation).distribution.probs
    assert (chances - 1 / chances.shape[1]).abs().max() < 0.2 / chances.shape[1]


def test_training_moves_the_policy_but_not_the_backbone(tiny_env: dict[str, Any]) -> None:
    env = make_env(tiny_env)
    model = make_model(tiny_env, env)
    core = env.unwrapped.core
    sam_before = {k: v.clone() for k, v in core.backbone.sam.state_dict().items()}
    policy_before = {k: v.clone() for k, v in model.policy.state_dict().items()}
    model.learn(32, callback=PinRolloutsCallback(core.store))
    for key, value in core.backbone.sam.state_dict().items():
        assert torch.equal(value, sam_before[key]), key
    assert not core.backbone.sam.training
    moved = [
        k for k, v in model.policy.state_dict().items() if not torch.equal(v, policy_before[k])
    ]
    assert any("clicks" in key for key in moved) and any("reduce" in key for key in moved)
    unknown = model.policy.features_extractor.modulation.weight[0]
    assert torch.equal(unknown, torch.zeros_like(unknown))
    assert not any("sam" in key or "image_encoder" in key for key in policy_before)


def test_categories_are_matched_by_name(tiny_env: dict[str, Any]) -> None:
    env = make_env(tiny_env)
    policy = make_model(tiny_env, env, vocabulary=["star", "tree"]).policy
    extractor = policy.features_extractor
    assert isinstance(extractor, ClickFeatures)
    policy.set_categories(["tree", "submarine", "star"])
    assert extractor.words.tolist() == [2, 0, 1]


def test_saved_policies_come_back_without_the_backbone(tiny_env: dict[str, Any], tmp_path) -> None:
    env = make_env(tiny_env)
    model = make_model(tiny_env, env)
    observations, _ = env.reset(seed=1)
    expected = model.policy.get_action_and_value(observations, deterministic=True)
    model.save(tmp_path / "policy.zip")
    own = sum(p.numel() for p in model.policy.parameters())
    assert (tmp_path / "policy.zip").stat().st_size < 16 * own + 60_000
    loaded = PPO.load(tmp_path / "policy.zip", device="cpu").policy
    again = loaded.get_action_and_value(observations, deterministic=True)
    for left, right in zip(expected, again, strict=True):
        assert torch.equal(left, right)


def test_the_removed_head_is_a_clear_error(tiny_env: dict[str, Any]) -> None:
    env = make_env(tiny_env)
    make_model(tiny_env, env, options={"head": "spatial"})  # as policies of earlier versions say
    with pytest.raises(ValueError, match="the action head 'flat' was removed"):
        make_model(tiny_env, env, options={"head": "flat"})


def test_rollouts_keep_their_embeddings(tiny_env: dict[str, Any]) -> None:
    """With room for few embeddings, what a rollout refers to is still there in the update."""
    settings = tiny_env | {"dataset_kwargs": {"length": 10_000, "size": 64}, "max_steps": 2}
    env = make_env(settings)
    model = make_model(settings, env)
    core = env.unwrapped.core
    size = int(np.prod(core.backbone.embedding_shape)) * 4
    core.store.max_bytes = 20 * size
    seen: dict[int, torch.Tensor] = {}

    class Check(PinRolloutsCallback):
        def _on_rollout_start(self) -> None:
            super()._on_rollout_start()
            seen.clear()

        def _on_step(self) -> bool:
            for handle in core.handles:
                now = core.store.gather(torch.tensor([handle]), "embedding").clone()
                assert torch.equal(seen.setdefault(int(handle), now), now)
            return True

        def _on_rollout_end(self) -> None:
            handles = self.model.rollout_buffer.observations["handle"].astype(int).ravel()
            for handle in set(handles.tolist()) & set(seen):
                assert torch.equal(
                    core.store.gather(torch.tensor([handle]), "embedding"), seen[handle]
                )

    model.learn(64, callback=Check(core.store))
    assert core.store.encoded > 20


def test_checkpointing_computes_the_same_gradients_and_keeps_less(tiny_env: dict[str, Any]) -> None:
    env = make_env(tiny_env)
    gradients, kept = [], []
    for on in (False, True):
        policy = make_model(tiny_env, env, options={"gradient_checkpointing": on}).policy
        observations, _ = env.reset(seed=0)
        tensors = policy.to_tensors(observations)
        sizes: list[int] = []

        def note(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            values, log_prob, _ = policy.evaluate_actions(tensors, torch.arange(4))
        (values.sum() + log_prob.sum()).backward()
        gradients.append([p.grad for p in policy.parameters() if p.grad is not None])
        kept.append(sum(sizes))
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)
    # What is left are the observations and the heads' own.
    assert kept[1] < 0.7 * kept[0]


def test_mixed_precision_is_close_and_keeps_weights_in_float32(tiny_env: dict[str, Any]) -> None:
    env = make_env(tiny_env)
    observations, _ = env.reset(seed=0)
    plain, mixed = (
        make_model(tiny_env, env, options={"precision": precision}).policy
        for precision in ("32-true", "bf16-mixed")
    )
    assert all(p.dtype == torch.float32 for p in mixed.parameters())
    tensors = plain.to_tensors(observations)
    with torch.no_grad():
        exact, close = (policy.extract_features(tensors) for policy in (plain, mixed))
    assert close.dtype == torch.float32
    assert torch.equal(close, close.bfloat16().float()) and not torch.equal(exact, close)
    assert torch.allclose(exact, close, atol=0.05 * float(exact.abs().max()))
    model = make_model(tiny_env, env, options={"precision": "bf16-mixed"})
    before = [p.clone() for p in model.policy.parameters()]
    model.learn(16)
    assert any(
        not torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True)
    )


def test_automatic_precision_depends_on_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for fast, expected in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda fast=fast: fast)
        assert resolve_precision("auto", cpu) == expected
        assert resolve_precision("auto", cuda) == "32-true"
        assert resolve_precision("bf16-mixed", cuda) == "bf16-mixed"
        assert resolve_precision("32-true", cpu) == "32-true"
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert resolve_precision("auto", cpu) == "32-true"


def test_misspelt_options_of_the_policy(tiny_env: dict[str, Any]) -> None:
    env = make_env(tiny_env)
    with pytest.raises(ValueError, match="Did you mean 'bf16-mixed'"):
        make_model(tiny_env, env, options={"precision": "bf16"})
