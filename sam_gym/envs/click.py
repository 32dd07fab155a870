"""`SamSeg-v0`: segment a target by clicking a Segment Anything Model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from torch.nn import functional as F

from sam_gym.backbones import NO_POINT, Prompts
from sam_gym.data import Dataset
from sam_gym.data.base import select_categories
from sam_gym.envs.base_core import BaseCore, DatasetConfig, EnvConfig, check_choice
from sam_gym.envs.base_env import BaseEnv, BaseVectorEnv, make_settings
from sam_gym.envs.rewards import REWARDS, Transition
from sam_gym.metrics import masks as metrics
from sam_gym.utils.transfer import to_device, to_host

#: Arrays of a `ClickCore` with a row per slot that say how far its episode is. `get_state` takes
#: these and the mask logits; targets and embeddings come back by drawing them once more.
EPISODE_ARRAYS = ("steps", "num_clicks", "points", "labels", "ious", "predicted_ious", "shown")


@dataclass(frozen=True)
class ClickConfig(EnvConfig):
    """Settings of clicking, whatever the images; a subclass says what those are."""

    target: Literal["category", "instance"] = "category"
    """What to segment: all instances of a category, or one instance shown by a cue click."""
    reward: str = "iou_gain"
    """Reward name: iou_gain, dice_gain, click_correct, foreground, shaped."""
    max_steps: int = 5
    """Actions per episode, after which it is truncated."""
    iou_target: float | None = None
    """End the episode as soon as the true IoU reaches this."""
    stop: bool = False
    """Add an action that ends the episode."""
    undo: bool = False
    """Add an action that takes the last click back."""
    keep_best: bool = False
    """Keep the earlier mask when a click yields one of lower predicted IoU."""
    click_cost: float = 0.0
    """Subtracted from the reward of every click and undo."""
    score: Literal["low", "full"] = "low"
    """Compute the IoU on SAM's low-res mask, or at the size of the image (slower)."""

    def validate(self) -> None:
        super().validate()
        check_choice("target", self.target, ("category", "instance"))
        check_choice("score", self.score, ("low", "full"))
        REWARDS.get(self.reward)
        if not 1 <= self.max_steps <= 100:
            raise ValueError(f"max_steps must be from 1 to 100, got {self.max_steps}.")
        if self.iou_target is not None and not 0 < self.iou_target <= 1:
            raise ValueError(f"iou_target must be in (0, 1], got {self.iou_target}.")

    @property
    def longest(self) -> int:
        return self.max_steps

    def asked_categories(self, names: Sequence[str]) -> list[int]:
        """Numbers of the categories, of all `names`, that are asked for; none if any may be."""
        del names
        return []


@dataclass(frozen=True)
class SamSegConfig(ClickConfig, DatasetConfig):
    """Settings of `SamSeg-v0`, all JSON-plain."""

    target_categories: str | None = None
    """Comma-separated categories that are asked for (default: all that are in an image)."""

    def asked_categories(self, names: Sequence[str]) -> list[int]:
        if self.target_categories is None:
            return []
        return [names.index(k) for k in select_categories(self.target_categories, names)]


@dataclass
class ClickTarget:
    """What one slot is about: the sample, the mask to find and how it is named."""

    image: np.ndarray
    mask: np.ndarray
    ignore: np.ndarray | None
    category: int
    source: str
    cue: tuple[int, int] | None
    digest: bytes | None = None


