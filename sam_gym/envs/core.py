"""The rules of the click task over a batch of slots; the environments are thin faces of this."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from gymnasium import spaces
from torch.nn import functional as F

from sam_gym import metrics
from sam_gym.backbones import NO_POINT, Prompts, load_backbone
from sam_gym.backbones.disk import DEFAULT_BYTES, DiskStore
from sam_gym.backbones.service import DTYPES
from sam_gym.backbones.store import MAX_HANDLES, shared_store
from sam_gym.data import Dataset, make_dataset
from sam_gym.data.cache import SampleCache
from sam_gym.data.sample import select_categories
from sam_gym.envs.ahead import DrawAhead
from sam_gym.registry import unknown_name
from sam_gym.rewards import REWARDS, Transition
from sam_gym.transfer import to_device, to_host

#: Arrays of a `ClickCore` with a row per slot that say how far its episode is. `get_state` takes
#: these and the mask logits; targets and embeddings come back by drawing them once more.
EPISODE_ARRAYS = ("steps", "num_clicks", "points", "labels", "ious", "predicted_ious", "shown")

_CHOICES = {
    "target": ("category", "instance"),
    "obs": ("full", "handle"),
    "score": ("low", "full"),
    "render_mode": (None, "rgb_array", "human"),
}


@dataclass(frozen=True)
class TaskConfig:
    """Settings of clicking, whatever the images; a subclass says what those are."""

    split: str = "train"
    """Split of the data: train, val, test."""
    backbone: str = "micro"
    """SAM that is clicked: [hq_]micro, [hq_]vit_b/l/h, mobile_sam, repvit_sam, hf:OWNER/NAME."""
    checkpoint: str | None = None
    """Weights of the backbone (micro brings its own)."""
    device: str = "auto"
    """Device of the backbone: auto, cpu, cuda, mps."""
    dtype: str = "auto"
    """Precision of the backbone: auto, float32, bfloat16, float16."""
    adapter: str | None = None
    """Adapter file that the SAM is adapted by (adaptation.train writes them)."""
    compile: bool = False
    """Compile the backbone: faster steps, after a first minute or two."""
    target: Literal["category", "instance"] = "category"
    """What to segment: all instances of a category, or one instance shown by a cue click."""
    obs: Literal["full", "handle"] = "full"
    """Observations with image and embedding, or with a small handle of the embedding."""
    reward: str = "iou_gain"
    """Reward name: iou_gain, dice_gain, click_correct, foreground, shaped."""
    grid: int = 16
    """Clicks fall on the centres of grid x grid cells of SAM's square input frame."""
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
    min_target: float = 0.002
    """Targets that cover less than this share of the frame are not drawn."""
    cache_mib: int = 1024
    """Memory for samples that are kept instead of read again, in MiB."""
    store_gib: float = 1.0
    """Memory for embeddings that are kept instead of encoded again, in GiB."""
    disk: str | None = None
    """Folder that keeps embeddings between runs too, or "home" for SAM_GYM_HOME/embeddings."""
    disk_dtype: str = "float32"
    """Precision of embeddings on disk: float32, float16, bfloat16."""
    disk_gib: float = DEFAULT_BYTES / 2**30
    """Bound on the files of this backbone and precision, in GiB; the least recently used go."""

    def validate(self) -> None:
        """Raise `ValueError` for a value that cannot work."""
        for name in ("target", "obs", "score"):
            value = getattr(self, name)
            if value not in _CHOICES[name]:
                raise unknown_name(name, value, [str(v) for v in _CHOICES[name]])
        REWARDS.get(self.reward)
        if self.disk_dtype not in DTYPES:
            raise unknown_name("disk_dtype", self.disk_dtype, DTYPES)
        if not 2 <= self.grid <= 64:
            raise ValueError(f"grid must be from 2 to 64, got {self.grid}.")
        if not 1 <= self.max_steps <= 100:
            raise ValueError(f"max_steps must be from 1 to 100, got {self.max_steps}.")
        if self.iou_target is not None and not 0 < self.iou_target <= 1:
            raise ValueError(f"iou_target must be in (0, 1], got {self.iou_target}.")
        if self.obs == "handle" and multiprocessing.current_process().daemon:
            raise ValueError(
                "obs='handle' refers to embeddings in this process, so it does not work in the "
                "workers of AsyncVectorEnv or SubprocVecEnv. Use gymnasium.make_vec(..., "
                "vectorization_mode='vector_entry_point'), which is faster, or obs='full'."
            )

    def open_dataset(self) -> Dataset:
        """The images, validated."""
        raise NotImplementedError

    def asked_categories(self, names: Sequence[str]) -> list[int]:
        """Numbers of the categories, of all `names`, that are asked for; none if any may be."""
        del names
        return []


