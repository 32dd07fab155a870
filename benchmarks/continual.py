"""`continual`: who adapts to domain after domain without forgetting (CoSAM, arXiv 2412.06418)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from adaptation.config import TrainConfig
from adaptation.evaluation import score
from adaptation.features import FeatureBank
from adaptation.method_flags import method_flags, options_from_flags
from adaptation.options import ModelOptions, StreamOptions
from adaptation.results import RunResult, folder_name
from adaptation.strategy import STRATEGIES
from adaptation.trainer import Trainer, check_tune
from benchmarks import report
from benchmarks.options import require_at_least
from sam_gym.backbones.adapters.adapter import Adapter
from sam_gym.backbones.adapters.tuning import TUNINGS
from sam_gym.data.streams import Stream, low_res_ceiling
from sam_gym.utils.plots import plot_matrix
from sam_gym.utils.registry import unknown_name
from sam_gym.utils.render import draw_episode
from sam_gym.version import __version__

#: The methods of the paper's table, in its order, and those that came after it.
PAPER = ("zero_shot", "joint", "naive", "lwf", "ewc", "er", "l2p", "dualprompt", "coda", "moda")
BEYOND = ("samcl", "regcl")
#: Options of all registered methods.
MethodFlags: Any = method_flags(STRATEGIES.names())


@dataclass
class Config:
    """Adapt a SAM to a stream of domains with every method, and see what is forgotten.

    Without options this is the quick setting: one seed, the methods of the paper, shown by box.
    """

    methods: tuple[str, ...] = ()
    """Methods to compare (default: those of the paper; with --full: all)."""
    tune: tuple[str, ...] = ("decoder",)
    """What is tuned: decoder, hq, hq_small, sam_adapter, lora, lora_decoder. Methods that do not
    go with it (prompt pools, regcl, samcl) tune what they are made for."""
    seeds: int = 1
    """Runs of each method: the first with the seed that is given, then those after it."""
    orders: tuple[str, ...] = ()
    """Orders of the domains: names with commas, or random:SEED. Each runs with every seed."""
    full: bool = False
    """The full setting: five seeds, all methods, boxes, one click and five clicks."""
    resume: bool = False
    """Go on with the runs in the output folder where they stopped."""
    out: str = "runs/continual"
    """Folder for results.json, tables, heat maps, adapters and report.html."""
    stream: tyro.conf.OmitArgPrefixes[StreamOptions] = field(default_factory=StreamOptions)
    model: tyro.conf.OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)
    train: tyro.conf.OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)
    method_options: tyro.conf.OmitArgPrefixes[MethodFlags] = field(default_factory=MethodFlags)


@dataclass(frozen=True)
class _Job:
    """One run: a method with what it tunes, a seed and an order."""

    label: str
    method: str
    tune: str
    seed: int
    order: str | None


def run(config: Config) -> dict[str, Any]:
    """Run the benchmark and write its report.

    Raises:
        ValueError, FileNotFoundError: an option, the data or the checkpoint is wrong.
    """
    config = _settled(config)
    jobs = _jobs(config)
    streams = {order: config.stream.open(order) for order in _orders(config)}
    retention = config.stream.open_retention()
    out = report.output_folder(config.out)
    report.refuse_unfinished(out, "runs/*/*/checkpoint.pt", config.resume)

    runs: dict[str, list[RunResult]] = {}
    first = next(iter(streams.values()))
    for number, ((seed, order), group) in enumerate(_grouped(jobs)):
        # Methods that share seed and order share a trainer, and so the bank of views.
        trainer = Trainer(
            replace(config.train, seed=seed),
            config.model.arguments,
            out / "runs" / _slug(order),
            retention,
        )
        for job in group:
            options = options_from_flags(config.method_options, job.method)
            done = trainer.fit(
                streams[order],
                job.method,
                job.tune,
                method_options=options,
                resume=config.resume,
            )
            runs.setdefault(job.label, []).append(done)
            numbers = done.summary(config.train.prompts[0])
            last, forgotten = numbers["last_iou"], numbers["ff_iou"]
            print(
                f"{job.label:<22} seed {seed}  last {last:5.1f}"
                + (f"  forgotten {forgotten:5.1f}" if forgotten is not None else " " * 17)
                + f"  {done.seconds:6.1f} s",
                flush=True,
            )
        if number == 0:
            sheet = _pictures(trainer, first, group, out)
    summary = _summary(config, first, runs, trainer.bank(first))
    _write(config, summary, runs, first, sheet, out)
    return summary


def _settled(config: Config) -> Config:
    """The settings with what --full and the defaults stand for, checked."""
    if config.full:
        train = replace(config.train, prompts=("box", "click", "clicks5"))
        seeds = max(5, config.seeds)
        methods = config.methods or (*PAPER, *BEYOND)
        config = replace(config, train=train, seeds=seeds, methods=methods)
    config = replace(config, methods=config.methods or PAPER)
    require_at_least(1, seeds=config.seeds)
    config.train.validate()
    for name in config.methods:
        STRATEGIES.get(name)
    for name in config.tune:
        if name not in TUNINGS.names():
            raise unknown_name("tune target", name, TUNINGS.names())
    if not config.tune:
        raise ValueError("--tune is empty: name at least one tune target.")
    return config


def _orders(config: Config) -> tuple[str | None, ...]:
    return config.orders or (None,)


def _jobs(config: Config) -> list[_Job]:
    """All runs; a method with several tune targets is named METHOD+TARGET."""
    kinds: dict[str, tuple[str, str]] = {}
    for tune in config.tune:
        for method in config.methods:
            fits = tune in STRATEGIES.get(method).tunes and method != "zero_shot"
            chosen = tune if fits else STRATEGIES.get(method).default_tune
            check_tune(method, chosen)
            label = f"{method}+{chosen}" if len(config.tune) > 1 and fits else method
            kinds.setdefault(label, (method, chosen))
    return [
        _Job(label, method, tune, config.train.seed + k, order)
        for order in _orders(config)
        for k in range(config.seeds)
        for label, (method, tune) in kinds.items()
    ]


def _grouped(jobs: Sequence[_Job]) -> list[tuple[tuple[int, str | None], list[_Job]]]:
    groups: dict[tuple[int, str | None], list[_Job]] = {}
    for job in jobs:
        groups.setdefault((job.seed, job.order), []).append(job)
    return list(groups.items())


def _slug(order: str | None) -> str:
    return "given" if order is None else order.replace(":", "-").replace(",", "_")[:80]


# Numbers ---------------------------------------------------------------------------------------


def _spread(values: Sequence[float | None]) -> dict[str, float | None] | None:
    """Mean and standard deviation over runs; None where the number does not apply."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    deviation = float(np.std(known, ddof=1)) if len(known) > 1 else 0.0
    return {"mean": round(float(np.mean(known)), 3), "std": round(deviation, 3)}


