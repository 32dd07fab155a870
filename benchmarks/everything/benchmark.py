"""`everything`: fine-tune everything mode to whole objects, and measure it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from adaptation.method_flags import method_flags, options_from_flags
from adaptation.options import ModelOptions, PromptName, TrainConfig
from adaptation.results import folder_name
from adaptation.strategy import STRATEGIES
from adaptation.trainer import Trainer, check_tune
from benchmarks.everything.measuring import SHOWN, ZERO_SHOT, Measuring
from benchmarks.everything.report import write_report
from benchmarks.everything.scores import Split
from benchmarks.options import OutputOptions
from benchmarks.report import output_folder, refuse_unfinished
from sam_gym.backbones import Backbone, load_backbone
from sam_gym.backbones.adapters.tuning import tune_help
from sam_gym.data import DATASETS, Dataset, MissingSplit, dataset_help, make_dataset
from sam_gym.data.options import DatasetOptions
from sam_gym.data.splits import check_held_out, shared_images
from sam_gym.data.streams import Domain, Stream
from sam_gym.mask_generation.generator import GeneratorOptions
from sam_gym.mask_generation.merging import MergeOptions
from sam_gym.utils.digest import image_digest
from sam_gym.utils.fields import documented
from sam_gym.utils.progress import ProgressBar
from sam_gym.utils.provenance import provenance
from sam_gym.utils.settings import Count, Positive, check_settings

#: Method -> point grid, columns and rows.
GRIDS = {"saom_v1": (32, 32), "saom_v2": (64, 64), "panosam": (320, 64)}
MethodFlags: Any = method_flags(GRIDS)


@documented
@dataclass(frozen=True)
class FineTuning(TrainConfig):
    """Options of the fine-tuning."""

    steps: Count = 3000
    """Number of optimizer steps per method."""
    batch_size: Count = 48
    """Objects per step, over all processes."""
    augmentations: Annotated[Count, tyro.conf.arg(aliases=("--views",))] = 1
    """Augmentations per training image: the image itself, then flipped and scaled copies."""
    max_images: tyro.conf.Suppress[Count | None] = None
    split: tyro.conf.Suppress[Literal["val", "test"]] = "val"
    prompts: tyro.conf.Suppress[tuple[PromptName, ...]] = ("click",)
    learning_rate: Positive | None = 1e-3
    """Adam's learning rate; decays to a tenth along a cosine."""


@documented
@dataclass(frozen=True, kw_only=True)
class EverythingBenchmarkConfig(DatasetOptions, OutputOptions):
    """Fine-tune everything mode to whole objects, and compare it with the pretrained SAM.

    Every model is prompted with a point grid, without ground truth. Its masks are filtered,
    duplicates are removed, and the rest are matched one to one with the objects. The thresholds of
    predicted IoU and stability are chosen on val for each model, by three criteria: best panoptic
    quality; best mIoU with at most one mask per object; best mIoU with no more masks than the
    pretrained SAM keeps.

    Without options this is the quick setting: `rooms`, micro, one fine-tuning.
    """

    methods: tuple[str, ...] = ("saom_v1",)
    """Methods to compare: saom_v1 (32x32 points), saom_v2 (64x64), panosam (320x64)."""
    tune: Annotated[str, tyro.conf.arg(help=f"{tune_help('Tune target')}.")] = "decoder"
    dataset: Annotated[str, tyro.conf.arg(help=dataset_help())] = "rooms"
    train_images: Count = 2048
    """Maximum number of training images."""
    val_images: Count = 24
    """Number of images to choose thresholds on."""
    test_images: Count = 32
    """Number of images to report on."""
    transfer: str | None = None
    """Root folder of a COCO dataset to measure the same models on."""
    transfer_annotations: str | None = None
    """Its annotation file (None: instances_val.json of the root folder)."""
    transfer_limit: Count = 40
    """Maximum number of its images."""
    grid: tuple[Count, Count] | None = None
    """Columns and rows of the point grid (None: that of the first method)."""
    seeds: Count = 1
    """Number of runs per method, with consecutive seeds."""
    resume: bool = False
    """Resume the fine-tunings in the output folder."""
    out: str = "runs/everything"
    """Folder for results.json, tables, pictures, adapters and report.html."""
    model: tyro.conf.OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)
    train: tyro.conf.OmitArgPrefixes[FineTuning] = field(default_factory=FineTuning)
    method_options: tyro.conf.OmitArgPrefixes[MethodFlags] = field(default_factory=MethodFlags)
    merging: tyro.conf.OmitArgPrefixes[MergeOptions] = field(default_factory=MergeOptions)


