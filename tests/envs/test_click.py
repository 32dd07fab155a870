"""The rules of `SamSeg-v0`, each against an independent implementation."""

import copy
import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from segment_anything import SamPredictor
from segment_anything.utils.transforms import ResizeLongestSide

import sam_gym  # noqa: F401 (registers the environments)
from sam_gym.backbones import Backbone
from sam_gym.backbones.embeddings.store import MAX_HANDLES
from sam_gym.data import make_dataset
from sam_gym.envs.click import SamSegConfig, SamSegEnv, SamSegVectorEnv
from sam_gym.envs.rewards import REWARDS

Make = Callable[..., SamSegEnv]

SCENE, FRAME, LOW = 128, 64, 16  # sides of the scenes, the tiny SAM's input and its masks


@pytest.fixture
def make(tiny_env: dict[str, Any]) -> Make:
    return lambda **more: gym.make("SamSeg-v0", **{**tiny_env, **more}).unwrapped


@pytest.fixture
def make_vec(tiny_env: dict[str, Any]) -> Callable[..., SamSegVectorEnv]:
    def make_vec(num_envs: int = 3, **more: Any) -> SamSegVectorEnv:
        settings = {**tiny_env, **more}
        return gym.make_vec(
            "SamSeg-v0", num_envs, vectorization_mode="vector_entry_point", **settings
        )

    return make_vec


@pytest.fixture
def photos(two_photos: Path, make: Make) -> Make:
    """Make an environment over two photographs, at the start of an episode of one of them."""

    def photos(stem: str, **more: Any) -> SamSegEnv:
        env = make(dataset="folder", data=str(two_photos), dataset_kwargs={}, **more)
        for seed in range(50):
            if env.reset(seed=seed)[1]["source"] == f"photos/{stem}":
                return env
        raise AssertionError("one of two photographs is never drawn")

    return photos


def current_logits(env: SamSegEnv) -> torch.Tensor:
    return env.core.logits[0, env.core.num_clicks[0]].clone()


def cell(row: int, column: int, grid: int = 16, positive: bool = True) -> int:
    return row * grid + column + (0 if positive else grid * grid)


def random_clicks(seed: int, count: int, grid: int = 16) -> list[int]:
    return np.random.default_rng(seed).integers(2 * grid * grid, size=count).tolist()


# What a click does -----------------------------------------------------------------------------


def played_by_hand(
    backbone: Backbone, image: np.ndarray, actions: list[int], grid: int
) -> tuple[np.ndarray, float]:
    """Low-res logits and predicted IoU after clicks, by the rule that the documentation gives."""
    predictor = SamPredictor(backbone.sam)
    predictor.set_image(image)
    height, width = predictor.input_size
    side = backbone.image_size / grid
    points, labels, logits, quality = [], [], None, None
    for action in actions:
        row, column = divmod(action % (grid * grid), grid)
        x, y = (column + 0.5) * side - 0.5, (row + 0.5) * side - 0.5
        points.append([min(x, width - 1), min(y, height - 1)])
        labels.append(int(action < grid * grid))
        _, quality, low = predictor.predict_torch(
            torch.tensor([points], dtype=torch.float32),
            torch.tensor([labels]),
            mask_input=logits,
            multimask_output=len(points) == 1,
            return_logits=True,
        )
        best = int(quality[0].argmax())
        logits, quality = low[:, best : best + 1], float(quality[0, best])
    assert logits is not None and quality is not None
    return logits[0, 0].numpy(), quality


@pytest.mark.parametrize("grid", [16, 7])
@pytest.mark.parametrize("name", ["micro", "tiny"])
def test_clicks_are_decoded_as_by_the_predictor(
    name: str, grid: int, make: Make, micro_env: dict[str, Any]
) -> None:
    more = {"backbone": "micro", **micro_env} if name == "micro" else {}
    env = make(**more, grid=grid, max_steps=6)
    _, info = env.reset(seed=3)
    dataset = make_dataset("scenes", **env.core.config.dataset_kwargs)
    image = dataset[int(info["source"].rpartition("/")[2])].image
    actions = random_clicks(1, 6, grid)
    for count, action in enumerate(actions, start=1):
        obs, _, _, _, info = env.step(action)
        expected, quality = played_by_hand(env.core.backbone, image, actions[:count], grid)
        np.testing.assert_allclose(current_logits(env), expected, atol=1e-4 * expected.std())
        probability = 1 / (1 + np.exp(-expected.astype(np.float64)))
        np.testing.assert_allclose(obs["sam_pred_mask_prob"], probability, atol=1e-4)
        assert info["predicted_iou"] == pytest.approx(quality, abs=1e-4)
        assert (info["clicks"], obs["num_steps"]) == (count, count)


