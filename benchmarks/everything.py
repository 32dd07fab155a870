"""Everything mode: does a SAM that is asked for nothing in particular answer with whole objects?"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from adaptation.merging import MergeOptions, merge_masks
from adaptation.nearest import nearest_points
from adaptation.options import ModelOptions
from adaptation.results import folder_name
from adaptation.strategy import STRATEGIES, Options
from adaptation.trainer import TrainConfig, Trainer, check_tune
from adaptation.views import low_res_target
from benchmarks.everything_report import write_report
from benchmarks.options import require_at_least
from benchmarks.report import output_folder, progress_bar
from sam_gym.backbones import Backbone, Prompts, load_backbone
from sam_gym.data import PROCEDURAL, Sample, make_dataset
from sam_gym.data.streams import Domain, Stream
from sam_gym.everything import GeneratorOptions, MaskGenerator
from sam_gym.everything_metrics import (
    Overlaps,
    average_recall,
    encoded,
    match,
    mean_over_classes,
    panoptic_quality,
)
from sam_gym.masks import Masks
from sam_gym.transfer import to_device
from sam_gym.version import __version__

UNTOUCHED, MERGED = "untouched", "merged"
#: What is told of each model at its own operating point.
OWN = ("miou", "macc", "pq", "masks_per_object")
#: Trained methods, and the grid of each.
GRIDS = {"saom_v1": (32, 32), "saom_v2": (64, 64), "panosam": (320, 64)}
#: Least predicted IoU among which the operating point of a model is chosen.
TRUST = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class FineTuning(TrainConfig):
    """Settings of the fine-tuning."""

    steps: int = 600
    """Optimizer steps of a fine-tuning."""
    batch_size: int = 48
    """Objects of a step, over all processes."""
    views: int = 2
    """Views of each training image, the first as it is, the others flipped and scaled."""
    prompts: tuple[str, ...] = ("click",)
    """What objects are shown by where a fine-tuning is measured by itself: box, click, clicks5."""
    learning_rate: float | None = 1e-3
    """Adam's learning rate, which falls to a tenth, along a cosine."""


@dataclass
class Config:
    """Fine-tune a SAM's everything mode to whole objects, and compare it with the SAM as it was.

    No truth is in the prompts: a grid of points is asked, masks are filtered and cleared of
    duplicates, and what is left is matched one to one with the objects. The least predicted IoU at
    which a mask is kept is the one that gives the SAM as it was the best panoptic quality on val,
    for all models. What each is like at its own best is told beside it.

    Without options this is the quick setting: `rooms`, micro, one fine-tuning.
    """

    methods: tuple[str, ...] = ("saom_v1",)
    """Fine-tunings to compare: saom_v1 (32x32 points), saom_v2 (64x64), panosam (320x64)."""
    tune: str = "decoder"
    """What is tuned: decoder, hq, hq_small, sam_adapter, lora, lora_decoder."""
    dataset: str = "rooms"
    """Images: rooms, rooms-panoramas, or coco, entities (with --data)."""
    data: str | None = None
    """Root folder of a dataset that reads files."""
    train_images: int = 192
    """Images that are trained on."""
    val_images: int = 12
    """Images on which operating points are chosen."""
    test_images: int = 32
    """Images that are reported on."""
    transfer: str | None = None
    """Root folder of photographs in COCO's form, on which the same models are measured too."""
    transfer_annotations: str | None = None
    """Their annotation file (default: instances_val.json of the root folder)."""
    transfer_limit: int = 40
    """At most so many of those photographs."""
    grid: tuple[int, int] | None = None
    """Columns and rows of the grid that is asked (default: that of the first method)."""
    stability: float = 0.0
    """Least stability of a mask, for all models; a model trained with a focal loss is less sure of
    its pixels, so this would judge the training."""
    seeds: int = 1
    """Runs of each fine-tuning: the first with the seed that is given, then those after it."""
    resume: bool = False
    """Go on with the fine-tunings in the output folder where they stopped."""
    out: str = "runs/everything"
    """Folder for results.json, tables, pictures, adapters and report.html."""
    model: tyro.conf.OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)
    train: tyro.conf.OmitArgPrefixes[FineTuning] = field(default_factory=FineTuning)
    weights: tyro.conf.OmitArgPrefixes[Options] = field(default_factory=Options)
    merging: tyro.conf.OmitArgPrefixes[MergeOptions] = field(default_factory=MergeOptions)


