"""The contract of every registered environment."""

import copy
import itertools
import json
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3

from sam_gym import ENVIRONMENTS
from sam_gym.envs.click import ClickCore
from sam_gym.envs.everything import MAPS, EverythingCore
from sam_gym.envs.video import VideoCore

Make = Callable[..., Any]
MODES = list(AutoresetMode)

#: Warnings that the checkers may give, and why each is no defect.
ALLOWED_WARNINGS = {
    "A Box observation space minimum value is -infinity": "an embedding has no bounds",
    "A Box observation space maximum value is infinity": "an embedding has no bounds",
    "sam_image_embeddings is an image but its `dtype`": "SB3 takes every 3-D box for an image",
    "sam_image_embeddings is an image but the upper and lower bounds": "the same guess of SB3",
    "Treating image space as channels-last, while second dimension was": "the same guess of SB3",
    "The minimal resolution for an image is 36x36": "the same guess of SB3",
    "sam_pred_mask_prob has an unconventional shape": "a mask has two dimensions",
    "coverage has an unconventional shape": "a map has two dimensions",
    "overlap has an unconventional shape": "a map has two dimensions",
    "predicted_iou has an unconventional shape": "a map has two dimensions",
    "tried has an unconventional shape": "a map has two dimensions",
    "rivals has an unconventional shape": "a table has two dimensions",
    "places has an unconventional shape": "a table has two dimensions",
    "memories has an unconventional shape": "a table has two dimensions",
    "render_mode='human' shows nothing": "there is no display here",
}

#: Arguments of environments in place of those of `SamSeg-v0`; None: there is no such thing.
ARGUMENTS: dict[str, dict[str, Any]] = {
    # Eight small images in each of two domains that come and go.
    "SamContinual-v0": {
        "dataset_kwargs": {
            "stream_kwargs": {"domains": "cells,night", "train_images": 8, "size": 128},
            "episodes_per_domain": 2,
            "cycle": True,
            "observe_task": True,
        }
    },
    "SamEverything-v0": {
        "dataset_kwargs": lambda kwargs: {
            "dataset": "scenes",
            "dataset_kwargs": kwargs,
            "keep_iou": 0.0,
            "duplicate_iou": 0.97,
            "budget": 5,
        },
        # A checker wants more than one step, so the budget is that of several random sets.
        "target": lambda target: (
            {} if target == "category" else {"actions": "set", "grid": 8, "budget": 64}
        ),
        "max_steps": lambda steps: {"budget": steps},
        "click_cost": lambda cost: {"point_cost": cost},
        "undo": None,
    },
    "SamVideo-v0": {
        "target": lambda target: {} if target == "category" else {"prompt": "box", "task": "when"},
        "max_steps": lambda steps: {"frames": steps + 2},
        "stop": None,
        "undo": None,
    },
}


