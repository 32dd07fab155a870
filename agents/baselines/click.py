"""Baselines of the click task."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from agents.baselines.base import Agent, Baseline
from sam_gym.envs.click import ClickCore
from sam_gym.simulation.clicks import error_click, point_grid
from sam_gym.utils.registry import Registry

#: Baseline name -> class, which takes a seed.
BASELINES: Registry[Callable[[int], Agent]] = Registry("baseline of the click task")


@BASELINES.register("random")
class RandomAgent(Baseline):
    """Clicks uniformly at random, positive or negative."""

    def act(self, core: ClickCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        return self.rng.integers(2 * core.config.grid**2, size=core.num_envs)


@BASELINES.register("center")
class CenterAgent(Baseline):
    """Repeats a positive click at the centre of the frame."""

    def act(self, core: ClickCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        middle = (core.backbone.image_size - 1) / 2
        return np.full(core.num_envs, core.action_at(middle, middle, True))


@BASELINES.register("confident")
class ConfidentAgent(Baseline):
    """Plays the positive click, of a coarse grid, whose mask has the highest predicted IoU."""

    slow = True
    tries = 6

    @torch.no_grad()
    def act(self, core: ClickCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        size = core.backbone.image_size
        points = point_grid(self.tries, self.tries, size, size)
        candidates = np.array([core.action_at(x, y, True) for x, y in points])
        actions = np.full(core.num_envs, candidates[0])
        rows = core.playing()
        predicted = []
        step = core.previews_at_once(len(rows))
        for some in (candidates[k : k + step] for k in range(0, len(candidates), step)):
            scores = core.preview_scores(np.tile(rows, len(some)), some.repeat(len(rows)))
            predicted.append(scores.reshape(len(some), -1).cpu().numpy())
        actions[rows] = candidates[np.concatenate(predicted).argmax(axis=0)]
        return actions


@BASELINES.register("oracle")
class OracleAgent(Baseline):
    """Reads the ground truth: plays the grid click nearest to the standard simulated click.

    The click stays in the region of the simulated one. The result is a reference that grid clicks
    can reach, not an upper bound.
    """

    def act(self, core: ClickCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        return np.array([self._click(core, i) for i in range(core.num_envs)])

    def _click(self, core: ClickCore, env_index: int) -> int:
        truth = core.ground_truth(env_index)
        mask = core.mask(env_index)
        click = error_click(truth.mask, mask, None, truth.ignore)
        if click is None:
            return core.stop_action if core.stop_action >= 0 else core.action_at(0, 0, False)
        region = truth.mask & ~mask if click.positive else mask & ~truth.mask
        cells = core.config.grid**2
        actions = np.arange(cells) + (0 if click.positive else cells)
        places = [core.click_of(int(action)) for action in actions]
        pixels = np.array([core.to_image(env_index, x, y) for x, y, _ in places])
        distance = np.hypot(*(pixels - [click.x, click.y]).T)
        inside = region[pixels[:, 1], pixels[:, 0]]
        if inside.any():
            distance[~inside] = np.inf
        return int(actions[distance.argmin()])
