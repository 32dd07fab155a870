"""`SamEverything-v0`: find all objects of an image with few points for a Segment Anything Model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor
from torch.nn import functional as F

from sam_gym.backbones import Prompts
from sam_gym.data import Dataset, Sample
from sam_gym.envs.base_core import BaseCore, DatasetConfig, check_choice
from sam_gym.envs.base_env import BaseEnv, BaseVectorEnv
from sam_gym.metrics.panoptic import PART_COVERS, PART_INSIDE, matched_ious
from sam_gym.simulation.clicks import cell_centres
from sam_gym.utils.transfer import to_device, to_host

#: Arrays of an `EverythingCore` with a row per slot that say how far its episode is. `get_state`
#: takes these and the kept masks; objects and embeddings come back by drawing them once more.
EPISODE_ARRAYS = (
    *("steps", "num_points", "num_duplicates", "cells"),
    *("ious", "found", "shown"),
)
#: An object counts as found from this IoU on.
FOUND_IOU = 0.5
#: So many kept masks on one another are shown as 1 in `overlap`.
MAX_OVERLAP = 4
#: Points that are decoded at once, times the cells of an embedding; at least one point of each
#: environment. Larger sets are decoded one part after the other.
MAX_DECODED = 2**18
#: The maps of what was found so far, in the order in which `shown` has them.
MAPS = ("coverage", "overlap", "predicted_iou")


@dataclass(frozen=True)
class EverythingConfig(DatasetConfig):
    """Settings of `SamEverything-v0`, all JSON-plain."""

    dataset: str = "rooms"
    """Dataset name: rooms, rooms-panoramas, scenes, coco, folder, entities, domain."""
    grid: int = 32
    """Points lie on the centres of grid x grid cells of SAM's square input frame."""
    actions: Literal["points", "set"] = "points"
    """One point in a step, or a whole set of points at once."""
    budget: int = 32
    """Points per episode, after which it is truncated."""
    stop: bool = True
    """Add an action that ends the episode; of sets, that is the empty one."""
    keep_iou: float = 0.4
    """Masks of lower predicted IoU are not kept."""
    duplicate_iou: float = 0.7
    """From this IoU with a mask that is kept already, a mask is a duplicate."""
    point_cost: float = 0.001
    """Subtracted from the reward for every point."""
    duplicate_cost: float = 0.002
    """Subtracted for every duplicate."""
    part_cost: float = 0.01
    """Subtracted for every kept mask that is a part of an object."""

    def validate(self) -> None:
        super().validate()
        check_choice("actions", self.actions, ("points", "set"))
        if not 1 <= self.budget <= self.grid**2:
            raise ValueError(
                f"budget must be from 1 to the {self.grid**2} points of the grid, "
                f"got {self.budget}."
            )
        for name in ("keep_iou", "duplicate_iou"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}.")
        for name in ("point_cost", "duplicate_cost", "part_cost"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")

    @property
    def longest(self) -> int:
        return self.budget


class Kept(NamedTuple):
    """A mask that was kept, apart from its pixels.

    Attributes:
        predicted_iou: how far SAM trusts it.
        overlaps: IoU with each object, float64 (N,).
        is_part: whether it is a part of an object.
    """

    predicted_iou: float
    overlaps: np.ndarray
    is_part: bool


class _Relations(NamedTuple):
    """New masks in numbers: (S, M) for M new masks of each of S slots, K kept ones, N objects.

    Attributes:
        predicted_iou: float32 (S, M); -1 where there is no mask, or an empty one.
        ious: float32 (S, M, K + M), with the kept masks, then with the new ones.
        overlaps: float32 (S, M, N), IoU with the objects.
        is_part: bool (S, M).
    """

    predicted_iou: np.ndarray
    ious: np.ndarray
    overlaps: np.ndarray
    is_part: np.ndarray


class EverythingCore(BaseCore[EverythingConfig, Sample]):
    """The task of finding everything in `num_envs` slots that share one `decode` per step.

    State of a slot: its image with all objects, the cells tried so far, and the masks that were
    kept. Large sets of points are decoded one part after the other (`MAX_DECODED`), so memory is
    bounded.

    Args:
        config: the settings.
        num_envs: how many episodes run side by side.
        dataset: instead of the one that the settings name.

    Raises:
        ValueError, FileNotFoundError: a setting, the dataset or the checkpoint is wrong.
    """

    episode_arrays: tuple[str, ...] = EPISODE_ARRAYS
    reported = ("points", "masks", "duplicates", "parts", "found")

    def __init__(
        self, config: EverythingConfig, num_envs: int, dataset: Dataset | None = None
    ) -> None:
        super().__init__(config, num_envs, dataset)
        cells, mask_shape = config.grid**2, self.backbone.mask_shape
        is_single = config.actions == "points"
        self.stop_action = cells if is_single and config.stop else -1
        self.action_space = (
            spaces.Discrete(cells + int(config.stop)) if is_single else spaces.MultiBinary(cells)
        )
        self.observation_space = self._make_observation_space()
        self.num_points = np.zeros(num_envs, np.int64)
        self.num_duplicates = np.zeros(num_envs, np.int64)
        #: The cells that were tried, in order; -1 where there is none yet.
        self.cells = np.full((num_envs, config.budget), -1, np.int64)
        #: Mean over the objects of the IoU with their own kept mask.
        self.ious = np.zeros(num_envs)
        #: Share of the objects that are found.
        self.found = np.zeros(num_envs)
        #: What an observation shows of the kept masks of each slot, see `MAPS`.
        full = config.obs == "full"
        shape = mask_shape if full else self.backbone.embedding_shape[1:]
        self.shown = np.zeros((num_envs, len(MAPS), *shape), np.float32 if full else np.uint8)
        #: The kept masks of each slot.
        self.kept: list[list[Kept]] = [[] for _ in range(num_envs)]
        self._masks = self._no_masks()
        self._objects = self._no_masks()
        self._valid = torch.ones((num_envs, *mask_shape), dtype=torch.bool, device=self.device)

    def _no_masks(self) -> Tensor:
        """Room for masks of each slot, bool (num_envs, K, hm, wm): none so far."""
        shape = (self.num_envs, 0, *self.backbone.mask_shape)
        return torch.zeros(shape, dtype=torch.bool, device=self.device)

    def _make_observation_space(self) -> spaces.Dict:
        config, backbone = self.config, self.backbone
        grid = (config.grid, config.grid)
        maps: spaces.Space = spaces.Box(0, 1, backbone.mask_shape, np.float32)
        tried: spaces.Space = spaces.Box(0, 1, grid, np.float32)
        if config.obs == "handle":
            maps = spaces.Box(0, 255, backbone.embedding_shape[1:], np.uint8)
            tried = spaces.Box(0, 255, grid, np.uint8)
        return spaces.Dict(
            {
                **self._image_spaces(),
                **{name: maps for name in MAPS},
                "tried": tried,
                "num_points": spaces.Discrete(config.budget + 1),
            }
        )

    # Episodes ----------------------------------------------------------------------------------

    def _draw(self, rng: np.random.Generator, part: int) -> tuple[Sample, np.ndarray, np.ndarray]:
        for _ in range(200):
            sample = self.samples[self._choose(rng, part)[0]]
            scored = self._scored(sample.image.shape[:2], sample.ignore)
            objects = [self._low_res(mask) & scored for mask in sample.masks]
            large = [self._covers_enough(low) for low in objects]
            if any(large):
                asked = np.array(large)
                sample = replace(
                    sample, masks=sample.masks[asked], categories=sample.categories[asked]
                )
                return sample, np.stack(objects)[asked], scored
        raise self._nothing_drawn(part)

    def _begin(
        self, slots: Sequence[int], drawn: Sequence[tuple[Sample, np.ndarray, np.ndarray]]
    ) -> None:
        super()._begin(slots, drawn)
        index = to_device(np.asarray(slots), self.device)
        most = max(len(objects) for _, objects, _ in drawn)
        self._objects = _with_room(self._objects, most)
        self._objects[index] = False
        objects = np.zeros((len(slots), most, *self.backbone.mask_shape), bool)
        for row, (_, own, _) in zip(objects, drawn, strict=True):
            row[: len(own)] = own
        self._objects[index, :most] = to_device(objects, self.device)
        self._valid[index] = to_device(np.stack([scored for *_, scored in drawn]), self.device)
        self._masks[index] = False
        self.cells[slots] = -1
        for name in ("num_points", "num_duplicates", "ious", "found", "shown"):
            getattr(self, name)[slots] = 0
        for slot in slots:
            self.kept[slot] = []

    def get_state(self) -> list[dict[str, Any]]:
        (masks,) = to_host(self._masks)
        return [
            row | {"masks": masks[slot, : len(kept)].copy(), "kept": [tuple(own) for own in kept]}
            for slot, (row, kept) in enumerate(zip(super().get_state(), self.kept, strict=True))
        ]

    def set_state(
        self, state: Sequence[dict[str, Any]], rngs: Sequence[np.random.Generator]
    ) -> None:
        super().set_state(state, rngs)
        self._masks = _with_room(self._masks, max(len(row["kept"]) for row in state))
        for slot, row in enumerate(state):
            self.kept[slot] = [Kept(*own) for own in row["kept"]]
            self._masks[slot, : len(row["kept"])] = to_device(row["masks"], self.device)

    # Steps -------------------------------------------------------------------------------------

    def check_actions(self, actions: np.ndarray) -> np.ndarray:
        array = np.asarray(actions)
        grid, cells = self.config.grid, self.config.grid**2
        is_single = self.config.actions == "points"
        shape = (self.num_envs,) if is_single else (self.num_envs, cells)
        whole = np.issubdtype(array.dtype, np.integer) or array.dtype == bool
        if array.shape != shape or not whole:
            what = "integer actions" if is_single else f"sets of {cells} zeros and ones"
            raise ValueError(f"Expected {self.num_envs} {what}, got {array.dtype} {array.shape}.")
        array, last = array.astype(np.int64), cells + int(self.config.stop) - 1 if is_single else 1
        if array.min() < 0 or array.max() > last:
            bad = array[(array < 0) | (array > last)][0]
            what = f"{grid} x {grid} points{', stop' * self.config.stop}"
            raise ValueError(
                f"Action {bad} is out of range: expected 0 to {last} ({what})."
                if is_single
                else f"A set of points holds zeros and ones, got {bad}."
            )
        return array

    def step(
        self, slots: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        config = self.config
        self._check_going_on(slots)
        before = self.ious[slots].copy()
        duplicates = self.num_duplicates[slots].copy()
        cells = self._cells_of(slots, actions)
        count = (cells >= 0).sum(axis=1)
        parts = np.zeros(len(slots), np.int64)
        _, height, width = self.backbone.embedding_shape
        at_once = max(1, MAX_DECODED // (height * width * len(slots)))
        for first in range(0, cells.shape[1], at_once):
            parts += self._try(slots, cells[:, first : first + at_once])
        for slot, own, number in zip(slots, cells, count, strict=True):
            done = self.num_points[slot]
            self.cells[slot, done : done + number] = own[:number]
        self.num_points[slots] += count
        self.steps[slots] += 1
        self._score(slots[count > 0])

        reward = self.ious[slots] - before - config.point_cost * count
        reward -= config.duplicate_cost * (self.num_duplicates[slots] - duplicates)
        reward -= config.part_cost * parts
        terminated = (count == 0) & config.stop
        return reward, terminated, self._is_over(slots) & ~terminated

    def _is_over(self, slots: np.ndarray) -> np.ndarray:
        return super()._is_over(slots) | (self.num_points[slots] >= self.config.budget)

    def _cells_of(self, slots: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """The cells that are tried, in order, as far as budgets reach: int64 (S, L), -1 padded."""
        if self.config.actions == "points":
            return np.where(actions == self.stop_action, -1, actions)[:, None]
        left = self.config.budget - self.num_points[slots]
        chosen = [np.flatnonzero(own)[:most] for own, most in zip(actions, left, strict=True)]
        cells = np.full((len(slots), max(len(own) for own in chosen)), -1, np.int64)
        for row, own in zip(cells, chosen, strict=True):
            row[: len(own)] = own
        return cells

    def _try(self, slots: np.ndarray, cells: np.ndarray) -> np.ndarray:
        """Decode cells int64 (S, M) of some slots and keep what is worth it.

        Returns:
            How many parts were kept in each slot, int64 (S,).
        """
        playing = (cells >= 0).any(axis=1)
        parts = np.zeros(len(slots), np.int64)
        if not playing.any():
            return parts
        slots, cells = slots[playing], cells[playing]
        most = max(len(self.kept[slot]) for slot in slots)
        new, predicted = self._decode(slots, cells)
        kept = self._masks[to_device(slots, self.device), :most]
        relations = self._relate(slots, new, predicted, kept)
        changes: dict[tuple[int, int], tuple[int, int]] = {}
        for row, slot in enumerate(slots):
            places, parts[np.flatnonzero(playing)[row]] = self._keep(slot, row, most, relations)
            changes |= {(slot, place): (row, number) for place, number in places.items()}
        if changes:
            into, out_of = (
                to_device(np.array(pairs).T.copy(), self.device)
                for pairs in (list(changes), list(changes.values()))
            )
            room = max(len(self.kept[slot]) for slot in slots)
            self._masks = _with_room(self._masks, room)
            self._masks[into[0], into[1]] = new[out_of[0], out_of[1]]
        return parts

    def _decode(self, slots: np.ndarray, cells: np.ndarray) -> tuple[Tensor, Tensor]:
        """The masks of points at cells int64 (S, M): the best of SAM's three for each.

        Returns:
            Masks bool (S, M, hm, wm) and predicted IoU float32 (S, M), -1 where there is no cell.
        """
        rows, places = np.nonzero(cells >= 0)
        grid, size = self.config.grid, self.backbone.image_size
        points = cell_centres(cells[rows, places], grid, (size / grid, size / grid))
        limits = np.array([self._inside(slot, size, size) for slot in slots])
        points = np.minimum(points, limits[rows]).astype(np.float32)[:, None]
        handles = self.handles[slots] if cells.shape[1] > 1 else self.handles[slots[rows]]
        index, places_index = to_device(rows, self.device), to_device(places, self.device)
        device = self.device
        prompts = Prompts(
            points=to_device(points, device),
            labels=torch.ones((len(rows), 1), dtype=torch.int64, device=device),
            rows=index if cells.shape[1] > 1 else None,
        )
        embeddings = self.store.gather(to_device(handles, device))
        ambiguous = torch.ones(len(rows), dtype=torch.bool, device=device)
        logits, trust = self.backbone.decode_best(embeddings, prompts, ambiguous)
        shape = (*cells.shape, *self.backbone.mask_shape)
        masks = torch.zeros(shape, dtype=torch.bool, device=device)
        masks[index, places_index] = logits > 0
        predicted = torch.full(cells.shape, -1.0, device=device)
        predicted[index, places_index] = trust
        return masks, predicted

    def _relate(
        self, slots: np.ndarray, new: Tensor, predicted: Tensor, kept: Tensor
    ) -> _Relations:
        """New masks (S, M, hm, wm) in numbers, beside kept ones (S, K, hm, wm) and the objects."""
        index = to_device(slots, self.device)
        pixels, others = new.flatten(2).float(), kept.flatten(2).float()
        among = torch.cat([others, pixels], dim=1)
        area = pixels.sum(dim=2)
        common = pixels @ among.transpose(1, 2)
        ious = common / (area[:, :, None] + among.sum(dim=2)[:, None] - common).clamp(min=1)

        objects = self._objects[index].flatten(2).float()
        scored = pixels * self._valid[index].flatten(1)[:, None]
        size, object_size = scored.sum(dim=2)[:, :, None], objects.sum(dim=2)[:, None]
        common = scored @ objects.transpose(1, 2)
        overlaps = common / (size + object_size - common).clamp(min=1)
        is_inside = common >= PART_INSIDE * size.clamp(min=1)
        is_part = (is_inside & (common < PART_COVERS * object_size)).any(dim=2)
        trust = torch.where(area > 0, predicted, -1.0)
        return _Relations(*to_host(trust, ious, overlaps, is_part))

    def _keep(
        self, slot: int, row: int, before: int, new: _Relations
    ) -> tuple[dict[int, int], int]:
        """Keep the new masks of a slot that are worth it, one after the other.

        Args:
            slot: whose.
            row: of the slot in `new`.
            before: number of columns of `new.ious` that stand for masks kept earlier.
            new: the new masks.

        Returns:
            Place among the kept masks -> number of the new mask that lies there now; and how many
            parts were kept.
        """
        kept, places, parts = self.kept[slot], {}, 0
        columns = list(range(len(kept)))
        objects = len(self._target(slot).masks)
        for number in np.flatnonzero(new.predicted_iou[row] >= self.config.keep_iou).tolist():
            own = Kept(
                float(new.predicted_iou[row, number]),
                new.overlaps[row, number, :objects].astype(np.float64),
                bool(new.is_part[row, number]),
            )
            ious = new.ious[row, number, columns]
            place = int(ious.argmax()) if len(ious) else -1
            if place >= 0 and ious[place] >= self.config.duplicate_iou:
                self.num_duplicates[slot] += 1
                if own.predicted_iou <= kept[place].predicted_iou:
                    continue
                kept[place], columns[place] = own, before + number
            else:
                place = len(kept)
                kept.append(own)
                columns.append(before + number)
            places[place] = number
            parts += own.is_part
        return places, parts

    def _score(self, slots: np.ndarray) -> None:
        """Compare what some slots have kept with their objects, and show it."""
        for slot in slots:
            if self.kept[slot]:
                matched = matched_ious(np.stack([own.overlaps for own in self.kept[slot]]))
                self.ious[slot] = matched.mean()
                self.found[slot] = (matched >= FOUND_IOU).mean()
        most = max((len(self.kept[slot]) for slot in slots), default=0)
        if most:
            trust = np.zeros((len(slots), most), np.float32)
            for row, slot in zip(trust, slots, strict=True):
                row[: len(self.kept[slot])] = [own.predicted_iou for own in self.kept[slot]]
            masks = self._masks[to_device(slots, self.device), :most]
            (self.shown[slots],) = to_host(self._maps(masks, to_device(trust, self.device)))

    def _maps(self, masks: Tensor, trust: Tensor) -> Tensor:
        """What an observation shows of masks bool (S, K, hm, wm): (S, 3, ...), see `MAPS`."""
        count = masks.sum(dim=1)
        highest = (masks * trust[:, :, None, None]).amax(dim=1).clamp(0, 1)
        maps = torch.stack([count > 0, count.clamp(max=MAX_OVERLAP) / MAX_OVERLAP, highest], dim=1)
        if self.config.obs == "full":
            return maps
        return (255 * F.avg_pool2d(maps, 4)).round().to(torch.uint8)

    # What is seen ------------------------------------------------------------------------------

    def tried(self, slots: np.ndarray) -> np.ndarray:
        """Which cells of the grid were tried in some slots: bool (S, grid, grid)."""
        grid = self.config.grid
        tried = np.zeros((len(slots), grid**2 + 1), bool)
        # Of -1, which stands for no cell, it is the last entry.
        np.put_along_axis(tried, self.cells[slots], True, axis=1)
        return tried[:, :-1].reshape(-1, grid, grid)

    def _entries(self, slots: np.ndarray) -> dict[str, np.ndarray]:
        shown, full = self.shown[slots], self.config.obs == "full"
        tried = self.tried(slots)
        return super()._entries(slots) | {
            **{name: shown[:, k].copy() for k, name in enumerate(MAPS)},
            "tried": tried.astype(np.float32) if full else tried * np.uint8(255),
            "num_points": self.num_points[slots].copy(),
        }

    def info(self, slots: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        slots = np.asarray(slots)
        kept = [self.kept[slot] for slot in slots]
        return {
            "iou": self.ious[slots].copy(),
            "points": self.num_points[slots].copy(),
            "masks": np.array([len(own) for own in kept], np.int64),
            "duplicates": self.num_duplicates[slots].copy(),
            "parts": np.array([sum(mask.is_part for mask in own) for own in kept], np.int64),
            "found": self.found[slots].copy(),
            "source": np.array([self._target(slot).source for slot in slots], object),
        }

    def coverage(self, slot: int) -> np.ndarray:
        """Where a slot has kept a mask, on SAM's low-res mask: bool (hm, wm)."""
        return to_host(self._masks[slot, : len(self.kept[slot])].any(dim=0))[0]

    def masks(self, slot: int) -> np.ndarray:
        """The kept masks of a slot at the size of its image: bool (K, H, W)."""
        low = self._masks[slot, : len(self.kept[slot])].float() - 0.5
        full = self.backbone.masks_at(low, self._target(slot).image.shape[:2]) > 0
        return to_host(full)[0]

    def points(self, slot: int) -> list[tuple[int, int]]:
        """The points of a slot so far, in order: (x, y) in pixels of its image."""
        return [self.pixel_of(slot, cell) for cell in self.cells[slot, : self.num_points[slot]]]

    def pixel_of(self, slot: int, cell: int) -> tuple[int, int]:
        """The pixel (x, y) of a slot's image that the point of a cell lies on."""
        return self.to_image(slot, *self._inside(slot, *self.centre_of(cell)))

    def render(self, slot: int, height: int = 384) -> np.ndarray:
        """A picture of a slot, `height` pixels high and a caption. Objects have white outlines.

        Returns:
            uint8 (H, W, 3), RGB.
        """
        from sam_gym.utils.render import draw_masks

        target = self._target(slot)
        return draw_masks(
            target.image,
            self.masks(slot),
            self.points(slot),
            targets=target.masks,
            caption=f"{self.num_points[slot]} points  {len(self.kept[slot])} masks  "
            f"IoU {self.ious[slot]:.2f}  found {self.found[slot]:.0%}",
            height=height,
        )


def _with_room(masks: Tensor, count: int) -> Tensor:
    """Masks bool (S, K, hm, wm) with room for at least `count` of each slot."""
    room = masks.shape[1]
    if count <= room:
        return masks
    grown = masks.new_zeros((len(masks), max(count, 2 * room), *masks.shape[2:]))
    grown[:, :room] = masks
    return grown


class SamEverythingEnv(BaseEnv):
    """Find all objects of an image with few points for a Segment Anything Model.

    ## Description

    An image is given. The agent chooses where on a point grid SAM is prompted; of the three masks
    that SAM finds for a point, the one of the highest predicted IoU counts. It is kept if SAM
    trusts it (`keep_iou`), unless it is a duplicate of a mask that is kept already
    (`duplicate_iou`): of the two, the one that SAM trusts more stays. The aim is a mask of every
    whole object with a small part of the points of the full grid.

    ## Action Space

    With `actions="points"`: `Discrete(grid * grid [+ 1])`, a cell of the grid over SAM's square
    input frame, row by row, and with `stop=True` the action that ends the episode after them.

    With `actions="set"`: `MultiBinary(grid * grid)`, all points of a step at once. They are played
    in the order of the grid, with the outcome that they would have one by one; of a set that is
    larger than what is left of the budget, only the first points count. With `stop=True`, an empty
    set ends the episode.

    SAM pads an image that is not square; a point in the padding is the nearest one in the image.

    ## Observation Space

    A `Dict`. With `obs="full"`:

    | key                    | space                       | meaning                               |
    |------------------------|-----------------------------|---------------------------------------|
    | `image`                | uint8 (S, S, 3)             | RGB, in SAM's input frame             |
    | `sam_image_embeddings` | float32 (C, h, w)           | SAM's image embedding                 |
    | `coverage`             | float32 (4h, 4w) in [0, 1]  | where a mask was kept                 |
    | `overlap`              | float32 (4h, 4w) in [0, 1]  | a quarter for each kept mask there    |
    | `predicted_iou`        | float32 (4h, 4w) in [0, 1]  | the highest of the kept masks there   |
    | `tried`                | float32 (grid, grid)        | 1 where a point was                   |
    | `num_points`           | Discrete(budget + 1)        | points so far                         |

    With `obs="handle"` (for training) the first two are replaced by `handle`, int32 (1,), the index
    of the embedding in the store of this process, and the maps are uint8: (h, w) the first three,
    0 or 255 of (grid, grid) the last.

    ## Rewards

    The gain in matched IoU: the mean over all objects of the IoU with their own mask, under the
    best one-to-one matching of kept masks and objects, on SAM's low-res masks. Subtracted are
    `point_cost` for every point, `duplicate_cost` for every duplicate, and `part_cost` for every
    mask that is kept of which at least 0.8 lies inside one object but covers less than half of it.

    ## Starting State

    No points and no masks. The image is drawn from the dataset with the environment's own random
    generator; objects that cover less than `min_target` of the frame do not count.

    ## Episode End

    *Terminated* by stop. *Truncated* when the budget of points is used up (or as many steps were
    made with empty sets).

    ## Information

    `iou` (matched), `points`, `masks` (kept), `duplicates`, `parts` (among the kept masks), `found`
    (share of the objects with a matched IoU of at least 0.5), `source`.

    ## Arguments

    ```python
    import gymnasium as gym
    import sam_gym

    env = gym.make("SamEverything-v0", budget=32, render_mode="rgb_array")
    ```

    All arguments are the fields of `sam_gym.envs.everything.EverythingConfig`. The vector
    environment, `gym.make_vec("SamEverything-v0", num_envs=64,
    vectorization_mode="vector_entry_point")`, decodes the points of all its environments in one
    batch.

    ## Version History

    * v0: initial version.

    Args:
        render_mode: None, "rgb_array" or "human".
        **settings: fields of `EverythingConfig`.

    Raises:
        ValueError: unknown name or impossible value, or data that does not validate.
        FileNotFoundError: a file is missing.
    """

    env_id = "SamEverything-v0"
    config_class = EverythingConfig
    core_class = EverythingCore
    core: EverythingCore


class SamEverythingVectorEnv(BaseVectorEnv):
    """`SamEverything-v0` with many environments that share one SAM decode per step.

    Sub-environment `i` seeded with `seed` plays as the scalar environment seeded with `seed + i`.

    Args:
        num_envs: how many environments.
        render_mode: None, "rgb_array" (one frame per environment) or "human" (all in one window).
        autoreset_mode: "NextStep" (default), "SameStep" or "Disabled", or the enum.
        **settings: fields of `EverythingConfig`; see `SamEverythingEnv`.
    """

    env_id = SamEverythingEnv.env_id
    config_class = SamEverythingEnv.config_class
    core_class = SamEverythingEnv.core_class
    core: EverythingCore