def as_of(env_id: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Translate arguments of `SamSeg-v0` to those of another environment."""
    translated: dict[str, Any] = {}
    others = ARGUMENTS.get(env_id, {})
    for name, value in settings.items():
        other = others.get(name, {name: value})
        translated |= (other(value) if callable(other) else other) or {}
    return translated


def random_actions(
    rng: np.random.Generator, space: gym.Space, count: int | tuple[int, ...]
) -> np.ndarray:
    """Sample actions of the space of one environment."""
    if isinstance(space, gym.spaces.Discrete):
        return rng.integers(space.n, size=count)
    shape = (count,) if isinstance(count, int) else count
    # Sets of no, one and many points.
    share = rng.choice([0.0, 1 / space.n, 0.5], size=(*shape, 1), p=[0.1, 0.6, 0.3])
    return (rng.random((*shape, space.n)) < share).astype(np.int8)


@pytest.fixture(params=sorted(ENVIRONMENTS))
def env_id(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def micro_env(
    micro_env: dict[str, Any], env_id: str, request: pytest.FixtureRequest
) -> dict[str, Any]:
    if env_id == "SamVideo-v0":
        return request.getfixturevalue("tiny_video_env")
    return as_of(env_id, micro_env)


@pytest.fixture
def tiny_env(
    tiny_env: dict[str, Any], env_id: str, request: pytest.FixtureRequest
) -> dict[str, Any]:
    if env_id == "SamVideo-v0":
        return request.getfixturevalue("tiny_video_env")
    return as_of(env_id, tiny_env)


@pytest.fixture(params=[("full", "category"), ("handle", "instance")], ids="-".join)
def variant(request: pytest.FixtureRequest, env_id: str) -> dict[str, Any]:
    obs, target = request.param
    return as_of(env_id, {"obs": obs, "target": target, "stop": True, "undo": True})


@pytest.fixture
def make(env_id: str, tiny_env: dict[str, Any]) -> Make:
    return lambda **more: gym.make(env_id, **{**tiny_env, **as_of(env_id, more)})


@pytest.fixture
def make_vec(env_id: str, tiny_env: dict[str, Any]) -> Make:
    def make_vec(mode: AutoresetMode, own: bool = True, **more: Any) -> VectorEnv:
        settings = {**tiny_env, "num_envs": 3, **as_of(env_id, more)}
        if own:
            return gym.make_vec(
                env_id,
                vectorization_mode="vector_entry_point",
                autoreset_mode=mode.value,
                **settings,
            )
        return gym.make_vec(
            env_id,
            vectorization_mode="sync",
            vector_kwargs={"autoreset_mode": mode},
            **settings,
        )

    return make_vec


def assert_equal(one: Any, other: Any, path: str = "") -> None:
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_equal(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, (tuple, list)) or getattr(one, "dtype", None) == np.dtype(object):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{path}/{i}")
    else:
        np.testing.assert_array_equal(one, other, err_msg=path)


def rollout(env: gym.Env, seed: int, steps: int, reset: bool = True) -> list[Any]:
    """Return the results of random actions, with a reset at the end of each episode."""
    actions = random_actions(np.random.default_rng(seed), env.action_space, steps)
    log: list[Any] = [env.reset(seed=seed)] if reset else []
    for action in actions:
        log.append(env.step(action))
        if log[-1][2] or log[-1][3]:
            log.append(env.reset())
    return log


# The checkers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant",
    list(itertools.product(("full", "handle"), ("category", "instance"))),
    ids="-".join,
    indirect=True,
)
@pytest.mark.parametrize("checker", [check_env, check_env_for_sb3], ids=["gymnasium", "sb3"])
def test_checkers_pass(
    checker: Callable[[gym.Env], None],
    env_id: str,
    variant: dict[str, Any],
    micro_env: dict[str, Any],
    no_display: None,
) -> None:
    env = gym.make(env_id, **{**micro_env, **variant})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checker(env.unwrapped)
    unexpected = {
        text
        for text in (str(warning.message) for warning in caught)
        if not any(allowed in text for allowed in ALLOWED_WARNINGS)
    }
    assert not unexpected


def test_returned_types_are_plain(make: Make, variant: dict[str, Any]) -> None:
    env = make(**variant).unwrapped
    for entry in rollout(env, seed=0, steps=12):
        obs, info = entry[0], entry[-1]
        assert env.observation_space.contains(obs)
        for value in info.values():
            assert isinstance(value, (str, int, float, np.generic))
        if len(entry) == 5:
            assert [type(item) for item in entry[1:4]] == [float, bool, bool]


# Determinism -----------------------------------------------------------------------------------


def test_same_seed_gives_the_same_numbers(make: Make, variant: dict[str, Any]) -> None:
    one, other = rollout(make(**variant), 5, 24), rollout(make(**variant), 5, 24)
    assert sum(len(entry) == 2 for entry in one) > 2  # several episodes
    assert_equal(one, other)


def test_seed_alone_decides(make: Make) -> None:
    env = make()
    first = rollout(env, 5, 15)
    np.random.seed(77)
    torch.manual_seed(77)
    assert_equal(rollout(env, 5, 15), first)
    assert not np.array_equal(rollout(env, 6, 15)[0][0]["image"], first[0][0]["image"])


@pytest.mark.parametrize("mode", MODES)
def test_same_seed_gives_the_same_numbers_in_a_vector(make_vec: Make, mode: AutoresetMode) -> None:
    # Episodes end, where that is followed by a reset.
    max_steps = 10 if mode == AutoresetMode.DISABLED else 4

    def log(seed: int) -> list[Any]:
        envs = make_vec(mode, max_steps=max_steps)
        entries: list[Any] = [envs.reset(seed=seed)]
        actions = random_actions(np.random.default_rng(0), envs.single_action_space, (8, 3))
        return entries + [envs.step(action) for action in actions]

    assert_equal(log(3), log(3))
    with pytest.raises(AssertionError):
        assert_equal(log(3), log(4))


# Specs, copies, pickles ------------------------------------------------------------------------


def test_spec_survives_json(env_id: str, make: Make, variant: dict[str, Any]) -> None:
    registered = gym.spec(env_id)
    assert EnvSpec.from_json(registered.to_json()) == registered

    env = make(**variant)
    text = env.spec.to_json()
    settings = json.loads(text)["kwargs"]
    assert settings.items() >= variant.items()
    again = gym.make(EnvSpec.from_json(text))
    assert json.loads(again.spec.to_json()) == json.loads(text)
    assert_equal(rollout(again, 1, 8), rollout(env, 1, 8))


def test_vector_spec_survives_json(make_vec: Make, variant: dict[str, Any]) -> None:
    envs = make_vec(AutoresetMode.SAME_STEP, **variant)
    again = gym.make_vec(EnvSpec.from_json(envs.spec.to_json()))
    assert (again.num_envs, again.metadata) == (3, envs.metadata)
    assert_equal(again.reset(seed=1), envs.reset(seed=1))


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_continues_alike_and_shares_the_model(
    make: Make, variant: dict[str, Any], clone: Callable[[gym.Env], gym.Env]
) -> None:
    env = make(max_steps=6, **variant)
    rollout(env, 2, 8)
    other = clone(env)
    assert other.unwrapped.core.backbone is env.unwrapped.core.backbone
    assert other.unwrapped.core.store is env.unwrapped.core.store
    expected = rollout(env, 3, 12, reset=False)
    env.close()
    assert_equal(rollout(other, 3, 12, reset=False), expected)


def test_pickle_holds_neither_model_nor_embeddings(env_id: str, micro_env: dict[str, Any]) -> None:
    env = gym.make(env_id, **micro_env)
    env.reset(seed=0)
    # The bounds of the spaces, an image with its masks, and a history of logits.
    size = len(pickle.dumps(env))
    assert size < 4 * 2**20
    for seed in range(8):
        env.reset(seed=seed)
    assert len(pickle.dumps(env)) < 1.1 * size
    copied = pickle.loads(pickle.dumps(env))
    assert_equal(copied.reset(seed=1), env.reset(seed=1))


def test_a_copied_vector_continues_alike(make_vec: Make, variant: dict[str, Any]) -> None:
    envs = make_vec(AutoresetMode.NEXT_STEP, **variant)
    envs.reset(seed=0)
    actions = random_actions(np.random.default_rng(0), envs.single_action_space, (12, 3))
    for action in actions[:7]:
        envs.step(action)
    other = pickle.loads(pickle.dumps(envs))
    expected = [envs.step(action) for action in actions]
    assert_equal([other.step(action) for action in actions], expected)


# Rendering -------------------------------------------------------------------------------------


def test_every_render_mode(make: Make, env_id: str, no_display: None) -> None:
    modes = make().metadata["render_modes"]
    assert set(modes) == {"rgb_array", "human"}
    env = make(render_mode="rgb_array", undo=True)
    env.reset(seed=0)
    frames = [env.render()]
    env.step(min(20, env.action_space.n - 1))
    frames.append(env.render())
    for frame in frames:
        assert isinstance(frame, np.ndarray)
        assert frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3
    assert (frames[0] != frames[1]).any()

    human = make(render_mode="human")
    with pytest.warns(UserWarning, match="'human' shows nothing: there is no display") as caught:
        human.reset(seed=0)
        human.step(min(20, env.action_space.n - 1))
        assert human.render() is None
    assert len(caught) == 1


def test_every_render_mode_of_a_vector(make_vec: Make, no_display: None) -> None:
    envs = make_vec(AutoresetMode.NEXT_STEP, render_mode="rgb_array")
    envs.reset(seed=0)
    frames = envs.render()
    assert isinstance(frames, tuple) and len(frames) == 3
    assert all(frame.dtype == np.uint8 and frame.shape[2] == 3 for frame in frames)
    assert (frames[0] != frames[1]).any()

    human = make_vec(AutoresetMode.NEXT_STEP, render_mode="human")
    with pytest.warns(UserWarning, match="'human' shows nothing: there is no display") as caught:
        human.reset(seed=0)
        human.step(np.array([1, 2, 3]))
        assert human.render() is None
    assert len(caught) == 1


def test_rendering_without_a_mode_is_a_warning(make: Make, make_vec: Make) -> None:
    env = make().unwrapped
    env.reset(seed=0)
    with pytest.warns(UserWarning, match=r'gym\.make\(\.\.\., render_mode="rgb_array"\)'):
        assert env.render() is None
    envs = make_vec(AutoresetMode.NEXT_STEP)
    with pytest.warns(UserWarning, match=r'gym\.make_vec\(\.\.\., render_mode="rgb_array"\)'):
        assert envs.render() is None


@pytest.mark.parametrize("number", [0, 1])
def test_unknown_render_mode(env_id: str, tiny_env: dict[str, Any], number: int) -> None:
    creator = gym.envs.registration.load_env_creator(ENVIRONMENTS[env_id][number])
    with pytest.raises(ValueError, match=r"Unknown render_mode 'rgb_aray'\. Did you mean 'rgb_arr"):
        creator(render_mode="rgb_aray", **tiny_env)


# The vector is the scalar, many times ----------------------------------------------------------


class Comparison:
    """Plays a vector environment and Gymnasium's own vector of scalar ones side by side.

    Decoding in one batch or alone differs by rounding, so a pixel whose logit is next to zero may
    fall on either side; `slack` is how much IoU such pixels of the episode can make up.
    """

    def __init__(self, own: VectorEnv, sync: SyncVectorEnv) -> None:
        self.own, self.sync = own, sync
        self.slack = np.zeros(own.num_envs)

    def reset(self, **arguments: Any) -> None:
        options = arguments.pop("options", None)
        self.slack[:] = 0
        one = self.own.reset(options=copy.deepcopy(options), **arguments)
        self.compare(one, self.sync.reset(options=copy.deepcopy(options), **arguments))

    def step(self, actions: np.ndarray) -> np.ndarray:
        one, other = self.own.step(actions), self.sync.step(actions)
        self.compare_masks()
        self.compare(one, other)
        return one[2] | one[3]

    def compare_masks(self) -> None:
        core = self.own.unwrapped.core
        for i, env in enumerate(self.sync.envs):
            alone = env.unwrapped.core
            assert core.steps[i] == alone.steps[0]
            if isinstance(core, VideoCore):
                unclear = self.unclear_video_pixels(core, alone, i)
                area = max(1, int(alone._truth[0, alone.now[0]].sum()))
            elif isinstance(core, EverythingCore):
                unclear = self.differing_pixels(core, alone, i)
                area = int(alone._objects[0].sum(dim=(1, 2))[: len(alone.targets[0].masks)].min())
            else:
                unclear = self.unclear_pixels(core, alone, i)
                area = int(alone._low_target[0].sum())
            self.slack[i] = max(self.slack[i], unclear / area)

    def differing_pixels(self, core: EverythingCore, alone: EverythingCore, i: int) -> int:
        together, expected = core.kept[i], alone.kept[0]
        assert [own.is_part for own in together] == [own.is_part for own in expected]
        predicted = [[own.predicted_iou for own in kept] for kept in (together, expected)]
        np.testing.assert_allclose(*predicted, atol=1e-4)
        count = len(expected)
        differing = int((core._masks[i, :count] != alone._masks[0, :count]).sum())
        assert differing <= count
        return differing

    def unclear_video_pixels(self, core: VideoCore, alone: VideoCore, i: int) -> int:
        np.testing.assert_array_equal(core.bank.frames[i], alone.bank.frames[0])
        together, expected = core.bank.logits[i], alone.bank.logits[0]
        limit = 1e-3 * float(expected.std())
        assert float((together - expected).abs().max()) <= limit
        return int((expected.abs() <= limit).sum()) if limit else 0

    def unclear_pixels(self, core: ClickCore, alone: ClickCore, i: int) -> int:
        assert core.num_clicks[i] == alone.num_clicks[0]
        together = core.logits[i, core.num_clicks[i]]
        expected = alone.logits[0, alone.num_clicks[0]]
        limit = 1e-4 * float(expected.std())
        assert float((together - expected).abs().max()) <= limit
        unclear = expected.abs() <= limit if limit else torch.zeros_like(expected, dtype=bool)
        assert torch.equal((together > 0)[~unclear], (expected > 0)[~unclear])
        return int(unclear.sum())

    def compare(self, one: Any, other: Any, name: str = "") -> None:
        if isinstance(one, dict):
            assert one.keys() == other.keys(), name
            for key in one:
                self.compare(one[key], other[key], key)
        elif isinstance(one, tuple):
            for i, (a, b) in enumerate(zip(one, other, strict=True)):
                self.compare(a, b, f"{name}{i}")
        elif name == "final_obs":
            for a, b in zip(one, other, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    self.compare(a, b)
        else:
            one, other = np.asarray(one), np.asarray(other)
            assert one.dtype == other.dtype and one.shape == other.shape, name
            if name in ("1", "iou", "dice", "gain", "sam2_iou"):  # 1 is the reward
                assert (np.abs(one - other) <= 4 * self.slack + 1e-9).all(), name
            elif name in MAPS and one.ndim > 1:
                differing = (np.abs(one - other.astype(float)) > 1e-3 * one.max(initial=1)).sum()
                assert differing <= 1e6 * self.slack.sum(), name
            elif name in ("places", "memories", "rivals"):
                np.testing.assert_allclose(one, other, atol=2e-3, err_msg=name)
            elif name == "predicted_iou":
                np.testing.assert_allclose(one, other, atol=1e-4, err_msg=name)
            elif name == "sam_pred_mask_prob":
                atol = 1e-3 if one.dtype == np.float32 else 1
                np.testing.assert_allclose(one.astype(float), other, atol=atol, err_msg=name)
            else:
                np.testing.assert_array_equal(one, other, err_msg=name)


def play_side_by_side(own: VectorEnv, sync: SyncVectorEnv, steps: int, seed: int) -> int:
    """Compare `steps` steps with clicks, stops and undos; returns how many episodes ended."""
    rng = np.random.default_rng(seed)
    game = Comparison(own, sync)
    game.reset(seed=10)
    space = own.single_action_space
    last = space.n - 1
    ended_episodes = 0
    disabled = own.metadata["autoreset_mode"] == AutoresetMode.DISABLED
    for step in range(steps):
        actions = random_actions(rng, space, own.num_envs)
        if isinstance(space, gym.spaces.Discrete):
            kind = rng.random(own.num_envs)
            actions[kind < 0.1], actions[kind > 0.8] = last - 1, last
        ended = game.step(actions)
        ended_episodes += int(ended.sum())
        if disabled and ended.any():
            game.reset(options={"reset_mask": ended})
        elif step % 25 == 10:
            game.reset()
        elif step % 25 == 20:
            game.reset(seed=[step, None, 7])
    return ended_episodes


# Each mode and each variant; all pairs would take much longer. SAME_STEP gives observations in
# two places, so it has both variants.
@pytest.mark.parametrize(
    ("mode", "variant"),
    [
        (AutoresetMode.NEXT_STEP, ("full", "category")),
        (AutoresetMode.SAME_STEP, ("full", "category")),
        (AutoresetMode.SAME_STEP, ("handle", "instance")),
        (AutoresetMode.DISABLED, ("handle", "instance")),
    ],
    ids=lambda own: own.value if isinstance(own, AutoresetMode) else "-".join(own),
    indirect=["variant"],
)
def test_vector_equals_scalars(
    env_id: str, make_vec: Make, variant: dict[str, Any], mode: AutoresetMode
) -> None:
    settings = {**variant, **as_of(env_id, {"max_steps": 6, "click_cost": 0.01})}
    own, sync = make_vec(mode, **settings), make_vec(mode, own=False, **settings)
    assert isinstance(sync, SyncVectorEnv) and not isinstance(own, SyncVectorEnv)
    assert own.single_observation_space == sync.single_observation_space
    assert own.observation_space == sync.observation_space
    assert own.action_space == sync.action_space
    # Steps of a video take several times as long, and there are more of them in an episode.
    steps, least = (22, 5) if env_id == "SamVideo-v0" else (32, 10)
    assert play_side_by_side(own, sync, steps, seed=MODES.index(mode)) > least


# The tests above play a video environment over a model of the same kind already.
@pytest.mark.parametrize("env_id", sorted({*ENVIRONMENTS} - {"SamVideo-v0"}), indirect=True)
@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_vector_equals_scalars_over_micro(
    env_id: str, make_vec: Make, micro_env: dict[str, Any], mode: AutoresetMode
) -> None:
    more = as_of(env_id, {"stop": True, "undo": True, "max_steps": 4})
    settings = {"backbone": "micro", **micro_env, **more}
    own, sync = make_vec(mode, **settings), make_vec(mode, own=False, **settings)
    assert play_side_by_side(own, sync, steps=22, seed=MODES.index(mode)) > 6


@pytest.mark.parametrize("obs", ["full", "handle"])
def test_bounds_of_a_batch_of_observations_take_the_memory_of_one(make_vec: Make, obs: str) -> None:
    env = make_vec(AutoresetMode.SAME_STEP, num_envs=5, obs=obs)
    single, batch = env.single_observation_space, env.observation_space
    assert batch == batch_space(single, 5) and batch.spaces.keys() == single.spaces.keys()
    observations, _ = env.reset(seed=0)
    assert observations in batch
    for name, own in batch.spaces.items():
        assert own.shape == (5, *single[name].shape) and own.dtype == single[name].dtype
        if isinstance(own, gym.spaces.Box) and own.shape[1:] != (1,):
            for bound in (own.low, own.high, own.bounded_below, own.bounded_above):
                assert held(bound) <= single[name].low.size * bound.itemsize
    expected = batch_space(single, 5)
    for space in (batch, expected):
        space.seed(3)
    for found, wanted in zip(batch.sample().values(), expected.sample().values(), strict=True):
        np.testing.assert_array_equal(found, wanted)
    again = pickle.loads(pickle.dumps(batch))
    assert again == batch == copy.deepcopy(batch)
    env.close()


def test_a_closed_environment_keeps_no_samples(make_vec: Make) -> None:
    env = make_vec(AutoresetMode.SAME_STEP)
    observations, _ = env.reset(seed=0)
    assert len(env.unwrapped.core.samples)
    env.close()
    assert not len(env.unwrapped.core.samples)
    again, _ = env.reset(seed=0)
    np.testing.assert_array_equal(again["image"], observations["image"])
    env.close()


def held(array: np.ndarray) -> int:
    """Bytes of memory that an array keeps."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.nbytes
