"""`semantic`: semantic segmentation of a dataset with label maps, prompted or by trained heads."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
import tyro

from adaptation.class_weights import Weighting
from adaptation.options import TrainConfig
from adaptation.strategies.semantic import Semantic
from benchmarks.options import BackboneOptions, subset
from benchmarks.report import output_folder
from benchmarks.semantic.agent import Acceptance, Corrector, load_corrector
from benchmarks.semantic.heads import (
    HeadName,
    HeadResult,
    TrainedHead,
    gain,
    load_head,
    segment,
    train_head,
    with_votes,
)
from benchmarks.semantic.points import PointName
from benchmarks.semantic.report import write_report
from benchmarks.semantic.speed import compare_speed
from benchmarks.semantic.zero_shot import ImageResult, Per, PromptResult, ZeroShot
from benchmarks.throughput.reference import check_comparable
from sam_gym.backbones import Backbone
from sam_gym.data import DATASETS, Dataset, dataset_help
from sam_gym.data.options import DatasetOptions
from sam_gym.data.semantic import SemanticDataset
from sam_gym.data.splits import check_held_out
from sam_gym.metrics.semantic import SemanticMetric, mean_score
from sam_gym.utils.fields import documented
from sam_gym.utils.progress import ProgressBar
from sam_gym.utils.provenance import provenance
from sam_gym.utils.settings import Count, Natural, check_settings
from sam_gym.utils.text import safe_name

#: Default number of images of an endless procedural dataset.
ROOMS = 100
#: Minimum mean IoU of the masks of both sides, for times to be comparable.
SAME = 0.99


@documented
@dataclass(frozen=True, kw_only=True)
class SemanticBenchmarkConfig(DatasetOptions, BackboneOptions):
    """Segment images semantically: zero-shot, from points, and by heads on the SAM's features.

    Heads are trained on the training split and segment without prompts. The points of the zero-shot
    phase come from the ground truth, as in the SAM-Cityscapes code: what is measured is the mask
    that a point gives, not the recognition of classes. Of the three masks of a point, that of the
    highest predicted IoU is taken. Scores are computed at the size of the label maps. Datasets
    without label maps, such as rooms, are scored on their objects and the background.
    """

    dataset: Annotated[str, tyro.conf.arg(help=dataset_help())] = "rooms"
    out: str = "runs/semantic"
    """Folder for results.json, the CSV tables, pictures and report.html."""
    split: str | None = None
    """Split to measure on (None: the held-out split of the dataset)."""
    point: PointName = "seed"
    """Place of a point in the ground truth: seed: the maximum of a distance transform that does not
    know the border of the image, as in the SAM-Cityscapes code; inner: of one that knows it;
    random: any pixel."""
    per: Per = "class"
    """One point per class of an image, or one per instance."""
    max_images: Count | None = None
    """Maximum number of images, sampled by the seed (None: all; procedural datasets: 100)."""
    batch_size: Count = 16
    """Images per encoder call."""
    boundary: bool = True
    """Also measure boundary IoU, which takes longer than everything else on large images."""
    zero_shot: bool = False
    """Only the zero-shot phase: train no head."""
    heads: tuple[HeadName, ...] = ("seed",)
    """Heads to train, see `python -m adaptation.train --method semantic --help`: seed, pyramid."""
    features: tuple[str, ...] = ("sam",)
    """Features on which each head is trained, to compare them: sam, timm:NAME (a model of timm, see
    `python -m adaptation.train --method semantic --help`)."""
    adapters: tuple[str, ...] = ()
    """Adapters whose semantic heads are measured; no head is trained then."""
    tiles: bool = True
    """The pyramid head also sees the four quarters of an image, for five encoder calls."""
    vote: bool = False
    """Also measure every head with its probabilities voted within the masks of everything mode,
    which takes as long as `annotate --everything`."""
    agent: str | None = None
    """Path of a policy.zip of train_ppo --initial-mask semantic: a third phase, in which it
    corrects the label maps of the head that it was trained on (None: no such phase)."""
    agent_classes: str | None = None
    """Comma-separated classes that the agent corrects, those of its training (None: all)."""
    agent_images: Natural = 100
    """Training images, sampled by the seed, on which it is chosen which masks of the agent are
    accepted: those from the predicted IoU that raises mean IoU most, for each class; none, unless
    the 95% interval of this gain lies above 0 (0 images: all masks are accepted)."""
    epochs: Count = Semantic.Options.epochs
    """Epochs of a head's training."""
    class_weights: Weighting = Semantic.Options.class_weights
    """Weights of the classes in a head's training, see `python -m adaptation.train --method
    semantic --help`: none, enet, median."""
    augmentations: Count = 4
    """Augmentations per training image: the image itself, then flipped and scaled copies."""
    train_images: Count | None = None
    """Maximum number of training images (None: all; procedural datasets: 100)."""
    save_labels: bool = False
    """Save predicted label maps as PNG with the values of the dataset's own files (cityscapes:
    labelIds), in the folder labels, and those of heads in folders of their own."""
    pictures: Natural = 9
    """Images to draw, evenly spaced by rank from best to worst."""
    speed_images: Natural = 0
    """Images on which to compare the time with a loop that encodes an image for every class, as the
    SAM-Cityscapes code does (0: no comparison)."""
    speed_repeats: Count = 5
    """Repeats of that comparison; times are medians."""


