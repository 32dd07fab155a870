"""Metrics of video segmentation: J and F, track AP, and scores per frame and category."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import cv2
import numpy as np
from pycocotools import mask as rle

from sam_gym.data.base import FrameAnnotation, Video
from sam_gym.metrics.masks import dice, iou
from sam_gym.utils.registry import check_choice

Protocol = Literal["davis", "sav", "all"]

#: Distance within which boundaries match, as a fraction of the diagonal.
BOUNDARY_TOLERANCE = 0.008
#: IoU thresholds of track AP, and recalls at which precision is read: those of COCO.
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0.0, 1.0, 101)
#: A track is a mapping: frame -> compressed RLE.
Masklet = Mapping[int, Mapping[str, Any]]


# J and F -----------------------------------------------------------------------------------------


def boundary_pixels(mask: np.ndarray) -> np.ndarray:
    """Return the boundary of a mask, one pixel wide: bool (H, W).

    A pixel belongs to it if its neighbour on the right, below, or diagonally below has another
    value, as in the evaluation of DAVIS: the boundary lies half a pixel towards the origin.

    Args:
        mask: bool (H, W).
    """
    # The last row compares with the right only, the last column with below only.
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, across = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return np.asarray((mask != right) | (mask != below) | (mask != across))


@lru_cache(maxsize=32)
def _disk(radius: int) -> np.ndarray:
    """Return a disk: uint8 (2 * radius + 1, 2 * radius + 1)."""
    steps = np.arange(-radius, radius + 1) ** 2
    return (steps[:, None] + steps[None] <= radius**2).astype(np.uint8)


def boundary_f(
    prediction: np.ndarray,
    target: np.ndarray,
    ignore: np.ndarray | None = None,
    tolerance: float = BOUNDARY_TOLERANCE,
) -> float:
    """Return F, the boundary measure of DAVIS (Perazzi et al. 2016); 1 if both masks are empty.

    The harmonic mean of precision and recall of boundary pixels, which match within a disk of
    radius `ceil(tolerance * diagonal)`. If one boundary is empty, F is 0. A mask that fills the
    image has no boundary.

    Args:
        prediction: bool (H, W).
        target: bool (H, W).
        ignore: bool (H, W), pixels that count as background in both.
        tolerance: the distance, as a fraction of the diagonal.
    """
    if ignore is not None:
        prediction, target = prediction & ~ignore, target & ~ignore
    radius = int(np.ceil(tolerance * float(np.linalg.norm(target.shape))))
    height, width = target.shape
    x, y, w, h = cv2.boundingRect((prediction | target).view(np.uint8))
    if not w:
        return 1.0
    # Boundary pixels lie in the box, or one pixel before it.
    rows = slice(max(y - 1, 0), min(y + h + 1, height))
    columns = slice(max(x - 1, 0), min(x + w + 1, width))
    found, wanted = (boundary_pixels(mask[rows, columns]) for mask in (prediction, target))
    count, expected = np.count_nonzero(found), np.count_nonzero(wanted)
    if not count or not expected:
        return float(count == expected)
    disk = _disk(radius)
    near_found, near_wanted = (cv2.dilate(b.view(np.uint8), disk) > 0 for b in (found, wanted))
    precision = np.count_nonzero(found & near_wanted) / count
    recall = np.count_nonzero(wanted & near_found) / expected
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@dataclass(frozen=True)
class ObjectScore:
    """J and F of one object of a video, over the frames that the protocol scores.

    Attributes:
        video: name of the video.
        object: id of the object.
        category: name of its category.
        j: float64 (K,), IoU in each scored frame.
        f: float64 (K,), boundary measure in each scored frame.
    """

    video: str
    object: int
    category: str
    j: np.ndarray
    f: np.ndarray

    def row(self) -> dict[str, Any]:
        """Return the row of this object in a table; see `summarize`."""
        scores = {"J&F": (self.j.mean() + self.f.mean()) / 2}
        for name, values in (("J", self.j), ("F", self.f)):
            scores[name] = values.mean()
            scores[f"{name} recall"] = (values > 0.5).mean()
            scores[f"{name} decay"] = decay(values)
        plain = {name: float(value) for name, value in scores.items()}
        head = {"video": self.video, "object": self.object, "category": self.category}
        return head | {"frames": len(self.j)} | plain


def decay(values: np.ndarray) -> float:
    """Return the mean over the first quarter of the frames minus that over the last.

    As in the evaluation of DAVIS, whose own indices are wrong beyond 256 frames.

    Args:
        values: float (K,), scores in order of time, K > 0.
    """
    ends = (np.round(np.linspace(1, len(values), 5) + 1e-10) - 1).astype(int)
    first, last = values[ends[0] : ends[1] + 1], values[ends[3] : ends[4] + 1]
    return float(first.mean() - last.mean())


class VideoScorer:
    """Scores the predictions of a video, frame by frame.

    Protocols:

    - "davis" (semi-supervised): every object in all annotated frames but the first and the last;
      an object out of sight without a prediction scores 1.
    - "sav" (SA-V, vos-benchmark): the first and the last annotated frame of each object are left
      out, and so are frames before its first appearance in truth or prediction; objects that never
      appear in the scored frames are left out.
    - "all": every object in every annotated frame.

    Args:
        video: the video, with its truth.
        categories: names that `Video.categories` indexes.
        protocol: "davis", "sav" or "all".

    Raises:
        ValueError: the protocol is unknown, or leaves no frame.
    """

    def __init__(
        self, video: Video, categories: Sequence[str], protocol: Protocol = "davis"
    ) -> None:
        check_choice("protocol", protocol, get_args(Protocol))
        self._video, self._categories, self._protocol = video, categories, protocol
        #: bool (T, N), whether an object is scored in a frame.
        self.scored = scored_frames(video.annotated, protocol)
        if not self.scored.any():
            raise ValueError(
                f"video {video.name!r} has no frame to score under protocol {protocol!r}, which "
                "leaves out the first and the last annotated one. Annotate three frames, or choose "
                "the protocol 'all'."
            )
        self._scores = np.full((2, *self.scored.shape), np.nan)
        self._seen = np.zeros((2, *self.scored.shape), bool)

    @property
    def frames(self) -> list[int]:
        """Frames in which an object is scored; the others need no prediction."""
        return np.flatnonzero(self.scored.any(axis=1)).tolist()

    def add(
        self, frame: int, prediction: np.ndarray, annotation: FrameAnnotation | None = None
    ) -> None:
        """Score the prediction of a frame; a frame that is not scored is ignored.

        Args:
            frame: index of the frame.
            prediction: bool (N, H, W), one mask per object in the order of `Video.objects`.
            annotation: of the frame, if it was read already. Void pixels count as background.

        Raises:
            ValueError: the prediction has another shape than the truth.
        """
        if not self.scored[frame].any():
            return
        truth = (annotation or self._video.annotation(frame)).masks
        if prediction.shape != truth.shape:
            raise ValueError(
                f"video {self._video.name!r}, frame {frame}: the prediction has shape "
                f"{prediction.shape}, the truth {truth.shape} (objects, height, width)."
            )
        prediction = prediction.astype(bool, copy=False)
        for number in np.flatnonzero(self.scored[frame]):
            own, target = prediction[number], truth[number]
            self._scores[:, frame, number] = iou(own, target), boundary_f(own, target)
            self._seen[:, frame, number] = own.any(), target.any()

    def results(self) -> list[ObjectScore]:
        """Return the scores of the objects.

        Raises:
            ValueError: a scored frame has no prediction.
        """
        missing = np.argwhere(self.scored & np.isnan(self._scores[0]))
        if len(missing):
            raise ValueError(
                f"video {self._video.name!r}: frame {missing[0][0]} has no prediction. Add one for "
                "every frame of `frames`; an empty mask says that the object is out of sight."
            )
        results = []
        for number, object_id in enumerate(self._video.objects):
            frames = np.flatnonzero(self.scored[:, number])
            predicted, present = self._seen[:, frames, number]
            if self._protocol == "sav":
                frames = frames[np.logical_or.accumulate(predicted | present)]
            if len(frames) and (present.any() or self._protocol != "sav"):
                category = self._categories[self._video.categories[number]]
                j, f = self._scores[:, frames, number]
                results.append(ObjectScore(self._video.name, object_id, category, j, f))
        return results


def scored_frames(annotated: np.ndarray, protocol: Protocol) -> np.ndarray:
    """Return whether a protocol scores an object in a frame; see `VideoScorer`.

    Args:
        annotated: bool (T, N).
        protocol: "davis", "sav" or "all".

    Returns:
        bool (T, N).
    """
    scored = annotated.copy()
    if protocol == "davis":
        frames = np.flatnonzero(annotated.any(axis=1))
        scored[[*frames[:1], *frames[-1:]]] = False
    elif protocol == "sav":
        for number, column in enumerate(annotated.T):
            frames = np.flatnonzero(column)
            scored[[*frames[:1], *frames[-1:]], number] = False
    return scored


def summarize(scores: Sequence[ObjectScore]) -> dict[str, float]:
    """Return the means over objects, not over videos, of the columns of `ObjectScore.row`.

    Raises:
        ValueError: there is no score.
    """
    if not scores:
        raise ValueError("No object was scored.")
    rows = [score.row() for score in scores]
    names = [name for name, value in rows[0].items() if isinstance(value, float)]
    return {name: float(np.mean([row[name] for row in rows])) for name in names}


# Track AP ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoredTrack:
    """A track of a video: a predicted or an annotated object.

    Attributes:
        video: name or id of its video.
        category: of the object.
        masks: frame -> compressed RLE; frames without a mask are left out.
        score: confidence of a prediction.
        crowd: whether matches of an annotated object are ignored.
    """

    video: str | int
    category: str | int
    masks: Masklet
    score: float = 1.0
    crowd: bool = False


def track_iou(first: Masklet, second: Masklet) -> float:
    """Return the sum of intersections over the sum of unions of two tracks; 0 without any pixel."""
    shared = union = 0.0
    for frame in first.keys() | second.keys():
        masks = [track[frame] for track in (first, second) if frame in track]
        area = float(rle.area(rle.merge(masks)))
        union += area
        if len(masks) == 2:
            shared += float(sum(rle.area(mask) for mask in masks)) - area
    return shared / union if union else 0.0


def track_ap(
    truth: Iterable[ScoredTrack], predictions: Iterable[ScoredTrack], max_tracks: int = 100
) -> dict[str, Any]:
    """Return track AP, as YouTube-VIS defines it (Yang et al. 2019).

    COCO's AP with the IoU of tracks: ten thresholds from 0.5 to 0.95, precision at 101 recalls,
    mean over the categories that have objects. Predictions match objects of their video and
    category, in the order of their scores.

    Args:
        truth: annotated objects.
        predictions: predicted tracks.
        max_tracks: predictions per video and category; those of lowest scores are dropped.

    Returns:
        AP, AP50, AP75 and AR (recall with `max_tracks`), and `per_category`: AP by category.

    Raises:
        ValueError: there is no annotated object that is no crowd.
    """
    wanted, found = _grouped(truth), _grouped(predictions)
    precisions: dict[str | int, np.ndarray] = {}
    recalls = []
    for category in dict.fromkeys(category for category, _ in wanted):
        parts = []
        for video in dict.fromkeys(v for c, v in (*wanted, *found) if c == category):
            own = sorted(found.get((category, video), ()), key=lambda track: -track.score)
            parts.append(_matched(wanted.get((category, video), []), own[:max_tracks]))
        total = sum(count for _, _, _, count in parts)
        if not total:
            continue
        scores = np.concatenate([scores for scores, _, _, _ in parts])
        order = np.argsort(-scores, kind="stable")
        hits, ignored = (np.concatenate([p[i] for p in parts], axis=1)[:, order] for i in (1, 2))
        precisions[category], recall = _precision(hits & ~ignored, ~hits & ~ignored, total)
        recalls.append(recall)
    if not recalls:
        raise ValueError("No annotated object to match.")
    mean = np.mean(list(precisions.values()), axis=0)
    return {
        "AP": float(mean.mean()),
        "AP50": float(mean[0]),
        "AP75": float(mean[5]),
        "AR": float(np.mean(recalls)),
        "per_category": {category: float(own.mean()) for category, own in precisions.items()},
    }


def _grouped(
    tracks: Iterable[ScoredTrack],
) -> dict[tuple[str | int, str | int], list[ScoredTrack]]:
    groups = defaultdict(list)
    for track in tracks:
        groups[track.category, track.video].append(track)
    return dict(groups)


def _matched(
    wanted: Sequence[ScoredTrack], found: Sequence[ScoredTrack]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Match the tracks of a video and a category.

    Returns:
        Scores of predictions, float (P,); whether each is a hit at each threshold, bool (10, P);
        whether it is ignored, bool (10, P); the number of objects.
    """
    objects = sorted(wanted, key=lambda track: track.crowd)
    crowds = np.array([track.crowd for track in objects], bool)
    count = int((~crowds).sum())
    ious = np.array([[track_iou(f.masks, w.masks) for w in objects] for f in found])
    hits, ignored = np.zeros((2, len(IOU_THRESHOLDS), len(found)), bool)
    for level, threshold in enumerate(IOU_THRESHOLDS):
        is_free = np.ones(len(objects), bool)
        for number in range(len(found) if objects else 0):
            # Objects come before crowds. The last one wins among equals, as in COCO.
            for group in (slice(0, count), slice(count, None)):
                overlaps = np.where(is_free[group], ious[number, group], -1.0)
                best = len(overlaps) - 1 - int(overlaps[::-1].argmax()) if len(overlaps) else -1
                if best >= 0 and overlaps[best] >= min(threshold, 1 - 1e-10) - np.spacing(1):
                    is_free[group][best] = False
                    hits[level, number], ignored[level, number] = True, crowds[group][best]
                    break
    return np.array([track.score for track in found]), hits, ignored, count


