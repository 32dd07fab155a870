"""Calibrate the presence score of a click agent: `python -m agents.presence --help`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from agents.annotation.clicks import ClickAnnotator
from agents.annotation.presence import Calibration, Logistic, Similarity, after, before
from agents.evaluate import PolicyAgent
from agents.sharing.pull import PolicyOption, local_policy
from sam_gym.data import Dataset, make_dataset
from sam_gym.data.folder import image_files
from sam_gym.data.io import read_image
from sam_gym.data.options import DatasetOptions
from sam_gym.data.splits import check_held_out
from sam_gym.utils import cli
from sam_gym.utils.digest import file_digest
from sam_gym.utils.fields import documented
from sam_gym.utils.progress import track
from sam_gym.utils.settings import Count, Seed, check_settings

#: Weight in the fit of images of `others`, which show none of the categories.
_OTHERS = 0.25
#: Fraction of the present categories at which an agent may stop before its first click.
_MISSED = 0.05


@documented
@dataclass(frozen=True, kw_only=True)
class PresenceConfig:
    """Calibrate the presence score of a click agent and write presence.json beside its policy.zip.

    Lets the agent play present and absent categories of training images, and fits two logistic
    models: one on CLIP's similarity before the first click, one on that of the mask after the last.
    Prints the AUROC on held-out images.
    """

    policy: PolicyOption
    data: Annotated[DatasetOptions, tyro.conf.arg(name="")] = field(default_factory=DatasetOptions)
    clip: str | None = None
    """CLIP that compares words with images (None: that of the policy, or clip_micro)."""
    clip_pretrained: str | None = None
    """Weights of the CLIP: a tag of open_clip or a file."""
    images: Count = 200
    """Number of training images."""
    held_out: Count = 100
    """Number of held-out images."""
    absent: Count = 3
    """Absent categories per image."""
    others: str | None = "rooms"
    """Procedural dataset that shows none of the categories, for a quarter of the weight of the fit
    (None: no such images)."""
    photos: str | None = None
    """Folder of images that show none of the categories, to measure how many are accepted."""
    max_photos: Count = 100
    """Maximum number of images of `photos`."""
    num_envs: Count = 16
    seed: Seed = 0
    device: str = "auto"
    """Device: auto (CUDA, then MPS, then CPU), cpu, mps, cuda."""


class Played(NamedTuple):
    """Evidence of K pairs of image and category.

    Attributes:
        before: float64 (K, 1).
        after: float64 (K, 3).
        present: bool (K,).
        weight: float64 (K,): how many pairs of an image each stands for.
    """

    before: np.ndarray
    after: np.ndarray
    present: np.ndarray
    weight: np.ndarray


class _Pair(NamedTuple):
    image: np.ndarray
    category: int
    present: bool
    weight: float


def _pairs(
    images: Iterator[tuple[np.ndarray, np.ndarray]], count: int, absent: int, seed: int
) -> Iterator[_Pair]:
    """Yield all present and some absent categories of images.

    Args:
        images: uint8 (H, W, 3) with the indices of their categories.
        count: number of categories.
        absent: maximum number of absent categories per image.
        seed: draws them.
    """
    rng = np.random.default_rng(seed)
    for image, present in images:
        missing = np.setdiff1d(np.arange(count), present)
        drawn = rng.permutation(missing)[:absent]
        yield from (_Pair(image, int(own), True, 1.0) for own in present)
        stands_for = len(missing) / max(1, len(drawn))
        yield from (_Pair(image, int(own), False, stands_for) for own in drawn)


def _samples(dataset: Dataset, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for index in range(min(count, len(dataset))):
        sample = dataset[index]
        yield sample.image, np.unique(sample.categories)


def _check_categories(samples: Iterator[tuple[np.ndarray, np.ndarray]], count: int) -> None:
    """Raise `ValueError` unless a category is present in an image, and one is absent."""
    shown = missing = False
    for _, present in samples:
        shown, missing = shown or len(present) > 0, missing or len(present) < count
        if shown and missing:
            return
    raise ValueError(
        "The training or held-out images show every category, or none: pass more --images and "
        "--held-out, or another --dataset."
    )


def play(
    annotator: ClickAnnotator, similarity: Similarity, pairs: list[_Pair], title: str
) -> Played:
    """Let an agent play pairs of image and category, and return the evidence."""
    size = annotator.core.num_envs
    early, late = [], []
    for start in track(range(0, len(pairs), size), title):
        batch = pairs[start : start + size]
        annotator.play([(("", own.category), own.image) for own in batch])
        maps: np.ndarray | None = None
        for number, own in enumerate(batch):
            if maps is None or own.image is not batch[number - 1].image:
                maps = similarity.maps(own.image)
            early.append(before(maps[own.category, None])[0])
            late.append(after(annotator.core, number, maps[own.category]))
    present = np.array([own.present for own in pairs])
    return Played(np.stack(early), np.stack(late), present, np.array([own.weight for own in pairs]))


def auroc(scores: np.ndarray, present: np.ndarray) -> float:
    """Return the area under the ROC curve: P(score of a present pair > of an absent one)."""
    from scipy.stats import rankdata  # here, since it takes long to import

    ranks, positive = rankdata(scores), np.count_nonzero(present)
    pairs = positive * np.count_nonzero(~present)
    return float((ranks[present].sum() - positive * (positive + 1) / 2) / pairs)


def _balanced_threshold(scores: np.ndarray, present: np.ndarray) -> float:
    """Return the score that best separates present from absent pairs, both kinds weighted alike."""
    candidates = np.unique(scores)
    kept = (scores[present][None] >= candidates[:, None]).mean(axis=1)
    refused = (scores[~present][None] < candidates[:, None]).mean(axis=1)
    return float(candidates[(kept + refused).argmax()])


def _measured(calibration: Calibration, played: Played) -> dict[str, float]:
    """Return AUROC, calibration and rates of held-out pairs."""
    score, present, weight = calibration.after(played.after), played.present, played.weight
    start = calibration.before(played.before)
    keep = (score >= calibration.threshold) & (start >= calibration.stop)
    bins = np.minimum((score * 10).astype(int), 9)
    gaps = [
        abs(np.average(score[own] - present[own], weights=weight[own])) * weight[own].sum()
        for own in (bins == number for number in range(10))
        if own.any()
    ]
    return {
        "auroc": round(auroc(score, present), 3),
        "auroc_before_clicks": round(auroc(start, present), 3),
        "calibration_error": round(float(sum(gaps) / weight.sum()), 3),
        "present_kept": round(float(keep[present].mean()), 3),
        "absent_accepted": round(float(keep[~present].mean()), 3),
        "absent_stopped_at_once": round(float((start[~present] < calibration.stop).mean()), 3),
        "pairs": len(score),
    }


def fit(own: Played, others: Played | None) -> tuple[Logistic, Logistic, float, float]:
    """Fit the models of presence.

    Args:
        own: pairs of images that show some of the categories.
        others: pairs of images that show none, or None.

    Returns:
        The models before and after the clicks, `stop` and `threshold` of `Calibration`.
    """
    parts, weights = [own], [own.weight / own.weight.sum()]
    if others is not None:
        parts.append(others)
        share = np.full(len(others.present), _OTHERS / len(others.present))
        weights = [weights[0] * (1 - _OTHERS), share]
    early, late, present, _ = map(np.concatenate, zip(*parts, strict=True))
    weight = np.concatenate(weights)
    first, last = Logistic.fit(early, present, weight), Logistic.fit(late, present, weight)
    stop = float(np.quantile(first(own.before)[own.present], _MISSED))
    return first, last, stop, _balanced_threshold(last(own.after), own.present)


def calibrate(config: PresenceConfig) -> dict[str, Any]:
    """Calibrate and write presence.json; returns what was measured on held-out images.

    Raises:
        ValueError, FileNotFoundError: an option, the policy or the data is wrong.
    """
    check_settings(config)
    agent = PolicyAgent.load(config.policy, config.device)
    own_clip = agent.policy.features.get("clip", {"name": "clip_micro", "pretrained": None})
    clip = {name: own_clip[name] for name in ("name", "pretrained")}
    if config.clip is not None:
        clip = {"name": config.clip, "pretrained": config.clip_pretrained}
    train, held_out = (config.data.make_dataset(split) for split in ("train", "val"))
    check_held_out(held_out, "val", train)
    names = list(train.categories)
    for dataset, count in ((train, config.images), (held_out, config.held_out)):
        _check_categories(_samples(dataset, count), len(names))
    plain = None if config.others is None else make_dataset(config.others, "train")
    files = None if config.photos is None else _photo_files(config.photos, config.max_photos)
    annotator = ClickAnnotator(agent, names, config.num_envs)
    similarity = Similarity(clip, annotator.backbone, names)

    def played(images: Iterator[tuple[np.ndarray, np.ndarray]], title: str) -> Played:
        pairs = list(_pairs(images, len(names), config.absent, config.seed))
        return play(annotator, similarity, pairs, title)

    own, others = played(_samples(train, config.images), "training images"), None
    if plain is not None:
        few = _samples(plain, -(-config.images // 4))
        others = played(_without_categories(image for image, _ in few), plain.name)
    models = fit(own, others)
    policy = local_policy(config.policy)
    calibration = Calibration(file_digest(policy), clip, similarity.identity, *models, {})
    found = played(_samples(held_out, config.held_out), "held-out images")
    measured = _measured(calibration, found)
    if files is not None:
        images = (read_image(path, "image") for path in files)
        photos = played(_without_categories(images), "photos")
        measured |= _measured_photos(calibration, found, photos)
    path = replace(calibration, held_out=measured).write(policy)
    print(json.dumps(measured, indent=2))
    print(f"A category counts as present from {calibration.threshold:.2f}. Wrote {path}.")
    return measured


def _measured_photos(calibration: Calibration, found: Played, photos: Played) -> dict[str, float]:
    """Return how well present held-out pairs differ from those of photos, which are absent."""
    own = calibration.after(found.after)[found.present]
    score, start = calibration.after(photos.after), calibration.before(photos.before)
    keep = (score >= calibration.threshold) & (start >= calibration.stop)
    present = np.repeat([True, False], [len(own), len(score)])
    return {
        "photos_auroc": round(auroc(np.append(own, score), present), 3),
        "photos_accepted": round(float(keep.mean()), 3),
        "photos_pairs": len(score),
    }


def _without_categories(
    images: Iterable[np.ndarray],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return ((image, np.zeros(0, np.int64)) for image in images)


def _photo_files(folder: str, count: int) -> list[str]:
    """Return the first images of a folder.

    Raises:
        FileNotFoundError, ValueError: there is no such folder, or no image in it.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"--photos {folder}: no such folder.")
    if files := [paths[0] for paths in islice(image_files(folder).values(), count)]:
        return files
    raise ValueError(f"--photos {folder}: no image in this folder.")


if __name__ == "__main__":
    cli.run(lambda: calibrate(cli.parse(PresenceConfig, "python -m agents.presence")))