def run(config: SemanticBenchmarkConfig) -> dict[str, Any]:
    """Run the benchmark and write its report.

    Raises:
        ValueError, FileNotFoundError: an option, the data or the checkpoint is wrong.
        RuntimeError: the sides of the comparison of times do not find the same masks.
    """
    check_settings(config)
    if config.speed_images:
        check_comparable(config.backbone)
    if config.agent is not None and not config.adapters:
        raise ValueError(
            "--agent corrects the head that it was trained on: pass that adapter as --adapters."
        )
    pictures = ("pictures/*.png", "labels*/*.png", "confusion_*.csv")
    out = output_folder(config.out, config.overwrite, pictures=pictures)
    spec = DATASETS.get(config.dataset)
    split = config.split or spec.held_out_split
    dataset = config.make_dataset(split)
    writer = dataset if isinstance(dataset, SemanticDataset) else None
    if config.save_labels and (writer is None or writer.label_ids is None):
        raise ValueError(
            f"--save-labels: dataset {config.dataset!r} has no label files whose values could be "
            "written. Leave it out."
        )
    backbone = config.load()
    loaded = [
        load_head(backbone, Path(path).expanduser(), name, dataset)
        for name, path in _adapter_names(config).items()
    ]
    if not (config.zero_shot or config.adapters):
        loaded = [
            _train(config, name, features, split, backbone, dataset, out)
            for features in config.features
            for name in config.heads
        ]
    variants = [(head, with_votes(head, own)) for head, own in loaded] if config.vote else []
    corrector, acceptance = None, {}
    if config.agent is not None:
        corrector = load_corrector(loaded, config.agent, config.device, config.agent_classes)
        acceptance = _choose(config, corrector, split, dataset) if config.agent_images else {}
        variants.append((corrector.head, corrector.trained()))
    heads = [head for head, _ in loaded] + [variant for _, variant in variants]
    zero_shot = ZeroShot(
        dataset,
        backbone,
        point=config.point,
        per=config.per,
        seed=config.seed,
        batch_size=config.batch_size,
    )
    limit = config.max_images or (ROOMS if spec.procedural else None)
    indices = subset(range(len(dataset)), limit, config.seed)

    groups = getattr(dataset, "category_groups", None)
    metric = SemanticMetric(zero_shot.classes, groups, config.boundary)
    overlaps = np.zeros((2, len(zero_shot.classes)), np.int64)
    results: list[ImageResult] = []
    started = time.perf_counter()
    with ProgressBar() as progress:
        task = progress.add_task("segmenting", total=len(indices))
        for own, outcome in zero_shot.segment(indices):
            score = metric.update(outcome.labels, own.truth)
            overlaps += outcome.overlaps
            scored = list(map(PromptResult.of, own.prompts, outcome.ious))
            results.append(ImageResult(own.number, own.name, scored, score))
            if config.save_labels and writer is not None:
                _save(writer, out / "labels", own.number, outcome.labels)
            progress.advance(task)
    seconds = (time.perf_counter() - started) / len(indices)
    measured = []
    for head in heads:
        scores = SemanticMetric(zero_shot.classes, groups, config.boundary)
        result = HeadResult(head, scores, keep=bool(variants))
        started = time.perf_counter()
        with ProgressBar() as progress:
            task = progress.add_task(f"segmenting, {head.name}", total=len(indices))
            for own, labels in segment(head, zero_shot.read, indices, config.batch_size):
                result.update(labels, own.truth)
                if config.save_labels and writer is not None:
                    _save(writer, out / f"labels_{head.name}", own.number, labels)
                progress.advance(task)
        result.seconds_per_image = (time.perf_counter() - started) / len(indices)
        measured.append(result)
    by_name = {own.head.name: own for own in measured}

    scored = [prompt for result in results for prompt in result.prompts]
    classes = class_rows(scored, metric, overlaps)
    for result in measured:
        for row, iou in zip(classes, result.metric.class_iou, strict=True):
            row[f"{result.head.name}_iou"] = _known(iou)
    summary = {
        "benchmark": "semantic",
        "dataset": dataset.name,
        "split": split,
        "images": len(results),
        "zero_shot": {
            "prompts": len(scored),
            "border_points": sum(prompt.on_border for prompt in scored),
            **{
                f"mean_{key}": _mean(row[key] for row in classes)
                for key in ("prompt_iou", "bound", "mask_iou")
            },
            **_numbers(metric, seconds),
        },
        "heads": {
            own.head.name: {
                "parameters": own.head.parameters,
                "training_seconds": own.head.seconds,
                **_numbers(own.metric, own.seconds_per_image),
            }
            for own in measured
        },
        "gains": {
            variant.name: gain(by_name[variant.name], by_name[head.name], config.seed)
            for head, variant in variants
        },
        "agent": corrector and _agent_rows(corrector, acceptance),
        "classes": classes,
        "speed": _speed(config, zero_shot, indices),
        **provenance(config, zero_shot.backbone),
    }
    write_report(out, summary, metric.counts, results, zero_shot, measured)
    return summary


