"""Test-time search: several clicks are decoded, a target map judges their masks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from agents.evaluate import PolicyAgent, evaluate
from agents.policies.implicit import ImplicitPolicy
from agents.ppo.config import TrainPPOConfig
from agents.ppo.run import make_model
from agents.ppo.vec_env import VectorEnvAdaptor, make_vector_env
from agents.search import best_clicks, error_clicks, soft_iou
from agents.tasks import task_of
from agents.train_ppo import main
from sam_gym.envs.click import ClickCore, SamSegConfig


@pytest.fixture
def made(tiny_env: dict[str, Any]) -> Callable[..., tuple[ImplicitPolicy, ClickCore, Any]]:
    def made(**options: Any) -> tuple[ImplicitPolicy, ClickCore, Any]:
        click = SamSegConfig(obs="handle", grid=8, stop=True, undo=True, **(tiny_env | options))
        config = TrainPPOConfig(
            num_envs=4, n_steps=8, batch_size=16, train_images=8, search=3, env_config=click
        )
        settings = task_of(config.env).training_config(config)
        env, core = make_vector_env("SamSeg-v0", 4, settings)
        model = make_model(config, settings, VectorEnvAdaptor(env), core)  # type: ignore[arg-type]
        return model.policy, core, env  # type: ignore[return-value]

    return made


def reveal_target(policy: Any, core: ClickCore) -> None:
    """Let the target map know the target, at the resolution of masks."""

    def forward(observations: dict[str, Tensor]) -> Tensor:
        return torch.logit(core.soft_targets(core.backbone.mask_shape)[0], eps=1e-6)

    policy.target_map.forward = forward


def test_soft_iou_of_hard_masks_is_the_iou() -> None:
    rng = np.random.default_rng(0)
    target, masks = (rng.random((5, 6, 7)) < 0.4 for _ in range(2))
    expected = (target & masks).sum((1, 2)) / (target | masks).sum((1, 2))
    got = soft_iou(torch.from_numpy(target).float(), torch.from_numpy(masks).float())
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6)
    nothing = torch.zeros(1, 6, 7)
    assert soft_iou(nothing, nothing).tolist() == [0.0]


def test_error_clicks_lie_inside_the_largest_errors() -> None:
    target, mask = torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)
    target[0, 8:14, 8:14] = 1.0  # missed
    target[0, 0, 0] = 1.0  # missed, but small
    mask[0, 1:6, 10:15] = 1.0  # superfluous
    positive, negative = error_clicks(target, mask, 16)[0].tolist()
    assert target[0].flatten()[positive] == 1 and positive // 16 in range(9, 13)
    assert negative >= 256 and mask[0].flatten()[negative - 256] == 1
    positive, negative = error_clicks(target, mask, 4)[0].tolist()
    assert positive in (10, 11, 14, 15) and negative in (16 + 2, 16 + 3, 16 + 6, 16 + 7)
    # A click mends a small error where it is.
    target, mask = torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)
    target[0, 5, 7] = mask[0, 9, 3] = 1.0
    assert error_clicks(target, mask, 16).tolist() == [[5 * 16 + 7, 256 + 9 * 16 + 3]]
    # A mask beside the target is wrong twice, within the same cells of the grid too.
    target, mask = torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)
    target[0, 4:, 4::2], mask[0, 4:, 5::2] = 1.0, 1.0
    assert error_clicks(target, mask, 4).tolist() == [[10, 16 + 10]]


def test_the_target_map_guides_clicks(made: Callable[..., Any]) -> None:
    policy, core, env = made()
    observations, _ = env.reset(seed=0)
    tensors = policy.to_tensors(observations)
    shape: Any = core.backbone.embedding_shape[1:]
    policy.target_map.forward = lambda _: torch.full((4, *shape), -30.0)
    with torch.no_grad():
        unguided, value = policy.logits_and_value(tensors)
        reveal_target(policy, core)
        guided, same = policy.logits_and_value(tensors)
        judged = policy.evaluate_actions(tensors, guided.argmax(dim=1))[1]
    assert torch.equal(value, same) and torch.equal(guided[:, 128:], unguided[:, 128:])
    # No mask yet: what is missed is the target, and nothing is superfluous.
    target = core.soft_targets(core.backbone.mask_shape)[0]
    missed = F.adaptive_avg_pool2d(target[:, None], 8).flatten(1)
    torch.testing.assert_close(guided[:, :64] - unguided[:, :64], 5 * missed)
    torch.testing.assert_close(guided[:, 64:128] - unguided[:, 64:128], -5 * missed)
    torch.testing.assert_close(judged, guided.log_softmax(dim=1).max(dim=1).values)


def test_guidance_is_sharp(made: Callable[..., Any]) -> None:
    """An error in one cell adds to the click there, and to no other."""
    policy, core, env = made()
    tensors = policy.to_tensors(env.reset(seed=0)[0])
    shape: Any = core.backbone.embedding_shape[1:]
    logits = torch.full((4, *shape), -30.0)
    logits[:, 1, 2] = 30.0
    policy.target_map.forward = lambda _: logits
    with torch.no_grad():
        guided = policy.logits_and_value(tensors)[0]
        policy.target_map.forward = lambda _: torch.full((4, *shape), -30.0)
        added = (guided - policy.logits_and_value(tensors)[0])[0]
    rows, columns = (8 // side for side in shape)  # clicks per cell of the map
    expected = torch.zeros(2, 8, 8)
    expected[0, rows : 2 * rows, 2 * columns : 3 * columns] = 5.0
    expected[1] = -expected[0]
    torch.testing.assert_close(added[:128], expected.flatten())


@pytest.mark.parametrize("keep_best", [False, True])
def test_a_preview_is_what_the_step_gives(made: Callable[..., Any], keep_best: bool) -> None:
    _, core, env = made(keep_best=keep_best)
    env.reset(seed=3)
    rows, rng = np.arange(4), np.random.default_rng(0)
    for _ in range(3):
        actions = rng.integers(2 * 64, size=4)
        before = (core.logits.clone(), core.points.copy(), core.labels.copy(), core.ious.copy())
        logits, predicted = core.preview(rows, actions)
        for own, then in zip(
            (core.logits, core.points, core.labels, core.ious), before, strict=True
        ):
            np.testing.assert_array_equal(np.asarray(own), np.asarray(then))
        if not keep_best:
            torch.testing.assert_close(core.preview_scores(rows, actions), predicted)
        env.step(actions)
        torch.testing.assert_close(core.logits[rows, core.num_clicks], logits)
        np.testing.assert_allclose(core.predicted_ious[rows, core.num_clicks], predicted)


def test_search_plays_the_candidate_of_the_best_mask(made: Callable[..., Any]) -> None:
    policy, core, env = made()
    env.reset(seed=0)
    reveal_target(policy, core)
    # The current mask is neither the first nor the last one that was decoded.
    undo = core.stop_action + 1
    for actions in ([70, 9, 27, 3], [1, 2, 90, 80], [undo, 5, undo, 6]):
        observations, *_ = env.step(np.array(actions))
    assert core.num_clicks.tolist() == [1, 3, 1, 3]
    tensors = policy.to_tensors(observations)
    with torch.no_grad():
        everything = policy.logits_and_value(tensors)[0]
    logits = everything[:, :128]
    everything[:, 128:] = -1e9  # no stop
    chosen = best_clicks(policy, core, tensors, everything)

    rows = np.arange(4)
    target = core.soft_targets(core.backbone.mask_shape)[0]
    now = torch.stack([core.logits[row, core.num_clicks[row]] for row in rows])
    candidates = torch.cat(
        [logits.topk(3, dim=1).indices, error_clicks(target, (now > 0).float(), 8)], dim=1
    ).numpy()
    judged = [
        soft_iou(target, (core.preview(rows, column)[0] > 0).float()) for column in candidates.T
    ]
    best = torch.stack(judged).argmax(dim=0).numpy()
    np.testing.assert_array_equal(chosen, candidates[rows, best])
    own, _ = policy.predict(observations, deterministic=True)
    with torch.no_grad():
        everything = policy.logits_and_value(tensors)[0]
    np.testing.assert_array_equal(own, everything.argmax(dim=1))
    played = PolicyAgent(policy).act(core, observations)
    np.testing.assert_array_equal(played, best_clicks(policy, core, tensors, everything))


def test_the_target_map_is_finer_than_the_embedding(made: Callable[..., Any]) -> None:
    policy, core, env = made()
    tensors = policy.to_tensors(env.reset(seed=0)[0])
    height, width = core.backbone.embedding_shape[1:]
    assert policy.upscale_factor == 4
    features = policy.target_map.features(tensors)
    with torch.no_grad():
        target = policy.target_map(tensors)
        assert target.shape == (4, 4 * height, 4 * width)
        # Each cell of the embedding gives the 4 x 4 values of its own place, row by row.
        own = policy.target_map.head(features)[2, :, 1, 3].reshape(4, 4)
    torch.testing.assert_close(target[2, 4:8, 12:16], own)


def test_search_leaves_stops_and_finished_episodes_alone(made: Callable[..., Any]) -> None:
    policy, core, env = made()
    observations, _ = env.reset(seed=0)
    tensors = policy.to_tensors(observations)
    actions = np.array([core.stop_action, 5, 5, core.stop_action])
    core.steps[1] = core.config.max_steps
    core.num_clicks[1] = core.config.max_steps
    logits = torch.nn.functional.one_hot(torch.from_numpy(actions), core.action_space.n).float()
    chosen = best_clicks(policy, core, tensors, logits)
    assert chosen[[0, 1, 3]].tolist() == [core.stop_action, 5, core.stop_action]
    core.steps[:] = core.config.max_steps
    assert best_clicks(policy, core, tensors, logits).tolist() == actions.tolist()


def test_a_run_with_search_is_saved_loaded_and_evaluated(
    tiny_env: dict[str, Any],
    arguments: Callable[..., list[str]],
    outcome: Callable[[Path], dict[str, Any]],
    tmp_path: Path,
) -> None:
    main(arguments(tmp_path, "--total-timesteps", "96"))
    assert len(outcome(tmp_path)["logged"]["target_map/loss"]) == 3
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["no_search"]["episodes"] == results["agent"]["episodes"]
    assert results["config"]["search"] == 2  # the default of this version
    agent = PolicyAgent.load(tmp_path / "policy.zip", "cpu")
    assert agent.policy.search == 2 and agent.policy.target_map is not None
    config = SamSegConfig(split="val", **tiny_env)
    played = [evaluate(agent, config, episodes=4, num_envs=2).ious for _ in range(2)]
    np.testing.assert_array_equal(*played)


def test_weights_of_earlier_versions_are_renamed(made: Callable[..., Any]) -> None:
    policy, *_ = made()
    weights = {
        name.replace("target_map.", "recalibration."): own + 1.0
        for name, own in policy.state_dict().items()
    }
    policy.load_state_dict(weights)
    for name, own in policy.target_map.state_dict().items():
        assert torch.equal(own, weights[f"recalibration.{name}"]), name


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--search", "-1"), "search must be from 0 to 4096, got -1"),
        (("--search", "4097"), "search must be from 0 to 4096, got 4097"),
        (("--env", "SamEverything-v0", "--search", "2"), "--search does not work with"),
        (
            ("--env", "SamEverything-v0", "--recalibration-updates", "2"),
            "policies of SamEverything-v0 have none",
        ),
    ],
)
def test_wrong_options_are_refused_before_work(
    more: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        main(["--out", str(tmp_path / "out"), *more])
    assert not (tmp_path / "out").exists()
