"""`SamEverything-v0`: its own rules, beside those of every registered environment."""

import itertools
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sam_gym.envs.everything as everything
from sam_gym.data import Sample
from sam_gym.envs.everything import (
    EPISODE_ARRAYS,
    EverythingConfig,
    EverythingCore,
)
from sam_gym.metrics.panoptic import matched_ious

#: Arrays with a row per sub-environment that `set_state` recomputes from the drawn objects, and
#: the buffer of kept masks, which `get_state` trims.
RECOMPUTED = {"handles", "_objects", "_valid", "_masks"}
FIRST = np.array([0])


class Drawn:
    """A dataset of one image with objects whose masks are given on 16 x 16 cells of 4 pixels."""

    name, categories = "drawn", ("object",)

    def __init__(self, *objects: np.ndarray, ignore: np.ndarray | None = None) -> None:
        masks = np.array([np.kron(mask, np.ones((4, 4))) > 0 for mask in objects], bool)
        image = np.full((64, 64, 3), 90, np.uint8)
        ignored = None if ignore is None else np.kron(ignore, np.ones((4, 4))) > 0
        categories = np.zeros(len(objects), np.int64)
        self.sample = Sample(image, masks.reshape(-1, 64, 64), categories, "drawn/0", ignored)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Sample:
        return self.sample

    def draw(self, rng: np.random.Generator) -> tuple[int, int | None]:
        return int(rng.integers(1)), None


def box(top: int, left: int, height: int, width: int) -> np.ndarray:
    """A rectangle on the low-res mask: bool (16, 16)."""
    mask = np.zeros((16, 16), bool)
    mask[top : top + height, left : left + width] = True
    return mask


#: Two objects of 64 cells each.
LEFT, RIGHT = box(0, 0, 8, 8), box(8, 8, 8, 8)


@pytest.fixture
def config(tiny_env: dict[str, Any]) -> EverythingConfig:
    del tiny_env["dataset_kwargs"]
    return EverythingConfig(
        **tiny_env,
        **{"grid": 8, "budget": 8, "keep_iou": 0.5},
        **{"point_cost": 0.01, "duplicate_cost": 0.03, "part_cost": 0.05},
    )