def _summary(
    config: Config, stream: Stream, runs: Mapping[str, list[RunResult]], bank: FeatureBank
) -> dict[str, Any]:
    methods: dict[str, Any] = {}
    for label, own in runs.items():
        entry: dict[str, Any] = {"tune": own[0].tune, "runs": len(own)}
        for prompt in config.train.prompts:
            rows = [run.summary(prompt) for run in own]
            numbers = {name: _spread([row.get(name) for row in rows]) for name in rows[0]}
            for group, names in _groups(stream).items():
                ends = [_of_group(run, prompt, names) for run in own]
                numbers[f"last_iou_{group}"] = _spread(ends)
            if prompt == config.train.prompts[0]:
                entry |= numbers
            else:
                entry[prompt] = numbers
        entry["trainable_parameters"] = own[0].trainable
        entry["bytes_per_domain"] = round(float(np.mean([run.kept_bytes for run in own])))
        entry["seconds"] = _spread([run.seconds for run in own])
        methods[label] = entry
    some = next(iter(runs.values()))[0]
    return {
        "benchmark": "continual",
        "setting": "full" if config.full else "quick",
        "prompt": config.train.prompts[0],
        "domains": [
            {
                "name": domain.name,
                "thin": domain.thin,
                "ceiling": round(
                    100
                    * low_res_ceiling(
                        domain.split(config.train.split),
                        bank.backbone.image_size,
                        bank.backbone.mask_shape[0],
                        config.train.max_images,
                    ),
                    1,
                ),
                "narrow_objects": some.narrow[domain.name],
                "objects": len(bank.held_out(domain, config.train.split).rows),
            }
            for domain in stream
        ],
        "methods": methods,
        "by_run": {label: [asdict(run) for run in own] for label, own in runs.items()},
        "backbone": {"name": bank.backbone.name, "identity": bank.backbone.identity},
        "threads": torch.get_num_threads(),
        "versions": {"sam-gym": __version__, "torch": torch.__version__},
        "settings": asdict(config),
    }


