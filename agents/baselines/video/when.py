"""Baselines of the task `when` of `SamVideo-v0`: in which frames to buy a click."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from agents.baselines.base import Agent, Baseline
from sam_gym.envs.video import PLACE_COLUMNS, WhenCore
from sam_gym.utils.registry import Registry

#: Baseline name -> class, which takes a seed.
WHEN: Registry[Callable[[int], Agent]] = Registry("baseline of the task when")

_IOU, _PRESENCE = (PLACE_COLUMNS.index(name) for name in ("predicted_iou", "presence"))


@WHEN.register("sam2")
class NoClicks(Baseline):
    """SAM 2 alone: buys nothing."""

    def act(self, core: WhenCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        return np.full(core.num_envs, core.sam2_action)


@WHEN.register("random")
class RandomFrames(Baseline):
    """Buys clicks in random frames, at the rate that spends the budget by the end."""

    def act(self, core: WhenCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        clicks = core.config.budget - core.num_clicks
        frames = np.maximum(core.lengths - 1 - core.now, 1)
        return (self.rng.random(core.num_envs) * frames < clicks).astype(np.int64)


@WHEN.register("first")
class FirstFrames(Baseline):
    """Spends the budget in the first frame that it can."""

    def act(self, core: WhenCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        return np.ones(core.num_envs, np.int64)


@WHEN.register("spaced")
class SpacedFrames(Baseline):
    """Buys clicks at equal distances."""

    def act(self, core: WhenCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        due = (core.num_clicks + 1) * (core.lengths - 1) / (core.config.budget + 1)
        return ((core.num_clicks < core.config.budget) & (core.now >= due)).astype(np.int64)


@WHEN.register("uncertain")
class UncertainFrames(Baseline):
    """Buys a click where the predicted IoU or the object score is low, one in a frame."""

    #: Minimum predicted IoU, and minimum probability that the object is in the frame.
    thresholds = 0.7, 0.5

    def act(self, core: WhenCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        present = observations["places"][:, -1]
        is_bad = (present[:, [_IOU, _PRESENCE]] < self.thresholds).any(axis=1)
        return (is_bad & (core.num_here == 0)).astype(np.int64)


@WHEN.register("oracle_worst")
class OracleWorst(Baseline):
    """Reads the ground truth: buys a click in each of the frames that SAM 2 alone finds worst."""

    def act(self, core: WhenCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        js = np.nan_to_num(core.reference_js, nan=np.inf)
        # No click is sold in the last frame, where the video is over.
        js[np.arange(core.num_envs), core.lengths - 1] = np.inf
        rank = js.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
        chosen = rank[np.arange(core.num_envs), core.now] < core.config.budget
        return (chosen & (core.num_here == 0)).astype(np.int64)


@WHEN.register("oracle")
class Oracle(Baseline):
    """Reads the ground truth: buys each click that pays in its own frame.

    It tries the click, and does not look at the frames that follow. The result is a reference, not
    an upper bound.
    """

    slow = True

    def act(self, core: WhenCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        rows = np.arange(core.num_envs)
        gains = core.click_gains(rows) / core.num_scored(rows)
        return (gains > core.config.click_cost).astype(np.int64)
