"""`SamSeg-v0`: segment a target by clicking a Segment Anything Model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from torch.nn import functional as F

from sam_gym.backbones import NO_POINT, Prompts
from sam_gym.data import Dataset
from sam_gym.data.base import select_categories
from sam_gym.envs.base_core import FRAME_HEIGHT, MAX_DRAWS, BaseCore, Draw, in_cells
from sam_gym.envs.base_env import BaseEnv, BaseVectorEnv
from sam_gym.envs.config import DatasetConfig, EnvConfig
from sam_gym.envs.proposals import Proposals
from sam_gym.envs.rewards import REWARDS, Transition, checked_rewards
from sam_gym.metrics import masks as metrics
from sam_gym.utils.fields import documented
from sam_gym.utils.settings import NotNegative, real, whole
from sam_gym.utils.transfer import to_device, to_host

#: Prompts of a call that previews several clicks of each sub-environment.
_PREVIEWED = 64
#: Arrays of a `ClickCore` that `get_state` saves, beside the mask logits.
EPISODE_ARRAYS = ("steps", "num_clicks", "points", "labels", "ious", "predicted_ious", "shown")


@documented
@dataclass(frozen=True, kw_only=True)
class ClickConfig(EnvConfig):
    """Arguments of the click task; a subclass adds where images come from."""

    target: Literal["category", "instance"] = "category"
    """Target: all instances of a category, or one instance shown by a cue click."""
    reward: str = "iou_gain"
    """Reward name: iou_gain, dice_gain, click_correct, foreground, shaped; or module:function."""
    max_steps: Annotated[int, whole(1, 100)] = 5
    """Actions per episode, after which it is truncated."""
    iou_target: Annotated[float, real(above=0, high=1)] | None = None
    """Terminate when the true IoU reaches this value."""
    stop: bool = False
    """Add an action that ends the episode."""
    undo: bool = False
    """Add an action that removes the last click."""
    keep_best: bool = False
    """Keep the previous mask when a click yields one of lower predicted IoU."""
    click_cost: NotNegative = 0.0
    """Cost of every click and undo, subtracted from the reward."""
    initial_mask: Literal["empty", "semantic"] = "empty"
    """Mask at the start of an episode: empty, or that of the category by the semantic head of the
    adapter, which clicks then correct."""
    score: Literal["low", "full"] = "low"
    """Compute the IoU on SAM's low-res mask, or at the size of the image (slower)."""

    def validate(self) -> None:
        super().validate()
        REWARDS.get(self.reward)
        if self.initial_mask == "semantic" and self.target == "instance":
            raise ValueError(
                "initial_mask='semantic' is the mask of a category, but target='instance': take "
                "target='category'."
            )

    @property
    def max_episode_steps(self) -> int:
        return self.max_steps

    def target_indices(self, names: Sequence[str]) -> list[int]:
        """Return the indices in `names` of the categories to segment; empty for any category."""
        del names
        return []


@documented
@dataclass(frozen=True, kw_only=True)
class SamSegConfig(ClickConfig, DatasetConfig):
    """Arguments of `SamSeg-v0`."""

    target_categories: str | None = None
    """Comma-separated categories to segment (None: all that are in an image)."""

    def target_indices(self, names: Sequence[str]) -> list[int]:
        if self.target_categories is None:
            return []
        return [names.index(k) for k in select_categories(self.target_categories, names)]


@dataclass
class ClickTarget:
    """The target of an episode.

    Attributes:
        image: uint8 (H, W, 3), RGB.
        mask: bool (H, W), to be found.
        ignore: bool (H, W) of pixels that are not scored, or None.
        category: index of its category.
        source: where the image comes from.
        cue: pixel (x, y) of the cue click, or None.
        digest: of the image, if known.
    """

    image: np.ndarray
    mask: np.ndarray
    ignore: np.ndarray | None
    category: int
    source: str
    cue: tuple[int, int] | None
    digest: bytes | None = None


