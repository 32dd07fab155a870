"""Reward functions by name, each over a batch of transitions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sam_gym.utils.registry import Registry


@dataclass(frozen=True)
class Transition:
    """N transitions of the click task; all arrays are (N,).

    Attributes:
        is_click: bool, false for `stop` and `undo`.
        positive: bool, whether the click is positive.
        on_target: bool, whether the clicked pixel belongs to the target.
        distance: float32, distance to the nearest earlier click, in units of the frame's side;
            infinite for a first click.
        iou_before, iou_after: float32, IoU with the target.
    """

    is_click: np.ndarray
    positive: np.ndarray
    on_target: np.ndarray
    distance: np.ndarray
    iou_before: np.ndarray
    iou_after: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """Whether clicks are positive on the target, or negative off it: bool (N,)."""
        return self.positive == self.on_target

    @property
    def dice_gain(self) -> np.ndarray:
        """Gain in the Dice coefficient: float32 (N,)."""
        after = 2 * self.iou_after / (1 + self.iou_after)
        return after - 2 * self.iou_before / (1 + self.iou_before)


Reward = Callable[[Transition], np.ndarray]


def _adopt(found: Any, name: str) -> Reward:
    if not callable(found) or isinstance(found, type):
        raise ValueError(f"The reward {name!r} is no function of a Transition, got {found!r}.")
    reward: Reward = found
    return reward


#: Reward name -> function from N transitions to float (N,); "module:function" is a name, too.
REWARDS: Registry[Reward] = Registry("reward", _adopt)


def register_reward(name: str, reward: Reward) -> Reward:
    """Add a reward of the click task, so that `reward=` takes its name in this process.

    Worker processes (`AsyncVectorEnv`, `SubprocVecEnv`, torchrun) know it if they import the module
    that calls this; `reward="module:function"` works in all processes without registration.

    Args:
        name: the name.
        reward: function from a `Transition` of N steps to the reward of each, float (N,).

    Raises:
        ValueError: the name is taken.
    """
    return REWARDS.add(name, reward)


def checked_rewards(rewards: Any, name: str, count: int) -> np.ndarray:
    """Return what a reward function has returned, as an array.

    Args:
        rewards: float (count,).
        name: of the reward, for the error.
        count: number of transitions.

    Raises:
        ValueError: it has another shape, or values that are not finite numbers.
    """
    values = np.asarray(rewards)
    if values.shape != (count,):
        raise ValueError(
            f"The reward {name!r} returned the shape {values.shape}, expected ({count},): a number "
            "for each transition."
        )
    if values.dtype.kind not in "biuf" or not np.isfinite(values).all():
        raise ValueError(f"The reward {name!r} returned values that are no finite numbers.")
    return values


@REWARDS.register("iou_gain")
def iou_gain(t: Transition) -> np.ndarray:
    """Gain in IoU; the rewards of an episode sum to its final IoU."""
    return t.iou_after - t.iou_before


@REWARDS.register("dice_gain")
def dice_gain(t: Transition) -> np.ndarray:
    """Gain in the Dice coefficient."""
    return t.dice_gain


@REWARDS.register("click_correct")
def click_correct(t: Transition) -> np.ndarray:
    """+1 for a click with the correct label, -1 for a wrong one."""
    return np.where(t.is_click, np.where(t.correct, 1.0, -1.0), 0.0)


@REWARDS.register("foreground")
def foreground(t: Transition) -> np.ndarray:
    """+1 for a click on the target, -1 elsewhere, regardless of its label.

    For agents that choose only the location (AlignSAM, Huang et al. 2024).
    """
    return np.where(t.is_click, np.where(t.on_target, 1.0, -1.0), 0.0)


@REWARDS.register("shaped")
def shaped(t: Transition) -> np.ndarray:
    """Shaped click correctness, as in AlignSAM's public reimplementation.

    A correct positive click earns 1, scaled down within a tenth of the frame from an earlier click
    (in proportion to the distance). A correct negative click earns its gain in Dice, at least 0. A
    wrong positive click costs 1, a wrong negative click 0.5.
    """
    novelty = np.clip(t.distance / 0.1, 0.0, 1.0)
    right = np.where(t.positive, novelty, np.maximum(t.dice_gain, 0.0))
    wrong = np.where(t.positive, -1.0, -0.5)
    return np.where(t.is_click, np.where(t.correct, right, wrong), 0.0)