@pytest.mark.parametrize("stem", ["wide", "tall"])
def test_clicks_on_photographs_are_decoded_as_by_the_predictor(
    photos: Callable[..., SamSegEnv], two_photos: Path, stem: str
) -> None:
    """Many of the clicks fall in the padding, and so on the nearest pixel of the image."""
    env = photos(stem, max_steps=8, grid=8)
    image = cv2.imread(str(two_photos / "images" / f"{stem}.png"))[..., ::-1]
    actions = [63, 7, 56, *random_clicks(2, 5, grid=8)]
    for action in actions:
        env.step(action)
    expected, _ = played_by_hand(env.core.backbone, image, actions, 8)
    np.testing.assert_allclose(current_logits(env), expected, atol=1e-4 * expected.std())


def test_undo_restores_the_previous_mask(make: Make) -> None:
    env = make(undo=True, max_steps=8)
    undo = env.action_space.n - 1
    assert undo == 2 * 16 * 16
    start, _ = env.reset(seed=0)
    first, second, third = random_clicks(5, 3)
    seen = [env.step(action) for action in (first, second)]
    one, two = (obs["sam_pred_mask_prob"] for obs, *_ in seen)
    assert (one != two).any()
    obs, reward, _, _, info = env.step(undo)
    np.testing.assert_array_equal(obs["sam_pred_mask_prob"], one)
    assert reward == pytest.approx(seen[0][4]["iou"] - seen[1][4]["iou"])
    for key in ("iou", "dice", "predicted_iou", "clicks"):
        assert info[key] == seen[0][4][key]
    assert obs["num_steps"] == 3

    obs, *_ = env.step(third)
    env.reset(seed=0)
    env.step(first)
    expected, *_ = env.step(third)
    np.testing.assert_array_equal(obs["sam_pred_mask_prob"], expected["sam_pred_mask_prob"])

    env.reset(seed=0)
    for _ in range(2):
        obs, reward, terminated, _, info = env.step(undo)
        np.testing.assert_array_equal(obs["sam_pred_mask_prob"], start["sam_pred_mask_prob"])
        assert (reward, info["iou"], info["clicks"], terminated) == (0.0, 0.0, 0, False)


def test_keep_best_never_lowers_the_predicted_iou(make: Make) -> None:
    kept_masks = fallen = 0
    for seed in range(4):
        free, best = make(max_steps=10), make(max_steps=10, keep_best=True)
        free.reset(seed=seed), best.reset(seed=seed)
        free_iou = best_iou = -np.inf
        previous = None
        for action in random_clicks(seed, 10):
            info = free.step(action)[4]
            fallen += info["predicted_iou"] < free_iou
            free_iou = info["predicted_iou"]
            obs, *_, info = best.step(action)
            assert info["predicted_iou"] >= best_iou
            if info["predicted_iou"] == best_iou:
                np.testing.assert_array_equal(obs["sam_pred_mask_prob"], previous)
                kept_masks += 1
            best_iou, previous = info["predicted_iou"], obs["sam_pred_mask_prob"]
    assert kept_masks and fallen  # without the option it does fall


# What it is about ------------------------------------------------------------------------------


def test_target_categories_hold_where_the_dataset_draws_the_category(
    make: Make, squares: Path
) -> None:
    content = json.loads((squares / "all.json").read_text())
    content["categories"].append({"id": 2, "name": "corner"})
    corner = [0, 0, 10, 0, 10, 10, 0, 10]
    content["annotations"].append(
        {"id": 99, "image_id": 5, "category_id": 2, "iscrowd": 0, "segmentation": [corner]}
        | {"bbox": [0, 0, 10, 10], "area": 100}
    )
    (squares / "instances_train.json").write_text(json.dumps(content))
    options = {"dataset": "coco", "data": str(squares), "dataset_kwargs": {}}
    env = make(**options, target_categories="square")
    assert {env.reset(seed=seed)[1]["target_name"] for seed in range(20)} == {"square"}
    env = make(**options, target_categories="corner")
    assert env.reset(seed=0)[1]["target_name"] == "corner"


def test_category_is_the_union_of_its_instances(make: Make) -> None:
    env = make()
    dataset = make_dataset("scenes", **env.core.config.dataset_kwargs)
    sizes = []
    for seed in range(20):
        obs, info = env.reset(seed=seed)
        sample = dataset[int(info["source"].rpartition("/")[2])]
        target = env.core.ground_truth(0)
        category = int(obs["target_category"])
        instances = [
            m for m, c in zip(sample.masks, sample.categories, strict=True) if c == category
        ]
        np.testing.assert_array_equal(target.mask, np.logical_or.reduce(instances))
        assert info["target_name"] == dataset.categories[category]
        sizes.append(len(instances))
    assert min(sizes) == 1 < max(sizes)


