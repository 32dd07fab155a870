"""Baselines of `SamEverything-v0`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from agents.baselines.base import Agent, Baseline
from sam_gym.backbones import Prompts
from sam_gym.envs.everything import FOUND_IOU, EverythingConfig, EverythingCore
from sam_gym.metrics.panoptic import matched_ious
from sam_gym.simulation.clicks import interior_distance, point_grid
from sam_gym.utils.registry import Registry
from sam_gym.utils.transfer import to_device, to_host

#: Baseline name -> class, which takes a seed.
BASELINES: Registry[Callable[[int], Agent]] = Registry("baseline of SamEverything-v0")


def _left(core: EverythingCore) -> np.ndarray:
    """Return the untried cells of each sub-environment: bool (num_envs, grid * grid)."""
    return ~core.tried(np.arange(core.num_envs)).reshape(core.num_envs, -1)


def _nothing_more(core: EverythingCore, left: np.ndarray) -> int:
    """Return the action of an agent without a good point: stop, or else an untried point."""
    return core.stop_action if core.stop_action >= 0 else int(left.argmax())


@BASELINES.register("random")
class RandomPoints(Baseline):
    """Tries untried points at random until the budget is spent."""

    def act(self, core: EverythingCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        left = _left(core)
        return np.where(left, self.rng.random(left.shape), -1.0).argmax(axis=1)


@BASELINES.register("grid")
class FullGrid(Baseline):
    """Tries all points of the grid at once, beyond the budget: the reference for quality."""

    def env_config_for(self, env_config: EverythingConfig) -> EverythingConfig:
        """Return the config with sets of points and a budget for the whole grid."""
        return replace(env_config, actions="set", budget=env_config.grid**2)

    def act(self, core: EverythingCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        return np.ones((core.num_envs, core.config.grid**2), np.int64)


@BASELINES.register("greedy")
class Greedy(Baseline):
    """Tries the point with the highest predicted IoU outside of covered areas.

    It decodes a coarse grid once per image. These prompts do not count as points, so the agent is
    not cheap.
    """

    #: Rows and columns of the coarse grid.
    tries = 16

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        #: Source of an image -> predicted IoU of each point of the coarse grid.
        self.predicted_ious: dict[str, np.ndarray] = {}

    @torch.no_grad()
    def act(self, core: EverythingCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        size = core.backbone.image_size
        points = point_grid(self.tries, self.tries, size, size)
        cells = np.array([core.cell_at(x, y) for x, y in points])
        left, covered = _left(core), self._covered(core, cells)
        actions = []
        for i in range(core.num_envs):
            predicted = self._predict(core, i, points)
            is_open: np.ndarray = ~covered[i] & left[i, cells]
            is_open &= predicted >= core.config.keep_iou
            best = int(np.where(is_open, predicted, -np.inf).argmax())
            actions.append(int(cells[best]) if is_open.any() else _nothing_more(core, left[i]))
        return np.array(actions)

    def _covered(self, core: EverythingCore, cells: np.ndarray) -> np.ndarray:
        """Return whether kept masks cover the centres of some cells: bool (num_envs, K)."""
        grid, (height, width) = core.config.grid, core.backbone.mask_shape
        ys = ((cells // grid + 0.5) * height / grid).astype(int)
        xs = ((cells % grid + 0.5) * width / grid).astype(int)
        return np.stack([core.coverage(i)[ys, xs] for i in range(core.num_envs)])

    def _predict(self, core: EverythingCore, env_index: int, points: np.ndarray) -> np.ndarray:
        """Return the predicted IoU of points float32 (K, 2), computed once per image."""
        source = core.ground_truth(env_index).source
        if source not in self.predicted_ious:
            device, count = core.device, len(points)
            prompts = Prompts(
                points=to_device(points[:, None], device),
                labels=torch.ones((count, 1), dtype=torch.int64, device=device),
                rows=torch.zeros(count, dtype=torch.int64, device=device),
            )
            handle = to_device(core.handles[env_index : env_index + 1], device)
            embedding = core.store.gather(handle)
            ambiguous = torch.ones(count, dtype=torch.bool, device=device)
            predicted = core.backbone.predict_iou(embedding, prompts, ambiguous)
            (self.predicted_ious[source],) = to_host(predicted)
        return self.predicted_ious[source]


@BASELINES.register("oracle")
class Oracle(Baseline):
    """Reads the ground truth: tries the point deepest inside an object that is not found yet.

    Depth is the distance to the object's border and to every tried point. Without the stop action
    it looks for better masks once everything is found. The result is a reference that points can
    reach, not an upper bound.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._pixels: dict[tuple[int, ...], np.ndarray] = {}

    def act(self, core: EverythingCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        left = _left(core)
        return np.array([self._point(core, i, left[i]) for i in range(core.num_envs)])

    def _point(self, core: EverythingCore, env_index: int, left: np.ndarray) -> int:
        masks, kept = core.ground_truth(env_index).masks, core.kept[env_index]
        missing = np.ones(len(masks), bool)
        if kept:
            matched = matched_ious(np.stack([own.overlaps for own in kept]))
            missing = matched < FOUND_IOU
        if not missing.any() and core.stop_action < 0:
            missing[:] = True
        shape = (*masks.shape[1:], core.config.grid)
        if shape not in self._pixels:
            cells = range(core.config.grid**2)
            self._pixels[shape] = np.array([core.pixel_of(env_index, cell) for cell in cells])
        pixels = self._pixels[shape]
        depth = np.zeros(len(pixels))
        for mask in masks[missing]:
            depth = np.maximum(depth, interior_distance(mask)[pixels[:, 1], pixels[:, 0]])
        for tried in pixels[~left]:
            depth = np.minimum(depth, np.hypot(*(pixels - tried).T))
        best = int(np.where(left, depth, 0.0).argmax())
        return best if left[best] and depth[best] > 0 else _nothing_more(core, left)
