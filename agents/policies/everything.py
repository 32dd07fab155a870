"""The policy of `SamEverything-v0`."""

from __future__ import annotations

from typing import Any, cast

import gymnasium as gym
import torch
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn
from torch.nn import functional as F

from agents.policies.base import NEVER, POLICIES, Mixer, SamPolicy, StoredFeatures, pooled
from sam_gym.envs.everything import MAPS
from sam_gym.utils.settings import Count, checked


class EverythingFeatures(StoredFeatures):
    """Features of the policy: float32 (B, width, h, w), aligned with SAM's embedding.

    They mix the image embedding; the same outside of covered areas; the maps of kept masks; the
    fraction of each cell that was tried; and the fraction of the budget that is spent.

    Args:
        observation_space: of `SamEverything-v0`, with `obs="full"` or `obs="handle"`.
        backbone: arguments of `load_backbone`.
        budget: points per episode, to scale their number.
        width: feature channels.
    """

    @checked
    def __init__(
        self,
        observation_space: gym.spaces.Dict,
        backbone: dict[str, Any],
        budget: Count,
        width: Count = 48,
    ) -> None:
        super().__init__(observation_space, backbone, width)
        self.budget = budget
        self.reduce = nn.Conv2d(self.backbone.embedding_shape[0], width, 1)
        self.mix = Mixer(width, len(MAPS) + 2, width)

    def forward(self, observations: PyTorchObs) -> Tensor:
        assert isinstance(observations, dict)
        image = F.relu(self.reduce(self.embedding(observations)))
        maps = torch.cat([self.plane(observations, name) for name in MAPS], dim=1)
        tried = was_tried(observations).float()[:, None]
        used = observations["num_points"].reshape(-1, 1, 1, 1).float() / self.budget
        tried = F.adaptive_avg_pool2d(tried, self.cells)
        planes = torch.cat([maps, tried, used.expand(-1, 1, *self.cells)], dim=1)
        return self.mix(image, 1 - maps[:, :1], planes)


def was_tried(observations: dict[str, Tensor]) -> Tensor:
    """Return which cells of the grid were tried: bool (B, grid, grid)."""
    return observations["tried"] > 0


class PixelShuffleHead(nn.Module):
    """A logit per cell of a grid that may be finer than the features, and one for stop.

    Args:
        width: channels of the features.
        cells: rows and columns of the features.
        grid: rows and columns of the points.
        num_others: number of other choices: 1 with stop, or 0.
    """

    def __init__(self, width: int, cells: tuple[int, int], grid: int, num_others: int) -> None:
        super().__init__()
        self.grid = grid
        self.finer = max(1, -(-grid // min(cells)))
        self.points = nn.Conv2d(width, self.finer**2, 1)
        self.others = nn.Linear(2 * width, num_others) if num_others else None

    def forward(self, features: Tensor) -> Tensor:
        fine = F.pixel_shuffle(self.points(features), self.finer)
        points = F.adaptive_avg_pool2d(fine, self.grid).flatten(1)
        if self.others is None:
            return points
        return torch.cat([points, self.others(pooled(features))], dim=1)


@POLICIES.register("everything")
class EverythingPolicy(SamPolicy):
    """Chooses the next point, or stops, by SAM's embedding and the masks found so far.

    It never tries a point twice.

    Args:
        *args: as SB3 passes them.
        grid: points lie on grid x grid cells.
        stop: whether the last action ends the episode.
        **kwargs: as `SamPolicy` takes them; `features` has the arguments of `EverythingFeatures`.
    """

    extractor_class = EverythingFeatures
    arguments = (*SamPolicy.arguments, "grid", "stop")

    def __init__(self, *args: Any, grid: int, stop: bool, **kwargs: Any) -> None:
        self.grid, self.stop = grid, stop
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        width = self.features_dim
        self._build_mlp_extractor()
        cells = cast(EverythingFeatures, self.features_extractor).cells
        head = PixelShuffleHead(width, cells, self.grid, int(self.stop))
        self._build_heads(head, self.grid**2 + int(self.stop), lr_schedule)

    def _adjusted(self, logits: Tensor, obs: PyTorchObs) -> Tensor:
        tried = was_tried(cast(dict[str, Tensor], obs)).flatten(1)
        return torch.where(F.pad(tried, (0, int(self.stop))), NEVER, logits)

    def action_config(self, num_actions: int) -> dict[str, Any]:
        return {"grid": self.grid, "stop": self.stop, "actions": "points"}