@dataclass(frozen=True)
class _DatasetFields:
    """Which images `SamSeg-v0` is about; a class apart, so that its fields come first."""

    dataset: str = "scenes"
    """Dataset name: scenes, coco, folder."""
    data: str | None = None
    """Root folder of a dataset that reads files."""
    dataset_kwargs: dict[str, Any] = field(default_factory=dict)
    """More options of the dataset, for example {"categories": "person"} or {"length": 2048}."""
    target_categories: str | None = None
    """Comma-separated categories that are asked for (default: all that are in an image)."""


@dataclass(frozen=True)
class ClickConfig(TaskConfig, _DatasetFields):
    """Settings of `SamSeg-v0`, all JSON-plain."""

    def validate(self) -> None:
        super().validate()
        for name, own in (("split", "split"), ("root", "data")):
            if name in self.dataset_kwargs:
                raise ValueError(f"dataset_kwargs may not hold {name!r}: use {own}= instead.")

    def open_dataset(self) -> Dataset:
        """The dataset, validated; raises as `make_dataset` does."""
        root = {} if self.data is None else {"root": self.data}
        return make_dataset(self.dataset, self.split, **root, **self.dataset_kwargs)

    def asked_categories(self, names: Sequence[str]) -> list[int]:
        if self.target_categories is None:
            return []
        return [names.index(k) for k in select_categories(self.target_categories, names)]


def check_render_mode(render_mode: str | None) -> None:
    """Raise `ValueError` for a render mode that the click task does not have."""
    if render_mode not in _CHOICES["render_mode"]:
        raise unknown_name("render_mode", render_mode, ["None", "rgb_array", "human"])


@dataclass
class SlotTarget:
    """What one slot is about: the sample, the mask to find and how it is named."""

    image: np.ndarray
    mask: np.ndarray
    ignore: np.ndarray | None
    category: int
    source: str
    cue: tuple[int, int] | None
    digest: bytes | None = None


