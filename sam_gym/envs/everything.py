"""`SamEverything-v0`: find all objects of an image with few point prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from gymnasium import spaces
from torch import Tensor

from sam_gym.backbones import Prompts
from sam_gym.data import Dataset, Sample, dataset_help
from sam_gym.data.cache import pack_masks, unpack_masks
from sam_gym.envs.base_core import FRAME_HEIGHT, MAX_DRAWS, BaseCore, Draw, in_cells
from sam_gym.envs.base_env import BaseEnv, BaseVectorEnv
from sam_gym.envs.config import DatasetConfig, Grid
from sam_gym.metrics.panoptic import PART_COVERS, PART_INSIDE, matched_ious
from sam_gym.utils.fields import documented
from sam_gym.utils.settings import Count, Fraction, NotNegative
from sam_gym.utils.transfer import to_device, to_host

#: Arrays of an `EverythingCore` that `get_state` saves, beside the kept masks.
EPISODE_ARRAYS = ("steps", "num_points", "num_duplicates", "cells", "ious", "found", "shown")
#: Minimum IoU at which an object counts as found.
FOUND_IOU = 0.5
#: Number of overlapping masks at which the map `overlap` saturates.
MAX_OVERLAP = 4
#: Maximum of points times embedding cells per decode, beyond one point per sub-environment;
#: larger sets are decoded in chunks.
MAX_DECODED = 2**18
#: Maximum number of mask pixels that are compared, or drawn into maps, at once.
MAX_PIXELS = 2**22
#: Observed maps of the kept masks, in the order of `EverythingCore.shown`.
MAPS = ("coverage", "overlap", "predicted_iou")


@documented
@dataclass(frozen=True, kw_only=True)
class EverythingConfig(DatasetConfig):
    """Arguments of `SamEverything-v0`."""

    dataset: Annotated[str, tyro.conf.arg(help=dataset_help())] = "rooms"
    grid: Grid = 32
    """Points lie on the centres of grid x grid cells of SAM's square input frame."""
    actions: Literal["points", "set"] = "points"
    """One point per step, or a set of points per step."""
    budget: Count = 32
    """Maximum number of points per episode, which is truncated then."""
    stop: bool = True
    """Add an action that ends the episode; with sets, the empty set."""
    keep_iou: Fraction = 0.4
    """Minimum predicted IoU of a mask that is kept."""
    duplicate_iou: Fraction = 0.7
    """Minimum IoU with a kept mask at which a new mask is a duplicate."""
    point_cost: NotNegative = 0.001
    """Cost of every point, subtracted from the reward."""
    duplicate_cost: NotNegative = 0.002
    """Cost of every duplicate."""
    part_cost: NotNegative = 0.01
    """Cost of every kept mask of a part of an object."""

    def validate(self) -> None:
        super().validate()
        if self.budget > self.grid**2:
            raise ValueError(
                f"budget must be at most the {self.grid**2} points of the grid, got {self.budget}."
            )

    @property
    def max_episode_steps(self) -> int:
        return self.budget


class KeptMask(NamedTuple):
    """A kept mask without its pixels.

    Attributes:
        predicted_iou: SAM's estimate of its IoU.
        overlaps: float64 (N,), IoU with each object.
        is_part: whether it is a part of an object.
    """

    predicted_iou: float
    overlaps: np.ndarray
    is_part: bool


class _Relations(NamedTuple):
    """Statistics of M new masks in S sub-environments with K kept masks and N objects each.

    Attributes:
        predicted_iou: float32 (S, M); -1 where there is no mask, or an empty one.
        ious: float32 (S, M, K + M), IoU with the kept masks, then with the new ones.
        overlaps: float32 (S, M, N), IoU with the objects.
        is_part: bool (S, M).
    """

    predicted_iou: np.ndarray
    ious: np.ndarray
    overlaps: np.ndarray
    is_part: np.ndarray