def _adapter_names(config: SemanticBenchmarkConfig) -> dict[str, str]:
    """Return the paths of the adapters by the names of their results: those of their folders."""
    names: dict[str, str] = {}
    for path in config.adapters:
        name = safe_name(Path(path).expanduser().resolve().parent.name)
        names[f"{name}_{len(names)}" if name in names else name] = path
    return names


def _train(
    config: SemanticBenchmarkConfig,
    name: HeadName,
    features: str,
    split: str,
    backbone: Backbone,
    dataset: Dataset,
    out: Path,
) -> tuple[TrainedHead, Backbone]:
    """Train a head, for the split that is measured."""
    if split not in ("val", "test"):
        raise ValueError(
            f"--split {split} holds training images, so no head is measured on it: take val or "
            "test, or --zero-shot."
        )
    procedural = DATASETS.get(config.dataset).procedural
    train = TrainConfig(
        split=cast(Literal["val", "test"], split),
        augmentations=config.augmentations,
        max_images=config.train_images or (ROOMS if procedural else None),
        seed=config.seed,
    )
    options = Semantic.Options(
        head=name,
        features=features,
        tiles=config.tiles,
        epochs=config.epochs,
        class_weights=config.class_weights,
    )
    label = name if features == "sam" else f"{name}_{safe_name(features)}"
    path, seconds = train_head(label, config, config, train, options, out)
    head, adapted = load_head(backbone, path, label, dataset)
    return replace(head, seconds=seconds), adapted


