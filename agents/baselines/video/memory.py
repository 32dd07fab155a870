"""Baselines of the task `memory` of `SamVideo-v0`: which frames to remember."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import cv2
import numpy as np

from agents.baselines.base import Agent, Baseline
from sam_gym.envs.video import PLACE_COLUMNS, MemoryCore
from sam_gym.utils.registry import Registry
from sam_gym.utils.transfer import to_host

#: Baseline name -> class, which takes a seed.
MEMORY: Registry[Callable[[int], Agent]] = Registry("baseline of the task memory")

_IOU, _PRESENCE = (PLACE_COLUMNS.index(name) for name in ("predicted_iou", "presence"))


@MEMORY.register("sam2")
class LatestFrames(Baseline):
    """SAM 2's own rule: remembers the latest frames."""

    def act(self, core: MemoryCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        return np.full(core.num_envs, core.sam2_action)


@MEMORY.register("random")
class RandomMemory(Baseline):
    """Keeps nothing, or overwrites any memory, at random."""

    def act(self, core: MemoryCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        return self.rng.integers(core.sam2_action + 1, size=core.num_envs)


@MEMORY.register("first")
class FirstFrame(Baseline):
    """Remembers the prompted frame only."""

    def act(self, core: MemoryCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        return np.zeros(core.num_envs, np.int64)


@MEMORY.register("spaced")
class SpacedFrames(Baseline):
    """Remembers frames at equal distances, so that its memories span the video."""

    def act(self, core: MemoryCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        apart = np.ceil(core.lengths / core.bank.num_slots).astype(int)
        return np.where(core.now % apart == 0, core.sam2_action, 0)


@MEMORY.register("confident")
class ConfidentFrames(Baseline):
    """Remembers the latest frames whose predicted IoU and object score are high."""

    #: Minimum predicted IoU, and minimum probability that the object is in the frame.
    thresholds = 0.7, 0.5

    def act(self, core: MemoryCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        present = observations["places"][:, -1]
        is_good = (present[:, [_IOU, _PRESENCE]] >= self.thresholds).all(axis=1)
        return np.where(is_good, core.sam2_action, 0)


@MEMORY.register("best")
class BestFrames(Baseline):
    """Remembers the frames of the highest predicted IoU so far."""

    def act(self, core: MemoryCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        ious = np.where(core.bank.frames >= 0, core.bank.ious, -1.0)
        slots = ious[:, core.bank.slots]
        worst = slots.argmin(axis=1)
        is_better = ious[:, -1] > slots.min(axis=1)
        return np.where(is_better, worst + 1, 0)


@MEMORY.register("samurai")
class Samurai(Baseline):
    """Remembers frames that fit the motion, as SAMURAI selects memories (Yang et al. 2024).

    A frame is valid if its predicted IoU, its object score and the agreement with a Kalman filter
    of its box pass thresholds. A frame attends to the latest valid frames, and always to the one
    before. A forgotten frame does not return, unlike in SAMURAI, where all frames are stored. Masks
    are chosen by SAM 2.
    """

    #: Minimum predicted IoU, object score, and IoU of the mask's box with the predicted one.
    thresholds = 0.5, 0.0, 0.5
    #: Number of frames that fit before the motion counts, and the predicted IoU at which one does.
    settle, settle_iou = 15, 0.3

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._filters: dict[int, BoxFilter] = {}
        self._stable: dict[int, int] = {}
        self._invalid: dict[int, set[int]] = defaultdict(set)

    def act(self, core: MemoryCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        (masks,) = to_host(core.bank.masks[:, core.bank.present])
        return np.array([self._action(core, i, masks[i]) for i in range(core.num_envs)])

    def _action(self, core: MemoryCore, row: int, mask: np.ndarray) -> int:
        bank, now = core.bank, int(core.now[row])
        if core.steps[row] == 0:
            self._filters.pop(row, None)
            self._stable[row], self._invalid[row] = 0, set()
        predicted, score = bank.ious[row, -1], bank.scores[row, -1]
        motion = self._motion(row, mask, float(predicted))
        valid = predicted > self.thresholds[0] and score > self.thresholds[1]
        if not (valid and (motion is None or motion > self.thresholds[2])):
            self._invalid[row].add(now)
        # The frame before was needed once, and is not valid.
        latest = int(bank.frames[row, bank.slots[0]])
        return 1 if latest in self._invalid[row] else core.sam2_action

    def _motion(self, row: int, mask: np.ndarray, predicted_iou: float) -> float | None:
        """Return the IoU of the mask's box with the one expected, None before motion is known."""
        box = _box(mask)
        if row not in self._filters:
            if box is not None:
                self._filters[row], self._stable[row] = BoxFilter(box), 1
            return None
        expected = self._filters[row].predict()
        overlap = 0.0 if box is None else _box_iou(box, expected)
        is_settled = self._stable[row] >= self.settle
        if box is not None and (is_settled or predicted_iou > self.settle_iou):
            self._filters[row].update(box)
            self._stable[row] += 1
        elif not is_settled:
            self._stable[row] = 0
        return overlap if is_settled else None


class BoxFilter:
    """Kalman filter of a box that moves at constant velocity (SORT; noise of DeepSORT).

    Args:
        box: (x0, y0, x1, y1).
    """

    #: Standard deviations of places and velocities, in units of the box's height.
    place, velocity = 1 / 20, 1 / 160

    def __init__(self, box: np.ndarray) -> None:
        self.mean = np.r_[_measured(box), np.zeros(4)]
        height = self.mean[3]
        places, velocities = 2 * self.place * height, 10 * self.velocity * height
        std = [places, places, 1e-2, places, velocities, velocities, 1e-5, velocities]
        self.covariance = np.diag(np.square(std))
        self._move = np.eye(8) + np.eye(8, k=4)

    def predict(self) -> np.ndarray:
        """Advance by a frame; return the expected box (x0, y0, x1, y1)."""
        places, velocities = self.place * self.mean[3], self.velocity * self.mean[3]
        std = [places, places, 1e-2, places, velocities, velocities, 1e-5, velocities]
        self.mean = self._move @ self.mean
        noise = np.diag(np.square(std))
        self.covariance = self._move @ self.covariance @ self._move.T + noise
        x, y, ratio, height = self.mean[:4]
        half = np.array([ratio * height, height]) / 2
        middle = np.array([x, y])
        return np.concatenate([middle - half, middle + half])

    def update(self, box: np.ndarray) -> None:
        """Take the box of the present frame into account."""
        places = self.place * self.mean[3]
        noise = np.diag(np.square([places, places, 1e-1, places]))
        expected = self.covariance[:4, :4] + noise
        gain = np.linalg.solve(expected, self.covariance[:4]).T
        self.mean = self.mean + gain @ (_measured(box) - self.mean[:4])
        self.covariance = self.covariance - gain @ expected @ gain.T


def _measured(box: np.ndarray) -> np.ndarray:
    """Return the middle of a box, its width over its height, and its height: float64 (4,)."""
    x0, y0, x1, y1 = box
    return np.array([(x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / (y1 - y0), y1 - y0])


def _box(mask: np.ndarray) -> np.ndarray | None:
    """Return the box of a mask, (x0, y0, x1, y1) with borders outside; None for an empty mask."""
    if not mask.any():
        return None
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    return np.array([x, y, x + w, y + h], np.float64)


def _box_iou(one: np.ndarray, other: np.ndarray) -> float:
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    common = float(np.prod(sides.clip(0)))
    areas = sum(float(np.prod(box[2:] - box[:2])) for box in (one, other))
    return common / (areas - common) if areas > common else 0.0


@MEMORY.register("dam4sam")
class DistractorAware(Baseline):
    """Remembers distractors apart from the latest appearance, as DAM4SAM (Videnovic et al. 2025).

    Half of the slots hold the latest frame and every fifth one before, if the object is in sight;
    the others hold frames in which a distractor was resolved: another mask reaches beyond the
    chosen one, whose predicted IoU is high and whose area is as usual. Slots keep their temporal
    positions, which DAM4SAM drops for the second half.
    """

    #: Frames between lasting memories of the first half.
    apart = 5
    #: Minimum predicted IoU, maximum change of the area, and maximum ratio of the area of the
    #: mask's box to that of the box around the other mask too.
    min_iou, max_change, max_ratio = 0.8, 0.2, 0.7
    #: Number of frames whose median area is the usual one.
    recent = 10

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._resolved: dict[int, set[int]] = defaultdict(set)
        self._areas: dict[int, list[int]] = defaultdict(list)

    def act(self, core: MemoryCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        masks, rivals = to_host(core.bank.masks[:, core.bank.present], core.rival_masks)
        rows = range(core.num_envs)
        return np.array([self._action(core, i, masks[i], rivals[i]) for i in rows])

    def _action(self, core: MemoryCore, row: int, mask: np.ndarray, rivals: np.ndarray) -> int:
        bank, now = core.bank, int(core.now[row])
        if core.steps[row] == 0:
            self._resolved[row], self._areas[row] = set(), []
        if not mask.any():
            return 0
        areas, resolved = self._areas[row], self._resolved[row]
        areas.append(int(mask.sum()))
        usual = float(np.median(areas[-self.recent :]))
        is_reliable = bank.ious[row, -1] > self.min_iou
        is_reliable &= abs(areas[-1] - usual) <= self.max_change * usual
        slots = bank.frames[row, bank.slots].tolist()
        ours = [slot for slot, frame in enumerate(slots) if frame in resolved]
        latest = [slot for slot, frame in enumerate(slots) if frame >= 0 and slot not in ours]
        empty = [slot for slot, frame in enumerate(slots) if frame < 0]
        half = bank.num_slots // 2
        if is_reliable and self._sees_distractor(mask, rivals):
            resolved.add(now)
            given_up = ours[-1:] if len(ours) >= half else empty[:1] or latest[-1:]
        elif latest and slots[latest[0]] % self.apart:
            given_up = latest[:1]
        else:
            given_up = latest[-1:] if len(latest) >= bank.num_slots - half else empty[:1]
        return given_up[0] + 1

    def _sees_distractor(self, mask: np.ndarray, rivals: np.ndarray) -> bool:
        box = _box(mask)
        for rival in rivals:
            count, labels, stats, _ = cv2.connectedComponentsWithStats(
                (rival & ~mask).astype(np.uint8)
            )
            if count < 2 or box is None:
                continue
            largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
            around = _box(mask | (labels == largest))
            assert around is not None
            ratio = np.prod(box[2:] - box[:2]) / np.prod(around[2:] - around[:2])
            if ratio <= self.max_ratio:
                return True
        return False


@MEMORY.register("oracle")
class Oracle(Baseline):
    """Reads the ground truth: the action after which the next mask is best, SAM 2's if any is.

    It tries all actions, and looks one frame ahead. The result is a reference, not an upper bound.
    """

    slow = True
    #: Minimum gain in J for which it leaves SAM 2's rule.
    least = 1e-4

    def act(self, core: MemoryCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        js = core.next_js(np.arange(core.num_envs))
        best, rule = js.argmax(axis=1), core.sam2_action
        return np.where(js.max(axis=1) > js[:, rule] + self.least, best, rule)