@dataclass(frozen=True)
class Split:
    """Images to measure on, with their objects as run-length codes."""

    samples: list[Sample]
    objects: list[list[dict[str, Any]]]
    classes: tuple[str, ...]

    @classmethod
    def of(cls, dataset: Any, limit: int) -> Split:
        """The first images of a dataset that show an object."""
        samples: list[Sample] = []
        for index in range(len(dataset)):
            if len(samples) == limit:
                break
            sample = dataset[index]
            if len(sample.masks):
                samples.append(sample)
        if not samples:
            raise ValueError(f"{dataset.name}: no image shows an object.")
        return cls(samples, [encoded(s.masks) for s in samples], tuple(dataset.categories))


def run(config: Config) -> dict[str, Any]:
    """Fine-tune, measure and write everything; returns what stands in results.json.

    Raises:
        ValueError, FileNotFoundError: a name, a value or the data is wrong, before work starts.
    """
    _check(config)
    grid = config.grid or GRIDS[config.methods[0]]
    options = GeneratorOptions(
        grid=grid, pred_iou_thresh=TRUST[0], stability_score_thresh=config.stability
    )
    options.validate()
    stream, val, test, others = _open(config)
    out = output_folder(config.out)
    if list(out.glob("runs/*/checkpoint.pt")) and not config.resume:
        if not (out / "results.json").is_file():
            raise ValueError(
                f"{out} holds an unfinished run. Pass --resume to go on with it, or another --out."
            )
    plain = load_backbone(**config.model.arguments)
    backbones: dict[str, list[Backbone]] = {UNTOUCHED: [plain]}
    seconds: dict[str, list[float]] = {}
    for method in config.methods:
        for number in range(config.seeds):
            backbone, spent = _trained(config, stream, method, config.train.seed + number, out)
            backbones.setdefault(method, []).append(backbone)
            seconds.setdefault(method, []).append(spent)
    splits = {"val": val, "test": test, **others}
    names = [*backbones, MERGED]
    scores: dict[str, dict[str, list[dict[str, float]]]] = {
        name: {model: [] for model in names} for name in splits if name != "val"
    }
    curves: dict[str, dict[str, list[Any]]] = {name: {} for name in scores}
    shown: dict[str, list[np.ndarray]] = {}
    with progress_bar() as bar:
        total = sum(len(own.samples) for own in splits.values())
        task = bar.add_task("measuring", total=total * sum(map(len, backbones.values())))

        def masks_of(backbone: Backbone, split: Split) -> tuple[list[Masks], float]:
            generator = MaskGenerator(backbone, options)
            found, started = [], time.perf_counter()
            for masks in generator.stream(sample.image for sample in split.samples):
                found.append(masks)
                bar.advance(task)
            return found, (time.perf_counter() - started) / len(split.samples)

        for model, own in backbones.items():
            for backbone in own:
                on_val, _ = masks_of(backbone, val)
                own_trust = _operating_point(on_val, val)
                if model == UNTOUCHED:
                    trust = own_trust
                    merge_trust = _operating_point(on_val, val, backbone, config.merging)
                for name, scored in scores.items():
                    found, took = masks_of(backbone, splits[name])
                    kept = [_trusted(masks, trust) for masks in found]
                    numbers = _numbers(kept, splits[name], backbone)
                    numbers |= _recalls(found, splits[name])
                    numbers |= {"seconds_per_image": took, "least_trust": trust}
                    best = [_trusted(masks, own_trust) for masks in found]
                    at_best = _numbers(best, splits[name], backbone)
                    numbers |= {f"own_{key}": at_best[key] for key in OWN}
                    numbers |= {"own_least_trust": own_trust}
                    numbers |= _released(backbone, splits[name], grid)
                    scored[model].append(numbers)
                    curves[name].setdefault(model, []).append(_curve(found, splits[name]))
                    if name == "test" and model not in shown:
                        shown[model] = [masks.binary() for masks in kept[:4]]
                    if model == UNTOUCHED:
                        merged = _merged(found, splits[name], merge_trust, backbone, config.merging)
                        numbers = _numbers(merged, splits[name], backbone)
                        numbers |= _recalls(merged, splits[name])
                        numbers |= {"seconds_per_image": took, "least_trust": merge_trust}
                        scored[MERGED].append(numbers)
    results = {
        "benchmark": "everything",
        "dataset": config.dataset,
        "grid": list(grid),
        "prompts": grid[0] * grid[1],
        "models": {name: _entry(own, seconds.get(name)) for name, own in scores["test"].items()},
        "transfer": {
            split: {name: _entry(own, None) for name, own in scores[split].items()}
            for split in others
        },
        "images": {name: len(own.samples) for name, own in splits.items()},
        "objects": {name: sum(map(len, own.objects)) for name, own in splits.items()},
        "by_run": scores,
        "curves": curves,
        "backbone": {"name": plain.name, "identity": plain.identity},
        "threads": torch.get_num_threads(),
        "versions": {"sam-gym": __version__, "torch": torch.__version__},
        "settings": asdict(config),
    }
    write_report(results, test.samples[:4], shown, out)
    return results


