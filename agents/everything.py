"""Agents for `SamEverything-v0`: the policy `everything`, and baselines that learn nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn
from torch.nn import functional as F

from agents.baselines import Agent
from agents.policies.base import (
    NEVER,
    POLICIES,
    SamPolicy,
    SplitFeatures,
    StoredFeatures,
    pooled,
)
from sam_gym.backbones import Prompts
from sam_gym.envs.everything import FOUND_IOU, MAPS, EverythingConfig, EverythingCore
from sam_gym.metrics.panoptic import matched_ious
from sam_gym.simulation.clicks import interior_distance, point_grid
from sam_gym.utils.registry import Registry
from sam_gym.utils.transfer import to_device, to_host

# The policy ------------------------------------------------------------------------------------


class EverythingFeatures(StoredFeatures):
    """What the policy sees: float32 (B, width, h, w), aligned with SAM's embedding.

    The image embedding, alone and where nothing is covered yet; the maps of what was kept; how
    much of each cell was tried; and the share of the budget that is used up.

    Args:
        observation_space: of `SamEverything-v0`, with `obs="full"` or `obs="handle"`.
        backbone: name, checkpoint, device and dtype of the SAM, as `load_backbone` takes them.
        budget: points per episode, to scale their number.
        width: feature channels.
    """

    def __init__(
        self,
        observation_space: gym.spaces.Dict,
        backbone: dict[str, Any],
        budget: int,
        width: int = 48,
    ) -> None:
        super().__init__(observation_space, backbone, width)
        self.budget = budget
        self.reduce = nn.Conv2d(self.backbone.embedding_shape[0], width, 1)
        self.mix = nn.Sequential(
            nn.Conv2d(2 * width + len(MAPS) + 2, width, 1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
        )

    def forward(self, observations: PyTorchObs) -> Tensor:
        assert isinstance(observations, dict)
        image = F.relu(self.reduce(self.embedding(observations)))
        maps = torch.cat([self.plane(observations, name) for name in MAPS], dim=1)
        tried = was_tried(observations).float()[:, None]
        used = observations["num_points"].reshape(-1, 1, 1, 1).float() / self.budget
        planes = [
            *(image, image * (1 - maps[:, :1]), maps),
            F.adaptive_avg_pool2d(tried, self.cells),
            used.expand(-1, 1, *self.cells),
        ]
        return self.mix(torch.cat(planes, dim=1))


def was_tried(observations: dict[str, Tensor]) -> Tensor:
    """Which cells of the grid were tried, of either observation form: bool (B, grid, grid)."""
    return observations["tried"] > 0


class PixelShuffleHead(nn.Module):
    """A logit for every cell of a grid that may be finer than the features; stop from all of them.

    Args:
        width: channels of the features.
        cells: rows and columns of the features.
        grid: rows and columns of the points.
        num_others: choices beyond points: stop, or none.
    """

    def __init__(self, width: int, cells: tuple[int, int], grid: int, num_others: int) -> None:
        super().__init__()
        self.grid = grid
        self.finer = max(1, -(-grid // min(cells)))
        self.points = nn.Conv2d(width, self.finer**2, 1)
        self.others = nn.Linear(2 * width, num_others) if num_others else None

    def last_layers(self) -> list[nn.Module]:
        """The layers that give the logits."""
        return [self.points] if self.others is None else [self.points, self.others]

    def forward(self, features: Tensor) -> Tensor:
        fine = F.pixel_shuffle(self.points(features), self.finer)
        points = F.adaptive_avg_pool2d(fine, self.grid).flatten(1)
        if self.others is None:
            return points
        return torch.cat([points, self.others(pooled(features))], dim=1)


@POLICIES.register("everything")
class EverythingPolicy(SamPolicy):
    """Chooses the next point, or to stop, by SAM's embedding and what was found so far.

    A point that was tried is never chosen again.

    Args:
        observation_space, action_space, lr_schedule: as SB3 passes them.
        features: arguments of `EverythingFeatures`.
        grid: points lie on grid x grid cells.
        stop: whether the last action ends the episode.
        **kwargs: as `SamPolicy` takes them.
    """

    extractor_class = EverythingFeatures
    arguments = (*SamPolicy.arguments, "grid", "stop")

    def __init__(
        self,
        observation_space: gym.spaces.Dict,
        action_space: gym.spaces.Discrete,
        lr_schedule: Schedule,
        *,
        features: dict[str, Any],
        grid: int,
        stop: bool,
        **kwargs: Any,
    ) -> None:
        self.grid, self.stop = grid, stop
        super().__init__(observation_space, action_space, lr_schedule, features=features, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        width = self.features_dim
        self.mlp_extractor = SplitFeatures(width)  # type: ignore[assignment]
        cells = cast(EverythingFeatures, self.features_extractor).cells
        head = PixelShuffleHead(width, cells, self.grid, int(self.stop))
        self._build_heads(head, self.grid**2 + int(self.stop), lr_schedule)

    def _allowed(self, logits: Tensor, obs: PyTorchObs) -> Tensor:
        tried = was_tried(cast(dict[str, Tensor], obs)).flatten(1)
        return torch.where(F.pad(tried, (0, int(self.stop))), NEVER, logits)

    def played_with(self, num_actions: int) -> dict[str, Any]:
        del num_actions
        return {"grid": self.grid, "stop": self.stop, "actions": "points"}


def policy_arguments(settings: EverythingConfig, backbone: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `EverythingPolicy` for the settings of an environment.

    Args:
        settings: of the environment.
        backbone: its SAM, as `load_backbone` takes it.

    Raises:
        ValueError: the environment takes sets of points.
    """
    if settings.actions != "points":
        raise ValueError(
            f"actions={settings.actions!r}: PPO chooses one point in a step. Leave it at points."
        )
    return {
        "features": {"backbone": backbone, "budget": settings.budget},
        "grid": settings.grid,
        "stop": settings.stop,
    }


# Baselines -------------------------------------------------------------------------------------

#: Baseline name -> class; each is made with a seed.
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

    def rules(self, settings: EverythingConfig) -> EverythingConfig:
        """The settings under which it plays."""
        return replace(settings, actions="set", budget=settings.grid**2)

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


def compared_with_grid(results: dict[str, Any], agents: Iterable[str]) -> None:
    """Add to the results of agents how they compare with those of the full grid.

    Args:
        results: summaries by name, "grid" among them; each gets `share_of_grid_iou` and
            `share_of_grid_points`.
        agents: names of those to compare.
    """
    grid = results["grid"]
    for name in agents:
        own = results[name]
        for share, number in (("iou", "mean_iou"), ("points", "mean_points")):
            whole = grid[number]
            own[f"share_of_grid_{share}"] = round(own[number] / whole, 4) if whole else 0.0