def _precision(hits: np.ndarray, misses: np.ndarray, total: int) -> tuple[np.ndarray, float]:
    """Return the mean precision at each threshold, float64 (10,), and the mean recall.

    Args:
        hits: bool (10, P), in the order of scores.
        misses: bool (10, P).
        total: number of objects.
    """
    right, wrong = hits.cumsum(axis=1), misses.cumsum(axis=1)
    precision = right / np.maximum(right + wrong, 1)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    means = []
    for own, recall in zip(precision, right / total, strict=True):
        at = np.searchsorted(recall, _RECALLS, side="left")
        means.append(np.append(own, 0.0)[at].mean())
    recall = right[:, -1] / total if right.shape[1] else np.zeros(len(right))
    return np.array(means), float(recall.mean())


# Scores per frame and category -------------------------------------------------------------------


class CategoryScorer:
    """IoU, Dice and MAE per frame and category, as in the "SAM2 video training" repository.

    The masks of a category are united. A frame scores the categories that truth or prediction show
    in it. Means are taken over the frames of a video, then over videos, then over categories;
    frames, videos and categories without a score are left out.

    MAE is the mean absolute difference of the masks. (The repository subtracts unsigned bytes, so
    that a missed pixel counts 255 there.)

    Args:
        categories: names of the categories.
    """

    def __init__(self, categories: Sequence[str]) -> None:
        self.categories = tuple(categories)
        #: Rows of a table: one per frame and category.
        self.rows: list[dict[str, Any]] = []

    def add(
        self, video: Video, frame: int, prediction: np.ndarray, annotation: FrameAnnotation
    ) -> None:
        """Score a frame; one in which nothing is annotated is ignored.

        Args:
            video: the video.
            frame: index of the frame.
            prediction: bool (N, H, W), one mask per object in the order of `Video.objects`.
            annotation: its truth.
        """
        if not annotation.annotated.any():
            return
        owners = np.array(video.categories)
        for index, name in enumerate(self.categories):
            own = annotation.annotated & (owners == index)
            if not own.any():
                continue
            found = prediction[own].any(axis=0)
            wanted = annotation.masks[own].any(axis=0)
            if found.any() or wanted.any():
                row = {"video": video.name, "frame": video.frames[frame], "category": name}
                scores = {
                    "iou": iou(found, wanted),
                    "dice": dice(found, wanted),
                    "mae": float(np.mean(found != wanted)),
                }
                self.rows.append(row | scores)

    def summary(self) -> dict[str, Any]:
        """Return mean `iou`, `dice` and `mae`, and `per_category`: the same by category.

        Raises:
            ValueError: nothing was scored.
        """
        if not self.rows:
            raise ValueError("No category was scored.")
        per_category = {}
        for name in self.categories:
            frames = defaultdict(list)
            for row in self.rows:
                if row["category"] == name:
                    frames[row["video"]].append([row[key] for key in ("iou", "dice", "mae")])
            if frames:
                videos = [np.mean(own, axis=0) for own in frames.values()]
                means = np.mean(videos, axis=0).tolist()
                per_category[name] = dict(zip(("iou", "dice", "mae"), means, strict=True))
        mean = {
            key: float(np.mean([own[key] for own in per_category.values()]))
            for key in ("iou", "dice", "mae")
        }
        return {**mean, "per_category": per_category}