def test_instance_is_one_mask_and_shown_by_the_cue(make: Make) -> None:
    env = make(target="instance")
    dataset = make_dataset("scenes", **env.core.config.dataset_kwargs)
    cues = []
    for seed in range(20):
        obs, info = env.reset(seed=seed)
        sample = dataset[int(info["source"].rpartition("/")[2])]
        x, y = np.rint(obs["cue_click"] * SCENE).astype(int)
        (number,) = np.flatnonzero(sample.masks[:, y, x])
        np.testing.assert_array_equal(env.core.ground_truth(0).mask, sample.masks[number])
        assert obs["target_category"] == sample.categories[number]
        cues.append((x, y))
    assert len(set(cues)) > 10


def test_start_is_empty(make: Make) -> None:
    obs, info = make().reset(seed=0)
    assert obs["num_steps"] == 0 and (obs["sam_pred_mask_prob"] < 1e-6).all()
    assert (info["iou"], info["dice"], info["clicks"], info["predicted_iou"]) == (0, 0, 0, 0)


def test_the_image_is_seen_in_the_input_frame(
    photos: Callable[..., SamSegEnv], two_photos: Path
) -> None:
    for stem, height, width in (("wide", 24, 64), ("tall", 64, 32)):
        obs, _ = (env := photos(stem)).reset(seed=env.np_random_seed)
        image = cv2.imread(str(two_photos / "images" / f"{stem}.png"))[..., ::-1]
        expected = ResizeLongestSide(FRAME).apply_image(image)
        assert expected.shape == (height, width, 3)
        np.testing.assert_array_equal(obs["image"][:height, :width], expected)
        assert not obs["image"][height:].any() and not obs["image"][:, width:].any()
        embedding = env.core.backbone.encode([image]).embedding[0]
        np.testing.assert_allclose(obs["sam_image_embeddings"], embedding, atol=1e-4)
        assert obs["sam_image_embeddings"].flags.c_contiguous


def test_first_click_into_the_padding_falls_on_the_border(
    photos: Callable[..., SamSegEnv],
) -> None:
    env = photos("wide", grid=8, reward="click_correct")  # 48 x 128 pixels, 24 x 64 in the frame
    for column, on_target in ((3, True), (0, False)):
        env.reset(seed=env.np_random_seed)
        _, reward, *_ = env.step(cell(7, column, grid=8))
        np.testing.assert_array_equal(env.core.points[0, 0], [8 * column + 3.5, 23])
        assert env.core.to_image(0, *env.core.points[0, 0]) == (16 * column + 8, 47)
        assert reward == (1.0 if on_target else -1.0)


def test_ground_truth_does_not_leak(make: Make, tmp_path: Path) -> None:
    """Another target mask of the same category changes the reward and nothing that is seen."""
    rng = np.random.default_rng(0)
    pixels = cv2.resize(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), (96, 96))
    logs = []
    for side, area in (("left", np.s_[10:80, 5:50]), ("right", np.s_[30:90, 40:95])):
        root = tmp_path / side / "leaves"
        mask = np.zeros((96, 96), np.uint8)
        mask[area] = 255
        for folder, content in (("images", pixels), ("masks", mask)):
            (root / folder).mkdir(parents=True)
            cv2.imwrite(str(root / folder / "a.png"), content)
        env = make(dataset="folder", data=str(root), dataset_kwargs={}, max_steps=6)
        log = [env.reset(seed=4)[0]]
        rewards = []
        for action in random_clicks(3, 6):
            obs, reward, *_ = env.step(action)
            log.append(obs)
            rewards.append(reward)
        logs.append((log, rewards))
    (left, left_rewards), (right, right_rewards) = logs
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)
    assert left_rewards != right_rewards


def test_too_small_targets_are_not_drawn(make: Make) -> None:
    env = make(target="instance", min_target=0.06)
    shares = []
    for seed in range(12):
        env.reset(seed=seed)
        mask = env.core.ground_truth(0).mask
        shares.append(mask.reshape(LOW, 8, LOW, 8).mean(axis=(1, 3)).__ge__(0.5).mean())
    assert min(shares) >= 0.06
    with pytest.raises(ValueError, match=r"scenes: 200 draws found no target .* 90\.00%"):
        make(min_target=0.9).reset(seed=0)


# Score and reward ------------------------------------------------------------------------------