def _check(config: Config) -> None:
    require_at_least(
        1,
        seeds=config.seeds,
        train_images=config.train_images,
        val_images=config.val_images,
        test_images=config.test_images,
        transfer_limit=config.transfer_limit,
    )
    config.train.validate()
    if not config.methods:
        raise ValueError("--methods is empty: name at least one of saom_v1, saom_v2, panosam.")
    for method in config.methods:
        if method not in GRIDS:
            STRATEGIES.get(method)
            raise ValueError(
                f"Method {method!r} does not train everything mode: take {', '.join(GRIDS)}."
            )
        check_tune(method, config.tune)


def _open(config: Config) -> tuple[Stream, Split, Split, dict[str, Split]]:
    """The stream that is trained on, and what is measured on."""
    root = {} if config.data is None else {"root": config.data}
    procedural = config.dataset in PROCEDURAL

    def split(name: str, limit: int) -> Any:
        return make_dataset(
            config.dataset, name, **root, **({"length": limit} if procedural else {})
        )

    train = split("train", config.train_images)
    val = split("val", config.val_images)
    try:
        test = split("test", config.test_images)
    except FileNotFoundError:
        # Without a test split: the images of val that operating points are not chosen on.
        test = _Rest(val, config.val_images)
    domain = Domain(config.dataset, False, {"train": train, "val": val, "test": test})
    others = {}
    if config.transfer is not None:
        photographs = make_dataset(
            "coco", "val", root=config.transfer, annotations=config.transfer_annotations
        )
        others["transfer"] = Split.of(photographs, config.transfer_limit)
    stream = Stream(config.dataset, (domain,))
    return stream, Split.of(val, config.val_images), Split.of(test, config.test_images), others


class _Rest:
    """A dataset without its first images."""

    def __init__(self, dataset: Any, first: int) -> None:
        self.dataset, self.first = dataset, first
        self.name, self.categories = dataset.name, dataset.categories

    def __len__(self) -> int:
        return max(0, len(self.dataset) - self.first)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[self.first + index]

    def draw(self, rng: np.random.Generator) -> tuple[int, int | None]:
        return int(rng.integers(len(self))), None


