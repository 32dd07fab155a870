"""The task `memory` of `SamVideo-v0`: decide which frames a tracker remembers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from gymnasium import spaces

from sam_gym.data import VideoDataset
from sam_gym.envs.base_core import Draw
from sam_gym.envs.video.config import SamVideoConfig
from sam_gym.envs.video.core import VideoTarget
from sam_gym.envs.video.frames import FrameByFrameCore
from sam_gym.utils.transfer import to_device


class MemoryCore(FrameByFrameCore):
    """Keep the present frame in place of a memory, or do not; arguments as for `BaseCore`."""

    episode_arrays: tuple[str, ...] = (*FrameByFrameCore.episode_arrays, "num_kept")
    reported = ("sam2_iou", "gain", "kept")

    def __init__(
        self, config: SamVideoConfig, num_envs: int, dataset: VideoDataset | None = None
    ) -> None:
        super().__init__(config, num_envs, dataset)
        self.action_space = spaces.Discrete(self.bank.num_slots + 1)
        #: The oldest memory goes.
        self.sam2_action = self.bank.num_slots
        #: Number of frames that were kept.
        self.num_kept = np.zeros(num_envs, np.int64)

    def _begin(self, indices: Sequence[int], draws: Sequence[Draw[VideoTarget]]) -> None:
        super()._begin(indices, draws)
        self.num_kept[np.asarray(indices)] = 0

    @property
    def _named_actions(self) -> str:
        last = self.bank.num_slots
        return f"0 (keep nothing) to {last} (overwrite the memory in slot {last})"

    def keys(self) -> dict[str, int]:
        return {str(action): action for action in range(min(self.bank.num_slots + 1, 10))}

    def step(
        self, indices: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._check_not_over(indices)
        keeping = actions > 0
        if keeping.any():
            self.bank.keep(indices[keeping], actions[keeping] - 1)
            self.num_kept[indices[keeping]] += 1
        self.steps[indices] += 1
        self._go_on(indices)
        self._track(indices)
        frames = self.now[indices]
        gain = self.js[indices, frames] - self.reference_js[indices, frames]
        # The video is over, and nothing follows: this is no time limit.
        return np.nan_to_num(gain), self._is_over(indices), np.zeros(len(indices), bool)

    @torch.no_grad()
    def next_js(self, indices: np.ndarray) -> np.ndarray:
        """Return J of the next frame after each action, float64 (S, A). Only for oracles."""
        choices = self.bank.num_slots + 1
        rows = np.arange(len(indices) * choices)
        actions = rows % choices
        bank = self.bank.copy(indices, choices)
        bank.keep(rows[actions > 0], actions[actions > 0] - 1)
        each = np.repeat(indices, choices)
        # An episode that is over, and waits for its reset, has no next frame.
        following = np.minimum(self.now + 1, self.lengths - 1)
        now = following[each]
        next_frames = [self._target(i).at(int(following[i])) for i in indices.tolist()]
        repeated = to_device(np.repeat(np.arange(len(indices)), choices), self.device)
        features, lengths = self._features(next_frames), self.lengths[each]
        logits = bank.find(rows, features, now, lengths, repeated).entry.logits
        index = to_device(each, self.device)
        truth = self._truth[index, to_device(now, self.device)]
        targets = [target for target in next_frames for _ in range(choices)]
        js = self._score(logits, truth, self._valid[index], targets)
        return np.nan_to_num(js).reshape(len(indices), choices)

    def info(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        return super().info(indices) | {"kept": self.num_kept[np.asarray(indices)]}

    def _describe(self, env_index: int) -> str:
        kept = self.bank.frames[env_index, self.bank.slots]
        return f"memory {' '.join(str(frame) for frame in kept.tolist() if frame >= 0)}"
