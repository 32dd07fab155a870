"""An environment from outside: a core, its two environments, and a registration."""

import copy
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

from sam_gym.backbones import Prompts
from sam_gym.data import Dataset, Sample
from sam_gym.envs.base_core import MAX_DRAWS, BaseCore, Draw
from sam_gym.envs.base_env import BaseEnv, BaseVectorEnv
from sam_gym.envs.config import DatasetConfig
from sam_gym.metrics.masks import batch_iou
from sam_gym.utils.render import draw_masks
from sam_gym.utils.transfer import to_device, to_host


@dataclass(frozen=True, kw_only=True)
class PointConfig(DatasetConfig):
    """Arguments of `Point-v0`."""

    max_points: int = 3
    """Points per episode."""

    @property
    def max_episode_steps(self) -> int:
        return self.max_points


class PointCore(BaseCore[PointConfig, Sample]):
    """Each point is decoded alone; the reward is the IoU of its mask with the target."""

    episode_arrays = ("steps", "ious")

    def __init__(self, config: PointConfig, num_envs: int, dataset: Dataset | None = None) -> None:
        super().__init__(config, num_envs, dataset)
        self.action_space = spaces.Discrete(config.grid**2)
        self.observation_space = spaces.Dict(
            self._image_spaces() | {"iou": spaces.Box(0, 1, (1,), np.float32)}
        )
        self.ious = np.zeros(num_envs)
        shape = (num_envs, *self.backbone.mask_shape)
        self._wanted = torch.zeros(shape, dtype=torch.bool, device=self.device)

    def _draw(self, rng: np.random.Generator, domain: int) -> Draw[Sample]:
        for _ in range(MAX_DRAWS):
            sample = self.samples[self._draw_image(rng, domain)[0]]
            number = int(rng.integers(len(sample.masks)))
            mask = self._low_res(sample.masks[number])
            if self._is_large_enough(mask):
                sample = replace(sample, masks=sample.masks[[number]])
                valid = self._low_res_valid(sample.image.shape[:2], sample.ignore)
                return Draw(sample, mask, valid)
        raise self._no_target_error(domain)

    def _begin(self, indices: Sequence[int], draws: Sequence[Draw[Sample]]) -> None:
        super()._begin(indices, draws)
        self.ious[indices] = 0
        masks = to_device(np.stack([draw.masks for draw in draws]), self.device)
        self._wanted[torch.as_tensor(list(indices))] = masks

    def check_actions(self, actions: np.ndarray) -> np.ndarray:
        if np.min(actions) < 0 or np.max(actions) >= self.action_space.n:
            raise ValueError(f"Actions are from 0 to {self.action_space.n - 1}, got {actions}.")
        return np.asarray(actions)

    def step(
        self, indices: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._check_not_over(indices)
        points = [
            self._clip_to_image(i, *self.centre_of(cell))
            for i, cell in zip(indices, actions, strict=True)
        ]
        prompts = Prompts(
            points=to_device(np.array(points, np.float32)[:, None], self.device),
            labels=torch.ones((len(indices), 1), dtype=torch.int64, device=self.device),
        )
        features = self.store.gather(to_device(self.handles[indices], self.device))
        ambiguous = torch.ones(len(indices), dtype=torch.bool, device=self.device)
        logits, _ = self.backbone.decode_best(features, prompts, ambiguous)
        wanted = self._wanted[to_device(indices, self.device)]
        self.ious[indices] = to_host(batch_iou(logits > 0, wanted))[0]
        self.steps[indices] += 1
        return self.ious[indices].copy(), np.zeros(len(indices), bool), self._is_over(indices)

    def _entries(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return super()._entries(indices) | {"iou": self.ious[indices, None].astype(np.float32)}

    def info(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        sources = [self.ground_truth(i).source for i in indices]
        return {"iou": self.ious[indices].copy(), "source": np.array(sources, object)}

    def render(self, env_index: int, height: int = 384) -> np.ndarray:
        target = self.ground_truth(env_index)
        return draw_masks(target.image, target.masks, [], height=height)


class PointEnv(BaseEnv):
    """Find the target with single points."""

    env_id, config_class, core_class = "Point-v0", PointConfig, PointCore


class PointVectorEnv(BaseVectorEnv):
    """`Point-v0` in a batch."""

    env_id, config_class, core_class = "Point-v0", PointConfig, PointCore


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    gym.register(
        "Point-v0",
        entry_point=f"{__name__}:PointEnv",
        vector_entry_point=f"{__name__}:PointVectorEnv",
    )
    yield
    del gym.registry["Point-v0"]


def test_the_scalar_environment_passes_gymnasiums_check(tiny_env: dict[str, Any]) -> None:
    env = gym.make("Point-v0", render_mode="rgb_array", **tiny_env)
    check_env(env.unwrapped, skip_render_check=True)
    assert env.unwrapped.render().shape[2] == 3
    with pytest.raises(ValueError, match=r"Unknown argument of Point-v0 'max_point'\. Did you"):
        gym.make("Point-v0", max_point=2, **tiny_env)


def test_the_vector_environment_plays_as_the_scalar_one(tiny_env: dict[str, Any]) -> None:
    make = {"num_envs": 3, "vectorization_mode": "vector_entry_point"}
    envs = gym.make_vec("Point-v0", **make, **tiny_env)
    env = gym.make("Point-v0", **tiny_env)
    together, _ = envs.reset(seed=4)
    alone, _ = env.reset(seed=6)
    for cell in (40, 130, 200):
        np.testing.assert_array_equal(together["image"][2], alone["image"])
        together, rewards, _, truncated, infos = envs.step(np.array([0, 90, cell]))
        alone, reward, _, _, info = env.step(cell)
        assert rewards[2] == pytest.approx(reward, abs=1e-6)
        assert infos["source"][2] == info["source"]
    assert truncated.all() and rewards.max() > 0


def test_states_and_copies_continue_the_same_way(tiny_env: dict[str, Any]) -> None:
    make = {"num_envs": 2, "vectorization_mode": "vector_entry_point"}
    envs = gym.make_vec("Point-v0", **make, **tiny_env).unwrapped
    envs.reset(seed=1)
    envs.step(np.array([100, 150]))
    others = [gym.make_vec("Point-v0", **make, **tiny_env).unwrapped]
    others[0].set_state(pickle.loads(pickle.dumps(envs.get_state())))
    others += [pickle.loads(pickle.dumps(envs)), copy.deepcopy(envs)]
    for action in ([120, 130], [7, 8], [90, 91]):
        _, rewards, _, _, infos = envs.step(np.array(action))
        for other in others:
            _, same, _, _, theirs = other.step(np.array(action))
            np.testing.assert_allclose(same, rewards, atol=1e-6)
            assert theirs["source"].tolist() == infos["source"].tolist()
