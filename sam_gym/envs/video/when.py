"""The task `when` of `SamVideo-v0`: decide in which frames a click is bought."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from sam_gym.backbones.prompts import NO_POINT, Prompts
from sam_gym.backbones.video.unroll import LIMIT
from sam_gym.data import VideoDataset
from sam_gym.envs.base_core import Draw
from sam_gym.envs.video.config import SamVideoConfig
from sam_gym.envs.video.core import VideoTarget
from sam_gym.envs.video.frames import FrameByFrameCore
from sam_gym.simulation.clicks import error_click
from sam_gym.utils.transfer import to_device


class WhenCore(FrameByFrameCore):
    """Go on to the next frame, or buy a click in the present one; arguments as for `BaseCore`.

    Memories and clicks are those of `VideoTracker`: the latest frames are remembered, and a frame
    with clicks becomes a conditioning frame.
    """

    episode_arrays: tuple[str, ...] = (
        *FrameByFrameCore.episode_arrays,
        "num_clicks",
        "num_here",
        "points",
        "labels",
    )
    reported = ("sam2_iou", "gain", "clicks")
    sam2_action = 0

    def __init__(
        self, config: SamVideoConfig, num_envs: int, dataset: VideoDataset | None = None
    ) -> None:
        super().__init__(config, num_envs, dataset, num_prompted=1 + config.budget)
        self.action_space = spaces.Discrete(2)
        self.observation_space["budget"] = spaces.Box(0, 1, (1,), np.float32)
        #: Number of clicks bought, and of those in the present frame.
        self.num_clicks, self.num_here = np.zeros((2, num_envs), np.int64)
        #: Clicks in the present frame, in pixels of the input frame.
        self.points = np.zeros((num_envs, config.budget, 2), np.float32)
        self.labels = np.full((num_envs, config.budget), NO_POINT, np.int64)

    def _begin(self, indices: Sequence[int], draws: Sequence[Draw[VideoTarget]]) -> None:
        rows = np.asarray(indices)
        self.num_clicks[rows] = 0
        self._forget_clicks(rows)
        super()._begin(indices, draws)

    def _forget_clicks(self, rows: np.ndarray) -> None:
        self.num_here[rows], self.labels[rows] = 0, NO_POINT

    @property
    def now(self) -> np.ndarray:
        return self.steps + 1 - self.num_clicks

    @property
    def _named_actions(self) -> str:
        return "0 (go on) or 1 (buy a click)"

    def keys(self) -> dict[str, int]:
        return {"0": 0, "1": 1}

    # Steps -------------------------------------------------------------------------------------

    def step(
        self, indices: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._check_not_over(indices)
        buys = (actions == 1) & (self.num_clicks[indices] < self.config.budget)
        rewards = np.zeros(len(indices))
        if buys.any():
            rewards[buys] = self._buy(indices[buys])
        if not buys.all():
            rewards[~buys] = self._advance(indices[~buys])
        # The video is over, and nothing follows: this is no time limit.
        return rewards, self._is_over(indices), np.zeros(len(indices), bool)

    def _buy(self, indices: np.ndarray) -> np.ndarray:
        """Buy a click for each of some objects; returns the rewards."""
        now = self.now[indices]
        before = self.js[indices, now]
        clicked = self._click(indices)
        self.steps[indices] += 1
        self.num_clicks[indices] += 1
        if clicked.any():
            own = indices[clicked]
            self._judge(own, self.bank.track(*self._correction(own)).entry.logits)
        gain = np.nan_to_num(self.js[indices, now] - before)
        return gain / self.num_scored(indices) - self.config.click_cost

    def _advance(self, indices: np.ndarray) -> np.ndarray:
        """Go on to the next frame, and track objects there; returns the rewards."""
        clicked = self.num_here[indices] > 0
        prompted, others = indices[clicked], indices[~clicked]
        if len(prompted):
            self.bank.keep_prompted(prompted)
        if len(others):
            self.bank.keep(others, np.full(len(others), self.bank.num_slots - 1))
        self._forget_clicks(indices)
        self.steps[indices] += 1
        self._go_on(indices)
        self._track(indices)
        frames = self.now[indices]
        gain = self.js[indices, frames] - self.reference_js[indices, frames]
        return np.nan_to_num(gain) / self.num_scored(indices)

    def num_scored(self, indices: np.ndarray) -> np.ndarray:
        """Return the number of frames that count, at least 1: int64 (S,)."""
        known = ~np.isnan(self.reference_js[indices])
        return np.maximum(known.sum(axis=1), 1)

    # Clicks ------------------------------------------------------------------------------------

    def _click(self, indices: np.ndarray) -> np.ndarray:
        """Place a click on the error of each present mask: whether there is one, bool (S,)."""
        found = np.zeros(len(indices), bool)
        for row, i in enumerate(indices.tolist()):
            target, count = self._target(i), self.num_here[i]
            if not target.annotated[target.now]:
                continue
            clicked = np.zeros(target.size, bool)
            own = np.rint(self.points[i, :count] / self.scale_of(target.size)).astype(int)
            clicked[own[:, 1], own[:, 0]] = True
            click = error_click(target.mask, self.mask(i), clicked)
            if click is None:
                continue
            self.points[i, count] = np.array(click[:2]) * self.scale_of(target.size)
            self.labels[i, count] = int(click.positive)
            self.num_here[i] += 1
            found[row] = True
        return found

    def _correction(self, indices: np.ndarray) -> tuple[Any, ...]:
        """Return the arguments of `MemoryBank.find` for the clicks in the present frames."""
        index = to_device(indices, self.device)
        prompts = Prompts(
            to_device(self.points[indices], self.device),
            to_device(self.labels[indices], self.device),
            masks=self.bank.logits[index].clamp(-LIMIT, LIMIT),
        )
        features = self.store.gather(to_device(self.handles[indices], self.device), check=False)
        # A single click is ambiguous.
        several = to_device(self.num_here[indices] == 1, self.device)
        now, lengths = self.now[indices], self.lengths[indices]
        return indices, features, now, lengths, None, prompts, several

    @torch.no_grad()
    def click_gains(self, indices: np.ndarray) -> np.ndarray:
        """Return what a click would add to J of the present frame, float64 (S,). Only for oracles.

        0 where none is left, or nothing is wrong or known.
        """
        saved = self.points.copy(), self.labels.copy(), self.num_here.copy()
        gains = np.zeros(len(indices))
        able = (self.num_clicks[indices] < self.config.budget) & ~self._is_over(indices)
        able[able] = self._click(indices[able])
        if able.any():
            own = indices[able]
            logits = self.bank.find(*self._correction(own)).entry.logits
            gains[able] = self._present_js(own, logits) - self.js[own, self.now[own]]
        self.points, self.labels, self.num_here = saved
        return gains

    # Observations ------------------------------------------------------------------------------

    def _entries(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        left = 1 - self.num_clicks[indices] / self.config.budget
        return super()._entries(indices) | {"budget": left.astype(np.float32)[:, None]}

    def info(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        return super().info(indices) | {"clicks": self.num_clicks[np.asarray(indices)]}

    def _describe(self, env_index: int) -> str:
        return f"clicks {self.num_clicks[env_index]}"
