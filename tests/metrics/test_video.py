"""Video metrics: against the published evaluators where they are installed, and by hand."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from scipy import ndimage

from sam_gym.data import FrameAnnotation, Video
from sam_gym.metrics.masks import iou
from sam_gym.metrics.panoptic import encoded
from sam_gym.metrics.video import (
    CategoryScorer,
    ObjectScore,
    ScoredTrack,
    VideoScorer,
    boundary_f,
    boundary_pixels,
    decay,
    summarize,
    track_ap,
    track_iou,
)
from sam_gym.utils.files import write_csv


class Masks:
    """A video that is given as masks, bool (T, N, H, W)."""

    def __init__(
        self,
        masks: np.ndarray,
        annotated: np.ndarray | None = None,
        categories: Sequence[int] | None = None,
        name: str = "video",
    ) -> None:
        self.name, self.masks = name, masks
        self.size = masks.shape[2:]
        self.frames = tuple(f"{frame:05d}" for frame in range(len(masks)))
        self.objects = tuple(range(1, masks.shape[1] + 1))
        self.categories = tuple(categories or (0,) * masks.shape[1])
        self.annotated = np.ones(masks.shape[:2], bool) if annotated is None else annotated

    def __len__(self) -> int:
        return len(self.masks)

    def image(self, frame: int) -> np.ndarray:
        return np.zeros((*self.size, 3), np.uint8)

    def annotation(self, frame: int) -> FrameAnnotation:
        known = self.annotated[frame]
        return FrameAnnotation(self.masks[frame] & known[:, None, None], known)


def score(
    truth: np.ndarray, found: np.ndarray, protocol: Any, annotated: np.ndarray | None = None
) -> list[ObjectScore]:
    video = Masks(truth, annotated)
    assert isinstance(video, Video)
    scorer = VideoScorer(video, ("object",), protocol)
    for frame in scorer.frames:
        scorer.add(frame, found[frame])
    return scorer.results()


def ellipse(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    ys, xs = np.mgrid[:height, :width]
    center = rng.uniform(-0.1, 1.1, 2) * [height, width]
    radii = rng.uniform(0.05, 0.6, 2) * [height, width]
    return ((ys - center[0]) / radii[0]) ** 2 + ((xs - center[1]) / radii[1]) ** 2 < 1


def pairs(count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Random pairs of masks: blobs at borders, holes, noise, full and empty ones."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        height, width = rng.integers(1 if number % 5 == 0 else 20, 90, 2)
        one = ellipse(rng, height, width) & ~ellipse(rng, height, width)
        two = np.roll(one, rng.integers(-4, 5, 2), (0, 1)) ^ (rng.random((height, width)) < 0.01)
        kind = number % 8
        if kind == 1:
            one = np.zeros_like(one)
        elif kind == 2:
            two = np.zeros_like(two)
        elif kind == 3:
            two = np.ones_like(two)
        elif kind == 4:
            one, two = ellipse(rng, height, width), ellipse(rng, height, width)
        found.append((one, two))
    found.append((np.zeros((9, 9), bool), np.zeros((9, 9), bool)))
    found.append((np.ones((9, 9), bool), np.ones((9, 9), bool)))
    found.append((np.ones((9, 9), bool), np.zeros((9, 9), bool)))
    return found


def reference_f(found: np.ndarray, wanted: np.ndarray) -> float:
    """F by definition: distances between all pairs of boundary pixels."""

    def boundary(mask: np.ndarray) -> np.ndarray:
        height, width = mask.shape
        return np.array(
            [
                (y, x)
                for y in range(height)
                for x in range(width)
                if any(
                    y + dy < height and x + dx < width and mask[y, x] != mask[y + dy, x + dx]
                    for dy, dx in ((0, 1), (1, 0), (1, 1))
                )
            ],
            int,
        ).reshape(-1, 2)

    one, two = boundary(found), boundary(wanted)
    if not len(one) or not len(two):
        return float(len(one) == len(two))
    near = ((one[:, None] - two[None]) ** 2).sum(axis=2)
    close = near <= np.ceil(0.008 * np.hypot(*found.shape)) ** 2
    precision, recall = close.any(axis=1).mean(), close.any(axis=0).mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


# J and F -----------------------------------------------------------------------------------------


def test_f_by_definition() -> None:
    for found, wanted in pairs(60):
        if found.size < 3000:
            assert boundary_f(found, wanted) == pytest.approx(reference_f(found, wanted), abs=1e-12)


def test_f_with_a_large_radius() -> None:
    """The boundary of one mask lies far outside the box of the other."""
    found, wanted = np.zeros((2, 1200, 1600), bool)
    found[100:300, 200:700] = True
    wanted[108:308, 190:690] = True
    near = [
        ndimage.distance_transform_edt(~boundary_pixels(mask)) <= 16 for mask in (wanted, found)
    ]
    shares = [n[boundary_pixels(m)].mean() for n, m in zip(near, (found, wanted), strict=True)]
    assert boundary_f(found, wanted) == pytest.approx(
        2 / (1 / shares[0] + 1 / shares[1]), abs=1e-12
    )


def test_empty_masks() -> None:
    empty, full = np.zeros((8, 8), bool), np.ones((8, 8), bool)
    some = empty.copy()
    some[2:5, 2:5] = True
    assert boundary_f(empty, empty) == 1.0
    assert boundary_f(some, empty) == boundary_f(empty, some) == 0.0
    # A full image has no boundary, as no mask has none.
    assert boundary_f(full, empty) == 1.0 and boundary_f(full, some) == 0.0
    assert boundary_f(some, some, ignore=some) == 1.0


def test_ignored_pixels_are_background() -> None:
    for found, wanted in pairs(20, seed=2):
        ignore = np.random.default_rng(0).random(found.shape) < 0.2
        expected = boundary_f(found & ~ignore, wanted & ~ignore)
        assert boundary_f(found, wanted, ignore) == expected


def test_arguments_are_not_changed() -> None:
    found, wanted = pairs(1)[0]
    copies = found.copy(), wanted.copy()
    boundary_f(found, wanted)
    assert (found == copies[0]).all() and (wanted == copies[1]).all()
    # Views of larger arrays, and other strides.
    assert boundary_f(found[::2, ::2], wanted[::2, ::2]) == pytest.approx(
        reference_f(found[::2, ::2], wanted[::2, ::2])
    )


def test_vos_benchmark_scores_the_same() -> None:
    peer = pytest.importorskip("vos_benchmark.evaluator")
    for found, wanted in pairs(200):
        evaluator = peer.Evaluator()
        # Pixels of another object keep an object in the lists that is in neither mask.
        evaluator.feed_frame(np.ones((2, 2), np.uint8), np.ones((2, 2), np.uint8))
        evaluator.feed_frame(found.astype(np.uint8), wanted.astype(np.uint8))
        assert iou(found, wanted) == pytest.approx(evaluator.object_iou[1][1], abs=1e-9)
        assert boundary_f(found, wanted) == pytest.approx(evaluator.boundary_f[1][1], abs=1e-9)


def test_davis2017_scores_the_same() -> None:
    peer = pytest.importorskip("davis2017.metrics")
    for found, wanted in pairs(200, seed=5):
        for void in (None, np.random.default_rng(1).random(found.shape) < 0.1):
            with np.errstate(invalid="ignore"):
                j = peer.db_eval_iou(wanted, found, void)
            assert iou(found, wanted, void) == pytest.approx(float(j), abs=1e-9)
            f = peer.db_eval_boundary(wanted, found, void)
            assert boundary_f(found, wanted, void) == pytest.approx(float(f), abs=1e-9)


def random_video(
    seed: int, frames: int = 9, objects: int = 3, size: int = 40
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of truth and prediction, uint8 (T, H, W); objects appear late, leave, or are missed."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((2, frames, size, size), np.uint8)
    for number in range(1, objects + 1):
        start = ellipse(rng, size, size)
        hidden = rng.random(frames) < 0.3
        if number == objects:
            hidden[: int(rng.integers(2, frames))] = True
        for frame in range(frames):
            mask = np.roll(start, rng.integers(-5, 6, 2), (0, 1))
            if not hidden[frame] or (frame == 0 and number < objects):
                ids[0, frame][mask] = number
            if rng.random() < 0.8:
                ids[1, frame][np.roll(mask, rng.integers(-3, 4, 2), (0, 1))] = number
    return ids[0], ids[1]


def masks_of(ids: np.ndarray, objects: int) -> np.ndarray:
    return ids[:, None] == np.arange(1, objects + 1)[:, None, None]


@pytest.mark.parametrize("seed", range(12))
def test_protocol_of_vos_benchmark(seed: int) -> None:
    peer = pytest.importorskip("vos_benchmark.evaluator")
    truth, found = random_video(seed)
    evaluator = peer.Evaluator()
    for frame in range(1, len(truth) - 1):
        evaluator.feed_frame(found[frame], truth[frame])
    j, f = evaluator.conclude()
    scores = score(masks_of(truth, 3), masks_of(found, 3), "sav")
    assert {own.object for own in scores} == set(j)
    for own in scores:
        assert 100 * own.j.mean() == pytest.approx(j[own.object], abs=1e-9)
        assert 100 * own.f.mean() == pytest.approx(f[own.object], abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_protocol_of_davis(seed: int) -> None:
    evaluation = pytest.importorskip("davis2017.evaluation").DAVISEvaluation
    statistics = pytest.importorskip("davis2017.utils").db_statistics
    truth, found = (masks_of(ids, 3) for ids in random_video(seed, frames=14))
    with np.errstate(invalid="ignore"):
        j, f = evaluation._evaluate_semisupervised(
            truth[1:-1].swapaxes(0, 1), found[1:-1].swapaxes(0, 1), None, ("J", "F")
        )
    scores = score(truth, found, "davis")
    assert len(scores) == 3
    for own, own_j, own_f in zip(scores, j, f, strict=True):
        row = own.row()
        for name, values in (("J", own_j), ("F", own_f)):
            got = row[name], row[f"{name} recall"], row[f"{name} decay"]
            assert got == pytest.approx(statistics(values), abs=1e-9)
    assert summarize(scores)["J"] == pytest.approx(j.mean(), abs=1e-9)


def strip(length: int, *spans: tuple[int, int] | None) -> np.ndarray:
    """Masks bool (T, 1, 4, length) of columns from start to stop."""
    masks = np.zeros((len(spans), 1, 4, length), bool)
    for mask, span in zip(masks, spans, strict=True):
        if span is not None:
            mask[..., slice(*span)] = True
    return masks


def test_protocols_by_hand() -> None:
    truth = strip(10, (0, 4), None, None, (0, 4), (0, 4), (4, 8))
    found = strip(10, (0, 4), None, None, (0, 2), (0, 4), None)
    (everything,) = score(truth, found, "all")
    assert everything.j.tolist() == [1, 1, 1, 0.5, 1, 0]
    (davis,) = score(truth, found, "davis")
    assert davis.j.tolist() == [1, 1, 0.5, 1]
    (sav,) = score(truth, found, "sav")
    assert sav.j.tolist() == [0.5, 1]
    # A false alarm before the first appearance counts from then on.
    found = strip(10, (0, 4), None, (0, 1), (0, 2), (0, 4), None)
    (sav,) = score(truth, found, "sav")
    assert sav.j.tolist() == [0, 0.5, 1]


def test_an_object_that_never_appears() -> None:
    truth = np.concatenate([strip(10, *((0, 4),) * 4), strip(10, *(None,) * 4)], axis=1)
    found = np.zeros_like(truth)
    assert [own.j.mean() for own in score(truth, found, "davis")] == [0, 1]
    assert [own.object for own in score(truth, found, "sav")] == [1]


def test_frames_that_are_not_annotated_do_not_count() -> None:
    truth = strip(10, *((0, 4),) * 7)
    found = strip(10, *((0, 4),) * 3, None, *((0, 2),) * 3)
    annotated = np.array([True, False, True, False, True, False, True])[:, None]
    (own,) = score(truth, found, "davis", annotated)
    assert own.j.tolist() == [1, 0.5]
    # Each object has its own first and last frame with SA-V's protocol.
    both = np.concatenate([annotated, annotated], axis=1)
    both[0, 1] = False
    pair = [np.concatenate([masks, masks], axis=1) for masks in (truth, found)]
    assert [len(own.j) for own in score(*pair, "davis", both)] == [2, 2]
    assert [len(own.j) for own in score(*pair, "sav", both)] == [2, 1]


def test_means_are_over_objects() -> None:
    scores = [
        ObjectScore("a", number, "object", np.array([j]), np.array([1.0]))
        for number, j in enumerate((0.0, 0.0, 0.0))
    ]
    scores.append(ObjectScore("b", 1, "object", np.array([1.0]), np.array([1.0])))
    mean = summarize(scores)
    assert (mean["J"], mean["F"], mean["J&F"]) == (0.25, 1.0, 0.625)
    assert mean["J recall"] == 0.25 and "object" not in mean and "frames" not in mean


def test_decay_of_a_long_video() -> None:
    values = np.linspace(1, 0, 1000)
    assert decay(values) == pytest.approx(values[:251].mean() - values[749:].mean(), abs=1e-3)
    assert decay(np.ones(1)) == 0.0


def test_rows_are_a_table(tmp_path: Path) -> None:
    truth, found = (masks_of(ids, 3) for ids in random_video(3))
    scores = score(truth, found, "davis")
    write_csv(tmp_path / "objects.csv", [own.row() for own in scores])
    with (tmp_path / "objects.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["object"] for row in rows] == ["1", "2", "3"] and rows[0]["frames"] == "7"
    assert float(rows[1]["J"]) == pytest.approx(scores[1].j.mean(), rel=1e-5)


def test_wrong_inputs_are_named() -> None:
    video = Masks(strip(10, *((0, 4),) * 4))
    with pytest.raises(ValueError, match="Unknown protocol 'davs'.*Did you mean 'davis'"):
        VideoScorer(video, ("object",), "davs")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'video' has no frame to score under protocol 'sav'"):
        VideoScorer(Masks(strip(10, (0, 4), (0, 4))), ("object",), "sav")
    scorer = VideoScorer(video, ("object",))
    assert scorer.frames == [1, 2]
    with pytest.raises(ValueError, match=r"frame 1: the prediction has shape \(1, 2, 2\), the"):
        scorer.add(1, np.zeros((1, 2, 2), bool))
    scorer.add(1, video.masks[1])
    with pytest.raises(ValueError, match="frame 2 has no prediction. Add one"):
        scorer.results()
    with pytest.raises(ValueError, match="No object was scored"):
        summarize([])


# Track AP ----------------------------------------------------------------------------------------


def tracks(seed: int, crowds: bool = False) -> tuple[list[ScoredTrack], list[ScoredTrack]]:
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for video in range(4):
        for _ in range(int(rng.integers(0, 5))):
            category = int(rng.integers(3))
            masks = np.stack([np.roll(ellipse(rng, 24, 24), t, 1) for t in range(5)])
            shown = rng.random(5) < 0.8
            crowd = crowds and bool(rng.random() < 0.3)
            truth.append(ScoredTrack(video, category, coded(masks, shown), crowd=crowd))
            for _ in range(int(rng.integers(0, 3))):
                moved = np.roll(masks, rng.integers(-3, 4, 2), (1, 2))
                kept = shown & (rng.random(5) < 0.9)
                other = category if rng.random() < 0.8 else int(rng.integers(4))
                # Few different scores, so that there are ties.
                found.append(
                    ScoredTrack(video, other, coded(moved, kept), score=rng.integers(8) / 8)
                )
    return truth, found


def coded(masks: np.ndarray, shown: np.ndarray) -> dict[int, Any]:
    codes = encoded(masks)
    return {frame: codes[frame] for frame in np.flatnonzero(shown).tolist()}


@pytest.mark.parametrize("crowds", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_trackeval_scores_the_same(seed: int, crowds: bool) -> None:
    peer = pytest.importorskip("trackeval.metrics.track_map")
    config = {
        "USE_AREA_RANGES": False,
        "USE_TIME_RANGES": False,
        "PRINT_CONFIG": False,
    }
    metric = peer.TrackMAP(config)
    truth, found = tracks(seed, crowds)
    # To trackeval, an object that track 0 matched is free: see the next test.
    numbers = iter(range(1, 10_000))
    precisions, recalls = [], []
    for category in range(3):
        results = {}
        for video in range(4):
            wanted = [t for t in truth if (t.video, t.category) == (video, category)]
            own = [t for t in found if (t.video, t.category) == (video, category)]
            own.sort(key=lambda t: -t.score)
            results[str(video)] = metric.eval_sequence(
                {
                    "gt_track_ids": [next(numbers) for _ in wanted],
                    "dt_track_ids": [next(numbers) for _ in own],
                    "gt_tracks": [{t: w.masks.get(t) for t in range(5)} for w in wanted],
                    "dt_tracks": [{t: w.masks.get(t) for t in range(5)} for w in own],
                    "gt_track_iscrowd": [int(w.crowd) for w in wanted],
                    "dt_track_scores": np.array([w.score for w in own]),
                    "iou_type": "mask",
                }
            )
        combined = metric.combine_sequences(results)
        if (combined["AP_all"] >= 0).all():
            precisions.append(combined["AP_all"])
            recalls.append(combined["AR_all"])
    if not precisions:
        pytest.skip("no object was drawn")
    got = track_ap(truth, found)
    assert got["AP"] == pytest.approx(np.mean(precisions), abs=1e-9)
    assert got["AP50"] == pytest.approx(np.mean(precisions, axis=0)[0], abs=1e-9)
    assert got["AP75"] == pytest.approx(np.mean(precisions, axis=0)[5], abs=1e-9)
    assert got["AR"] == pytest.approx(np.mean(recalls), abs=1e-9)


def test_trackeval_counts_an_object_twice() -> None:
    """Its own ids start at 0, so two tracks on one of two objects score AP 1; noticed if fixed."""
    peer = pytest.importorskip("trackeval.metrics.track_map")
    metric = peer.TrackMAP(
        {"USE_AREA_RANGES": False, "USE_TIME_RANGES": False, "PRINT_CONFIG": False}
    )
    shown = np.ones(1, bool)
    first, second = (coded(strip(20, span)[:, 0], shown) for span in ((0, 10), (10, 20)))
    data = {
        "gt_track_ids": [1, 2],
        "dt_track_ids": [0, 1],
        "gt_tracks": [first, second],
        "dt_tracks": [first, first],
        "gt_track_iscrowd": [0, 0],
        "dt_track_scores": np.array([0.9, 0.8]),
        "iou_type": "mask",
    }
    assert metric.combine_sequences({"a": metric.eval_sequence(data)})["AP_all"].mean() == 1.0
    truth = [ScoredTrack("a", "x", masks) for masks in (first, second)]
    found = [ScoredTrack("a", "x", first, score=own) for own in (0.9, 0.8)]
    assert track_ap(truth, found)["AP"] == pytest.approx(51 / 101)


def test_iou_of_tracks_sums_over_frames() -> None:
    one = coded(strip(10, (0, 4), (0, 4), None)[:, 0], np.array([True, True, False]))
    two = coded(strip(10, (2, 6), None, (0, 2))[:, 0], np.array([True, False, True]))
    # Frame 0 shares 2 of 6 columns, frame 1 0 of 4, frame 2 0 of 2.
    assert track_iou(one, two) == pytest.approx(2 / 12)
    assert track_iou({}, {}) == 0.0
    assert track_iou(one, one) == 1.0


def test_track_ap_by_hand() -> None:
    shown = np.ones(1, bool)
    first, second = (coded(strip(20, span)[:, 0], shown) for span in ((0, 10), (10, 20)))
    near = coded(strip(20, (0, 7))[:, 0], shown)
    truth = [ScoredTrack("a", "x", first), ScoredTrack("a", "x", second)]
    # An IoU of exactly 0.7 passes the thresholds 0.5 to 0.7: five of ten.
    got = track_ap(truth, [ScoredTrack("a", "x", near, score=0.9)])
    assert got["AP50"] == pytest.approx(51 / 101) and got["AP75"] == 0.0
    assert got["AP"] == pytest.approx(0.5 * 51 / 101) and got["AR"] == pytest.approx(0.25)
    # A second track on the same object is false; other videos and categories match nothing.
    wrong = [
        ScoredTrack("a", "x", first, score=0.9),
        ScoredTrack("a", "x", first, score=0.8),
        ScoredTrack("b", "x", second, score=0.95),
        ScoredTrack("a", "y", second, score=0.95),
    ]
    assert track_ap(truth, wrong)["AP"] == pytest.approx(0.5 * 51 / 101)
    assert track_ap(truth, wrong)["per_category"].keys() == {"x"}
    assert track_ap(truth, [])["AP"] == 0.0
    assert track_ap(truth, wrong, max_tracks=1)["AR"] == 0.5
    with pytest.raises(ValueError, match="No annotated object"):
        track_ap([], wrong)


# Scores per frame and category -------------------------------------------------------------------


def test_scores_per_frame_and_category_by_hand() -> None:
    scorer = CategoryScorer(("a", "b", "never"))
    # Video 1: two objects of a, one of b, which is absent from truth and prediction in frame 1.
    truth = np.concatenate(
        [strip(10, (0, 2), (0, 2)), strip(10, (2, 4), (2, 4)), strip(10, (6, 8), None)], axis=1
    )
    found = np.concatenate(
        [strip(10, (0, 4), None), strip(10, None, None), strip(10, (7, 8), None)], axis=1
    )
    video = Masks(truth, categories=(0, 0, 1), name="one")
    for frame in range(2):
        scorer.add(video, frame, found[frame], video.annotation(frame))
    other = Masks(strip(10, (0, 5)), categories=(0,), name="two")
    scorer.add(other, 0, other.masks[0], other.annotation(0))
    scores = [(r["video"], r["frame"], r["category"], r["iou"], r["mae"]) for r in scorer.rows]
    # The union of a is what counts: the two halves are found as one.
    assert scores == [
        ("one", "00000", "a", 1.0, 0.0),
        ("one", "00000", "b", 0.5, 0.1),
        ("one", "00001", "a", 0.0, 0.4),
        ("two", "00000", "a", 1.0, 0.0),
    ]
    got = scorer.summary()
    assert got["per_category"]["a"]["iou"] == pytest.approx((0.5 + 1.0) / 2)
    assert got["per_category"]["b"]["dice"] == pytest.approx(2 / 3)
    assert got["iou"] == pytest.approx((0.75 + 0.5) / 2) and "never" not in got["per_category"]
    assert got["mae"] == pytest.approx((0.1 + 0.1) / 2)
    with pytest.raises(ValueError, match="No category was scored"):
        CategoryScorer(("a",)).summary()


def test_codes_of_pycocotools_are_taken() -> None:
    mask = strip(10, (2, 5))[:, 0]
    (code,) = encoded(mask)
    assert coco_mask.area(code) == 12 and track_iou({0: code}, {0: code}) == 1.0