def _groups(stream: Stream) -> dict[str, list[str]]:
    """Compact and thin domains, where there are both."""
    groups = {
        name: [domain.name for domain in stream if domain.thin is thin]
        for name, thin in (("compact", False), ("thin", True))
    }
    return groups if all(groups.values()) else {}


def _of_group(run: RunResult, prompt: str, names: Sequence[str]) -> float:
    last = run.scores[prompt]["iou"][-1]
    return float(np.mean([last[run.domains.index(name)] for name in names]))


# Pictures --------------------------------------------------------------------------------------


def _pictures(
    trainer: Trainer, stream: Stream, jobs: Sequence[_Job], out: Path
) -> list[tuple[str, np.ndarray]]:
    """Draw an object per domain as some methods segment it after the last stage."""
    bank, split = trainer.bank(stream), trainer.config.split
    shown = [job for job in jobs if job.method in ("naive", "er", "moda")][:3]
    models = {"zero_shot": trainer.backbone.pretrained}
    assert trainer.out is not None
    for job in shown:
        folder = trainer.out / folder_name(job.method, job.tune, job.seed)
        file = folder / "adapter.safetensors"
        models[job.label] = trainer.backbone.adapted_model(Adapter.load(file), str(file))
    rows: dict[str, list[np.ndarray]] = {}
    for domain in stream:
        objects = bank.held_out(domain, split)
        areas = [mask.mean() for mask in objects.masks]
        pick = int(np.argsort(areas)[len(areas) * 3 // 4])
        image = objects.images[objects.rows[pick]]
        frames = [draw_episode(image, objects.masks[pick], caption="truth", height=200)]
        for name, model in models.items():
            scores = score(model, bank, domain, "box", split, keep_masks=True)
            caption = f"{name} {scores.iou[pick]:.2f}"
            mask = scores.masks[pick]
            frames.append(draw_episode(image, mask, caption=caption, height=200))
        rows[domain.name] = frames
    return [
        (f"{name}: ground truth, and masks by box after the last domain", report.side_by_side(row))
        for name, row in rows.items()
    ]


# Report ----------------------------------------------------------------------------------------

_COLUMNS = {
    "last_iou": "Last-IoU",
    "avg_iou": "Avg-IoU",
    "ff_iou": "FF-IoU",
    "last_biou": "Last-BIoU",
    "ff_biou": "FF-BIoU",
    "forward_iou": "forward",
    "retention_iou": "retention",
    "selector_accuracy": "selector",
}
#: What of the table the terminal shows.
_BRIEF = ("method", "Last-IoU", "Avg-IoU", "FF-IoU", "Last-BIoU", "retention", "selector")


def _write(
    config: Config,
    summary: dict[str, Any],
    runs: Mapping[str, list[RunResult]],
    stream: Stream,
    sheet: Sequence[tuple[str, np.ndarray]],
    out: Path,
) -> None:
    prompt = config.train.prompts[0]
    files = report.write_results(out, summary, "methods.csv", _flat(summary))
    cells = _cells(summary)
    columns = ["method", *_shown_columns(summary).values(), "parameters", "KB a domain", "train s"]

    quick = "" if config.full else "Quick setting: few seeds, short training. "
    page = report.Page(
        "Continual adaptation of a Segment Anything Model",
        f"{quick}{len(stream)} domains one after the other; held-out objects shown by {prompt}; "
        f"{config.seeds * len(_orders(config))} runs of each method, mean and standard deviation, "
        "in %.",
    )
    page.cards(_headlines(summary))
    page.table(columns, cells)
    page.text(
        "Last: mean over domains after the last one. Avg: mean over stages of the mean over the "
        "domains learned so far. FF: mean drop of a domain from just after it was learned to the "
        "end (below 0: it got better). forward: what earlier domains did for a domain before its "
        "turn, against the pretrained SAM. selector: held-out images sent to their own expert."
    )
    for name, own in summary["methods"].items():
        for other in config.train.prompts[1:]:
            numbers = own[other]
            page.text(
                f"{name} by {other}: Last-IoU {_shown(numbers['last_iou'])}, "
                f"FF-IoU {_shown(numbers['ff_iou'])}."
            )
    page.heading("The domains")
    page.table(
        ["domain", "kind", "objects", "ceiling", "narrow objects"],
        [
            [
                own["name"],
                "thin" if own["thin"] else "compact",
                str(own["objects"]),
                f"{own['ceiling']:.1f}",
                f"{100 * own['narrow_objects']:.0f}%",
            ]
            for own in summary["domains"]
        ],
    )
    page.text(
        "Ceiling: what the objects' own masks score at low resolution. Narrow objects: their "
        "boundary is all of them, so boundary IoU says what IoU says."
    )
    for caption, picture in sheet:
        page.photograph(picture, caption)
    page.heading("Stage by domain")
    for label, own in runs.items():
        matrices = [np.array(run.scores[prompt]["iou"]) / 100 for run in own if _same(run, own[0])]
        file = out / f"matrix_{label.replace('+', '_')}.png"
        plot_matrix(file, np.mean(matrices, axis=0), own[0].domains, label)
        page.plot(file, f"IoU on every domain after every stage: {label}")
    brief = [columns.index(name) for name in columns if name in _BRIEF]
    page.finish(
        files,
        summary["settings"],
        f"continual ({summary['setting']} setting), by {prompt}, in %",
        [columns[k] for k in brief],
        [[row[k] for k in brief] for row in cells],
    )


def _same(run: RunResult, other: RunResult) -> bool:
    """Whether two runs had one order of the domains, so that their matrices may be averaged."""
    return run.domains == other.domains


def _shown_columns(summary: Mapping[str, Any]) -> dict[str, str]:
    """The columns that say something of at least one method, with those of thin and compact."""
    methods = summary["methods"].values()
    titles = dict(_COLUMNS) | {
        "last_iou_compact": "Last, compact",
        "last_iou_thin": "Last, thin",
    }
    return {key: name for key, name in titles.items() if any(own.get(key) for own in methods)}


def _shown(number: Mapping[str, float] | None) -> str:
    if number is None:
        return ""
    deviation = f" ± {number['std']:.1f}" if number["std"] else ""
    return f"{number['mean']:.1f}{deviation}"


def _cells(summary: Mapping[str, Any]) -> list[list[str]]:
    keys = _shown_columns(summary)
    return [
        [
            f"{name} ({own['tune']})" if own["seconds"]["mean"] else name,
            *(_shown(own.get(key)) for key in keys),
            f"{own['trainable_parameters']:,}",
            f"{own['bytes_per_domain'] / 1000:,.0f}",
            f"{own['seconds']['mean']:.0f}",
        ]
        for name, own in summary["methods"].items()
    ]


def _flat(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row of the CSV for each method: mean and deviation of every number."""
    rows = []
    for name, own in summary["methods"].items():
        row: dict[str, Any] = {"method": name, "tune": own["tune"], "runs": own["runs"]}
        for key in _shown_columns(summary):
            number = own.get(key) or {"mean": None, "std": None}
            row |= {key: number["mean"], f"{key}_std": number["std"]}
        row["trainable_parameters"] = own["trainable_parameters"]
        row["bytes_per_domain"] = own["bytes_per_domain"]
        row["seconds"] = own["seconds"]["mean"]
        rows.append(row)
    return rows


def _headlines(summary: Mapping[str, Any]) -> dict[str, str]:
    """Last-IoU of the bounds, of doing nothing against forgetting, and of MoDA."""
    methods = summary["methods"]
    cards = {}
    for name in ("zero_shot", "naive", "moda", "joint"):
        if name in methods:
            cards[f"Last-IoU, {name}"] = f"{methods[name]['last_iou']['mean']:.1f}"
    return cards