def low_res(area: np.ndarray) -> np.ndarray:
    """Cells of SAM's low-res mask at least half of which `area` covers, padding being outside."""
    size = max(area.shape)
    padded = np.zeros((size, size), bool)
    padded[: area.shape[0], : area.shape[1]] = area
    return padded.reshape(LOW, size // LOW, LOW, size // LOW).mean(axis=(1, 3)) >= 0.5


def overlap(one: np.ndarray, other: np.ndarray, valid: np.ndarray) -> float:
    return (one & other & valid).sum() / ((one | other) & valid).sum()


def test_iou_of_low_res_masks(make: Make) -> None:
    env = make(max_steps=6)
    for seed in range(5):
        env.reset(seed=seed)
        target = low_res(env.core.ground_truth(0).mask)
        for action in random_clicks(seed, 6):
            *_, info = env.step(action)
            predicted = current_logits(env).numpy() > 0
            expected = overlap(predicted, target, np.ones_like(target))
            assert info["iou"] == pytest.approx(expected)
            assert info["dice"] == pytest.approx(2 * expected / (1 + expected))


@pytest.mark.parametrize("score", ["low", "full"])
@pytest.mark.parametrize("stem", ["wide", "tall"])
def test_iou_leaves_out_padding_and_ignored_pixels(
    photos: Callable[..., SamSegEnv], two_photos: Path, stem: str, score: str
) -> None:
    env = photos(stem, max_steps=6, score=score)
    labels = cv2.imread(str(two_photos / "masks" / f"{stem}.png"), cv2.IMREAD_GRAYSCALE)
    target, valid = labels == 255, labels != 128
    counted = 0
    for action in random_clicks(0, 6):
        *_, info = env.step(action)
        logits = current_logits(env)
        if score == "low":
            masks = logits.numpy() > 0, low_res(target), low_res(valid)
        else:
            sam = env.core.backbone.sam
            frame = env.core.backbone.input_size(labels.shape)
            full = sam.postprocess_masks(logits[None, None], frame, labels.shape)[0, 0]
            masks = full.numpy() > 0, target, valid
            np.testing.assert_array_equal(env.core.mask(0), masks[0])
        assert info["iou"] == pytest.approx(overlap(*masks))
        counted += overlap(*masks) != overlap(masks[0], masks[1], np.ones_like(masks[2]))
    assert counted


def test_iou_gain_adds_up_to_the_final_iou(make: Make) -> None:
    env = make(undo=True, max_steps=12)
    for seed in range(4):
        env.reset(seed=seed)
        actions = [*random_clicks(seed, 11), env.action_space.n - 1]
        steps = [env.step(action) for action in actions]
        assert sum(step[1] for step in steps) == pytest.approx(steps[-1][4]["iou"])
        assert steps[-1][4]["iou"] > 0


def test_returns_of_a_vector_are_final_ious(make_vec: Callable[..., SamSegVectorEnv]) -> None:
    envs = RecordEpisodeStatistics(make_vec(max_steps=4, autoreset_mode="SameStep"))
    envs.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(4):
        *_, infos = envs.step(rng.integers(512, size=3))
    np.testing.assert_allclose(infos["episode"]["r"], infos["final_info"]["iou"], atol=1e-6)
    assert (infos["episode"]["l"] == 4).all() and (infos["final_info"]["iou"] > 0).any()


@pytest.mark.parametrize("reward", REWARDS.names())
def test_every_reward_by_its_rule(make: Make, reward: str) -> None:
    env = make(reward=reward, stop=True, undo=True, max_steps=40, grid=8, click_cost=0.25)
    seen: set[tuple[bool, bool]] = set()
    for seed in range(3):
        env.reset(seed=seed)
        mask = env.core.ground_truth(0).mask
        clicks: list[tuple[float, float]] = []
        iou = 0.0
        for action in [*random_clicks(seed, 30, grid=8), 129, 129, 128]:
            _, earned, terminated, _, info = env.step(action)
            assert terminated == (action == 128)
            gain = info["iou"] - iou
            dice_gain = 2 * info["iou"] / (1 + info["iou"]) - 2 * iou / (1 + iou)
            iou = info["iou"]
            by_gain = {"iou_gain": gain, "dice_gain": dice_gain}
            if action >= 128:
                assert earned == pytest.approx(by_gain.get(reward, 0.0) - 0.25 * (action == 129))
                clicks = clicks[: len(clicks) - (action == 129)]
                continue
            row, column = divmod(action % 64, 8)
            positive, on_target = action < 64, bool(mask[16 * row + 8, 16 * column + 8])
            seen.add((positive, on_target))
            apart = [np.hypot(row - r, column - c) / 8 for r, c in clicks]
            clicks.append((row, column))
            right = positive == on_target
            if positive:
                shaped = min(1.0, min(apart, default=1.0) / 0.1) if right else -1.0
            else:
                shaped = max(dice_gain, 0.0) if right else -0.5
            signs = {"click_correct": right, "foreground": on_target}
            rules = {name: 1.0 if good else -1.0 for name, good in signs.items()}
            rules |= {**by_gain, "shaped": shaped}
            assert earned == pytest.approx(rules[reward] - 0.25, abs=1e-6)
    assert len(seen) == 4


# Ends ------------------------------------------------------------------------------------------


def test_truncated_after_max_steps(make: Make) -> None:
    env = make(max_steps=3)
    env.reset(seed=0)
    assert [env.step(action)[2:4] for action in random_clicks(0, 3)] == [
        (False, False),
        (False, False),
        (False, True),
    ]
    with pytest.raises(RuntimeError, match=r"An episode of 3 steps is over: call reset\(\)"):
        env.step(0)
    env.reset()
    env.step(0)


def test_stop_terminates_and_costs_nothing(make: Make) -> None:
    env = make(stop=True, max_steps=2, click_cost=0.5)
    stop = env.action_space.n - 1
    env.reset(seed=0)
    before, *_, info = env.step(100)
    obs, reward, terminated, truncated, last = env.step(stop)
    assert (reward, terminated, truncated) == (0.0, True, False)
    np.testing.assert_array_equal(obs["sam_pred_mask_prob"], before["sam_pred_mask_prob"])
    assert last == info


def test_iou_target_terminates(make: Make) -> None:
    actions = random_clicks(0, 4)
    env = make(max_steps=4)
    env.reset(seed=1)
    ious = [env.step(action)[4]["iou"] for action in actions]
    best = int(np.argmax(ious))
    assert ious[best] > 0
    for margin, reached in ((-1e-6, True), (1e-6, False)):
        env = make(max_steps=4, iou_target=ious[best] + margin)
        env.reset(seed=1)
        ends = [env.step(action)[2:4] for action in actions[: best + 1]]
        assert not any(terminated for terminated, _ in ends[:-1])
        assert ends[-1][0] == reached
        assert not (ends[-1][0] and ends[-1][1])


def test_episodes_differ(make: Make) -> None:
    env = make()
    env.reset(seed=0)
    assert len({(i["source"], i["target_name"]) for i in (env.reset()[1] for _ in range(20))}) > 8


# Observations ----------------------------------------------------------------------------------


def test_handle_leads_to_the_embedding(make: Make) -> None:
    full, small = make(), make(obs="handle")
    assert small.observation_space["handle"].high[0] == MAX_HANDLES - 1 < 2**24
    handles = set()
    for seed in range(6):
        expected, _ = full.reset(seed=seed)
        obs, _ = small.reset(seed=seed)
        handle = np.float32(obs["handle"])  # as SB3's buffers hold it
        handles.add(int(handle[0]))
        found = small.core.store.gather(torch.from_numpy(handle), "embedding")[0]
        np.testing.assert_array_equal(found, expected["sam_image_embeddings"])
        for action in random_clicks(seed, 3):
            expected, *_ = full.step(action)
            obs, *_ = small.step(action)
            cells = expected["sam_pred_mask_prob"].reshape(4, 4, 4, 4).mean(axis=(1, 3))
            np.testing.assert_allclose(obs["sam_pred_mask_prob"], 255 * cells, atol=0.51)
    assert len(handles) > 2 and obs["sam_pred_mask_prob"].dtype == np.uint8


def test_handle_observations_have_the_grid_of_the_embedding(micro_env: dict[str, Any]) -> None:
    """`micro` upscales its embedding by 6, SAM by 4."""
    full: Any = gym.make("SamSeg-v0", **micro_env).unwrapped
    small: Any = gym.make("SamSeg-v0", **micro_env, obs="handle").unwrapped
    for env in (full, small):
        env.reset(seed=0)
    expected, obs = full.step(100)[0], small.step(100)[0]
    assert obs in small.observation_space
    cells = expected["sam_pred_mask_prob"].reshape(16, 6, 16, 6).mean(axis=(1, 3))
    np.testing.assert_allclose(obs["sam_pred_mask_prob"], 255 * cells, atol=0.51)


@pytest.mark.parametrize("obs", ["full", "handle"])
def test_returned_arrays_may_be_overwritten(make: Make, obs: str) -> None:
    env = make(obs=obs, target="instance")

    def play(overwrite: bool) -> list[dict[str, np.ndarray]]:
        observations = [env.reset(seed=2)[0]]
        for action in random_clicks(2, 4):
            copied = {key: np.copy(value) for key, value in observations[-1].items()}
            if overwrite:
                for value in observations[-1].values():
                    if isinstance(value, np.ndarray):
                        value.fill(1)
            observations[-1] = copied
            observations.append(env.step(action)[0])
        return observations

    clean, _, again = play(False), play(True), play(False)
    for one, other in zip(clean, again, strict=True):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def private_store(tiny_checkpoint: str, tmp_path: Path, embeddings: int) -> dict[str, Any]:
    """Arguments of an environment with a private store of a few embeddings."""
    checkpoint = tmp_path / "own.pth"
    shutil.copy(tiny_checkpoint, checkpoint)
    return {"checkpoint": str(checkpoint), "store_gib": (embeddings + 0.5) * 2048 / 2**30}


def test_only_current_images_are_pinned(make: Make, tiny_checkpoint: str, tmp_path: Path) -> None:
    own = private_store(tiny_checkpoint, tmp_path, embeddings=3)
    one, other = make(**own), make(**own)
    store = one.core.store
    assert other.core.store is store and store.capacity == 3
    for seed in range(12):
        one.reset(seed=seed), other.reset(seed=50 + seed)
        assert sum(store._pins.values()) == 2
    one.close()
    one.close()
    assert sum(store._pins.values()) == 1
    with pytest.raises(RuntimeError, match=r"Call reset\(\)"):
        one.step(0)


def test_vector_unpins_previous_images(
    make_vec: Callable[..., SamSegVectorEnv], tiny_checkpoint: str, tmp_path: Path
) -> None:
    envs = make_vec(3, **private_store(tiny_checkpoint, tmp_path, embeddings=6), max_steps=2)
    envs.reset(seed=0)
    for _ in range(12):
        envs.step(np.array([1, 2, 3]))
        assert sum(envs.core.store._pins.values()) == 3
    envs.close()
    assert not envs.core.store._pins


def test_too_small_a_store_says_so(
    make_vec: Callable[..., SamSegVectorEnv], tiny_checkpoint: str, tmp_path: Path
) -> None:
    envs = make_vec(6, **private_store(tiny_checkpoint, tmp_path, embeddings=2))
    with pytest.raises(MemoryError, match=r"all of its 2 embeddings are in use.*store_gib="):
        envs.reset(seed=0)


def test_handles_of_final_observations_are_valid(
    make_vec: Callable[..., SamSegVectorEnv], tiny_checkpoint: str, tmp_path: Path
) -> None:
    """Even in a full store, until the next step: learners look back at the end of an episode."""
    envs = make_vec(
        2,
        **private_store(tiny_checkpoint, tmp_path, embeddings=4),
        obs="handle",
        max_steps=1,
        autoreset_mode="SameStep",
    )
    dataset = make_dataset("scenes", **envs.core.config.dataset_kwargs)
    envs.reset(seed=0)
    for _ in range(10):
        *_, infos = envs.step(np.array([5, 6]))
        for obs, source in zip(infos["final_obs"], infos["final_info"]["source"], strict=True):
            image = dataset[int(source.rpartition("/")[2])].image
            found = envs.core.store.gather(torch.from_numpy(obs["handle"]), "embedding")
            expected = envs.core.backbone.encode([image]).embedding
            np.testing.assert_allclose(found, expected, atol=1e-4)


def test_all_environments_share_the_model(make: Make, make_vec: Callable[..., Any]) -> None:
    cores = [make().core, make(obs="handle").core, make_vec(2).core]
    assert len({id(core.backbone) for core in cores}) == 1
    assert len({id(core.store) for core in cores}) == 1


def test_cache_changes_nothing(make: Make) -> None:
    cached, uncached = make(), make(cache_mib=0)
    for seed in (0, 1, 0):
        one, other = cached.reset(seed=seed)[0], uncached.reset(seed=seed)[0]
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)
    assert len(cached.core.samples) and not len(uncached.core.samples)