def _choose(
    config: SemanticBenchmarkConfig, corrector: Corrector, split: str, dataset: Dataset
) -> dict[str, Acceptance]:
    """Choose which masks of the agent are accepted, on images of the training split."""
    if split == "train":
        raise ValueError(
            "--split train: which masks of the agent are accepted is chosen on training images. "
            "Measure on val or test, or accept all masks (--agent-images 0)."
        )
    train = config.make_dataset("train")
    check_held_out(dataset, split, train)
    indices = subset(range(len(train)), config.agent_images, config.seed)
    return corrector.choose(train, indices, config.batch_size, config.seed)


def _agent_rows(corrector: Corrector, acceptance: Mapping[str, Acceptance]) -> list[dict[str, Any]]:
    """Return what became of the agent's masks of each class.

    `threshold`: lowest predicted IoU of accepted masks, None where none are accepted; `train_*`: on
    the images of the choice. If all masks are accepted, there are neither.
    """
    rows = []
    for name, counts in corrector.counts().items():
        row: dict[str, Any] = {"class": name, **counts}
        if own := acceptance.get(name):
            row |= {
                "threshold": own.threshold,
                "train_proposed": own.proposed,
                "train_best": own.best,
                "train_gain": own.gain,
            }
        rows.append(row)
    return rows


def _save(writer: SemanticDataset, folder: Path, number: int, labels: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    writer.save_prediction(folder, number, labels)


def _numbers(metric: SemanticMetric, seconds: float) -> dict[str, Any]:
    """Return the numbers of a phase."""
    return {
        **{name: _known(value) for name, value in metric.summary().items()},
        "categories": {name: _known(x) for name, x in metric.category_iou.items()},
        "seconds_per_image": seconds,
    }


def class_rows(
    prompts: Sequence[PromptResult], metric: SemanticMetric, overlaps: np.ndarray
) -> list[dict[str, Any]]:
    """Return the scores of each class, None where they are not known.

    Args:
        prompts: of all images.
        metric: of the label maps.
        overlaps: int64 (2, C), sums of `Outcome.overlaps`.
    """
    boundaries = metric.boundary_iou
    groups = metric.category_groups
    rows = []
    for number, name in enumerate(metric.classes):
        own = [prompt for prompt in prompts if prompt.category == number]
        union = int(overlaps[1, number])
        row: dict[str, Any] = {"class": name}
        if groups is not None:
            row["group"] = groups[number]
        row |= {
            "prompts": len(own),
            "prompt_iou": _mean(prompt.iou for prompt in own),
            "bound": _mean(prompt.bound for prompt in own),
            "mask_iou": int(overlaps[0, number]) / union if union else None,
            "iou": _known(metric.class_iou[number]),
        }
        if boundaries is not None:
            row["boundary_iou"] = _known(boundaries[number])
        rows.append(row)
    return rows


def _speed(
    config: SemanticBenchmarkConfig, zero_shot: ZeroShot, indices: Sequence[int]
) -> dict[str, Any] | None:
    """Compare the time with that of the reference, if it was asked for."""
    if not config.speed_images:
        return None
    read = [zero_shot.read(index) for index in indices[: config.speed_images]]
    numbers = compare_speed(
        zero_shot.backbone,
        [own.image for own in read],
        [[prompt.point for prompt in own.prompts] for own in read],
        config.batch_size,
        config.speed_repeats,
    )
    if numbers["mean_iou_of_masks"] < SAME and zero_shot.backbone.dtype == torch.float32:
        raise RuntimeError(
            "The sides disagree, so their times cannot be compared: the mean IoU of their masks is "
            f"{numbers['mean_iou_of_masks']:.3f}."
        )
    return numbers


def _known(value: float) -> float | None:
    """Return a number, or None for nan."""
    return None if np.isnan(value) else float(value)


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are known; None if there are none."""
    return _known(mean_score(np.array([np.nan if v is None else v for v in values], np.float64)))