def _trained(
    config: Config, stream: Stream, method: str, seed: int, out: Path
) -> tuple[Backbone, float]:
    """A fine-tuned backbone, and the seconds that its training took."""
    settings = replace(config.train, seed=seed, split="val", max_images=config.train_images)
    trainer = Trainer(settings, config.weights, config.model.arguments, out / "runs")
    result = trainer.fit(stream, method, config.tune, config.resume)
    folder = out / "runs" / folder_name(method, config.tune, seed)
    adapter = str(folder / "adapter.safetensors")
    return load_backbone(**config.model.arguments, adapter=adapter), result.seconds


# Masks -----------------------------------------------------------------------------------------


def _trusted(masks: Masks, least: float) -> Masks:
    return masks.take(np.flatnonzero(masks.predicted_iou > least))


def _merged(
    found: Sequence[Masks],
    split: Split,
    least: float,
    backbone: Backbone,
    options: MergeOptions,
) -> list[Masks]:
    """Masks merged without training, after those that are not trusted were left out."""
    merged = []
    for masks, sample in zip(found, split.samples, strict=True):
        embedding = _without_padding(backbone, sample.image)
        merged.append(merge_masks(_trusted(masks, least), embedding, options))
    return merged


def _without_padding(backbone: Backbone, image: np.ndarray) -> np.ndarray:
    """The embedding of an image, float32 (C, h, w), where there is image."""
    embedding = backbone.encode([image])[0].cpu().numpy()
    corner = backbone.to_input_frame(np.array([[image.shape[1], image.shape[0]]]), image.shape[:2])
    side = backbone.image_size / embedding.shape[-1]
    columns, rows = np.maximum(np.ceil(corner[0] / side - 0.01), 1).astype(int)
    return embedding[:, :rows, :columns]


def _operating_point(
    found: Sequence[Masks],
    split: Split,
    backbone: Backbone | None = None,
    merging: MergeOptions | None = None,
) -> float:
    """The least predicted IoU of `TRUST` of the best panoptic quality."""
    qualities = []
    for least in TRUST:
        if backbone is None or merging is None:
            kept = [_trusted(masks, least) for masks in found]
        else:
            kept = _merged(found, split, least, backbone, merging)
        qualities.append(panoptic_quality(_overlaps(kept, split)))
    return TRUST[int(np.argmax(qualities))]


def _curve(found: Sequence[Masks], split: Split) -> list[dict[str, float]]:
    """mIoU and masks per object for every value of `TRUST`."""
    categories = np.concatenate([sample.categories for sample in split.samples])
    curve = []
    for least in TRUST:
        kept = [_trusted(masks, least) for masks in found]
        iou = np.concatenate([match(own).iou for own in _overlaps(kept, split)])
        point = {"least_trust": least, "miou": 100 * mean_over_classes(iou, categories)}
        curve.append(point | {"masks_per_object": sum(map(len, kept)) / len(iou)})
    return curve


def _overlaps(kept: Sequence[Masks], split: Split) -> list[Overlaps]:
    return [Overlaps.of(masks.coco(), own) for masks, own in zip(kept, split.objects, strict=True)]


# Numbers ---------------------------------------------------------------------------------------


def _numbers(kept: Sequence[Masks], split: Split, backbone: Backbone) -> dict[str, float]:
    """What the masks of a model come to, in points of 100 where that makes sense."""
    overlaps = _overlaps(kept, split)
    matches = [match(own) for own in overlaps]
    iou = np.concatenate([own.iou for own in matches])
    accuracy = np.concatenate([own.accuracy for own in matches])
    categories = np.concatenate([sample.categories for sample in split.samples])
    count = sum(map(len, kept))
    parts = sum(int(own.is_part.sum()) for own in overlaps)
    numbers = {
        "miou": 100 * mean_over_classes(iou, categories),
        "macc": 100 * mean_over_classes(accuracy, categories),
        "pq": 100 * panoptic_quality(overlaps),
        "found": 100 * float((iou >= 0.5).mean()),
        "masks_per_object": count / len(iou),
        "part_share": 100 * parts / count if count else 0.0,
    }
    if backbone.model.classes == split.classes:
        right = 0
        for masks, own, sample in zip(kept, matches, split.samples, strict=True):
            hit = own.masks >= 0
            right += int((masks.classes[own.masks[hit]] == sample.categories[hit]).sum())
        # An object without a mask is not told right.
        numbers["class_accuracy"] = 100 * right / len(iou)
    return numbers