class ClickCore:
    """The click task in `num_slots` slots that share one `decode` per step.

    State of a slot: its target, the clicks so far, and after each click the mask logits and their
    predicted IoU. `undo` forgets the last entry.

    Args:
        config: the settings.
        num_slots: how many episodes run side by side.
        dataset: instead of the one that the settings name.

    Raises:
        ValueError, FileNotFoundError: a setting, the dataset or the checkpoint is wrong.
    """

    #: Arrays with a row per slot that say how far its episode is (see `get_state`).
    episode_arrays: tuple[str, ...] = EPISODE_ARRAYS

    def __init__(self, config: TaskConfig, num_slots: int, dataset: Dataset | None = None) -> None:
        config.validate()
        if num_slots < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_slots}.")
        self.config, self.num_slots = config, num_slots
        self.dataset = config.open_dataset() if dataset is None else dataset
        self._share()
        self.device = self.backbone.device
        self._reward = REWARDS.get(config.reward)
        self.asked = config.asked_categories(self.dataset.categories)

        cells = config.grid**2
        self.stop_action = 2 * cells if config.stop else -1
        self.undo_action = 2 * cells + int(config.stop) if config.undo else -1
        self.action_space = spaces.Discrete(2 * cells + int(config.stop) + int(config.undo))
        self.observation_space = self._make_observation_space()

        mask_shape, steps = self.backbone.mask_shape, config.max_steps
        self.handles = np.full(num_slots, -1, np.int64)
        self.targets: list[SlotTarget | None] = [None] * num_slots
        #: The state of each slot's generator before its target was drawn.
        self._starts: list[dict[str, Any] | None] = [None] * num_slots
        self.steps = np.zeros(num_slots, np.int64)
        self.num_clicks = np.zeros(num_slots, np.int64)
        self.points = np.zeros((num_slots, steps, 2), np.float32)
        self.labels = np.full((num_slots, steps), NO_POINT, np.int64)
        self.ious = np.zeros((num_slots, steps + 1))
        self.predicted_ious = np.zeros((num_slots, steps + 1), np.float32)
        # Entry 0 of a history is the empty mask before the first click.
        self.logits = torch.full((num_slots, steps + 1, *mask_shape), -20.0, device=self.device)
        self._low_target = torch.zeros(
            (num_slots, *mask_shape), dtype=torch.bool, device=self.device
        )
        self._low_valid = torch.ones_like(self._low_target)
        self._nothing = to_host(self._shown(self.logits[:1, 0]))[0]
        #: What an observation shows of the current mask of each slot.
        self.shown = np.repeat(self._nothing, num_slots, axis=0)

    def _share(self) -> None:
        """Take what all cores of this process have in common, and an empty cache."""
        config = self.config
        self.samples = SampleCache(self.dataset, config.cache_mib * 2**20)
        self.ahead = DrawAhead(self._draw)
        self._misses = 0
        self.backbone = load_backbone(
            config.backbone,
            config.checkpoint,
            config.device,
            config.dtype,
            config.compile,
            config.adapter,
        )
        disk = None
        if config.disk is not None:
            folder = None if config.disk == "home" else Path(config.disk).expanduser()
            disk = DiskStore(self.backbone, folder, config.disk_dtype, int(config.disk_gib * 2**30))
        self.store = shared_store(self.backbone, int(config.store_gib * 2**30), disk)

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle holds the episodes; the model and the embeddings stay in the process."""
        left_out = ("samples", "ahead", "backbone", "store")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.config.validate()
        self._share()
        held = np.flatnonzero(self.handles >= 0)
        self.handles[held] = self.store.acquire([self._target(int(slot)).image for slot in held])

    def _make_observation_space(self) -> spaces.Dict:
        config, backbone = self.config, self.backbone
        size, (channels, height, width) = backbone.image_size, backbone.embedding_shape
        entries: dict[str, spaces.Space] = {
            "target_category": spaces.Discrete(len(self.dataset.categories)),
            "num_steps": spaces.Discrete(config.max_steps + 1),
        }
        if config.obs == "full":
            entries["image"] = spaces.Box(0, 255, (size, size, 3), np.uint8)
            entries["sam_image_embeddings"] = spaces.Box(
                -np.inf, np.inf, (channels, height, width), np.float32
            )
            entries["sam_pred_mask_prob"] = spaces.Box(0, 1, backbone.mask_shape, np.float32)
        else:
            entries["handle"] = spaces.Box(0, MAX_HANDLES - 1, (1,), np.int32)
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
            the cell that is scored: two float32 (num_slots, *cells), 0 to 1.
        """
        both = torch.stack([self._low_target & self._low_valid, self._low_valid], dim=1).float()
        target, scored = F.adaptive_avg_pool2d(both, cells).unbind(dim=1)
        return target / scored.clamp(min=1e-6), scored

    # Episodes ----------------------------------------------------------------------------------

    def plan(self, slots: Sequence[int], seeded: Sequence[int], options: Mapping[str, Any]) -> None:
        """Take note of a reset that somebody asks for, before it comes; not of an autoreset.

        Args:
            slots: that will be reset.
            seeded: those of them that get a seed.
            options: of the reset.
        """

    def reset(self, slots: Sequence[int], rngs: Sequence[np.random.Generator]) -> None:
        """Begin new episodes in some slots, each with a target drawn from its own generator."""
        starts: list[Any] = [rng.bit_generator.state for rng in rngs]
        self._begin(slots, self._draw_all(slots, rngs))
        for slot, start in zip(slots, starts, strict=True):
            self._starts[slot] = start

    def place(self, slots: Sequence[int], targets: Sequence[SlotTarget]) -> None:
        """Begin new episodes in some slots about targets of the caller's choice."""
        self._begin(slots, [(t, *self._low_res(t.mask, t.ignore)) for t in targets])

    def _begin(
        self, slots: Sequence[int], drawn: Sequence[tuple[SlotTarget, np.ndarray, np.ndarray]]
    ) -> None:
        """Begin new episodes about targets, each with its low-res mask and scored area."""
        handles = self.store.acquire(
            [target.image for target, _, _ in drawn], [target.digest for target, _, _ in drawn]
        )
        for slot, handle, (target, _, _) in zip(slots, handles, drawn, strict=True):
            self.release([slot])
            self.handles[slot] = handle
            self.targets[slot] = target
            self._starts[slot] = None
        index = to_device(np.asarray(slots), self.device)
        self._low_target[index] = to_device(np.stack([low for _, low, _ in drawn]), self.device)
        self._low_valid[index] = to_device(np.stack([valid for *_, valid in drawn]), self.device)
        self.steps[slots] = 0
        self.num_clicks[slots] = 0
        self.labels[slots] = NO_POINT
        self.shown[slots] = self._nothing

    def describe(self) -> None:
        """Let the store say what was attached to it since the slots were reset."""
        held = np.flatnonzero(self.handles >= 0).tolist()
        self.store.describe({int(self.handles[slot]): self._target(slot).image for slot in held})

    def get_state(self) -> list[dict[str, Any]]:
        """The episode of each slot, copied: numpy arrays and plain values, small enough to keep.

        Images, targets and embeddings are not in it: `set_state` draws them again.
        """
        (logits,) = to_host(self.logits[:, 1 : int(self.num_clicks.max()) + 1])
        return [
            {name: getattr(self, name)[slot].copy() for name in self.episode_arrays}
            | {"logits": logits[slot, :count].copy(), "start": self._starts[slot]}
            for slot, count in enumerate(self.num_clicks)
        ]

    def set_state(
        self, state: Sequence[dict[str, Any]], rngs: Sequence[np.random.Generator]
    ) -> None:
        """Go on with the episodes of `get_state`, of a core with the same settings.

        Args:
            state: of each slot.
            rngs: the generators of the slots; they end as they were right after the draw.
        """
        for slot, (row, rng) in enumerate(zip(state, rngs, strict=True)):
            if row["start"] is None:
                raise ValueError(f"Slot {slot} of this state had not been reset: nothing to go on.")
            rng.bit_generator.state = row["start"]
        self.reset(range(self.num_slots), rngs)
        for name in self.episode_arrays:
            getattr(self, name)[:] = np.stack([row[name] for row in state])
        for slot, row in enumerate(state):
            self.logits[slot, 1 : len(row["logits"]) + 1] = to_device(row["logits"], self.device)

    def close(self) -> None:
        """Let go of all targets and embeddings; slots must be reset before use."""
        self.release(range(self.num_slots))
        self.ahead.close()

    def release(self, slots: Sequence[int]) -> None:
        """Let go of the targets and embeddings of some slots, which must be reset before use."""
        for slot in slots:
            if self.handles[slot] >= 0:
                self.store.unpin(int(self.handles[slot]))
                self.handles[slot] = -1
            self.targets[slot] = None

    def _draw_all(
        self, slots: Sequence[int], rngs: Sequence[np.random.Generator]
    ) -> list[tuple[SlotTarget, np.ndarray, np.ndarray]]:
        """The next target of each slot; the ones after are begun in a thread if that pays."""
        drawn = self.ahead.take(slots, rngs, self._upcoming(slots))
        self._enter(slots)
        # A sample from the cache is there sooner than two threads have agreed on whose turn it is.
        missed, self._misses = self.samples.misses > self._misses, self.samples.misses
        if missed and self.num_slots > 1:
            self.ahead.begin(slots, rngs, self._upcoming(slots))
        return drawn

    def _upcoming(self, slots: Sequence[int]) -> list[int]:
        """Which part of the dataset the next episode of each slot is drawn from."""
        return [0] * len(slots)

    def _enter(self, slots: Sequence[int]) -> None:
        """Note that the next episode of some slots has been drawn from where it was upcoming."""

    def _choose(self, rng: np.random.Generator, part: int) -> tuple[int, int | None]:
        """Draw an image from a part of the dataset, as `Dataset.draw` does from all of it."""
        del part
        return self.dataset.draw(rng)

    def _name_of(self, part: int) -> str:
        del part
        return self.dataset.name

    def draw(self, rng: np.random.Generator, part: int = 0) -> SlotTarget:
        """What an episode that begins with this generator is about."""
        return self._draw(rng, part)[0]

    def _draw(
        self, rng: np.random.Generator, part: int
    ) -> tuple[SlotTarget, np.ndarray, np.ndarray]:
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
            low, valid = self._low_res(mask, sample.ignore)
            if np.count_nonzero(low) >= max(1.0, self.config.min_target * low.size):
                target = SlotTarget(
                    sample.image, mask, sample.ignore, category, sample.source, cue, sample.digest
                )
                return target, low, valid
        raise ValueError(
            f"{self._name_of(part)}: 200 draws found no target that covers at least "
            f"{self.config.min_target:.2%} of the frame. Lower min_target or take other categories."
        )

    def _low_res(
        self, mask: np.ndarray, ignore: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The target and the scored area on SAM's low-res mask: two bool (hm, wm)."""
        size, shape = self.backbone.image_size, self.backbone.mask_shape
        height, width = self.backbone.input_size(mask.shape)

        def shrink(area: np.ndarray) -> np.ndarray:
            frame: np.ndarray = area.astype(np.float32)
            if area.shape != (height, width):
                frame = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
            frame = np.pad(frame, ((0, size - height), (0, size - width)))
            return cv2.resize(frame, shape[::-1], interpolation=cv2.INTER_AREA) >= 0.5

        target = shrink(mask)
        if ignore is None and height == width:
            return target, np.ones(shape, bool)
        scored = np.ones_like(mask) if ignore is None else ~ignore
        return target, shrink(scored)

    # Steps -------------------------------------------------------------------------------------

    def check_actions(self, actions: np.ndarray) -> np.ndarray:
        """Actions as int64 (num_slots,); raises `ValueError` if one is out of range."""
        array = np.asarray(actions)
        if array.shape != (self.num_slots,) or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(
                f"Expected {self.num_slots} integer actions, got {array.dtype} {array.shape}."
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
        grid = self.config.grid
        negative, cell = divmod(int(action), grid * grid)
        row, column = divmod(cell, grid)
        side = self.backbone.image_size / grid
        return (column + 0.5) * side - 0.5, (row + 0.5) * side - 0.5, not negative

    def action_at(self, x: float, y: float, positive: bool) -> int:
        """The click action of the cell that holds (x, y), in pixels of the input frame."""
        grid = self.config.grid
        side = self.backbone.image_size / grid
        row, column = (int(np.clip((v + 0.5) // side, 0, grid - 1)) for v in (y, x))
        return (0 if positive else grid * grid) + row * grid + column

    def step(
        self, slots: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Play one action in each of some slots.

        Args:
            slots: int (S,), without repetition.
            actions: int (S,), checked.

        Returns:
            reward float64 (S,), terminated bool (S,), truncated bool (S,).
        """
        config = self.config
        if (self.steps[slots] >= config.max_steps).any():
            raise RuntimeError(
                f"An episode of {config.max_steps} steps is over: call reset() before going on."
            )
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
        truncated = (self.steps[slots] >= config.max_steps) & ~terminated
        return reward, terminated, truncated

    def _add_click(self, slot: int, action: int) -> tuple[bool, bool, float]:
        """Add a click to a slot; returns its polarity, whether it hits the target, its distance."""
        target = self._target(slot)
        x, y, positive = self.click_of(action)
        height, width = self.backbone.input_size(target.mask.shape)
        x, y = min(x, width - 1.0), min(y, height - 1.0)
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

    def to_image(self, slot: int, x: float, y: float) -> tuple[int, int]:
        """The pixel (x, y) of a slot's image that lies at (x, y) of the input frame."""
        image_height, image_width = self._target(slot).mask.shape
        height, width = self.backbone.input_size((image_height, image_width))
        column = int((x + 0.5) * image_width / width)
        row = int((y + 0.5) * image_height / height)
        return min(max(column, 0), image_width - 1), min(max(row, 0), image_height - 1)

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
        valid = self._low_valid[index]
        predicted, truth = (logits > 0) & valid, self._low_target[index] & valid
        overlap = (predicted & truth).sum(dim=(1, 2))
        return overlap / (predicted | truth).sum(dim=(1, 2)).clamp(min=1)

    def _full_iou(self, slots: np.ndarray, logits: torch.Tensor) -> np.ndarray:
        """IoU (S,) of masks at the size of their images."""
        ious = []
        for target, row in zip(map(self._target, slots), logits, strict=True):
            mask = to_host(self.backbone.masks_at(row, target.mask.shape) > 0)[0]
            ious.append(metrics.iou(mask, target.mask, target.ignore))
        return np.array(ious)

    # What is seen ------------------------------------------------------------------------------

    def _target(self, slot: int) -> SlotTarget:
        target = self.targets[slot]
        if target is None:
            raise RuntimeError("Call reset() before anything else.")
        return target

    def observe(self, slots: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Observations of some slots, stacked, in fresh arrays."""
        entries = self._entries(np.asarray(slots))
        return {key: entries[key] for key in self.observation_space.spaces}

    def _entries(self, slots: np.ndarray) -> dict[str, np.ndarray]:
        """The entries of observations of some slots, in any order."""
        targets = [self._target(slot) for slot in slots]
        obs: dict[str, np.ndarray] = {
            "target_category": np.array([t.category for t in targets], np.int64),
            "num_steps": self.steps[slots].copy(),
        }
        obs["sam_pred_mask_prob"] = self.shown[slots]
        if self.config.obs == "full":
            handles = to_device(self.handles[slots], self.device)
            obs["image"] = np.stack([self.backbone.framed(t.image) for t in targets])
            obs["sam_image_embeddings"] = to_host(self.store.gather(handles))[0]
        else:
            obs["handle"] = self.handles[slots].astype(np.int32)[:, None]
        if self.config.target == "instance":
            obs["cue_click"] = np.array([self._cue(t) for t in targets], np.float32)
        return obs

    def _shown(self, logits: torch.Tensor) -> torch.Tensor:
        """What an observation shows of mask logits (S, hm, wm): probability, or a small byte."""
        probability = logits.sigmoid()
        if self.config.obs == "full":
            return probability
        return (255 * F.avg_pool2d(probability[:, None], 4)[:, 0]).round().to(torch.uint8)

    def _cue(self, target: SlotTarget) -> np.ndarray:
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
        from sam_gym.render import draw_episode

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

    # Oracle view -------------------------------------------------------------------------------

    def ground_truth(self, slot: int) -> SlotTarget:
        """The target of a slot, for rewards, metrics and agents that cheat on purpose."""
        return self._target(slot)
