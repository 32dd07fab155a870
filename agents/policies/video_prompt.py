"""The policy of the task `prompt` of `SamVideo-v0`."""

from __future__ import annotations

from typing import Any, cast

import gymnasium as gym
import torch
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn
from torch.nn import functional as F

from agents.policies.base import NEVER, POLICIES, Mixer, SamPolicy, StoredFeatures, pooled
from sam_gym.envs.video import FRAME_COLUMNS
from sam_gym.envs.video.prompt import STOP
from sam_gym.utils.settings import Count, checked


class ClipFeatures(StoredFeatures):
    """Features of each frame of a clip: float32 (B, T, width, h, w).

    They mix the frame's embedding, its mask, its clicks, and what is known of it, with the mean and
    the maximum over all frames.

    Args:
        observation_space: of the task `prompt`, with `obs="full"` or `obs="handle"`.
        backbone: arguments of `load_backbone`.
        width: feature channels.
    """

    @checked
    def __init__(
        self, observation_space: gym.spaces.Dict, backbone: dict[str, Any], width: Count = 32
    ) -> None:
        super().__init__(observation_space, backbone, width)
        frames = observation_space["frames"].shape
        assert frames is not None
        self.position = nn.Parameter(torch.zeros(frames[0], width))
        self.reduce = nn.Conv2d(self.backbone.embedding_shape[0], width, 1)
        # The mask, clicks of both signs, what is known of a frame, and the budget.
        self.mix = Mixer(width, 4 + len(FRAME_COLUMNS), width)
        self.between = nn.Linear(4 * width, width)

    def embedding(self, observations: dict[str, Tensor]) -> Tensor:
        """Return the embeddings of all frames: (B * T, C, h, w)."""
        if "handle" in observations:
            return self.store.gather(observations["handle"].flatten(), "embedding")
        return observations["sam_image_embeddings"].flatten(0, 1)

    def forward(self, observations: PyTorchObs) -> Tensor:
        assert isinstance(observations, dict)
        known = observations["frames"].float()
        count, length = known.shape[:2]
        masks = observations["sam_pred_mask_prob"].float().flatten(0, 1)
        masks = masks / 255.0 if "handle" in observations else masks
        masks = F.adaptive_avg_pool2d(masks, self.cells)
        clicks = observations["clicks"].float().flatten(0, 1)
        clicks = F.adaptive_max_pool2d(clicks, self.cells)
        budget = observations["budget"].float()[:, None].expand(-1, length, -1)
        scalars = torch.cat([known, budget], dim=2).flatten(0, 1)[..., None, None]
        planes = torch.cat([masks, clicks, scalars.expand(-1, -1, *self.cells)], dim=1)
        image = F.relu(self.reduce(self.embedding(observations)))
        features = self.mix(image, masks, planes).unflatten(0, (count, length))
        pooled = torch.cat([features.mean(dim=(3, 4)), features.amax(dim=(3, 4))], dim=2)
        exists = known[..., :1]
        mean = (pooled * exists).sum(dim=1, keepdim=True) / exists.sum(dim=1, keepdim=True)
        context = torch.cat([pooled, mean.expand_as(pooled)], dim=2)
        context = self.between(context) + self.position
        return F.relu(features + context[..., None, None])


class ClipHead(nn.Module):
    """A logit for each frame, cell and sign, and one for stop: (B, T * grid * grid * 2 + 1).

    Args:
        width: channels of the features.
        grid: rows and columns of the clicks.
    """

    def __init__(self, width: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.signs, self.stop = nn.Conv2d(width, 2, 1), nn.Linear(2 * width, 1)

    def forward(self, features: Tensor) -> Tensor:
        clicks = self.signs(features.flatten(0, 1))
        if clicks.shape[-2:] != (self.grid, self.grid):
            clicks = F.interpolate(clicks, (self.grid, self.grid), mode="bilinear")
        clicks = clicks.unflatten(0, features.shape[:2]).permute(0, 1, 3, 4, 2).flatten(1)
        return torch.cat([clicks, self.stop(pooled(features))], dim=1)


@POLICIES.register("video_prompt")
class VideoPromptPolicy(SamPolicy):
    """Chooses the next click among all cells of all frames of a clip, or stops.

    It never clicks a cell twice with the same sign.

    Args:
        *args: as SB3 passes them.
        grid: clicks lie on grid x grid cells.
        **kwargs: as `SamPolicy` takes them; `features` has the arguments of `ClipFeatures`.
    """

    extractor_class = ClipFeatures
    arguments = (*SamPolicy.arguments, "grid")

    def __init__(self, *args: Any, grid: int, **kwargs: Any) -> None:
        self.grid = grid
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        self._build_mlp_extractor()
        frames, cells, _ = cast(gym.spaces.MultiDiscrete, self.action_space).nvec.tolist()
        #: Number of clicks: the number of the choice to stop.
        self.num_clicks = 2 * frames * cells
        head = ClipHead(self.features_dim, self.grid)
        self._build_heads(head, self.num_clicks + 1, lr_schedule)

    def _adjusted(self, logits: Tensor, obs: PyTorchObs) -> Tensor:
        own = cast(dict[str, Tensor], obs)
        clicked = own["clicks"].permute(0, 1, 3, 4, 2).flatten(2) > 0
        exists = own["frames"][..., :1] > 0
        impossible = (clicked | ~exists).flatten(1)
        return torch.where(F.pad(impossible, (0, 1)), NEVER, logits)

    def _to_actions(self, choices: Tensor, obs: PyTorchObs) -> Tensor:
        cells = self.grid**2
        parts = [choices // (2 * cells), choices // 2 % cells, choices % 2]
        stop = choices.new_tensor([0, 0, STOP])
        is_stop = choices == self.num_clicks
        return torch.where(is_stop[:, None], stop, torch.stack(parts, dim=1))

    def _to_choices(self, actions: Tensor) -> Tensor:
        frame, cell, kind = actions.long().unbind(dim=1)
        click = (frame * self.grid**2 + cell) * 2 + kind
        return torch.where(kind == STOP, self.num_clicks, click)

    def action_config(self, num_actions: int) -> dict[str, Any]:
        return {"task": "prompt", "grid": self.grid}

    def obs_to_tensor(self, observation: Any) -> tuple[PyTorchObs, bool]:
        is_batch = observation["frames"].ndim > 2 if "frames" in observation else True
        if is_batch:
            return super().obs_to_tensor(observation)
        one = {name: value[None] for name, value in observation.items()}
        return super().obs_to_tensor(one)[0], False