# Vector ----------------------------------------------------------------------------------------


def test_showing_images_of_different_shapes(
    make_vec: Callable[..., SamSegVectorEnv], two_photos: Path, no_display: None
) -> None:
    settings = {"dataset": "folder", "data": str(two_photos), "dataset_kwargs": {}}
    human = make_vec(4, render_mode="human", **settings)
    with pytest.warns(UserWarning, match="'human' shows nothing"):
        human.reset(seed=0)


def test_ended_environments_must_be_reset_where_autoreset_is_off(
    make_vec: Callable[..., SamSegVectorEnv],
) -> None:
    envs = make_vec(stop=True, autoreset_mode="Disabled")
    envs.reset(seed=0)
    envs.step(np.array([512, 0, 512]))
    with pytest.raises(RuntimeError, match=r"Sub-environments \[0, 2\] have ended.*reset_mask"):
        envs.step(np.array([0, 0, 0]))
    envs.reset(options={"reset_mask": np.array([True, False, True])})
    obs, *_ = envs.step(np.array([0, 0, 0]))
    assert obs["num_steps"].tolist() == [1, 2, 1]


def test_reset_forgets_that_episodes_had_ended(
    make_vec: Callable[..., SamSegVectorEnv],
) -> None:
    envs = make_vec(stop=True)
    envs.reset(seed=0)
    envs.step(np.array([512, 512, 0]))
    envs.reset(seed=1)
    obs, _, _, _, infos = envs.step(np.array([3, 4, 5]))
    assert obs["num_steps"].tolist() == [1, 1, 1] and infos["clicks"].tolist() == [1, 1, 1]


