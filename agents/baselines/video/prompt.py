"""Baselines of the task `prompt` of `SamVideo-v0`: which frame of a clip to click, and where."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from agents.baselines.base import Agent, Baseline
from sam_gym.envs.video import PromptCore
from sam_gym.envs.video.prompt import POSITIVE
from sam_gym.simulation.clicks import interior_distance
from sam_gym.utils.registry import Registry
from sam_gym.utils.transfer import to_host

#: Baseline name -> class, which takes a seed.
PROMPT: Registry[Callable[[int], Agent]] = Registry("baseline of the task prompt")


@PROMPT.register("sam2")
class NoClicks(Baseline):
    """SAM 2 alone: stops at once."""

    def act(self, core: PromptCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        return np.tile(core.sam2_action, (core.num_envs, 1))


@PROMPT.register("random")
class RandomClicks(Baseline):
    """Clicks random cells of random frames, of either sign."""

    def act(self, core: PromptCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        _, cells, _ = core.action_space.nvec
        parts = [self.rng.integers(count, size=core.num_envs) for count in (cells, 2)]
        return np.stack([self.rng.integers(core.lengths), *parts], axis=1)


class _Inside(Baseline):
    """Clicks the middle of the mask in frames that a subclass chooses: positive, unseen."""

    def act(self, core: PromptCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        return np.array([self._click(core, i) for i in range(core.num_envs)])

    def _click(self, core: PromptCore, row: int) -> tuple[int, int, int]:
        frame = self._frame(core, row)
        (logits,) = to_host(core.logits[row, frame])
        mask = logits > core.backbone.mask_threshold
        # Where nothing was found, the most likely place.
        inner = interior_distance(mask) if mask.any() else logits
        y, x = divmod(int(inner.argmax()), mask.shape[1])
        side = core.backbone.image_size / mask.shape[1]
        return frame, core.cell_at((x + 0.5) * side - 0.5, (y + 0.5) * side - 0.5), POSITIVE

    def _frame(self, core: PromptCore, row: int) -> int:
        raise NotImplementedError


def _spaced(core: PromptCore, row: int) -> int:
    """Return the next of frames at equal distances."""
    share = (core.steps[row] + 1) / (core.config.budget + 1)
    return min(round(share * core.lengths[row]), int(core.lengths[row]) - 1)


@PROMPT.register("spaced")
class SpacedFrames(_Inside):
    """Confirms the mask, by a click in its middle, in frames at equal distances."""

    def _frame(self, core: PromptCore, row: int) -> int:
        return _spaced(core, row)


@PROMPT.register("uncertain")
class UncertainFrames(_Inside):
    """Confirms the mask, by a click in its middle, in the frame of the lowest predicted IoU."""

    def _frame(self, core: PromptCore, row: int) -> int:
        ious = core.ious[row, : core.lengths[row]].copy()
        ious[core.session.conditioned(row)] = np.inf
        return int(ious.argmin())


class _OnErrors(Baseline):
    """Reads the ground truth: clicks the error of a frame that a subclass chooses."""

    def act(self, core: PromptCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        clicks = [core.error_in(i, self._frame(core, i)) for i in range(core.num_envs)]
        return np.array([core.sam2_action if own is None else own for own in clicks])

    def _frame(self, core: PromptCore, row: int) -> int:
        raise NotImplementedError


@PROMPT.register("oracle_spaced")
class OracleSpaced(_OnErrors):
    """Reads the ground truth: clicks errors of frames at equal distances."""

    def _frame(self, core: PromptCore, row: int) -> int:
        return _spaced(core, row)


@PROMPT.register("oracle_worst")
class OracleWorst(_OnErrors):
    """Reads the ground truth: clicks the error of the worst frame."""

    def _frame(self, core: PromptCore, row: int) -> int:
        return int(np.nan_to_num(core.js[row], nan=np.inf).argmin())


@PROMPT.register("oracle")
class Oracle(Baseline):
    """Reads the ground truth: the click that pays most, of those on errors of a few frames.

    It tries the worst frames, and looks one click ahead; it stops where none pays. The result is a
    reference, not an upper bound.
    """

    slow = True
    #: Number of frames that are tried.
    tried = 3

    def act(self, core: PromptCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        actions = np.tile(core.sam2_action, (core.num_envs, 1))
        best = core.mean_js(core.js) + core.config.click_cost
        worst = np.nan_to_num(core.js, nan=np.inf).argsort(axis=1)[:, : self.tried]
        over = core.stopped | (core.steps >= core.config.budget)
        for frames in worst.T:
            clicks = {
                row: click
                for row, frame in enumerate(frames.tolist())
                if not over[row] and (click := core.error_in(row, frame)) is not None
            }
            if not clicks:
                continue
            rows, candidates = np.array(list(clicks)), np.stack(list(clicks.values()))
            js = core.try_clicks(rows, candidates)
            better = js > best[rows]
            best[rows[better]], actions[rows[better]] = js[better], candidates[better]
        return actions
