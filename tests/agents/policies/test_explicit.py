"""The explicit policy: what it sees of words, where that is kept, and that it can be saved."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from agents.clip.surgery import min_max
from agents.evaluate import PolicyAgent, evaluate
from agents.policies.base import POLICIES
from agents.policies.explicit import (
    ExplicitPolicy,
    TextFeatures,
    WordMaps,
    relations,
    shared_surgery,
)
from agents.ppo.vec_env import VectorEnvAdaptor, make_vector_env
from sam_gym.backbones import Backbone
from sam_gym.backbones.embeddings.store import EmbeddingStore
from sam_gym.envs.click import SamSegConfig

WORDS = ["fish", "mug", "star"]


@pytest.fixture
def clip(clip_folder: Path) -> dict[str, Any]:
    return {"name": "clip_micro", "pretrained": str(clip_folder), "device": "cpu"}


@pytest.fixture
def surgery(clip: dict[str, Any]) -> Any:
    return shared_surgery(**clip)


def images_of(*shapes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


def policy_of(
    env: VectorEnvAdaptor, core: Any, clip: dict[str, Any], **more: Any
) -> ExplicitPolicy:
    features = {
        "backbone": {
            "name": core.config.backbone,
            "checkpoint": core.config.checkpoint,
            "device": "cpu",
        },
        "categories": list(core.dataset.categories),
        "max_steps": core.config.max_steps,
        "clip": clip,
        **more,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ExplicitPolicy(
            env.observation_space, env.action_space, lambda _: 1e-3, features=features, grid=16
        )


def test_maps_of_words_by_hand(tiny: Backbone, surgery: Any) -> None:
    maps = WordMaps(surgery, tiny, WORDS)
    image = images_of((64, 64))[0]
    packed = maps([image])
    assert packed.shape == (1, 3, 1 + 4 * 4) and packed.dtype == torch.float16
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    expected, whole = surgery.similarity(
        pixels, surgery.embed_texts(WORDS), surgery.embed_texts([""])[0]
    )
    small = torch.nn.functional.interpolate(expected, (4, 4), mode="bilinear")
    torch.testing.assert_close(packed[0, :, 1:].float(), small[0].flatten(1), rtol=0, atol=2e-3)
    torch.testing.assert_close(packed[0, :, 0].float(), whole[0], rtol=0, atol=2e-3)
    # The map of a word is the same among other words.
    alone = WordMaps(surgery, tiny, WORDS[1:2])
    assert torch.equal(alone([image])[:, 0], packed[:, 1]) and alone.name != maps.name


def test_padding_is_like_no_word(tiny: Backbone, surgery: Any) -> None:
    packed = WordMaps(surgery, tiny, WORDS)(images_of((24, 64), (64, 40)))
    wide, tall = packed[..., 1:].reshape(2, 3, 4, 4)
    # 24 of 64 rows are one and a half cells of four; 40 columns two and a half.
    assert torch.equal(wide[:, 2:], wide.amin(dim=(1, 2))[:, None, None].expand(3, 2, 4))
    assert torch.equal(tall[:, :, 3:], tall.amin(dim=(1, 2))[:, None, None].expand(3, 4, 1))
    assert len(wide[0, :2].unique()) > 2 and len(tall[0, :, :3].unique()) > 2


def test_maps_are_computed_once_per_image(tiny: Backbone, surgery: Any) -> None:
    maps, calls = WordMaps(surgery, tiny, WORDS), []

    def compute(images: Any) -> torch.Tensor:
        calls.append(len(images))
        return maps(images)

    entry = 4 * int(np.prod(tiny.embedding_shape))
    store = EmbeddingStore(tiny, max_bytes=2 * entry)
    first, second, third = images_of((64, 64), (64, 64), (64, 64))
    (early,) = store.acquire([first])
    store.register_feature(maps.name, compute)
    with pytest.raises(KeyError, match="before reset"):
        store.gather(torch.tensor([early]), maps.name)
    store.compute_features({early: first})
    handles = store.acquire([first, second])
    assert calls == [1, 1] and handles[0] == early
    expected = maps([first, second])
    torch.testing.assert_close(store.gather(torch.tensor(handles), maps.name), expected)
    for handle in (early, *handles):
        store.unpin(handle)
    # A row that is used again is computed again.
    (recycled,) = store.acquire([third])
    assert len(store._table) == 2 and calls == [1, 1, 1]
    torch.testing.assert_close(store.gather(torch.tensor([recycled]), maps.name), maps([third]))
    # A feature that nobody holds is dropped.
    del compute
    store.compute_features({recycled: third})
    with pytest.raises(KeyError):
        store.gather(torch.tensor([recycled]), maps.name)


def standard(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean()) / x.std(unbiased=False)


def test_planes_of_the_target_among_other_words(tiny_env: dict, clip: dict[str, Any]) -> None:
    settings = SamSegConfig(**tiny_env)
    vector, core = make_vector_env("SamSeg-v0", 3, settings)
    env = VectorEnvAdaptor(vector)
    policy = policy_of(env, core, clip)
    extractor: Any = policy.features_extractor
    assert isinstance(extractor, TextFeatures)
    observations = policy.obs_to_tensor(env.reset())[0]
    planes = extractor.map_planes(observations)
    assert planes.shape == (3, 4, 4, 4) and torch.isfinite(planes).all()
    for slot in range(3):
        target = core.ground_truth(slot)
        packed = extractor._maps([target.image])[0].float()
        maps = packed[:, 1:].reshape(-1, 4, 4)
        own = maps[target.category]
        others = torch.cat([maps[: target.category], maps[target.category + 1 :]])
        expected = [
            min_max(own),
            standard(own),
            standard(own - others.amax(dim=0)),
            np.exp(-1 / 0.33) * min_max(others).amax(dim=0),
        ]
        torch.testing.assert_close(planes[slot], torch.stack(expected), rtol=1e-3, atol=1e-3)
    env.close()


@pytest.mark.parametrize("photos", [False, True])
def test_both_forms_of_observation_show_the_same(
    photos: bool, tiny_env: dict, clip: dict[str, Any], two_photos: Path
) -> None:
    if photos:
        where = {"dataset": "folder", "data": str(two_photos), "split": "test"}
        tiny_env |= where | {"dataset_kwargs": {"category": "mug"}}
    settings = SamSegConfig(**tiny_env)
    vector, core = make_vector_env("SamSeg-v0", 4, settings)
    env = VectorEnvAdaptor(vector)
    policy = policy_of(env, core, clip)
    whole: Any = gym.make_vec(
        "SamSeg-v0", 4, vectorization_mode="vector_entry_point", **tiny_env, obs="full"
    )
    env.seed(0)
    handles = policy.extract_features(policy.obs_to_tensor(env.reset())[0])
    observations, _ = whole.reset(seed=0)
    assert photos == any((image == 0).all(axis=2).any() for image in observations["image"])
    full = policy.extract_features(policy.to_tensors(observations))
    torch.testing.assert_close(full, handles, rtol=1e-3, atol=1e-3)
    # SB3 has channels first.
    first = observations | {"image": observations["image"].transpose(0, 3, 1, 2)}
    assert torch.equal(policy.extract_features(policy.to_tensors(first)), full)
    env.close()
    whole.close()


def test_it_learns_is_saved_and_plays_with_other_words(
    tiny_env: dict, clip: dict[str, Any], tmp_path: Path
) -> None:
    settings = SamSegConfig(**(tiny_env | {"target_categories": "star,ring,fish"}))
    vector, core = make_vector_env("SamSeg-v0", 4, settings)
    env = VectorEnvAdaptor(vector)
    policy = policy_of(env, core, clip)
    model = PPO(
        POLICIES.get("explicit"),
        env,
        n_steps=4,
        batch_size=8,
        n_epochs=2,
        policy_kwargs={"features": policy.features, "grid": 16},
        device="cpu",
        seed=0,
    )
    before = {key: value.clone() for key, value in model.policy.state_dict().items()}
    assert not [key for key in before if "clip_branch" not in key and "clip" in key.split(".")]
    model.learn(16)
    after = model.policy.state_dict()
    for part in ("clip_branch.0.weight", "attention.in_proj_weight", "positions"):
        key = f"features_extractor.{part}"
        assert not torch.equal(before[key], after[key]), part
    model.save(tmp_path / "policy.zip")
    assert (tmp_path / "policy.zip").stat().st_size < 4e6
    agent = PolicyAgent.load(tmp_path / "policy.zip", "cpu")
    others = SamSegConfig(**(tiny_env | {"target_categories": "mug,tree"}))
    played = evaluate(agent, others, episodes=4, num_envs=2, seed=0)
    assert set(played.targets) <= {"mug", "tree"} and len(played.ious) == 4
    again = evaluate(PolicyAgent(model.policy), others, episodes=4, num_envs=2, seed=0)
    np.testing.assert_array_equal(again.ious, played.ious)
    env.close()


def test_words_that_clip_does_not_know_are_refused(tiny: Backbone, surgery: Any) -> None:
    for name in ("zebra", "星", "star2", "!!"):
        with pytest.raises(ValueError, match=f"no word for '{name}'"):
            WordMaps(surgery, tiny, ["star", name])


def test_unknown_words_are_taken_on_request(tiny: Backbone, surgery: Any) -> None:
    maps = WordMaps(surgery, tiny, ["star", "zebra", "yak"], allow_unknown=True)
    assert torch.equal(maps.texts[1], maps.texts[2])
    assert not torch.equal(maps.texts[0], maps.texts[1])


def test_known_words_are_hidden_from_a_policy_that_learns(
    tiny_env: dict, clip: dict[str, Any]
) -> None:
    settings = SamSegConfig(**(tiny_env | {"obs": "handle", "target_categories": "star,ring"}))
    vector, core = make_vector_env("SamSeg-v0", 4, settings)
    env = VectorEnvAdaptor(vector)
    policy = policy_of(env, core, clip, vocabulary=["star", "ring", "tree"], hidden=0.5)
    extractor: TextFeatures = policy.features_extractor  # type: ignore[assignment]
    observations = policy.to_tensors(env.reset())  # type: ignore[arg-type]
    names = core.dataset.categories
    numbers = [names.index(name) for name in ("star", "fish", "tree", "ring")]
    observations["target_category"] = torch.tensor(numbers)

    rng = torch.Generator().manual_seed(0)
    embedding = torch.randn(4, *extractor.backbone.embedding_shape, generator=rng)
    assert extractor._known_words(embedding, observations).tolist() == [1, 0, 3, 2]
    policy.set_learning(True)
    many = embedding.repeat(100, 1, 1, 1) + torch.randn(400, 1, 1, 1, generator=rng)
    tiled = {"target_category": observations["target_category"].repeat(100)}
    seen = extractor._known_words(many, tiled)
    again = extractor._known_words(many, tiled)
    assert torch.equal(seen, again)
    known = torch.tensor([1, 0, 3, 2]).repeat(100)
    assert set((seen - known)[seen != known].tolist()) == {-1, -3, -2}
    assert 0.4 < (seen[known > 0] == 0).float().mean() < 0.6
    with policy.playing():
        assert torch.equal(extractor._known_words(many, tiled), known)
    assert extractor.learning

    # A word of the vocabulary changes what is seen beyond its map; another one does not.
    with torch.no_grad(), policy.playing():
        plain = extractor._modulated(embedding, torch.zeros(4, dtype=torch.long))
        told = extractor._modulated(embedding, torch.tensor([1, 0, 3, 2]))
    differs = (plain - told).abs().amax(dim=(1, 2, 3)) > 1e-4
    assert differs.tolist() == [True, False, True, True]
    env.close()


def test_relations_are_cosines_with_what_lies_under_peaks_and_mask() -> None:
    rng = np.random.default_rng(0)
    embedding, maps = rng.normal(size=(2, 5, 3, 4)), rng.normal(size=(2, 2, 3, 4))
    mask = rng.random((2, 1, 3, 4))
    mask[1] = 0.0
    planes = relations(*(torch.from_numpy(array) for array in (embedding, maps, mask))).numpy()
    centred = (embedding - embedding.mean(axis=(2, 3), keepdims=True)).reshape(2, 5, 12)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    for image in range(2):
        for k in range(2):
            weight = np.exp(3 * maps[image, k].ravel())
            under = unit[image] @ (weight / weight.sum())
            expected = (under / np.linalg.norm(under)) @ unit[image]
            np.testing.assert_allclose(planes[image, k].ravel(), expected, atol=1e-9)
    under = unit[0] @ mask[0].ravel()
    expected = mask[0].max() * (under / np.linalg.norm(under)) @ unit[0]
    np.testing.assert_allclose(planes[0, 2].ravel(), expected, atol=1e-9)
    assert not planes[1, 2].any()


@pytest.mark.parametrize("known", [False, True])
def test_of_words_without_experience_only_maps_and_relations_count(
    known: bool, tiny_env: dict, clip: dict[str, Any]
) -> None:
    settings = SamSegConfig(**(tiny_env | {"obs": "handle", "target_categories": "star"}))
    vector, core = make_vector_env("SamSeg-v0", 2, settings)
    env = VectorEnvAdaptor(vector)
    policy = policy_of(env, core, clip, vocabulary=["star" if known else "ring"])
    extractor: Any = policy.features_extractor
    observations = policy.to_tensors(env.reset())  # type: ignore[arg-type]
    before = policy.extract_features(observations)
    with torch.no_grad():
        extractor.reduce.weight.normal_()
    after = policy.extract_features(observations)
    env.close()
    assert torch.equal(before, after) == (not known)
