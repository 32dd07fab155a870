"""`SamSeg-v0` with `initial_mask="semantic"`, and the agents that play it."""

import copy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sam_gym.backbones import Backbone, load_backbone
from sam_gym.backbones.adapters.adapter import Adapter
from sam_gym.backbones.adapters.model import raw_spec
from sam_gym.backbones.adapters.semantic_head import SEMANTIC_HEADS
from sam_gym.backbones.prompts import Prompts
from sam_gym.data.synthetic.scenes import Scenes

LOW = 16  # side of the tiny SAM's masks


def head_of(tiny: Backbone, classes: list[str], path: Path) -> str:
    torch.manual_seed(0)
    head = SEMANTIC_HEADS.get("seed")("embedding", raw_spec(tiny.sam, "embedding"), classes)
    head.eval()
    scenes = Scenes("train", length=2, size=128)
    with torch.no_grad():  # sure of something everywhere, and not of the same
        head.net[-1].weight *= 30
        raw = tiny.raw_source("embedding").encode([scenes[index].image for index in range(2)])
        head.net[-1].bias -= head(raw).mean(dim=(0, 2, 3))
    adapter = Adapter(
        *("tiny", tiny.weights_digest, "semantic", "head", ["scenes"]),
        semantic_type="seed",
        semantic_features="embedding",
        semantic_classes=classes,
        semantic=head.state_dict(),
    )
    return str(adapter.save(path))


@pytest.fixture
def settings(tiny: Backbone, tiny_env: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    # The head has the classes in another order, and one more.
    classes = ["ground", *reversed(Scenes.categories)]
    adapter = head_of(tiny, classes, tmp_path / "head.safetensors")
    return {**tiny_env, "adapter": adapter, "initial_mask": "semantic", "undo": True, "stop": True}


def make(settings: dict[str, Any], **more: Any) -> Any:
    return gym.make("SamSeg-v0", **{**settings, **more}).unwrapped


def test_an_episode_begins_with_the_log_odds_of_the_category(settings: dict[str, Any]) -> None:
    env = make(settings)
    observation, info = env.reset(seed=3)
    core = env.core
    image = core.ground_truth(0).image
    backbone = load_backbone("tiny", settings["checkpoint"], "cpu", adapter=settings["adapter"])
    raw = backbone.raw_source("embedding").encode([image])
    chances = backbone.segment_logits(raw).softmax(dim=1)[0].double()
    chance = chances[list(backbone.semantic_classes).index(info["target_name"])]
    odds = F.interpolate(chance.logit()[None, None], (LOW, LOW), mode="bilinear")[0, 0]
    torch.testing.assert_close(core.logits[0, 0].double(), odds, rtol=2e-3, atol=2e-3)
    mask, truth = odds.numpy() > 0, core._low_target[0].numpy()
    assert 0 < mask.sum() < mask.size
    assert info["iou"] == pytest.approx((mask & truth).sum() / (mask | truth).sum())
    np.testing.assert_allclose(observation["sam_pred_mask_prob"], odds.sigmoid(), atol=1e-3)
    assert (info["clicks"], observation["num_steps"]) == (0, 0)


def test_a_click_corrects_the_mask_and_undo_returns_to_it(settings: dict[str, Any]) -> None:
    env = make(settings)
    _, before = env.reset(seed=3)
    core = env.core
    _, reward, _, _, after = env.step(100)
    x, y, _ = core.click_of(100)
    prompts = Prompts(
        points=torch.tensor([[[x, y]]]),
        labels=torch.ones((1, 1), dtype=torch.int64),
        masks=core.logits[:, 0],
        has_mask=torch.tensor([True]),
    )
    features = core.backbone.encode([core.ground_truth(0).image])
    expected, iou = core.backbone.decode_best(features, prompts, torch.tensor([False]))
    torch.testing.assert_close(core.logits[0, 1], expected[0])
    assert after["predicted_iou"] == pytest.approx(iou.item(), abs=1e-6)
    assert reward == pytest.approx(after["iou"] - before["iou"])
    _, reward, _, _, undone = env.step(core.undo_action)
    assert reward == pytest.approx(before["iou"] - after["iou"])
    assert undone["iou"] == before["iou"] and undone["clicks"] == 0
    np.testing.assert_array_equal(env.step(core.stop_action)[0]["sam_pred_mask_prob"].shape, LOW)


def test_scalar_equals_vector_and_states_are_restored(settings: dict[str, Any]) -> None:
    actions = np.random.default_rng(0).integers(512, size=(4, 3))
    vector = gym.make_vec("SamSeg-v0", 3, vectorization_mode="vector_entry_point", **settings)
    seen = [vector.reset(seed=5)[0]["sam_pred_mask_prob"]]
    state, copied = None, None
    for number, own in enumerate(actions):
        if number == 1:
            state = vector.unwrapped.get_state()
            copied = copy.deepcopy(vector.unwrapped.core)
        observation, reward, *_ = vector.step(own)
        seen.append(observation["sam_pred_mask_prob"])
    for index in range(3):
        env = make(settings)
        env.reset(seed=5 + index)
        for number, own in enumerate(actions):
            observation, last, *_ = env.step(own[index])
            np.testing.assert_allclose(
                observation["sam_pred_mask_prob"], seen[number + 1][index], atol=1e-5
            )
        assert last == pytest.approx(reward[index], abs=0.01)
    vector.unwrapped.set_state(state)
    assert copied is not None
    for number, own in enumerate(actions[1:], start=2):
        again = vector.step(own)[0]["sam_pred_mask_prob"]
        np.testing.assert_array_equal(again, seen[number])
        copied.step(np.arange(3), own)
        np.testing.assert_array_equal(copied.observe(range(3))["sam_pred_mask_prob"], again)


def test_what_cannot_begin_with_a_mask_is_refused(
    settings: dict[str, Any], tiny: Backbone, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="take target='category'"):
        make(settings, target="instance")
    with pytest.raises(ValueError, match="none, for the SAM has no semantic head"):
        make(settings, adapter=None)
    other = head_of(tiny, ["sky", "road"], tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"does not know .*star.*its classes: sky, road"):
        make(settings, adapter=other)
