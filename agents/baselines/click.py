"""Baselines of the click task."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from agents.baselines.base import Agent
from sam_gym.backbones import NO_POINT, Prompts
from sam_gym.envs.click import ClickCore
from sam_gym.simulation.clicks import error_click, point_grid
from sam_gym.utils.registry import Registry

#: Baseline name -> class, which takes a seed.
BASELINES: Registry[Callable[[int], Agent]] = Registry("baseline of the click task")


@BASELINES.register("random")
class RandomAgent:
    """Clicks anywhere, positive or negative."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)

    def act(self, core: ClickCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        return self.rng.integers(2 * core.config.grid**2, size=core.num_envs)


@BASELINES.register("center")
class CenterAgent:
    """Clicks the middle of the frame, positive, again and again."""

    def __init__(self, seed: int = 0) -> None:
        del seed

    def act(self, core: ClickCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        middle = (core.backbone.image_size - 1) / 2
        return np.full(core.num_envs, core.action_at(middle, middle, True))


@BASELINES.register("confident")
class ConfidentAgent:
    """Tries a coarse grid of positive clicks and plays the one whose mask SAM trusts most."""

    tries = 6

    def __init__(self, seed: int = 0) -> None:
        del seed

    @torch.no_grad()
    def act(self, core: ClickCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        size = core.backbone.image_size
        candidates = [
            core.action_at(x, y, True) for x, y in point_grid(self.tries, self.tries, size, size)
        ]
        # One try at a time over all slots keeps the memory of a step that of a normal one.
        trust = np.stack([self._predicted_iou(core, action) for action in candidates])
        return np.array(candidates)[trust.argmax(axis=0)]

    def _predicted_iou(self, core: ClickCore, action: int) -> np.ndarray:
        slots = np.arange(core.num_envs)
        x, y, positive = core.click_of(action)
        count = core.num_clicks
        used = int(count.max()) + 1
        points = np.zeros((core.num_envs, used, 2), np.float32)
        points[:, : used - 1] = core.points[:, : used - 1]
        labels = np.full((core.num_envs, used), NO_POINT)
        labels[:, : used - 1] = core.labels[:, : used - 1]
        points[slots, count], labels[slots, count] = (x, y), int(positive)
        device = core.device
        first = torch.from_numpy(count == 0).to(device)
        prompts = Prompts(
            points=torch.from_numpy(points).to(device),
            labels=torch.from_numpy(labels).to(device),
            masks=core.logits[torch.from_numpy(slots), torch.from_numpy(count)],
            has_mask=~first,
        )
        embeddings = core.store.gather(torch.from_numpy(core.handles))
        return core.backbone.decode_best(embeddings, prompts, first)[1].cpu().numpy()


@BASELINES.register("oracle")
class OracleAgent:
    """Sees the ground truth: the grid click nearest the standard simulated click, in its region.

    A reference that grid clicks can reach, not a proven upper bound.
    """

    def __init__(self, seed: int = 0) -> None:
        del seed

    def act(self, core: ClickCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        return np.array([self._click(core, slot) for slot in range(core.num_envs)])

    def _click(self, core: ClickCore, slot: int) -> int:
        truth = core.ground_truth(slot)
        mask = core.mask(slot)
        click = error_click(truth.mask, mask, None, truth.ignore)
        if click is None:
            return core.stop_action if core.stop_action >= 0 else core.action_at(0, 0, False)
        region = truth.mask & ~mask if click.positive else mask & ~truth.mask
        cells = core.config.grid**2
        actions = np.arange(cells) + (0 if click.positive else cells)
        places = [core.click_of(int(action)) for action in actions]
        pixels = np.array([core.to_image(slot, x, y) for x, y, _ in places])
        distance = np.hypot(*(pixels - [click.x, click.y]).T)
        inside = region[pixels[:, 1], pixels[:, 0]]
        if inside.any():
            distance[~inside] = np.inf
        return int(actions[distance.argmin()])