class ClickCore(BaseCore[ClickConfig, ClickTarget]):
    """The click task in `num_envs` slots that share one `decode` per step.

    State of a slot: its target, the clicks so far, and after each click the mask logits and their
    predicted IoU. `undo` forgets the last entry.

    Args:
        config: the settings.
        num_envs: how many episodes run side by side.
        dataset: instead of the one that the settings name.

    Raises:
        ValueError, FileNotFoundError: a setting, the dataset or the checkpoint is wrong.
    """

    episode_arrays: tuple[str, ...] = EPISODE_ARRAYS
    reported = ("clicks",)
    action_space: spaces.Discrete

    def __init__(self, config: ClickConfig, num_envs: int, dataset: Dataset | None = None) -> None:
        super().__init__(config, num_envs, dataset)
        self._reward = REWARDS.get(config.reward)
        self.asked = config.asked_categories(self.dataset.categories)

        cells = config.grid**2
        self.stop_action = 2 * cells if config.stop else -1
        self.undo_action = 2 * cells + int(config.stop) if config.undo else -1
        self.action_space = spaces.Discrete(2 * cells + int(config.stop) + int(config.undo))
        self.observation_space = self._make_observation_space()

        mask_shape, steps = self.backbone.mask_shape, config.max_steps
        self.num_clicks = np.zeros(num_envs, np.int64)
        self.points = np.zeros((num_envs, steps, 2), np.float32)
        self.labels = np.full((num_envs, steps), NO_POINT, np.int64)
        self.ious = np.zeros((num_envs, steps + 1))
        self.predicted_ious = np.zeros((num_envs, steps + 1), np.float32)
        # Entry 0 of a history is the empty mask before the first click.
        self.logits = torch.full((num_envs, steps + 1, *mask_shape), -20.0, device=self.device)
        self._low_target = torch.zeros(
            (num_envs, *mask_shape), dtype=torch.bool, device=self.device
        )
        self._low_valid = torch.ones_like(self._low_target)
        self._nothing = to_host(self._shown(self.logits[:1, 0]))[0]
        #: What an observation shows of the current mask of each slot.
        self.shown = np.repeat(self._nothing, num_envs, axis=0)

    def _make_observation_space(self) -> spaces.Dict:
        config, backbone = self.config, self.backbone
        _, height, width = backbone.embedding_shape
        entries: dict[str, spaces.Space] = {
            "target_category": spaces.Discrete(len(self.dataset.categories)),
            "num_steps": spaces.Discrete(config.max_steps + 1),
            **self._image_spaces(),
        }
        if config.obs == "full":
            entries["sam_pred_mask_prob"] = spaces.Box(0, 1, backbone.mask_shape, np.float32)
        else:
            entries["sam_pred_mask_prob"] = spaces.Box(0, 255, (height, width), np.uint8)
        if config.target == "instance":
            entries["cue_click"] = spaces.Box(0, 1, (2,), np.float32)
        return spaces.Dict(entries)

    def soft_targets(self, cells: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The targets of all slots on a coarse grid, for those who learn from them.

        Args:
            cells: rows and columns of the grid.

        Returns:
            The share of what is scored of each cell that belongs to the target, and the share of
            the cell that is scored: two float32 (num_envs, *cells), 0 to 1.
        """
        both = torch.stack([self._low_target & self._low_valid, self._low_valid], dim=1).float()
        target, scored = F.adaptive_avg_pool2d(both, cells).unbind(dim=1)
        return target / scored.clamp(min=1e-6), scored

    # Episodes ----------------------------------------------------------------------------------

    def place(self, slots: Sequence[int], targets: Sequence[ClickTarget]) -> None:
        """Begin new episodes in some slots about targets of the caller's choice."""
        self._begin(slots, [self._with_low_res(target) for target in targets])

    def _begin(
        self, slots: Sequence[int], drawn: Sequence[tuple[ClickTarget, np.ndarray, np.ndarray]]
    ) -> None:
        super()._begin(slots, drawn)
        index = to_device(np.asarray(slots), self.device)
        self._low_target[index] = to_device(np.stack([low for _, low, _ in drawn]), self.device)
        self._low_valid[index] = to_device(np.stack([valid for *_, valid in drawn]), self.device)
        self.num_clicks[slots] = 0
        self.labels[slots] = NO_POINT
        self.shown[slots] = self._nothing

    def get_state(self) -> list[dict[str, Any]]:
        (logits,) = to_host(self.logits[:, 1 : int(self.num_clicks.max()) + 1])
        return [
            row | {"logits": logits[slot, :count].copy()}
            for slot, (row, count) in enumerate(
                zip(super().get_state(), self.num_clicks, strict=True)
            )
        ]

    def set_state(
        self, state: Sequence[dict[str, Any]], rngs: Sequence[np.random.Generator]
    ) -> None:
        super().set_state(state, rngs)
        for slot, row in enumerate(state):
            self.logits[slot, 1 : len(row["logits"]) + 1] = to_device(row["logits"], self.device)

    def draw(self, rng: np.random.Generator, part: int = 0) -> ClickTarget:
        """What an episode that begins with this generator is about."""
        return self._draw(rng, part)[0]

    def _draw(
        self, rng: np.random.Generator, part: int
    ) -> tuple[ClickTarget, np.ndarray, np.ndarray]:
        for _ in range(200):
            index, category = self._choose(rng, part)
            sample = self.samples[index]
            if category is None and (self.asked or self.config.target == "category"):
                present = np.unique(sample.categories)
                present = np.intersect1d(present, self.asked) if self.asked else present
                if not len(present):
                    continue
                category = int(rng.choice(present))
            if self.config.target == "category":
                assert category is not None
                mask, cue = sample.category_mask(category), None
            else:
                pool = (
                    np.flatnonzero(sample.categories == category)
                    if category is not None
                    else (np.arange(len(sample.masks)))
                )
                number = int(rng.choice(pool))
                mask, category = sample.masks[number], int(sample.categories[number])
                inside = np.flatnonzero(mask)
                y, x = divmod(int(inside[rng.integers(len(inside))]), mask.shape[1])
                cue = (x, y)
            target = ClickTarget(
                sample.image, mask, sample.ignore, category, sample.source, cue, sample.digest
            )
            drawn = self._with_low_res(target)
            if self._covers_enough(drawn[1]):
                return drawn
        raise self._nothing_drawn(part)

    def _with_low_res(self, target: ClickTarget) -> tuple[ClickTarget, np.ndarray, np.ndarray]:
        """A target, and it and its scored area on SAM's low-res mask: two bool (hm, wm)."""
        scored = self._scored(target.mask.shape[:2], target.ignore)
        return target, self._low_res(target.mask), scored

    # Steps -------------------------------------------------------------------------------------

    def check_actions(self, actions: np.ndarray) -> np.ndarray:
        """Actions as int64 (num_envs,); raises `ValueError` if one is out of range."""
        array = np.asarray(actions)
        if array.shape != (self.num_envs,) or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(
                f"Expected {self.num_envs} integer actions, got {array.dtype} {array.shape}."
            )
        if array.min() < 0 or array.max() >= self.action_space.n:
            bad = array[(array < 0) | (array >= self.action_space.n)][0]
            raise ValueError(
                f"Action {bad} is out of range: expected 0 to {self.action_space.n - 1} "
                f"({self.config.grid} x {self.config.grid} cells x positive, negative"
                f"{', stop' * self.config.stop}{', undo' * self.config.undo})."
            )
        return array.astype(np.int64)

    def click_of(self, action: int) -> tuple[float, float, bool]:
        """Where a click action clicks: (x, y) in pixels of the input frame, and its polarity."""
        negative, cell = divmod(int(action), self.config.grid**2)
        return (*self.centre_of(cell), not negative)

    def action_at(self, x: float, y: float, positive: bool) -> int:
        """The click action of the cell that holds (x, y), in pixels of the input frame."""
        return (0 if positive else self.config.grid**2) + self.cell_at(x, y)

    def step(
        self, slots: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        config = self.config
        self._check_going_on(slots)
        before = self.ious[slots, self.num_clicks[slots]]
        is_click = actions < 2 * config.grid**2
        is_undo = actions == self.undo_action
        positive = np.zeros(len(slots), bool)
        on_target = np.zeros(len(slots), bool)
        distance = np.full(len(slots), np.inf, np.float32)

        for i in np.flatnonzero(is_click):
            slot = slots[i]
            positive[i], on_target[i], distance[i] = self._add_click(slot, actions[i])
        if is_click.any():
            self._decode(slots[is_click])
        if is_undo.any():
            self._undo(slots[is_undo])

        self.steps[slots] += 1
        after = self.ious[slots, self.num_clicks[slots]]
        reward = self._reward(Transition(is_click, positive, on_target, distance, before, after))
        reward = reward - config.click_cost * (is_click | is_undo)
        terminated = actions == self.stop_action
        if config.iou_target is not None:
            terminated = terminated | (after >= config.iou_target)
        return reward, terminated, self._is_over(slots) & ~terminated

    def _add_click(self, slot: int, action: int) -> tuple[bool, bool, float]:
        """Add a click to a slot; returns its polarity, whether it hits the target, its distance."""
        target = self._target(slot)
        x, y, positive = self.click_of(action)
        x, y = self._inside(slot, x, y)
        earlier = self.points[slot, : self.num_clicks[slot]]
        distance = np.inf
        if len(earlier):
            distance = float(np.hypot(*(earlier - [x, y]).T).min()) / self.backbone.image_size
        count = self.num_clicks[slot]
        self.points[slot, count] = x, y
        self.labels[slot, count] = int(positive)
        self.num_clicks[slot] += 1
        column, row = self.to_image(slot, x, y)
        return positive, bool(target.mask[row, column]), distance

    def _undo(self, slots: np.ndarray) -> None:
        """Take the last click of some slots back."""
        self.num_clicks[slots] = np.maximum(self.num_clicks[slots] - 1, 0)
        count = self.num_clicks[slots]
        self.labels[slots, count] = NO_POINT
        index, counts = to_device(slots, self.device), to_device(count, self.device)
        self.shown[slots] = to_host(self._shown(self.logits[index, counts]))[0]

    def _decode(self, slots: np.ndarray) -> None:
        """Decode all clicks of some slots, after a click was added to each, and score the masks."""
        count = self.num_clicks[slots]
        used = int(count.max())
        index, counts, handles, points, labels = (
            to_device(array, self.device)
            for array in (
                slots,
                count,
                self.handles[slots],
                self.points[slots, :used],
                self.labels[slots, :used],
            )
        )
        first = counts == 1
        previous = self.logits[index, counts - 1]
        prompts = Prompts(points=points, labels=labels, masks=previous, has_mask=~first)
        logits, predicted = self.backbone.decode_best(self.store.gather(handles), prompts, first)
        if self.config.keep_best:
            best = to_device(self.predicted_ious[slots, count - 1], self.device)
            worse = ~first & (predicted < best)
            logits = torch.where(worse[:, None, None], previous, logits)
            predicted = torch.where(worse, best, predicted)
        self.logits[index, counts] = logits
        # Everything that numpy is asked for comes over at once: the only wait of a step.
        iou, self.predicted_ious[slots, count], self.shown[slots] = to_host(
            self._low_iou(index, logits), predicted, self._shown(logits)
        )
        if self.config.score == "full":
            iou = self._full_iou(slots, logits)
        self.ious[slots, count] = iou

    def _low_iou(self, index: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """IoU (S,) of low-res masks with the targets of the slots in `index`."""
        return metrics.batch_iou(logits > 0, self._low_target[index], self._low_valid[index])

    def _full_iou(self, slots: np.ndarray, logits: torch.Tensor) -> np.ndarray:
        """IoU (S,) of masks at the size of their images."""
        ious = []
        for target, row in zip(map(self._target, slots), logits, strict=True):
            mask = to_host(self.backbone.masks_at(row, target.mask.shape) > 0)[0]
            ious.append(metrics.iou(mask, target.mask, target.ignore))
        return np.array(ious)

    # What is seen ------------------------------------------------------------------------------

    def _entries(self, slots: np.ndarray) -> dict[str, np.ndarray]:
        targets = [self._target(slot) for slot in slots]
        obs = super()._entries(slots) | {
            "target_category": np.array([t.category for t in targets], np.int64),
            "num_steps": self.steps[slots].copy(),
        }
        obs["sam_pred_mask_prob"] = self.shown[slots]
        if self.config.target == "instance":
            obs["cue_click"] = np.array([self._cue(t) for t in targets], np.float32)
        return obs

    def _shown(self, logits: torch.Tensor) -> torch.Tensor:
        """What an observation shows of mask logits (S, hm, wm): probability, or a small byte."""
        probability = logits.sigmoid()
        if self.config.obs == "full":
            return probability
        return (255 * F.avg_pool2d(probability[:, None], 4)[:, 0]).round().to(torch.uint8)

    def _cue(self, target: ClickTarget) -> np.ndarray:
        point = self.backbone.to_input_frame(np.array(target.cue), target.mask.shape)
        return point / self.backbone.image_size

    def info(self, slots: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Numbers and names of some slots, stacked: float64, int64 or object (S,)."""
        slots = np.asarray(slots)
        targets = [self._target(slot) for slot in slots]
        count = self.num_clicks[slots]
        names = self.dataset.categories
        overlap = self.ious[slots, count]
        return {
            "iou": overlap.copy(),
            "dice": 2 * overlap / (1 + overlap),
            "predicted_iou": self.predicted_ious[slots, count].astype(np.float64),
            "clicks": count.copy(),
            "target_name": np.array([names[t.category] for t in targets], object),
            "source": np.array([t.source for t in targets], object),
        }

    def mask(self, slot: int) -> np.ndarray:
        """The current mask of a slot at the size of its image: bool (H, W)."""
        logits = self.logits[slot, int(self.num_clicks[slot])]
        return (self.backbone.masks_at(logits, self._target(slot).mask.shape) > 0).cpu().numpy()

    def clicks(self, slot: int) -> list[tuple[int, int, bool]]:
        """The clicks of a slot so far: (x, y) in pixels of its image, and whether positive."""
        count = int(self.num_clicks[slot])
        return [
            (*self.to_image(slot, *point), bool(label == 1))
            for point, label in zip(self.points[slot, :count], self.labels[slot], strict=False)
        ]

    def render(self, slot: int, height: int = 384) -> np.ndarray:
        """A picture of a slot, `height` pixels high and a caption. The target has a white outline.

        Returns:
            uint8 (H, W, 3), RGB.
        """
        from sam_gym.utils.render import draw_episode

        target = self._target(slot)
        return draw_episode(
            target.image,
            self.mask(slot),
            self.clicks(slot),
            target=target.mask,
            cue=target.cue,
            caption=self._caption(slot),
            height=height,
        )

    def _caption(self, slot: int) -> str:
        name = self.dataset.categories[self._target(slot).category]
        overlap = self.ious[slot, int(self.num_clicks[slot])]
        return f"{name}  step {self.steps[slot]}  IoU {overlap:.2f}"


class SamSegEnv(BaseEnv):
    """Segment a target by clicking a Segment Anything Model.

    ## Description

    An image and the name of a category are given. The agent places positive and negative clicks on
    a grid over the image; after each click SAM decodes all clicks so far together with its previous
    mask. The aim is a mask of *all* instances of the category (`target="category"`), the task of
    AlignSAM (Huang et al., CVPR 2024), or of the one instance that a cue click shows
    (`target="instance"`).

    ## Action Space

    `Discrete(2 * grid * grid [+ 1] [+ 1])`, with G = grid * grid cells over SAM's square input
    frame, row by row:

    | action            | meaning                                               |
    |-------------------|-------------------------------------------------------|
    | 0 .. G - 1        | positive click at the centre of the cell              |
    | G .. 2G - 1       | negative click at the centre of the cell              |
    | 2G                | stop (with `stop=True`)                               |
    | the one after     | undo the last click (with `undo=True`)                |

    SAM pads an image that is not square; a click in the padding falls on the nearest image pixel.

    ## Observation Space

    A `Dict`. With `obs="full"`:

    | key                    | space                          | meaning                           |
    |------------------------|--------------------------------|-----------------------------------|
    | `image`                | uint8 (S, S, 3)                | RGB, in SAM's input frame         |
    | `target_category`      | Discrete(number of categories) | its name is in `info`             |
    | `sam_image_embeddings` | float32 (C, h, w)              | SAM's image embedding             |
    | `sam_pred_mask_prob`   | float32 (4h, 4w) in [0, 1]     | probability of the current mask   |
    | `num_steps`            | Discrete(max_steps + 1)        | actions so far                    |
    | `cue_click`            | float32 (2,) in [0, 1]         | only for `target="instance"`      |

    With `obs="handle"` (for training) the first and third are replaced by `handle`, int32 (1,),
    the index of the embedding in the store of this process, and the mask is uint8 (h, w).

    ## Rewards

    `reward="iou_gain"` (default), `"dice_gain"`, `"click_correct"`, `"foreground"` or `"shaped"`;
    see `sam_gym.envs.rewards`. `click_cost` is subtracted for every click and undo.

    ## Starting State

    No clicks and an empty mask. Image and target are drawn from the dataset with the environment's
    own random generator.

    ## Episode End

    *Terminated* by `stop`, or when the true IoU reaches `iou_target` if one is set. *Truncated*
    after `max_steps` actions.

    ## Information

    `iou`, `dice` (of the current mask and the target), `predicted_iou` (SAM's own estimate),
    `clicks`, `target_name`, `source`.

    ## Arguments

    ```python
    import gymnasium as gym
    import sam_gym

    env = gym.make("SamSeg-v0", dataset="scenes", max_steps=5, render_mode="rgb_array")
    ```

    All arguments are the fields of `sam_gym.envs.click.SamSegConfig`. The vector environment,
    `gym.make_vec("SamSeg-v0", num_envs=64, vectorization_mode="vector_entry_point")`, decodes the
    clicks of all its environments in one batch.

    ## Version History

    * v0: initial version.

    Args:
        render_mode: None, "rgb_array" or "human".
        **settings: fields of `SamSegConfig`.

    Raises:
        ValueError: unknown name or impossible value, or data that does not validate.
        FileNotFoundError: a file is missing.
    """

    env_id = "SamSeg-v0"
    config_class: type[ClickConfig] = SamSegConfig
    core_class: type[ClickCore] = ClickCore
    core: ClickCore


class SamSegVectorEnv(BaseVectorEnv):
    """`SamSeg-v0` with many environments that share one SAM decode per step.

    Sub-environment `i` seeded with `seed` plays as the scalar environment seeded with `seed + i`.

    Args:
        num_envs: how many environments.
        render_mode: None, "rgb_array" (one frame per environment) or "human" (all in one window).
        autoreset_mode: "NextStep" (default), "SameStep" or "Disabled", or the enum.
        **settings: fields of `sam_gym.envs.click.SamSegConfig`; see `SamSegEnv`.
    """

    env_id = SamSegEnv.env_id
    config_class = SamSegEnv.config_class
    core_class = SamSegEnv.core_class
    core: ClickCore


def make_config(settings: dict[str, Any]) -> SamSegConfig:
    """The config of `SamSeg-v0` with keyword arguments; see `make_settings`."""
    return make_settings(SamSegConfig, SamSegEnv.env_id, settings)