class EverythingCore(BaseCore[EverythingConfig, Sample]):
    """The task of finding all objects: all sub-environments share one `decode` per step.

    State of an episode: the image with its objects, the cells tried, and the kept masks. Large sets
    of points are decoded, and masks are compared, in chunks (`MAX_DECODED`, `MAX_PIXELS`), which
    bounds memory. The masks of targets are packed; `ground_truth` unpacks them. Arguments as for
    `BaseCore`.
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
        #: Tried cells, in order, padded with -1.
        self.cells = np.full((num_envs, config.budget), -1, np.int64)
        #: Mean over the objects of the IoU with their matched mask.
        self.ious = np.zeros(num_envs)
        #: Fraction of the objects that are found.
        self.found = np.zeros(num_envs)
        #: The kept masks as observations show them, see `MAPS`.
        full = config.obs == "full"
        shape = mask_shape if full else self.backbone.embedding_shape[1:]
        self.shown = np.zeros((num_envs, len(MAPS), *shape), np.float32 if full else np.uint8)
        self.kept: list[list[KeptMask]] = [[] for _ in range(num_envs)]
        self._masks = self._no_masks()
        self._objects = self._no_masks()
        self._valid = torch.ones((num_envs, *mask_shape), dtype=torch.bool, device=self.device)

    def _no_masks(self) -> Tensor:
        """Return an empty buffer of masks: bool (num_envs, 0, hm, wm)."""
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

    def _draw(self, rng: np.random.Generator, domain: int) -> Draw[Sample]:
        for _ in range(MAX_DRAWS):
            sample = self.samples[self._draw_image(rng, domain)[0]]
            valid = self._low_res_valid(sample.image.shape[:2], sample.ignore)
            objects = [self._low_res(mask) & valid for mask in sample.masks]
            large = np.array([self._is_large_enough(mask) for mask in objects])
            if large.any():
                # Packed: the masks of a crowded image take more memory than all else of an episode.
                packed = pack_masks(sample.masks[large])
                sample = replace(sample, masks=packed, categories=sample.categories[large])
                return Draw(sample, np.stack(objects)[large], valid)
        raise self._no_target_error(domain)

    def _begin(self, indices: Sequence[int], draws: Sequence[Draw[Sample]]) -> None:
        super()._begin(indices, draws)
        index = to_device(np.asarray(indices), self.device)
        count = max(len(draw.masks) for draw in draws)
        self._objects = _with_capacity(self._objects, count)
        self._objects[index] = False
        objects = np.zeros((len(indices), count, *self.backbone.mask_shape), bool)
        for row, draw in zip(objects, draws, strict=True):
            row[: len(draw.masks)] = draw.masks
        self._objects[index, :count] = to_device(objects, self.device)
        self._valid[index] = to_device(np.stack([draw.valid for draw in draws]), self.device)
        self._masks[index] = False
        self.cells[indices] = -1
        for name in ("num_points", "num_duplicates", "ious", "found", "shown"):
            getattr(self, name)[indices] = 0
        for i in indices:
            self.kept[i] = []

    def get_state(self) -> list[dict[str, Any]]:
        (masks,) = to_host(self._masks)
        return [
            row | {"masks": masks[i, : len(kept)].copy(), "kept": [tuple(mask) for mask in kept]}
            for i, (row, kept) in enumerate(zip(super().get_state(), self.kept, strict=True))
        ]

    def set_state(
        self, state: Sequence[dict[str, Any]], rngs: Sequence[np.random.Generator]
    ) -> None:
        super().set_state(state, rngs)
        self._masks = _with_capacity(self._masks, max(len(row["kept"]) for row in state))
        for i, row in enumerate(state):
            self.kept[i] = [KeptMask(*mask) for mask in row["kept"]]
            self._masks[i, : len(row["kept"])] = to_device(row["masks"], self.device)

    # Steps -------------------------------------------------------------------------------------

    def keys(self) -> dict[str, int]:
        return {"s": self.stop_action} if self.stop_action >= 0 else {}

    def action_at(self, x: float, y: float, positive: bool) -> int:
        if self.config.actions != "points":
            raise NotImplementedError
        return self.cell_at(x, y)

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
        self, indices: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        config = self.config
        self._check_not_over(indices)
        before = self.ious[indices].copy()
        duplicates = self.num_duplicates[indices].copy()
        cells = self._cells_of(indices, actions)
        count = (cells >= 0).sum(axis=1)
        parts = np.zeros(len(indices), np.int64)
        _, height, width = self.backbone.embedding_shape
        chunk = max(1, MAX_DECODED // (height * width * len(indices)))
        for start in range(0, cells.shape[1], chunk):
            parts += self._try(indices, cells[:, start : start + chunk])
        for i, new, number in zip(indices, cells, count, strict=True):
            before_step = self.num_points[i]
            self.cells[i, before_step : before_step + number] = new[:number]
        self.num_points[indices] += count
        self.steps[indices] += 1
        self._score(indices[count > 0])

        reward = self.ious[indices] - before - config.point_cost * count
        reward -= config.duplicate_cost * (self.num_duplicates[indices] - duplicates)
        reward -= config.part_cost * parts
        terminated = (count == 0) & config.stop
        return reward, terminated, self._is_over(indices) & ~terminated

    def _is_over(self, indices: np.ndarray) -> np.ndarray:
        return super()._is_over(indices) | (self.num_points[indices] >= self.config.budget)

    def _cells_of(self, indices: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Return the cells to try, in order, within the budget: int64 (S, L), padded with -1."""
        if self.config.actions == "points":
            return np.where(actions == self.stop_action, -1, actions)[:, None]
        left = self.config.budget - self.num_points[indices]
        chosen = [np.flatnonzero(points)[:n] for points, n in zip(actions, left, strict=True)]
        cells = np.full((len(indices), max(map(len, chosen))), -1, np.int64)
        for row, points in zip(cells, chosen, strict=True):
            row[: len(points)] = points
        return cells

    def _try(self, indices: np.ndarray, cells: np.ndarray) -> np.ndarray:
        """Decode cells int64 (S, M) and keep new masks.

        Returns:
            Number of kept parts, int64 (S,).
        """
        playing = (cells >= 0).any(axis=1)
        parts = np.zeros(len(indices), np.int64)
        if not playing.any():
            return parts
        indices, cells = indices[playing], cells[playing]
        num_kept = max(len(self.kept[i]) for i in indices)
        new, predicted = self._decode(indices, cells)
        relations = self._relate(indices, new, predicted, num_kept)
        changes: dict[tuple[int, int], tuple[int, int]] = {}
        for row, i in enumerate(indices):
            places, parts[np.flatnonzero(playing)[row]] = self._keep(i, row, num_kept, relations)
            changes |= {(i, place): (row, number) for place, number in places.items()}
        if changes:
            into, out_of = (
                to_device(np.array(pairs).T.copy(), self.device)
                for pairs in (list(changes), list(changes.values()))
            )
            num_kept = max(len(self.kept[i]) for i in indices)
            self._masks = _with_capacity(self._masks, num_kept)
            self._masks[into[0], into[1]] = new[out_of[0], out_of[1]]
        return parts

    def _decode(self, indices: np.ndarray, cells: np.ndarray) -> tuple[Tensor, Tensor]:
        """Decode points at cells int64 (S, M): the mask of highest predicted IoU for each.

        Returns:
            Masks bool (S, M, hm, wm) and predicted IoU float32 (S, M), -1 where there is no cell.
        """
        rows, places = np.nonzero(cells >= 0)
        size = self.backbone.image_size
        points = self._centres[cells[rows, places]]
        limits = np.array([self._clip_to_image(i, size, size) for i in indices])
        points = np.minimum(points, limits[rows]).astype(np.float32)[:, None]
        handles = self.handles[indices] if cells.shape[1] > 1 else self.handles[indices[rows]]
        index, places_index = to_device(rows, self.device), to_device(places, self.device)
        device = self.device
        prompts = Prompts(
            points=to_device(points, device),
            labels=torch.ones((len(rows), 1), dtype=torch.int64, device=device),
            rows=index if cells.shape[1] > 1 else None,
        )
        features = self.store.gather(to_device(handles, device), check=False)
        ambiguous = torch.ones(len(rows), dtype=torch.bool, device=device)
        logits, own_iou = self.backbone.decode_best(features, prompts, ambiguous)
        shape = (*cells.shape, *self.backbone.mask_shape)
        masks = torch.zeros(shape, dtype=torch.bool, device=device)
        masks[index, places_index] = logits > self.backbone.mask_threshold
        predicted = torch.full(cells.shape, -1.0, device=device)
        predicted[index, places_index] = own_iou
        return masks, predicted

    def _relate(
        self, indices: np.ndarray, new: Tensor, predicted: Tensor, num_kept: int
    ) -> _Relations:
        """Compare new masks (S, M, hm, wm) with the first `num_kept` kept ones and the objects."""
        parts = [
            self._relate_some(index, new[rows], predicted[rows], num_kept)
            for rows, index in self._some(indices, num_kept + new.shape[1])
        ]
        return _Relations(*to_host(*(torch.cat(own) for own in zip(*parts, strict=True))))

    def _some(self, indices: np.ndarray, count: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield sub-environments a few at a time, with at most `MAX_PIXELS` of `count` masks each.

        Yields:
            Their rows in `indices`, and the indices on the device.
        """
        few = max(1, MAX_PIXELS // (count * self._valid[0].numel()))
        index = to_device(indices, self.device)
        for start in range(0, len(indices), few):
            rows = slice(start, start + few)
            yield rows, index[rows]

    def _relate_some(
        self, index: Tensor, new: Tensor, predicted: Tensor, num_kept: int
    ) -> tuple[Tensor, ...]:
        """Return the fields of `_Relations` of a few sub-environments."""
        pixels, others = new.flatten(2).float(), self._masks[index, :num_kept].flatten(2).float()
        area = pixels.sum(dim=2)
        # Sums of zeros and ones are exact.
        common = torch.cat([pixels @ own.transpose(1, 2) for own in (others, pixels)], dim=2)
        areas = torch.cat([others.sum(dim=2), area], dim=1)
        ious = common / (area[:, :, None] + areas[:, None] - common).clamp(min=1)

        objects = self._objects[index].flatten(2).float()
        scored = pixels * self._valid[index].flatten(1)[:, None]
        size, object_size = scored.sum(dim=2)[:, :, None], objects.sum(dim=2)[:, None]
        common = scored @ objects.transpose(1, 2)
        overlaps = common / (size + object_size - common).clamp(min=1)
        is_inside = common >= PART_INSIDE * size.clamp(min=1)
        is_part = (is_inside & (common < PART_COVERS * object_size)).any(dim=2)
        return torch.where(area > 0, predicted, -1.0), ious, overlaps, is_part

    def _keep(
        self, env_index: int, row: int, before: int, new: _Relations
    ) -> tuple[dict[int, int], int]:
        """Keep new masks of sufficient predicted IoU, one after another.

        Args:
            env_index: the sub-environment.
            row: its row in `new`.
            before: number of columns of `new.ious` for masks kept earlier.
            new: statistics of the new masks.

        Returns:
            Index among the kept masks -> index of the new mask stored there; number of kept parts.
        """
        kept, places, parts = self.kept[env_index], {}, 0
        columns = list(range(len(kept)))
        objects = len(self._target(env_index).masks)
        for number in np.flatnonzero(new.predicted_iou[row] >= self.config.keep_iou).tolist():
            mask = KeptMask(
                float(new.predicted_iou[row, number]),
                new.overlaps[row, number, :objects].astype(np.float64),
                bool(new.is_part[row, number]),
            )
            ious = new.ious[row, number, columns]
            place = int(ious.argmax()) if len(ious) else -1
            if place >= 0 and ious[place] >= self.config.duplicate_iou:
                self.num_duplicates[env_index] += 1
                if mask.predicted_iou <= kept[place].predicted_iou:
                    continue
                kept[place], columns[place] = mask, before + number
            else:
                place = len(kept)
                kept.append(mask)
                columns.append(before + number)
            places[place] = number
            parts += mask.is_part
        return places, parts

    def _score(self, indices: np.ndarray) -> None:
        """Match kept masks with objects, and update scores and maps."""
        for i in indices:
            if self.kept[i]:
                matched = matched_ious(np.stack([mask.overlaps for mask in self.kept[i]]))
                self.ious[i] = matched.mean()
                self.found[i] = (matched >= FOUND_IOU).mean()
        num_kept = max((len(self.kept[i]) for i in indices), default=0)
        if num_kept:
            predicted = np.zeros((len(indices), num_kept), np.float32)
            for row, i in zip(predicted, indices, strict=True):
                row[: len(self.kept[i])] = [mask.predicted_iou for mask in self.kept[i]]
            quality = to_device(predicted, self.device)
            maps = [
                self._maps(self._masks[index, :num_kept], quality[rows])
                for rows, index in self._some(indices, num_kept)
            ]
            (self.shown[indices],) = to_host(torch.cat(maps))

    def _maps(self, masks: Tensor, predicted: Tensor) -> Tensor:
        """Return the observed maps of masks bool (S, K, hm, wm): (S, 3, ...), see `MAPS`."""
        count = masks.sum(dim=1)
        highest = (masks * predicted[:, :, None, None]).amax(dim=1).clamp(0, 1)
        maps = torch.stack([count > 0, count.clamp(max=MAX_OVERLAP) / MAX_OVERLAP, highest], dim=1)
        if self.config.obs == "full":
            return maps
        return in_cells(self.backbone, maps)

    # Observations ------------------------------------------------------------------------------

    def tried(self, indices: np.ndarray) -> np.ndarray:
        """Return the cells that were tried: bool (S, grid, grid)."""
        grid = self.config.grid
        tried = np.zeros((len(indices), grid**2 + 1), bool)
        # The padding, -1, sets the last entry, which is dropped.
        np.put_along_axis(tried, self.cells[indices], True, axis=1)
        return tried[:, :-1].reshape(-1, grid, grid)

    def _entries(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        shown, full = self.shown[indices], self.config.obs == "full"
        tried = self.tried(indices)
        return super()._entries(indices) | {
            **{name: shown[:, k].copy() for k, name in enumerate(MAPS)},
            "tried": tried.astype(np.float32) if full else tried * np.uint8(255),
            "num_points": self.num_points[indices].copy(),
        }

    def info(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        indices = np.asarray(indices)
        kept = [self.kept[i] for i in indices]
        return {
            "iou": self.ious[indices].copy(),
            "points": self.num_points[indices].copy(),
            "masks": np.array([len(own) for own in kept], np.int64),
            "duplicates": self.num_duplicates[indices].copy(),
            "parts": np.array([sum(mask.is_part for mask in own) for own in kept], np.int64),
            "found": self.found[indices].copy(),
            "source": np.array([self._target(i).source for i in indices], object),
        }

    def coverage(self, env_index: int) -> np.ndarray:
        """Return the union of the kept masks at SAM's low resolution: bool (hm, wm)."""
        return to_host(self._masks[env_index, : len(self.kept[env_index])].any(dim=0))[0]

    def masks(self, env_index: int) -> np.ndarray:
        """Return the kept masks at the size of the image: bool (K, H, W)."""
        low = self._masks[env_index, : len(self.kept[env_index])].float() - 0.5
        full = self.backbone.masks_at(low, self._target(env_index).image.shape[:2]) > 0
        return to_host(full)[0]

    def ground_truth(self, env_index: int) -> Sample:
        target = self._target(env_index)
        return replace(target, masks=unpack_masks(target.masks, target.image.shape[1]))

    def points(self, env_index: int) -> list[tuple[int, int]]:
        """Return the points of the episode, in order: (x, y) in pixels of the image."""
        return [
            self.pixel_of(env_index, cell)
            for cell in self.cells[env_index, : self.num_points[env_index]]
        ]

    def pixel_of(self, env_index: int, cell: int) -> tuple[int, int]:
        """Return the image pixel (x, y) of the point of a cell."""
        return self.to_image(env_index, *self._clip_to_image(env_index, *self.centre_of(cell)))

    def render(self, env_index: int, height: int = FRAME_HEIGHT) -> np.ndarray:
        """Draw the episode, `height` pixels high and a caption. Objects have white outlines.

        Returns:
            uint8 (H, W, 3), RGB.
        """
        from sam_gym.utils.render import draw_masks

        target = self._target(env_index)
        return draw_masks(
            target.image,
            self.masks(env_index),
            self.points(env_index),
            targets=self.ground_truth(env_index).masks,
            caption=f"{self.num_points[env_index]} points  {len(self.kept[env_index])} masks  "
            f"IoU {self.ious[env_index]:.2f}  found {self.found[env_index]:.0%}",
            height=height,
        )


def _with_capacity(masks: Tensor, count: int) -> Tensor:
    """Grow a buffer of masks bool (S, K, hm, wm) to K >= count, at least doubling it."""
    capacity = masks.shape[1]
    if count <= capacity:
        return masks
    grown = masks.new_zeros((len(masks), max(count, 2 * capacity), *masks.shape[2:]))
    grown[:, :capacity] = masks
    return grown


class SamEverythingEnv(BaseEnv):
    """Find all objects of an image with few point prompts for a Segment Anything Model.

    ## Description

    The agent gets an image and chooses the points of a grid at which SAM is prompted. Of SAM's
    three masks for a point, the one of the highest predicted IoU counts. It is kept if its
    predicted IoU is at least `keep_iou`. If it duplicates a kept mask (IoU of at least
    `duplicate_iou`), the one of the higher predicted IoU stays. The goal is a mask of every whole
    object with a fraction of the points of the full grid.

    ## Action Space

    With `actions="points"`: `Discrete(grid * grid [+ 1])`, a cell of the grid over SAM's square
    input frame, row by row, and with `stop=True` a last action that ends the episode.

    With `actions="set"`: `MultiBinary(grid * grid)`, a set of points per step. They are evaluated
    in the order of the grid, with the same outcome as one by one; points beyond the budget are
    ignored. With `stop=True`, the empty set ends the episode.

    SAM pads images that are not square; a point in the padding moves to the nearest image pixel.

    ## Observation Space

    A `Dict`. With `obs="full"`:

    | key                    | space                       | meaning                               |
    |------------------------|-----------------------------|---------------------------------------|
    | `image`                | uint8 (S, S, 3)             | RGB, in SAM's input frame             |
    | `sam_image_embeddings` | float32 (C, h, w)           | SAM's image embedding                 |
    | `coverage`             | float32 (hm, wm) in [0, 1]  | 1 where a mask is kept                |
    | `overlap`              | float32 (hm, wm) in [0, 1]  | 1/4 per kept mask, at most 1          |
    | `predicted_iou`        | float32 (hm, wm) in [0, 1]  | maximum over the kept masks           |
    | `tried`                | float32 (grid, grid)        | 1 at cells that were tried            |
    | `num_points`           | Discrete(budget + 1)        | points used                           |

    S is the side of SAM's input frame, (C, h, w) the shape of its embedding, (hm, wm) that of its
    low-res masks.

    With `obs="handle"` (for training) the first two are replaced by `handle`, int32 (1,), the
    number of the embedding in the store of this process. The maps are uint8 (h, w), and `tried` is
    uint8 (grid, grid), 0 or 255.

    ## Rewards

    The gain in matched IoU: the mean over all objects of the IoU with their matched mask, under the
    best one-to-one matching of kept masks and objects, on SAM's low-res masks. Subtracted are
    `point_cost` for every point, `duplicate_cost` for every duplicate, and `part_cost` for every
    kept part. A mask is a part if at least 0.8 of it lies in one object, and it covers less than
    half of that object.

    ## Starting State

    No points and no masks. The environment's random generator draws the image from the dataset.
    `reset(options={"index": i})` takes image `i` instead. Objects that cover less than `min_target`
    of the frame do not count.

    ## Episode End

    *Terminated* by stop. *Truncated* when the budget of points is used up, or after `budget` steps.

    ## Information

    `iou` (matched), `points`, `masks` (kept), `duplicates`, `parts` (among the kept masks), `found`
    (fraction of the objects with a matched IoU of at least 0.5), `source` (of the image).

    ## Arguments

    ```python
    import gymnasium as gym
    import sam_gym

    env = gym.make("SamEverything-v0", budget=32, render_mode="rgb_array")
    ```

    All arguments are the fields of `sam_gym.envs.everything.EverythingConfig`. The vector
    environment, `gym.make_vec("SamEverything-v0", num_envs=64,
    vectorization_mode="vector_entry_point")`, decodes the points of all sub-environments in one
    batch.

    ## Version History

    * v0: initial version.

    Args:
        render_mode: None, "rgb_array" or "human".
        **kwargs: fields of `EverythingConfig`.

    Raises:
        ValueError: an argument is unknown or impossible, or the data does not validate.
        FileNotFoundError: a file is missing.
    """

    env_id = "SamEverything-v0"
    config_class = EverythingConfig
    core_class = EverythingCore
    core: EverythingCore


class SamEverythingVectorEnv(BaseVectorEnv):
    """`SamEverything-v0` in a batch: all sub-environments share one SAM decode per step.

    With `reset(seed=seed)`, sub-environment `i` behaves as the scalar environment with
    `seed + i`. Arguments as for `BaseVectorEnv`, with the fields of `EverythingConfig`.
    """

    env_id = SamEverythingEnv.env_id
    config_class = SamEverythingEnv.config_class
    core_class = SamEverythingEnv.core_class
    core: EverythingCore