def test_seeds_of_a_vector(make_vec: Callable[..., SamSegVectorEnv]) -> None:
    envs = make_vec()
    expected = envs.reset(seed=5)[1]["source"].tolist()
    assert envs.reset(seed=[5, 6, 7])[1]["source"].tolist() == expected
    assert envs.reset(seed=np.int64(5))[1]["source"].tolist() == expected
    with pytest.raises(ValueError, match="Expected 3 seeds, got 2"):
        envs.reset(seed=[1, 2])


# Errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rewrad": "shaped"}, r"Unknown argument of SamSeg-v0 'rewrad'\. Did you mean 'reward'\?"),
        ({"reward": "iou_gian"}, r"Unknown reward 'iou_gian'\. Did you mean 'iou_gain'\?"),
        ({"dataset": "scense"}, r"Unknown dataset 'scense'\. Did you mean 'scenes'\?"),
        ({"split": "trian"}, r"Unknown split 'trian'\. Did you mean 'train'\?"),
        ({"backbone": "mirco"}, r"Unknown backbone 'mirco'\. Did you mean 'micro'\?"),
        ({"target": "categroy"}, r"Unknown target 'categroy'\. Did you mean 'category'\?"),
        ({"obs": "handel"}, r"Unknown obs 'handel'\. Did you mean 'handle'\?"),
        ({"score": "ful"}, r"Unknown score 'ful'\. Did you mean 'full'\?"),
        ({"dtype": "float23"}, r"Unknown dtype 'float23'\. Did you mean 'float32'\?"),
        (
            {"dataset_kwargs": {"split": "val"}},
            "dataset_kwargs may not hold 'split': use split= instead",
        ),
        (
            {"dataset_kwargs": {"lenght": 8}},
            r"Unknown option of dataset 'scenes' 'lenght'.*'length'\?",
        ),
        ({"data": "photos"}, "'scenes' reads no files"),
        ({"disk": ""}, "disk is empty: name a folder"),
        ({"dataset": "folder", "dataset_kwargs": {}}, r"'folder' reads files: pass .*data='PATH'"),
        ({"grid": 1}, "grid must be from 2 to 64, got 1"),
        ({"grid": 65}, "grid must be from 2 to 64, got 65"),
        ({"max_steps": 0}, "max_steps must be from 1 to 100, got 0"),
        ({"iou_target": 0.0}, r"iou_target must be positive and at most 1, got 0\.0"),
        ({"iou_target": 1.1}, r"iou_target must be positive and at most 1, got 1\.1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_arguments(
    make: Make, make_vec: Callable[..., Any], settings: dict[str, Any], message: str
) -> None:
    for maker in (make, make_vec):
        with pytest.raises(ValueError, match=message):
            maker(**settings)