def _recalls(found: Sequence[Masks], split: Split) -> dict[str, float]:
    """Average recall, in points of 100, of all masks of a model."""
    scores = [masks.predicted_iou for masks in found]
    recalls = average_recall([masks.coco() for masks in found], scores, split.objects)
    return {"ar100": 100 * recalls[0], "ar1000": 100 * recalls[1]}


def _released(backbone: Backbone, split: Split, grid: tuple[int, int]) -> dict[str, float]:
    """The protocol of the released code, whose prompts are derived from the truth.

    One point for each object, by nearest neighbour in the embedding; the mask that is trusted most.
    """
    ious, accuracies, categories = [], [], []
    for sample in split.samples:
        embedding = backbone.encode([sample.image])
        points = _points_from_truth(backbone, embedding, sample, grid)
        prompts = Prompts(
            points=points[:, None],
            labels=torch.ones((len(points), 1), dtype=torch.int64, device=points.device),
            rows=torch.zeros(len(points), dtype=torch.int64, device=points.device),
        )
        ambiguous = torch.ones(len(points), dtype=torch.bool, device=points.device)
        logits, _ = backbone.decode_best(embedding, prompts, ambiguous)
        for own, truth in zip(logits, sample.masks, strict=True):
            mask = (backbone.masks_at(own[None], truth.shape)[0] > 0).cpu().numpy()
            shared = np.count_nonzero(mask & truth)
            ious.append(shared / np.count_nonzero(mask | truth))
            accuracies.append(shared / np.count_nonzero(truth))
        categories.append(sample.categories)
    every = np.concatenate(categories)
    return {
        "released_miou": 100 * mean_over_classes(np.array(ious), every),
        "released_macc": 100 * mean_over_classes(np.array(accuracies), every),
    }


def _points_from_truth(
    backbone: Backbone, embedding: Tensor, sample: Sample, grid: tuple[int, int]
) -> Tensor:
    """Where the released protocol asks for each object: float32 (N, 2), pixels of the frame."""
    import cv2

    size, shape = backbone.image_size, backbone.mask_shape
    height, width = sample.image.shape[:2]
    scale = size / max(height, width)
    side = (max(1, round(width * scale)), max(1, round(height * scale)))
    framed = np.zeros((len(sample.masks) + 1, size, size), bool)
    for frame, mask in zip(framed, [*sample.masks, np.ones((height, width), bool)], strict=True):
        small = cv2.resize(mask.astype(np.uint8), side, interpolation=cv2.INTER_NEAREST)
        frame[: side[1], : side[0]] = small > 0
    targets = np.stack([low_res_target(mask, shape) for mask in framed[:-1]])
    shown = cv2.resize(framed[-1].astype(np.uint8), shape[::-1], interpolation=cv2.INTER_AREA)
    count, device = len(targets), backbone.device
    return nearest_points(
        embedding[:, : backbone.sam.prompt_encoder.embed_dim],
        torch.zeros(count, dtype=torch.int64, device=device),
        to_device(targets, device).float() / 255.0,
        to_device(shown, device).float()[None].expand(count, -1, -1),
        grid,
        size,
    )


def _entry(runs: Sequence[Mapping[str, float]], seconds: Sequence[float] | None) -> dict[str, Any]:
    """Means over the runs of a model, and under `std` their deviations."""
    entry: dict[str, Any] = {
        key: round(float(np.mean([own[key] for own in runs])), 3) for key in runs[0]
    }
    entry["runs"] = len(runs)
    entry["std"] = {
        key: round(float(np.std([own[key] for own in runs], ddof=1)), 3) if len(runs) > 1 else 0.0
        for key in runs[0]
    }
    if seconds is not None:
        entry["training_seconds"] = round(float(np.mean(seconds)), 2)
    return entry
