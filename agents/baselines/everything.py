"""Baselines of `SamEverything-v0`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from agents.baselines.base import Agent
from sam_gym.backbones import Prompts
from sam_gym.envs.everything import FOUND_IOU, EverythingConfig, EverythingCore
from sam_gym.metrics.panoptic import matched_ious
from sam_gym.simulation.clicks import interior_distance, point_grid
from sam_gym.utils.registry import Registry
from sam_gym.utils.transfer import to_device, to_host

#: Baseline name -> class, which takes a seed.
BASELINES: Registry[Callable[[int], Agent]] = Registry("baseline of SamEverything-v0")


def _left(core: EverythingCore) -> np.ndarray:
    """Which cells of each slot were not tried yet: bool (num_envs, grid * grid)."""
    return ~core.tried(np.arange(core.num_envs)).reshape(core.num_envs, -1)


def _nothing_more(core: EverythingCore, left: np.ndarray) -> int:
    """The action of an agent that knows no good point: stop, or else a point not tried yet."""
    return core.stop_action if core.stop_action >= 0 else int(left.argmax())


@BASELINES.register("random")
class RandomPoints:
    """Tries points anywhere, none of them twice, until the budget is used up."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)

    def act(self, core: EverythingCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        left = _left(core)
        return np.where(left, self.rng.random(left.shape), -1.0).argmax(axis=1)


@BASELINES.register("grid")
class FullGrid:
    """Tries all points of the grid at once, whatever the budget: the reference for quality."""

    def __init__(self, seed: int = 0) -> None:
        del seed

    def env_config_for(self, env_config: EverythingConfig) -> EverythingConfig:
        """Return the config with sets of points and a budget for the whole grid."""
        return replace(env_config, actions="set", budget=env_config.grid**2)

    def act(self, core: EverythingCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        return np.ones((core.num_envs, core.config.grid**2), np.int64)


@BASELINES.register("greedy")
class Greedy:
    """Tries the point of the highest predicted IoU outside of what is covered.

    SAM's predicted IoU is looked up on a coarse grid, which it decodes once per image; these
    prompts do not count as points, so it is no cheap agent.
    """

    #: Rows and columns of the coarse grid.
    tries = 16

    def __init__(self, seed: int = 0) -> None:
        del seed
        self._trust: dict[str, np.ndarray] = {}

    @torch.no_grad()
    def act(self, core: EverythingCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        size = core.backbone.image_size
        points = point_grid(self.tries, self.tries, size, size)
        cells = np.array([core.cell_at(x, y) for x, y in points])
        left, covered = _left(core), self._covered(core, cells)
        actions = []
        for slot in range(core.num_envs):
            trust = self._predicted_ious(core, slot, points)
            is_open: np.ndarray = ~covered[slot] & left[slot, cells]
            is_open &= trust >= core.config.keep_iou
            best = int(np.where(is_open, trust, -np.inf).argmax())
            actions.append(int(cells[best]) if is_open.any() else _nothing_more(core, left[slot]))
        return np.array(actions)

    def _covered(self, core: EverythingCore, cells: np.ndarray) -> np.ndarray:
        """Whether something was kept at the centres of some cells: bool (num_envs, K)."""
        grid, (height, width) = core.config.grid, core.backbone.mask_shape
        ys = ((cells // grid + 0.5) * height / grid).astype(int)
        xs = ((cells % grid + 0.5) * width / grid).astype(int)
        return np.stack([core.coverage(slot)[ys, xs] for slot in range(core.num_envs)])

    def _predicted_ious(self, core: EverythingCore, slot: int, points: np.ndarray) -> np.ndarray:
        """SAM's predicted IoU of the mask of each point float32 (K, 2), from the image's cache."""
        source = core.ground_truth(slot).source
        if source not in self._trust:
            device, count = core.device, len(points)
            prompts = Prompts(
                points=to_device(points[:, None], device),
                labels=torch.ones((count, 1), dtype=torch.int64, device=device),
                rows=torch.zeros(count, dtype=torch.int64, device=device),
            )
            embedding = core.store.gather(to_device(core.handles[slot : slot + 1], device))
            ambiguous = torch.ones(count, dtype=torch.bool, device=device)
            _, trust = core.backbone.decode_best(embedding, prompts, ambiguous)
            (self._trust[source],) = to_host(trust)
        return self._trust[source]


@BASELINES.register("oracle")
class Oracle:
    """Sees the ground truth: the point deepest inside an object not found yet, far from all tried.

    Deep is what is far from the object's border and from every point tried so far. Where it cannot
    stop once everything is found, it looks for better masks of all objects. A reference that points
    can reach, not a proven upper bound.
    """

    def __init__(self, seed: int = 0) -> None:
        del seed
        self._pixels: dict[tuple[int, ...], np.ndarray] = {}

    def act(self, core: EverythingCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        left = _left(core)
        return np.array([self._point(core, slot, left[slot]) for slot in range(core.num_envs)])

    def _point(self, core: EverythingCore, slot: int, left: np.ndarray) -> int:
        masks, kept = core.ground_truth(slot).masks, core.kept[slot]
        missing = np.ones(len(masks), bool)
        if kept:
            matched = matched_ious(np.stack([own.overlaps for own in kept]))
            missing = matched < FOUND_IOU
        if not missing.any() and core.stop_action < 0:
            missing[:] = True
        shape = (*masks.shape[1:], core.config.grid)
        if shape not in self._pixels:
            cells = range(core.config.grid**2)
            self._pixels[shape] = np.array([core.pixel_of(slot, cell) for cell in cells])
        pixels = self._pixels[shape]
        depth = np.zeros(len(pixels))
        for mask in masks[missing]:
            depth = np.maximum(depth, interior_distance(mask)[pixels[:, 1], pixels[:, 0]])
        for tried in pixels[~left]:
            depth = np.minimum(depth, np.hypot(*(pixels - tried).T))
        best = int(np.where(left, depth, 0.0).argmax())
        return best if left[best] and depth[best] > 0 else _nothing_more(core, left)