def test_missing_files_are_named(make: Make, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pth: no such checkpoint file"):
        make(checkpoint=str(tmp_path / "none.pth"))
    with pytest.raises(FileNotFoundError, match=r"nowhere.*images: the folder does not exist"):
        make(dataset="folder", data=str(tmp_path / "nowhere"), dataset_kwargs={})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_envs": 0}, "num_envs must be at least 1, got 0"),
        ({"autoreset_mode": "SameSetp"}, r"Unknown autoreset_mode 'SameSetp'.*mean 'SameStep'\?"),
    ],
)
def test_impossible_vectors(
    make_vec: Callable[..., Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_vec(**settings)


def test_reset_mask_of_another_size(make_vec: Callable[..., SamSegVectorEnv]) -> None:
    envs = make_vec()
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=r"reset_mask must be bool \(3,\), got shape \(2,\)"):
        envs.reset(options={"reset_mask": np.array([True, False])})


def test_actions_out_of_range(make: Make, make_vec: Callable[..., SamSegVectorEnv]) -> None:
    env = make(stop=True, undo=True)
    env.reset(seed=0)
    expected = r"expected 0 to 513 \(16 x 16 cells x positive, negative, stop, undo\)"
    for action in (-1, 514):
        with pytest.raises(ValueError, match=rf"Action {action} is out of range: {expected}"):
            env.step(action)
    envs = make_vec()
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=r"Action 512 is out of range: expected 0 to 511"):
        envs.step(np.array([0, 512, 1]))
    assert envs.core.steps.tolist() == [0, 0, 0]


@pytest.mark.parametrize("action", [1.0, np.array([1]), None, "1", True])
def test_actions_of_another_kind(make: Make, action: Any) -> None:
    env = make()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="Expected 1 integer actions, got"):
        env.step(action)