class ClickCore(BaseCore[ClickConfig, ClickTarget]):
    """The click task: all sub-environments share one `decode` per step.

    State of an episode: its target, the clicks, and after each click the mask logits and their
    predicted IoU. `undo` removes the last entry. Arguments as for `BaseCore`.
    """

    episode_arrays: tuple[str, ...] = EPISODE_ARRAYS
    reported = ("clicks",)
    action_space: spaces.Discrete

    def __init__(self, config: ClickConfig, num_envs: int, dataset: Dataset | None = None) -> None:
        super().__init__(config, num_envs, dataset)
        self._reward = REWARDS.get(config.reward)
        self._target_indices = config.target_indices(self.dataset.categories)

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
        # Entry 0 of a history is the mask before the first click.
        self.logits = torch.full((num_envs, steps + 1, *mask_shape), -20.0, device=self.device)
        self._low_target = torch.zeros(
            (num_envs, *mask_shape), dtype=torch.bool, device=self.device
        )
        self._low_valid = torch.ones_like(self._low_target)
        self._nothing = to_host(self._shown(self.logits[:1, 0]))[0]
        #: The current mask as observations show it.
        self.shown = np.repeat(self._nothing, num_envs, axis=0)

    def _open_services(self) -> None:
        super()._open_services()
        self._proposals: Proposals | None = None
        if self.config.initial_mask == "semantic":
            self._proposals = Proposals(self.backbone, self.dataset.categories)
            self.store.register_feature(self._proposals.name, self._proposals)

    def __getstate__(self) -> dict[str, Any]:
        return {key: own for key, own in super().__getstate__().items() if key != "_proposals"}

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
        """Return all targets on a coarse grid, as training labels.

        Args:
            cells: rows and columns of the grid.

        Returns:
            Fraction of the scored area of each cell that belongs to the target, and fraction of
            the cell that is scored: two float32 (num_envs, *cells), 0 to 1.
        """
        both = torch.stack([self._low_target & self._low_valid, self._low_valid], dim=1).float()
        target, scored = F.adaptive_avg_pool2d(both, cells).unbind(dim=1)
        return target / scored.clamp(min=1e-6), scored

    # Episodes ----------------------------------------------------------------------------------

    def set_targets(self, indices: Sequence[int], targets: Sequence[ClickTarget]) -> None:
        """Begin new episodes about given targets."""
        self._begin(indices, [self._as_draw(target) for target in targets])

    def _begin(self, indices: Sequence[int], draws: Sequence[Draw[ClickTarget]]) -> None:
        super()._begin(indices, draws)
        index = to_device(np.asarray(indices), self.device)
        self._low_target[index] = to_device(np.stack([d.masks for d in draws]), self.device)
        self._low_valid[index] = to_device(np.stack([d.valid for d in draws]), self.device)
        self.num_clicks[indices] = 0
        self.labels[indices] = NO_POINT
        self.shown[indices] = self._nothing
        if self._proposals is not None:
            categories = torch.tensor([draw.target.category for draw in draws])
            handles = to_device(self.handles[indices], self.device)
            masks = self.store.gather(handles, self._proposals.name, check=False)
            logits = masks[torch.arange(len(masks)), categories].float()
            self.logits[index, 0] = logits
            self.ious[indices, 0], self.shown[indices] = to_host(
                self._low_iou(index, logits), self._shown(logits)
            )
            if self.config.score == "full":
                self.ious[indices, 0] = self._full_iou(np.asarray(indices), logits)

    def is_first_prompt(self, counts: torch.Tensor) -> torch.Tensor:
        """Whether clicks are decoded without the mask before them, which is empty.

        Args:
            counts: number of clicks, int (S,).

        Returns:
            bool (S,).
        """
        return (counts == 1) & (self._proposals is None)

    def get_state(self) -> list[dict[str, Any]]:
        (logits,) = to_host(self.logits[:, 1 : int(self.num_clicks.max()) + 1])
        return [
            row | {"logits": logits[i, :count].copy()}
            for i, (row, count) in enumerate(zip(super().get_state(), self.num_clicks, strict=True))
        ]

    def set_state(
        self, state: Sequence[dict[str, Any]], rngs: Sequence[np.random.Generator]
    ) -> None:
        super().set_state(state, rngs)
        for i, row in enumerate(state):
            self.logits[i, 1 : len(row["logits"]) + 1] = to_device(row["logits"], self.device)

    def draw(self, rng: np.random.Generator, domain: int = 0) -> ClickTarget:
        """Draw the target of an episode that begins with this generator."""
        return self._draw(rng, domain).target

    def _draw(self, rng: np.random.Generator, domain: int) -> Draw[ClickTarget]:
        wanted = self._target_indices
        for _ in range(MAX_DRAWS):
            index, category = self._draw_image(rng, domain)
            sample = self.samples[index]
            if wanted and category not in wanted:
                category = None
            if category is None and (wanted or self.config.target == "category"):
                present = np.unique(sample.categories)
                present = np.intersect1d(present, wanted) if wanted else present
                if not len(present):
                    continue
                category = int(rng.choice(present))
            if self.config.target == "category":
                assert category is not None
                mask, cue = sample.category_mask(category), None
            else:
                numbers = np.arange(len(sample.masks))
                if category is not None:
                    numbers = numbers[sample.categories == category]
                number = int(rng.choice(numbers))
                # A view would keep the masks of all instances in memory.
                mask, category = sample.masks[number].copy(), int(sample.categories[number])
                inside = np.flatnonzero(mask)
                y, x = divmod(int(inside[rng.integers(len(inside))]), mask.shape[1])
                cue = (x, y)
            target = ClickTarget(
                sample.image, mask, sample.ignore, category, sample.source, cue, sample.digest
            )
            draw = self._as_draw(target)
            if self._is_large_enough(draw.masks):
                return draw
        raise self._no_target_error(domain)

    def _as_draw(self, target: ClickTarget) -> Draw[ClickTarget]:
        valid = self._low_res_valid(target.mask.shape[:2], target.ignore)
        return Draw(target, self._low_res(target.mask), valid)

    # Steps -------------------------------------------------------------------------------------

    def check_actions(self, actions: np.ndarray) -> np.ndarray:
        """Return actions as int64 (num_envs,); raise `ValueError` if one is out of range."""
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
        """Return the click of an action: (x, y) in pixels of the input frame, and its polarity."""
        negative, cell = divmod(int(action), self.config.grid**2)
        return (*self.centre_of(cell), not negative)

    def keys(self) -> dict[str, int]:
        actions = {"s": self.stop_action, "u": self.undo_action}
        return {key: action for key, action in actions.items() if action >= 0}

    def action_at(self, x: float, y: float, positive: bool) -> int:
        return (0 if positive else self.config.grid**2) + self.cell_at(x, y)

    def step(
        self, indices: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        config = self.config
        self._check_not_over(indices)
        before = self.ious[indices, self.num_clicks[indices]]
        is_click = actions < 2 * config.grid**2
        is_undo = actions == self.undo_action
        positive = np.zeros(len(indices), bool)
        on_target = np.zeros(len(indices), bool)
        distance = np.full(len(indices), np.inf, np.float32)

        for row in np.flatnonzero(is_click):
            positive[row], on_target[row], distance[row] = self._add_click(
                indices[row], actions[row]
            )
        if is_click.any():
            self._decode(indices[is_click])
        if is_undo.any():
            self._undo(indices[is_undo])

        self.steps[indices] += 1
        after = self.ious[indices, self.num_clicks[indices]]
        transition = Transition(is_click, positive, on_target, distance, before, after)
        reward = checked_rewards(self._reward(transition), config.reward, len(indices))
        reward = reward - config.click_cost * (is_click | is_undo)
        terminated = actions == self.stop_action
        if config.iou_target is not None:
            terminated = terminated | (after >= config.iou_target)
        return reward, terminated, self._is_over(indices) & ~terminated

    def _add_click(self, env_index: int, action: int) -> tuple[bool, bool, float]:
        """Add a click.

        Returns:
            Its polarity, whether it hits the target, and its distance to the nearest earlier click
            in units of the frame's side.
        """
        target = self._target(env_index)
        x, y, positive = self.click_of(action)
        x, y = self._clip_to_image(env_index, x, y)
        earlier = self.points[env_index, : self.num_clicks[env_index]]
        distance = np.inf
        if len(earlier):
            distance = float(np.hypot(*(earlier - [x, y]).T).min()) / self.backbone.image_size
        count = self.num_clicks[env_index]
        self.points[env_index, count] = x, y
        self.labels[env_index, count] = int(positive)
        self.num_clicks[env_index] += 1
        column, row = self.to_image(env_index, x, y)
        return positive, bool(target.mask[row, column]), distance

    def _undo(self, indices: np.ndarray) -> None:
        """Remove the last click of some sub-environments."""
        self.num_clicks[indices] = np.maximum(self.num_clicks[indices] - 1, 0)
        self.labels[indices, self.num_clicks[indices]] = NO_POINT
        self.shown[indices] = to_host(self._shown(self.current_logits(indices)))[0]

    def _decode(self, indices: np.ndarray) -> None:
        """Decode all clicks of some sub-environments, each with a new one; score the masks."""
        count = self.num_clicks[indices]
        logits, predicted = self._decoded(
            indices, count, self.points[indices], self.labels[indices]
        )
        index, counts = to_device(indices, self.device), to_device(count, self.device)
        self.logits[index, counts] = logits
        # All results for numpy are copied together: the only synchronisation of a step.
        iou, self.predicted_ious[indices, count], self.shown[indices] = to_host(
            self._low_iou(index, logits), predicted, self._shown(logits)
        )
        if self.config.score == "full":
            iou = self._full_iou(indices, logits)
        self.ious[indices, count] = iou

    def preview(
        self, indices: np.ndarray, actions: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode one more click of some sub-environments without playing it.

        Args:
            indices: of sub-environments whose episodes are not over, int (S,); may repeat.
            actions: a click for each, int (S,).

        Returns:
            Mask logits float32 (S, hm, wm) and their predicted IoU float32 (S,).
        """
        return self._decoded(indices, *self._with_clicks(indices, actions))

    def previews_at_once(self, count: int) -> int:
        """Return how many clicks of each of `count` sub-environments to preview in one call.

        More than one only fills a small batch: the memory is that of a normal step, or of
        `_PREVIEWED` prompts. A compiled backbone would compile another batch size.
        """
        return 1 if self.backbone.compiled else max(1, _PREVIEWED // max(count, 1))

    def preview_scores(self, indices: np.ndarray, actions: np.ndarray) -> torch.Tensor:
        """Return the predicted IoU float32 (S,) of `preview`, without its masks.

        It ignores `keep_best`.
        """
        prompts = self._prompts(indices, *self._with_clicks(indices, actions))
        return self.backbone.predict_iou(*prompts)

    def _with_clicks(
        self, indices: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return numbers of clicks, points and labels as they would be after one more click."""
        count = self.num_clicks[indices]
        points, labels = self.points[indices], self.labels[indices]
        for row, (index, action) in enumerate(zip(indices, actions, strict=True)):
            x, y, positive = self.click_of(action)
            points[row, count[row]] = self._clip_to_image(index, x, y)
            labels[row, count[row]] = int(positive)
        return count + 1, points, labels

    def _decoded(
        self, indices: np.ndarray, count: np.ndarray, points: np.ndarray, labels: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mask logits (S, hm, wm) and their predicted IoU (S,).

        Args:
            indices: of the sub-environments, int (S,).
            count: number of clicks, int (S,).
            points: float32 (S, max_steps, 2).
            labels: int (S, max_steps).
        """
        features, prompts, first = self._prompts(indices, count, points, labels)
        logits, predicted = self.backbone.decode_best(features, prompts, first)
        if self.config.keep_best and prompts.masks is not None:
            best = to_device(self.predicted_ious[indices, count - 1], self.device)
            worse = ~first & (predicted < best)
            logits = torch.where(worse[:, None, None], prompts.masks, logits)
            predicted = torch.where(worse, best, predicted)
        return logits, predicted

    def _prompts(
        self, indices: np.ndarray, count: np.ndarray, points: np.ndarray, labels: np.ndarray
    ) -> tuple[Any, Prompts, torch.Tensor]:
        """Return features, prompts and which of them are the first, for a decoder call."""
        used = int(count.max())
        arrays = (indices, count, self.handles[indices], points[:, :used], labels[:, :used])
        index, counts, handles, xy, signs = (to_device(array, self.device) for array in arrays)
        first = self.is_first_prompt(counts)
        all_first = used == 1 and self._proposals is None
        if all_first and not self.backbone.compiled:  # each form of prompts compiles
            prompts = Prompts(points=xy, labels=signs)
        else:
            previous = self.logits[index, counts - 1]
            prompts = Prompts(points=xy, labels=signs, masks=previous, has_mask=~first)
        return self.store.gather(handles, check=False), prompts, first

    def _low_iou(self, index: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the IoU (S,) of low-res masks with the targets of the rows in `index`."""
        masks = logits > self.backbone.mask_threshold
        return metrics.batch_iou(masks, self._low_target[index], self._low_valid[index])

    def _full_iou(self, indices: np.ndarray, logits: torch.Tensor) -> np.ndarray:
        """Return the IoU (S,) of masks at the size of their images."""
        ious = []
        for target, row in zip(map(self._target, indices), logits, strict=True):
            mask = self._mask_at(row, target)
            ious.append(metrics.iou(mask, target.mask, target.ignore))
        return np.array(ious)

    # Observations ------------------------------------------------------------------------------

    def _entries(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        targets = [self._target(i) for i in indices]
        obs = super()._entries(indices) | {
            "target_category": np.array([t.category for t in targets], np.int64),
            "num_steps": self.steps[indices].copy(),
        }
        obs["sam_pred_mask_prob"] = self.shown[indices]
        if self.config.target == "instance":
            obs["cue_click"] = np.array([self._cue(t) for t in targets], np.float32)
        return obs

    def _shown(self, logits: torch.Tensor) -> torch.Tensor:
        """Return mask logits (S, hm, wm) as observations show them.

        Probabilities float32 (S, hm, wm) with `obs="full"`, else uint8 (S, h, w) on the grid of
        the embedding.
        """
        probability = logits.sigmoid()
        if self.config.obs == "full":
            return probability
        return in_cells(self.backbone, probability[:, None])[:, 0]

    def _cue(self, target: ClickTarget) -> np.ndarray:
        point = self.backbone.to_input_frame(np.array(target.cue), target.mask.shape)
        return point / self.backbone.image_size

    def info(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Return the infos of some sub-environments, stacked: float64, int64 or object (S,)."""
        indices = np.asarray(indices)
        targets = [self._target(i) for i in indices]
        count = self.num_clicks[indices]
        names = self.dataset.categories
        overlap = self.ious[indices, count]
        return {
            "iou": overlap.copy(),
            "dice": 2 * overlap / (1 + overlap),
            "predicted_iou": self.predicted_ious[indices, count].astype(np.float64),
            "clicks": count.copy(),
            "target_name": np.array([names[t.category] for t in targets], object),
            "source": np.array([t.source for t in targets], object),
        }

    def current_logits(self, indices: np.ndarray) -> torch.Tensor:
        """Return the logits of the current masks of some sub-environments, float32 (S, hm, wm)."""
        index, counts = (to_device(own, self.device) for own in (indices, self.num_clicks[indices]))
        return self.logits[index, counts]

    def mask(self, env_index: int) -> np.ndarray:
        """Return the current mask at the size of the image: bool (H, W)."""
        (logits,) = self.current_logits(np.array([env_index]))
        return self._mask_at(logits, self._target(env_index))

    def _mask_at(self, logits: torch.Tensor, target: ClickTarget) -> np.ndarray:
        """Return low-res logits (hm, wm) as a mask of the size of the image: bool (H, W)."""
        full = self.backbone.masks_at(logits, target.mask.shape)
        return to_host(full > self.backbone.mask_threshold)[0]

    def clicks(self, env_index: int) -> list[tuple[int, int, bool]]:
        """Return the clicks of the episode: (x, y) in pixels of the image, and whether positive."""
        count = int(self.num_clicks[env_index])
        return [
            (*self.to_image(env_index, *point), bool(label == 1))
            for point, label in zip(
                self.points[env_index, :count], self.labels[env_index], strict=False
            )
        ]

    def render(self, env_index: int, height: int = FRAME_HEIGHT) -> np.ndarray:
        """Draw the episode, `height` pixels high and a caption. The target has a white outline.

        Returns:
            uint8 (H, W, 3), RGB.
        """
        from sam_gym.utils.render import draw_episode

        target = self._target(env_index)
        return draw_episode(
            target.image,
            self.mask(env_index),
            self.clicks(env_index),
            target=target.mask,
            cue=target.cue,
            caption=self._caption(env_index),
            height=height,
        )

    def _caption(self, env_index: int) -> str:
        name = self.dataset.categories[self._target(env_index).category]
        overlap = self.ious[env_index, int(self.num_clicks[env_index])]
        return f"{name}  step {self.steps[env_index]}  IoU {overlap:.2f}"


class SamSegEnv(BaseEnv):
    """Segment a target by clicking a Segment Anything Model.

    ## Description

    The agent gets an image and the name of a category. It places positive and negative clicks on a
    grid over the image; after each click, SAM decodes all clicks and its previous mask. The goal is
    a mask of *all* instances of the category (`target="category"`, the task of AlignSAM, Huang et
    al., CVPR 2024), or of the one instance that a cue click shows (`target="instance"`).

    ## Action Space

    `Discrete(2 * grid * grid [+ 1] [+ 1])`, with G = grid * grid cells over SAM's square input
    frame, row by row:

    | action            | meaning                                               |
    |-------------------|-------------------------------------------------------|
    | 0 .. G - 1        | positive click at the centre of the cell              |
    | G .. 2G - 1       | negative click at the centre of the cell              |
    | 2G                | stop (with `stop=True`)                               |
    | the next one      | undo the last click (with `undo=True`)                |

    SAM pads images that are not square; a click in the padding moves to the nearest image pixel.

    ## Observation Space

    A `Dict`. With `obs="full"`:

    | key                    | space                          | meaning                           |
    |------------------------|--------------------------------|-----------------------------------|
    | `image`                | uint8 (S, S, 3)                | RGB, in SAM's input frame         |
    | `target_category`      | Discrete(number of categories) | its name is in `info`             |
    | `sam_image_embeddings` | float32 (C, h, w)              | SAM's image embedding             |
    | `sam_pred_mask_prob`   | float32 (hm, wm) in [0, 1]     | probability of the current mask   |
    | `num_steps`            | Discrete(max_steps + 1)        | actions taken                     |
    | `cue_click`            | float32 (2,) in [0, 1]         | only for `target="instance"`      |

    S is the side of SAM's input frame, (C, h, w) the shape of its embedding, (hm, wm) that of its
    low-res masks.

    With `obs="handle"` (for training) the first and third are replaced by `handle`, int32 (1,),
    the number of the embedding in the store of this process, and the mask is uint8 (h, w).

    ## Rewards

    `reward="iou_gain"` (default), `"dice_gain"`, `"click_correct"`, `"foreground"` or `"shaped"`,
    see `sam_gym.envs.rewards`; or your own, `"module:function"`. `click_cost` is subtracted for
    every click and undo.

    ## Starting State

    No clicks and an empty mask, or with `initial_mask="semantic"` that of the category by the
    adapter's semantic head. The environment's random generator draws the image and the target
    from the dataset. `reset(options={"index": i})` takes image `i` instead.

    ## Episode End

    *Terminated* by `stop`, or when the true IoU reaches `iou_target`, if set. *Truncated* after
    `max_steps` actions.

    ## Information

    `iou` and `dice` (of the current mask and the target), `predicted_iou` (SAM's estimate),
    `clicks`, `target_name`, `source` (of the image).

    ## Arguments

    ```python
    import gymnasium as gym
    import sam_gym

    env = gym.make("SamSeg-v0", dataset="scenes", max_steps=5, render_mode="rgb_array")
    ```

    All arguments are the fields of `sam_gym.envs.click.SamSegConfig`. The vector environment,
    `gym.make_vec("SamSeg-v0", num_envs=64, vectorization_mode="vector_entry_point")`, decodes the
    clicks of all sub-environments in one batch.

    ## Version History

    * v0: initial version.

    Args:
        render_mode: None, "rgb_array" or "human".
        **kwargs: fields of `SamSegConfig`.

    Raises:
        ValueError: an argument is unknown or impossible, or the data does not validate.
        FileNotFoundError: a file is missing.
    """

    env_id = "SamSeg-v0"
    config_class: type[ClickConfig] = SamSegConfig
    core_class: type[ClickCore] = ClickCore
    core: ClickCore


class SamSegVectorEnv(BaseVectorEnv):
    """`SamSeg-v0` in a batch: all sub-environments share one SAM decode per step.

    With `reset(seed=seed)`, sub-environment `i` behaves as the scalar environment with
    `seed + i`. Arguments as for `BaseVectorEnv`, with the fields of `SamSegConfig`.
    """

    env_id = SamSegEnv.env_id
    config_class = SamSegEnv.config_class
    core_class = SamSegEnv.core_class
    core: ClickCore