def run(config: EverythingBenchmarkConfig) -> dict[str, Any]:
    """Fine-tune, measure and write the report; returns the content of results.json.

    Raises:
        ValueError, FileNotFoundError: an option or the data is wrong; raised before work starts.
    """
    _check(config)
    grid = config.grid or GRIDS[config.methods[0]]
    GeneratorOptions(grid=grid).validate()
    stream, splits = _open(config)
    out = output_folder(config.out, config.overwrite, resume=config.resume)
    if not (config.resume or config.overwrite):
        refuse_unfinished(out, "runs/*/checkpoint.pt")
    plain = load_backbone(**config.model.arguments)
    backbones: dict[str, list[Backbone]] = {ZERO_SHOT: [plain]}
    seconds: dict[str, list[float]] = {}
    for method in config.methods:
        for number in range(config.seeds):
            backbone, spent = _trained(config, stream, method, config.train.seed + number, out)
            backbones.setdefault(method, []).append(backbone)
            seconds.setdefault(method, []).append(spent)
    with ProgressBar() as bar:
        total = sum(len(own.samples) for own in splits.values())
        task = bar.add_task("measuring", total=total * sum(map(len, backbones.values())))
        measuring = Measuring(splits, grid, config.merging, lambda: bar.advance(task))
        for model, own in backbones.items():
            for backbone in own:
                measuring.model(model, backbone)
    scores = measuring.scores
    results = {
        "benchmark": "everything",
        "dataset": config.dataset,
        "grid": list(grid),
        "prompts": grid[0] * grid[1],
        "models": {name: _entry(own, seconds.get(name)) for name, own in scores["test"].items()},
        "transfer": {
            split: {name: _entry(own, None) for name, own in scores[split].items()}
            for split in splits.keys() - {"val", "test"}
        },
        "images": {name: len(own.samples) for name, own in splits.items()},
        "objects": {name: sum(map(len, own.objects)) for name, own in splits.items()},
        "by_run": scores,
        "curves": measuring.curves,
        "backbone": {"name": plain.name, "identity": plain.identity},
        **provenance(config),
    }
    write_report(results, splits["test"].samples[:SHOWN], measuring.shown, out)
    return results


def _check(config: EverythingBenchmarkConfig) -> None:
    check_settings(config)
    config.train.validate()
    if config.transfer is None and config.transfer_annotations is not None:
        raise ValueError("--transfer-annotations needs --transfer, the root folder.")
    if not config.methods:
        raise ValueError("--methods is empty: name at least one of saom_v1, saom_v2, panosam.")
    for method in config.methods:
        if config.methods.count(method) > 1:
            raise ValueError(f"--methods names {method!r} twice; for several runs, pass --seeds.")
        if method not in GRIDS:
            STRATEGIES.get(method)
            raise ValueError(
                f"Method {method!r} does not train everything mode; take {', '.join(GRIDS)}."
            )
        check_tune(method, config.tune)


def _open(config: EverythingBenchmarkConfig) -> tuple[Stream, dict[str, Split]]:
    """Open the training stream and the splits to measure on: val, test and others."""
    procedural = DATASETS.get(config.dataset).procedural

    def dataset(split: str, limit: int) -> Dataset:
        return config.make_dataset(split, **({"length": limit} if procedural else {}))

    train, val = dataset("train", config.train_images), dataset("val", config.val_images)
    check_held_out(val, "val", train)
    splits = {"val": Split.of(val, config.val_images)}
    try:
        test = dataset("test", config.test_images)
    except MissingSplit:
        test = val
    check_held_out(test, "test", train)
    splits["test"] = Split.of(test, config.test_images, but=splits["val"])
    for name, split in splits.items():
        if image_digest(train[0].image) in split.digests:
            raise ValueError(f"{config.dataset}: an image of train is also in {name}.")
    if config.transfer is not None:
        photographs = make_dataset(
            "coco",
            "val",
            root=config.transfer,
            annotations=config.transfer_annotations,
            on_error=config.on_error,
        )
        if shared := shared_images(train, photographs):
            raise ValueError(
                f"--transfer {config.transfer}: {shared} of its images are training images. Pass "
                "another folder, or other --transfer-annotations."
            )
        splits["transfer"] = Split.of(photographs, config.transfer_limit)
    domain = Domain(config.dataset, False, {"train": train, "val": splits["val"]})
    return Stream(config.dataset, (domain,)), splits


def _trained(
    config: EverythingBenchmarkConfig, stream: Stream, method: str, seed: int, out: Path
) -> tuple[Backbone, float]:
    """Fine-tune a backbone; returns it and the training time in seconds."""
    settings = replace(config.train, seed=seed, max_images=config.train_images)
    trainer = Trainer(settings, config.model.arguments, out / "runs")
    options = options_from_flags(config.method_options, method)
    result = trainer.fit(
        stream,
        method,
        config.tune,
        method_options=options,
        resume=config.resume,
        overwrite=config.overwrite,
    )
    folder = out / "runs" / folder_name(method, config.tune, seed)
    adapter = str(folder / "adapter.safetensors")
    return load_backbone(**config.model.arguments, adapter=adapter), result.seconds


def _entry(runs: Sequence[Mapping[str, float]], seconds: Sequence[float] | None) -> dict[str, Any]:
    """Return means over the runs of a model, and under `std` the standard deviations."""
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