@pytest.mark.parametrize("actions", [np.zeros(2, int), np.zeros((3, 1), int), np.zeros(3), 0])
def test_vector_actions_of_another_kind(
    make_vec: Callable[..., SamSegVectorEnv], actions: Any
) -> None:
    envs = make_vec()
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="Expected 3 integer actions, got"):
        envs.step(actions)


def test_reset_comes_first(make: Make, make_vec: Callable[..., SamSegVectorEnv]) -> None:
    with pytest.raises(RuntimeError, match=r"Call reset\(\) before anything else"):
        make().step(0)
    with pytest.raises(RuntimeError, match=r"Call reset\(\) before anything else"):
        make_vec().step(np.zeros(3, int))


def test_handles_are_refused_in_workers_that_are_no_daemons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`AsyncVectorEnv(..., daemon=False)`."""
    monkeypatch.setattr(multiprocessing.current_process(), "name", "Worker<AsyncVectorEnv>-1")
    with pytest.raises(ValueError, match="refers to embeddings in this process"):
        SamSegConfig(obs="handle").validate()


@pytest.mark.slow
def test_handles_are_refused_in_worker_processes() -> None:
    """The workers of AsyncVectorEnv and SubprocVecEnv are daemons, as those of a pool are."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        message = r"obs='handle' refers to embeddings in this process.*make_vec\("
        with pytest.raises(ValueError, match=message):
            pool.apply(gym.make, ("sam_gym:SamSeg-v0",), {"obs": "handle"})
        assert pool.apply(SamSegConfig(obs="full").validate) is None


# As shipped ------------------------------------------------------------------------------------


def test_environment_as_shipped(shipped: Backbone) -> None:
    env = gym.make("SamSeg-v0", device="cpu", render_mode="rgb_array")
    env.reset(seed=0)
    core = env.unwrapped.core
    assert core.backbone is shipped
    y, x = np.argwhere(core.ground_truth(0).mask).mean(axis=0)
    *_, info = env.step(core.action_at(x, y, True))
    assert info["clicks"] == 1 and env.render().ndim == 3
    assert json.loads(env.spec.to_json())["kwargs"]["device"] == "cpu"


def test_oracle_clicks_earn_more_than_random_ones(shipped: Backbone) -> None:
    """The shipped model makes the environment worth playing."""
    envs = gym.make_vec(
        "SamSeg-v0", num_envs=8, max_steps=2, device="cpu", autoreset_mode="Disabled"
    )
    core = envs.unwrapped.core

    def final(oracle: bool) -> float:
        rng = np.random.default_rng(0)
        envs.reset(seed=0)
        for _ in range(2):
            actions = rng.integers(envs.single_action_space.n, size=8)
            for i in range(8 if oracle else 0):
                wrong = core.ground_truth(i).mask & ~core.mask(i)
                middle = np.argwhere(wrong)[len(np.argwhere(wrong)) // 2, ::-1]
                x, y = core.backbone.to_input_frame(middle[None], wrong.shape)[0]
                actions[i] = core.action_at(x, y, True)
            *_, infos = envs.step(actions)
        return float(infos["iou"].mean())

    assert final(oracle=True) > final(oracle=False) + 0.3


# Prefetching ------------------------------------------------------------------------------------


def test_new_images_are_prefetched_and_cached_ones_are_not(
    make_vec: Callable[..., SamSegVectorEnv],
) -> None:
    env = make_vec(dataset_kwargs={"length": 1, "size": SCENE})
    env.reset(seed=0)
    assert sorted(env.core.prefetcher.pending) == [0, 1, 2]
    env.reset()
    env.reset()
    assert not env.core.prefetcher.pending
    env.close()


def test_prefetching_changes_nothing(make_vec: Callable[..., SamSegVectorEnv]) -> None:
    """Seeds, copies and a closed environment, with draws in progress."""
    endless = {"length": None, "size": SCENE}
    env = make_vec(dataset_kwargs=endless)
    first = env.reset(seed=5)[1]["source"].tolist()
    second = env.reset()[1]["source"].tolist()
    assert env.core.prefetcher.pending
    copied = copy.deepcopy(env)
    third = env.reset()[1]["source"].tolist()
    assert copied.reset()[1]["source"].tolist() == third
    assert env.reset(seed=5)[1]["source"].tolist() == first
    env.close()
    assert env.reset()[1]["source"].tolist() == second
    assert len({*first, *second, *third}) == 9
    env.close()


def test_a_target_keeps_the_pixels_of_one_instance(make: Make) -> None:
    env = make(target="instance", dataset_kwargs={"length": 2, "size": SCENE})
    for seed in range(3):
        env.reset(seed=seed)
        mask = env.core.ground_truth(0).mask
        while isinstance(mask.base, np.ndarray):
            mask = mask.base
        assert mask.nbytes == SCENE**2
