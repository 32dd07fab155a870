"""Simulated prompts for the training of `micro`: clicks, boxes, noisy masks and corrections."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from sam_gym.backbones.micro.data import TrainItem
from sam_gym.backbones.micro.photos import SIZE
from sam_gym.backbones.prompts import NO_POINT, Prompts
from sam_gym.simulation.clicks import interior_distance
from sam_gym.utils.lowres import low_res

#: Side of a low-res mask, and pixels per cell.
MASK, CELL = SIZE // 4, 4


class PromptBatch:
    """The prompts of one step. Each round adds a click.

    Args:
        items: the images and targets of the step.
        capacity: maximum number of clicks per target.
        rng: draws prompt kinds and click places.
    """

    def __init__(self, items: Sequence[TrainItem], capacity: int, rng: np.random.Generator) -> None:
        targets = [target for item in items for target in item.targets]
        self.rng = rng
        self.rows = np.repeat(np.arange(len(items)), [len(item.targets) for item in items])
        self.full = np.stack([target.mask for target in targets])
        area = np.stack([low_res(mask, (MASK, MASK)) for mask in self.full])
        self.target = torch.from_numpy(area)
        self.hard = area > 0.5
        ignore = np.stack([low_res(item.ignore, (MASK, MASK)) > 0.5 for item in items])[self.rows]
        self.ignore = ignore & ~self.hard
        #: float32 (P, h, w), 0 where a pixel does not count.
        self.weight = torch.from_numpy(1.0 - self.ignore.astype(np.float32))
        count = len(targets)
        self.points = np.zeros((count, capacity, 2), np.float32)
        self.labels = np.full((count, capacity), NO_POINT, np.int64)
        self.boxes = np.zeros((count, 4), np.float32)
        self.has_box = np.zeros(count, bool)
        self.masks = torch.zeros(count, MASK, MASK)
        self.has_mask = np.zeros(count, bool)
        self.used = np.zeros(count, np.int64)
        self.partial = np.zeros(count, bool)
        for i, target in enumerate(targets):
            self._first_prompt(i, target.clicks)

    def _first_prompt(self, i: int, clicks: np.ndarray) -> None:
        kind = self.rng.random()
        if kind < 0.18:
            self._add_box(i)
            return
        count = len(clicks) if len(clicks) > 1 and self.rng.random() < 0.5 else 1
        # The first click on a union selects a single object: this round has no training signal.
        self.partial[i] = count < len(clicks)
        for click in clicks[:count]:
            self._add_click(i, click[0], click[1], True)
        if kind > 0.9:
            self._add_noisy_mask(i)

    def _add_click(self, i: int, x: float, y: float, positive: bool) -> None:
        if self.used[i] < self.points.shape[1]:
            self.points[i, self.used[i]] = x, y
            self.labels[i, self.used[i]] = int(positive)
            self.used[i] += 1

    def _add_box(self, i: int) -> None:
        x, y, w, h = cv2.boundingRect(self.full[i].astype(np.uint8))
        corners = np.array([x, y, x + w - 1, y + h - 1], np.float32)
        noise = self.rng.normal(0, 0.06, 4) * [w, h, w, h]
        self.boxes[i] = np.clip(corners + np.clip(noise, -20, 20), 0, SIZE - 1)
        self.has_box[i] = True

    def _add_noisy_mask(self, i: int) -> None:
        mask = self.hard[i].astype(np.float32)
        dx, dy = self.rng.normal(0, 3, 2)
        move = np.array([[1, 0, dx], [0, 1, dy]], np.float32)
        mask = cv2.GaussianBlur(cv2.warpAffine(mask, move, (MASK, MASK)), (0, 0), 2.0)
        bumps = cv2.resize(self.rng.normal(0, 0.25, (8, 8)).astype(np.float32), (MASK, MASK))
        self.masks[i] = torch.from_numpy((mask + bumps - 0.5) * self.rng.uniform(6, 20))
        self.has_mask[i] = True

    @property
    def ambiguous(self) -> Tensor:
        """bool (P,): rows whose only prompt is one click."""
        return torch.from_numpy((self.used == 1) & ~self.has_box & ~self.has_mask)

    def prompts(self, device: torch.device) -> Prompts:
        used = max(1, int(self.used.max()))

        def to(x: np.ndarray) -> Tensor:
            return torch.from_numpy(x).to(device)

        return Prompts(
            points=to(self.points[:, :used]),
            labels=to(self.labels[:, :used]),
            boxes=to(self.boxes),
            has_box=to(self.has_box),
            masks=self.masks.to(device),
            has_mask=to(self.has_mask),
            rows=to(self.rows),
        )

    def correct(self, logits: Tensor) -> None:
        """Give each target a click in its error region, and the logits as its mask prompt."""
        self.masks = logits.detach().float().cpu().clamp(-32, 32)
        self.has_mask[:] = True
        predicted = self.masks.numpy() > 0
        for i, (mask, truth) in enumerate(zip(predicted, self.hard, strict=True)):
            missed, extra = truth & ~mask, mask & ~truth & ~self.ignore[i]
            if not (missed.any() or extra.any()):
                continue
            if self.rng.random() < 0.65:
                inner_missed, inner_extra = interior_distance(missed), interior_distance(extra)
                positive = bool(inner_missed.max() > inner_extra.max())
                index = int((inner_missed if positive else inner_extra).argmax())
            else:
                wrong = np.flatnonzero(missed | extra)
                index = int(wrong[self.rng.integers(len(wrong))])
                positive = bool(truth.flat[index])
            y, x = divmod(index, MASK)
            dx, dy = self.rng.integers(0, CELL, 2)
            self._add_click(i, CELL * x + dx, CELL * y + dy, positive)