@pytest.fixture
def play(config: EverythingConfig) -> Callable[..., EverythingCore]:
    """A core in which the mask and the predicted IoU of cell 0, 1, ... are given."""

    def play(answers: list[tuple[np.ndarray, float]], **more: Any) -> EverythingCore:
        dataset = more.pop("dataset", Drawn(LEFT, RIGHT))
        core = EverythingCore(replace(config, **more), 1, dataset)

        def decode(indices: np.ndarray, cells: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
            asked = [[answers[cell] for cell in row] for row in cells]
            masks = np.array([[mask for mask, _ in row] for row in asked])
            predicted = np.array([[own for _, own in row] for row in asked], np.float32)
            return torch.from_numpy(masks), torch.from_numpy(predicted)

        core._decode = decode  # type: ignore[method-assign]
        core.reset([0], [np.random.default_rng(0)])
        return core

    return play


def step(core: EverythingCore, action: Any) -> tuple[float, bool, bool, dict[str, Any]]:
    reward, terminated, truncated = core.step(FIRST, core.check_actions(np.array([action])))
    info = {key: value[0] for key, value in core.info(FIRST).items()}
    return float(reward[0]), bool(terminated[0]), bool(truncated[0]), info


# The reward, by hand ---------------------------------------------------------------------------


def test_every_outcome_of_a_point_pays_what_it_should(play: Callable[..., EverythingCore]) -> None:
    core = play(
        [
            (LEFT, 0.8),
            (box(0, 0, 7, 8), 0.7),  # a duplicate, trusted less
            (box(0, 0, 7, 8), 0.9),  # a duplicate, trusted more: it replaces
            (box(8, 8, 4, 4), 0.6),  # a quarter of the other object: a part
            (RIGHT, 0.4),  # trusted too little
            (RIGHT, 0.5),  # just enough
            (np.zeros((16, 16), bool), 0.9),  # nothing
        ]
    )
    expected = [
        (0.5 - 0.01, 0.5, {"masks": 1, "duplicates": 0, "parts": 0, "found": 0.5}),
        (-0.01 - 0.03, 0.5, {"masks": 1, "duplicates": 1, "parts": 0, "found": 0.5}),
        (-1 / 16 - 0.01 - 0.03, 7 / 16, {"masks": 1, "duplicates": 2, "parts": 0, "found": 0.5}),
        (1 / 8 - 0.01 - 0.05, 9 / 16, {"masks": 2, "duplicates": 2, "parts": 1, "found": 0.5}),
        (-0.01, 9 / 16, {"masks": 2, "duplicates": 2, "parts": 1, "found": 0.5}),
        (3 / 8 - 0.01, 15 / 16, {"masks": 3, "duplicates": 2, "parts": 1, "found": 1.0}),
        (-0.01, 15 / 16, {"masks": 3, "duplicates": 2, "parts": 1, "found": 1.0}),
    ]
    for number, (reward, iou, numbers) in enumerate(expected):
        got, terminated, truncated, info = step(core, number)
        assert got == pytest.approx(reward) and not terminated and not truncated
        assert info["iou"] == pytest.approx(iou) and info["points"] == number + 1
        assert {name: info[name] for name in numbers} == numbers
        assert info["source"] == "drawn/0"
    reward, terminated, truncated, info = step(core, core.stop_action)
    assert (reward, terminated, truncated) == (0.0, True, False) and info["points"] == 7


def test_a_mask_counts_for_one_object_only(play: Callable[..., EverythingCore]) -> None:
    both = LEFT | RIGHT
    core = play([(both, 0.9), (LEFT, 0.9)])
    assert step(core, 0)[3]["iou"] == pytest.approx(0.25)  # half of one of the two
    assert step(core, 1)[3]["iou"] == pytest.approx(0.75)


def test_a_part_is_mostly_inside_and_less_than_half(play: Callable[..., EverythingCore]) -> None:
    cases = {
        (0, 0, 4, 8): 0,  # half of the object
        (0, 0, 3, 8): 1,
        (5, 0, 4, 8): 0,  # three quarters of it are inside
        (4, 0, 5, 6): 1,  # 24 of 30 are inside: 0.8
    }
    for number, (shape, parts) in enumerate(cases.items()):
        core = play([(box(*shape), 0.9)] * 4)
        assert step(core, number)[3]["parts"] == parts, shape


def test_ignored_pixels_do_not_count(play: Callable[..., EverythingCore]) -> None:
    dataset = Drawn(LEFT, RIGHT, ignore=box(0, 0, 4, 16))
    core = play([(box(4, 0, 4, 8), 0.9), (box(0, 8, 4, 8), 0.9)], dataset=dataset)
    assert step(core, 0)[3]["iou"] == pytest.approx(0.5)
    assert step(core, 1)[3]["parts"] == 0  # all of it is ignored


def test_small_objects_do_not_count(play: Callable[..., EverythingCore]) -> None:
    core = play([(LEFT, 0.9)], dataset=Drawn(LEFT, box(12, 12, 1, 2)), min_target=0.01)
    assert len(core.ground_truth(0).masks) == 1
    assert step(core, 0)[3]["iou"] == 1.0
    with pytest.raises(ValueError, match="200 draws found no target that covers at least 1.00%"):
        play([], dataset=Drawn(box(12, 12, 1, 2)), min_target=0.01)
    with pytest.raises(ValueError, match="drawn: 200 draws found no target"):
        play([], dataset=Drawn())


def test_matching_is_the_best_there_is() -> None:
    rng = np.random.default_rng(0)
    for masks, objects in [(1, 3), (3, 3), (4, 2), (2, 4)]:
        overlaps = rng.random((masks, objects))
        # The same by trying everything.
        padded = np.zeros((max(masks, objects),) * 2)
        padded[:masks, :objects] = overlaps
        orders = itertools.permutations(range(len(padded)))
        best = max(padded[list(order), range(len(padded))].sum() for order in orders)
        matched = matched_ious(overlaps)
        assert matched.shape == (objects,) and matched.sum() == pytest.approx(best)


# What is observed ------------------------------------------------------------------------------


def test_maps_show_what_was_kept(play: Callable[..., EverythingCore]) -> None:
    answers = [(LEFT, 0.6), (box(0, 0, 4, 8), 0.8), (RIGHT, 0.1)]
    full, small = play(answers), play(answers, obs="handle")
    for core in (full, small):
        for cell in range(3):
            step(core, cell)
    seen = {key: value[0] for key, value in full.observe(FIRST).items()}
    np.testing.assert_array_equal(seen["coverage"], LEFT.astype(np.float32))
    np.testing.assert_array_equal(seen["overlap"][[0, 4, 8], 0], np.float32([0.5, 0.25, 0]))
    np.testing.assert_array_equal(seen["predicted_iou"][[0, 4, 8], 0], np.float32([0.8, 0.6, 0]))
    assert seen["tried"].shape == (8, 8) and seen["num_points"] == 3
    np.testing.assert_array_equal(seen["tried"].ravel(), np.float32([1, 1, 1] + [0] * 61))

    seen = {key: value[0] for key, value in small.observe(FIRST).items()}
    assert {seen[name].dtype for name in (*everything.MAPS, "tried")} == {np.dtype(np.uint8)}
    np.testing.assert_array_equal(seen["coverage"][:, 0], [255, 255, 0, 0])
    np.testing.assert_array_equal(seen["predicted_iou"][:, 0], [204, 153, 0, 0])
    np.testing.assert_array_equal(np.flatnonzero(seen["tried"]), [0, 1, 2])
    assert "image" not in seen and seen["handle"] == small.handles[0]


def test_maps_have_the_grid_of_the_embedding(
    play: Callable[..., EverythingCore], micro_env: dict[str, Any]
) -> None:
    """`micro` upscales its embedding by 6, SAM by 4."""
    backbone = {"backbone": "micro", "checkpoint": micro_env["checkpoint"]}
    core = play([(np.kron(LEFT, np.ones((6, 6))) > 0, 0.6)], obs="handle", **backbone)
    step(core, 0)
    seen = {key: value[0] for key, value in core.observe(FIRST).items()}
    assert seen in core.observation_space
    np.testing.assert_array_equal(seen["coverage"], 255 * LEFT)


def test_observations_are_fresh(play: Callable[..., EverythingCore]) -> None:
    core = play([(LEFT, 0.9), (RIGHT, 0.9)])
    step(core, 0)
    first = core.observe(FIRST)
    kept = {key: value.copy() for key, value in first.items()}
    step(core, 1)
    core.observe(FIRST)
    np.testing.assert_equal(first, kept)


# Budget, stop, sets ----------------------------------------------------------------------------


def test_an_episode_ends_with_its_budget(play: Callable[..., EverythingCore]) -> None:
    core = play([(LEFT, 0.9)] * 3, budget=2, stop=False)
    assert core.action_space == gym.spaces.Discrete(64)
    assert step(core, 0)[1:3] == (False, False)
    assert step(core, 1)[1:3] == (False, True)
    with pytest.raises(RuntimeError, match=r"An episode of 2 steps is over: call reset\(\)"):
        step(core, 2)
    with pytest.raises(ValueError, match=r"Action 64 is out of range: expected 0 to 63 \(8 x 8"):
        step(core, 64)


def test_points_of_a_set_beyond_the_budget_are_ignored(play: Callable[..., EverythingCore]) -> None:
    answers = [(LEFT, 0.9), (np.zeros((16, 16), bool), 0.9), (RIGHT, 0.9)] + [(LEFT, 0.9)] * 61
    core = play(answers, actions="set", budget=3)
    assert core.action_space == gym.spaces.MultiBinary(64)
    chosen = np.zeros(64, np.int8)
    chosen[[0, 1]] = 1
    reward, terminated, truncated, info = step(core, chosen)
    assert reward == pytest.approx(0.5 - 0.02) and not terminated and not truncated
    _, terminated, truncated, info = step(core, np.ones(64, np.int8))
    assert (info["points"], info["duplicates"], truncated) == (3, 1, True)
    np.testing.assert_array_equal(core.cells[0], [0, 1, 0])

    core = play(answers, actions="set")
    assert step(core, np.zeros(64, np.int8))[1:3] == (True, False)
    core = play(answers, actions="set", stop=False, budget=2)
    assert step(core, np.zeros(64, np.int8))[1:3] == (False, False)
    assert step(core, np.zeros(64, np.int8))[1:3] == (False, True)
    with pytest.raises(ValueError, match="A set of points holds zeros and ones, got 2"):
        step(core, np.full(64, 2))
    with pytest.raises(ValueError, match="Expected 1 sets of 64 zeros and ones"):
        step(core, 3)


@pytest.mark.parametrize("decoded", [1, 7 * 16 * 3, 2**18])
@pytest.mark.parametrize("pixels", [1, 2**24])
def test_a_set_is_its_points_one_by_one(
    config: EverythingConfig, monkeypatch: pytest.MonkeyPatch, decoded: int, pixels: int
) -> None:
    monkeypatch.setattr(everything, "MAX_DECODED", decoded)
    monkeypatch.setattr(everything, "MAX_PIXELS", pixels)
    settings = replace(
        config,
        **{"dataset": "scenes", "dataset_kwargs": {"length": 4, "size": 96}, "budget": 64},
        **{"keep_iou": 0.0, "duplicate_iou": 0.97},
    )
    rng = np.random.default_rng(0)
    single, whole = (
        EverythingCore(replace(settings, actions=actions), 3) for actions in ("points", "set")
    )
    sets = rng.random((3, 64)) < [[0.1], [0.3], [0.9]]
    for core in (single, whole):
        core.reset(range(3), [np.random.default_rng(seed) for seed in range(3)])
    rewards = whole.step(np.arange(3), whole.check_actions(sets))[0]
    for i, chosen in enumerate(sets):
        total = sum(
            single.step(np.array([i]), np.array([cell]))[0][0] for cell in np.flatnonzero(chosen)
        )
        assert total == pytest.approx(rewards[i], abs=1e-6)
    expected = single.info(range(3))
    assert expected["masks"].max() > 2 and expected["duplicates"].max() > 2
    for name, values in whole.info(range(3)).items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)
    np.testing.assert_array_equal(whole.cells, single.cells)
    np.testing.assert_allclose(whole.shown, single.shown, atol=1e-4)
    for i in range(3):
        np.testing.assert_array_equal(whole.masks(i), single.masks(i))


class Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        outcome = func(*args, **(kwargs or {}))
        if isinstance(outcome, torch.Tensor):
            self.nbytes = max(self.nbytes, outcome.untyped_storage().nbytes())
        return outcome


def test_the_memory_of_a_step_does_not_grow_with_masks_and_environments(
    config: EverythingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the kept masks do, a byte per pixel."""
    settings = replace(
        config,
        **{"dataset": "scenes", "dataset_kwargs": {"length": 4, "size": 96}, "budget": 64},
        **{"actions": "set", "keep_iou": 0.0, "duplicate_iou": 1.0},
    )
    core = EverythingCore(settings, 24)
    pixels = core.backbone.mask_shape[0] * core.backbone.mask_shape[1]
    monkeypatch.setattr(everything, "MAX_PIXELS", 80 * pixels)
    core.reset(range(24), [np.random.default_rng(seed) for seed in range(24)])
    index, every = np.arange(24), np.ones((24, 64), np.int64)
    core._try(index, core._cells_of(index, every)[:, :40])
    new, predicted = core._decode(index, core._cells_of(index, every)[:, 40:])
    for i in index:
        core.num_points[i] = 1
    with Largest() as largest:
        core._relate(index, new, predicted, 40)
        core._score(index)
    assert max(len(kept) for kept in core.kept) > 20
    target, drawn = core.targets[0], core.ground_truth(0)
    assert target is not None and target.masks.nbytes * 8 == drawn.masks.nbytes
    assert largest.nbytes <= max(core._masks.nbytes, 80 * pixels * 4)
    assert 24 * (40 + 24) * pixels * 4 > 2 * largest.nbytes


def test_the_mask_of_a_point_is_that_of_sam(config: EverythingConfig) -> None:
    from sam_gym.backbones import Prompts

    settings = replace(
        config, dataset="scenes", dataset_kwargs={"length": 4, "size": 64}, keep_iou=0.0
    )
    core = EverythingCore(settings, 1)
    core.reset([0], [np.random.default_rng(0)])
    masks, predicted = core._decode(FIRST, np.array([[11]]))
    point = torch.tensor([[[(3 + 0.5) * 8 - 0.5, (1 + 0.5) * 8 - 0.5]]])
    prompts = Prompts(points=point, labels=torch.ones((1, 1), dtype=torch.int64))
    embedding = core.backbone.encode([core.ground_truth(0).image])
    logits, iou = core.backbone.decode(embedding, prompts, multimask=True)
    best = int(iou[0].argmax())
    assert predicted[0, 0] == pytest.approx(float(iou[0, best]), abs=1e-5)
    assert torch.equal(masks[0, 0], logits[0, best] > 0)


def test_points_in_the_padding_move_to_the_image(config: EverythingConfig) -> None:
    dataset = Drawn(LEFT)
    wide = dataset.sample.image[:32], dataset.sample.masks[:, :32]
    dataset.sample = replace(dataset.sample, image=wide[0], masks=wide[1])
    core = EverythingCore(config, 1, dataset)
    core.reset([0], [np.random.default_rng(0)])
    last = core._decode(FIRST, np.array([[63]]))
    step(core, 63)
    assert core.points(0) == [(60, 31)]
    assert core.render(0).shape[1] == 768
    core._clip_to_image = lambda env_index, x, y: (x, y)  # type: ignore[method-assign]
    assert not torch.equal(core._decode(FIRST, np.array([[63]]))[1], last[1])


# Settings and states ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"actions": "point"}, r"Unknown actions 'point'. Did you mean 'points'"),
        ({"budget": 0}, "budget must be at least 1, got 0"),
        ({"budget": 65}, "budget must be at most the 64 points"),
        ({"keep_iou": 1.5}, "keep_iou must be from 0 to 1, got 1.5"),
        ({"duplicate_iou": -1}, "duplicate_iou must be from 0 to 1"),
        ({"part_cost": -0.1}, "part_cost must be at least 0, got -0.1"),
        ({"grid": 1, "budget": 1}, "grid must be from 2 to 64"),
        ({"obs": "handel"}, "Unknown obs 'handel'. Did you mean 'handle'"),
        ({"dataset_kwargs": {"split": "test"}}, "dataset_kwargs may not hold 'split'"),
    ],
)
def test_impossible_arguments_are_errors(
    config: EverythingConfig, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, **settings).validate()


def test_unknown_arguments_are_errors(tiny_env: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Unknown argument of SamEverything-v0 'max_steps'"):
        gym.make("SamEverything-v0", **tiny_env, max_steps=3)


@pytest.fixture
def make_vec(config: EverythingConfig) -> Callable[..., Any]:
    def make_vec(num_envs: int = 4, **more: Any) -> Any:
        own = {"dataset": "scenes", "dataset_kwargs": {"length": 6, "size": 96}, "keep_iou": 0.0}
        settings = {**vars(config), **own, **more}
        return gym.make_vec(
            "SamEverything-v0", num_envs, vectorization_mode="vector_entry_point", **settings
        )

    return make_vec


def without_handles(observations: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: value for key, value in observations.items() if key != "handle"}


@pytest.mark.parametrize("more", [{"obs": "handle"}, {"actions": "set", "budget": 40}])
def test_episodes_continue_in_another_environment(
    make_vec: Callable[..., Any], more: dict[str, Any]
) -> None:
    first, second = (make_vec(autoreset_mode="SameStep", **more) for _ in range(2))
    rng = np.random.default_rng(0)

    def actions() -> np.ndarray:
        if more.get("actions") == "set":
            return (rng.random((4, 64)) < 0.1).astype(np.int64)
        return rng.integers(65, size=4)

    observations, _ = first.reset(seed=3)
    for _ in range(13):
        observations, *_ = first.step(actions())
    assert any(first.core.kept)
    state = pickle.loads(pickle.dumps(first.get_state()))
    kept = pickle.dumps(state)
    np.testing.assert_equal(without_handles(second.set_state(state)), without_handles(observations))
    for _ in range(20):
        action = actions()
        one, two = first.step(action), second.step(action)
        np.testing.assert_equal(without_handles(one[0]), without_handles(two[0]))
        for a, b in zip(one[1:4], two[1:4], strict=True):
            np.testing.assert_array_equal(a, b)
        for name in ("iou", "masks", "duplicates", "parts", "found", "source"):
            np.testing.assert_array_equal(one[4][name], two[4][name])
    assert pickle.dumps(state) == kept


def test_the_state_of_an_episode_is_complete(make_vec: Callable[..., Any]) -> None:
    core = make_vec(7).core
    with_a_row_per_env = {
        name
        for name, value in vars(core).items()
        if isinstance(value, np.ndarray | torch.Tensor) and len(value) == core.num_envs
    }
    assert with_a_row_per_env == {*EPISODE_ARRAYS, *RECOMPUTED}
