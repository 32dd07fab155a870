"""Report of the `continual` benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adaptation.evaluation import score
from adaptation.results import RunResult, folder_name
from adaptation.trainer import Trainer
from benchmarks import report
from benchmarks.continual.config import ContinualBenchmarkConfig
from sam_gym.backbones.adapters.adapter import Adapter
from sam_gym.data.streams import Stream
from sam_gym.utils.plots import plot_matrix
from sam_gym.utils.render import draw_episode
from sam_gym.utils.text import counted

_COLUMNS = {
    "last_iou": "Last-IoU",
    "avg_iou": "Avg-IoU",
    "ff_iou": "FF-IoU",
    "last_biou": "Last-BIoU",
    "ff_biou": "FF-BIoU",
    "forward_iou": "forward",
    "retention_iou": "retention",
    "selector_accuracy": "router",
    "last_iou_compact": "Last, compact",
    "last_iou_thin": "Last, thin",
}
#: Columns that the terminal shows; it is narrower than a page.
_BRIEF = ("method", "Last-IoU", "Avg-IoU", "FF-IoU", "Last-BIoU", "retention", "router")


def pictures(
    trainer: Trainer, stream: Stream, jobs: Mapping[str, tuple[str, str]]
) -> list[tuple[str, np.ndarray]]:
    """For each domain, the final masks of one object by some methods, beside the truth."""
    bank, split = trainer.bank(stream), trainer.config.split or stream.held_out_split
    shown = [job for job in jobs.items() if job[1][0] in ("naive", "er", "moda")][:3]
    models = {"zero_shot": trainer.backbone.pretrained}
    assert trainer.out is not None
    for label, (method, tune) in shown:
        folder = trainer.out / folder_name(method, tune, trainer.config.seed)
        file = folder / "adapter.safetensors"
        models[label] = trainer.backbone.adapted_model(Adapter.load(file), str(file))
    sheet = []
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
        caption = f"{domain.name}: ground truth, and masks for a box prompt after the last domain"
        sheet.append((caption, report.side_by_side(frames)))
    return sheet


def write_report(
    config: ContinualBenchmarkConfig,
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

    count = config.seeds * max(1, len(config.orders))
    quick = "" if config.full else "Quick setting: few seeds, short training. "
    domains = counted(len(stream), "domain")
    if len(stream) > 1:
        domains += " one after the other"
    page = report.Page(
        "Continual adaptation of a Segment Anything Model",
        f"{quick}{domains}; held-out objects (of {summary['split']}) prompted by {prompt}; "
        f"{report.over_runs(count, ' of each method')}, in %.",
    )
    page.cards(_headlines(summary))
    page.table(columns, cells)
    page.text(
        "Last: mean over domains after the last stage. Avg: mean over stages of the mean over the "
        "domains learned so far. FF: mean drop of a domain from just after it was learned to the "
        "end (below 0: it improved). forward: IoU on a domain before it is learned, minus that of "
        "the pretrained SAM. router: fraction of held-out images routed to their own expert."
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
        *report.formatted(
            [own | {"kind": "thin" if own["thin"] else "compact"} for own in summary["domains"]],
            {
                "domain": "{name}",
                "kind": "{kind}",
                "objects": "{objects}",
                "ceiling": "{ceiling:.1f}",
                "narrow objects": "{narrow_objects:.0%}",
            },
        )
    )
    page.text(
        "Ceiling: score of the true masks at low resolution. Narrow objects consist of boundary "
        "pixels only, so that their boundary IoU equals their IoU."
    )
    for caption, picture in sheet:
        page.photograph(picture, caption)
    page.heading("Stage by domain")
    for label, own in runs.items():
        # Matrices can be averaged if the order of domains is the same.
        alike = [run for run in own if run.domains == own[0].domains]
        matrices = [np.array(run.scores[prompt]["iou"]) / 100 for run in alike]
        file = out / f"matrix_{label.replace('+', '_')}.png"
        row = own[0].only_stage
        plot_matrix(file, np.mean(matrices, axis=0), own[0].domains, label, row=row)
        when = "after every stage" if row is None else row
        page.plot(file, f"IoU on every domain, {when}: {label}")
    brief = [columns.index(name) for name in columns if name in _BRIEF]
    page.finish(
        files,
        summary["settings"],
        f"continual ({summary['setting']} setting), by {prompt}, in %",
        [columns[k] for k in brief],
        [[row[k] for k in brief] for row in cells],
    )


def _shown_columns(summary: Mapping[str, Any]) -> dict[str, str]:
    """Key and title of the columns that apply to at least one method."""
    methods = summary["methods"].values()
    return {key: name for key, name in _COLUMNS.items() if any(own.get(key) for own in methods)}


def _shown(number: Mapping[str, float] | None) -> str:
    if number is None:
        return ""
    deviation = f" ± {number['std']:.1f}" if number["std"] else ""
    return f"{number['mean']:z.1f}{deviation}"


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
    """CSV rows, one per method: mean and deviation of every number."""
    rows = []
    for name, own in summary["methods"].items():
        row: dict[str, Any] = {"method": name, "tune": own["tune"], "runs": own["runs"]}
        for key in _shown_columns(summary):
            number = own.get(key) or {"mean": None, "std": None}
            row |= {key: number["mean"], f"{key}_std": number["std"]}
        costs = {key: own[key] for key in ("trainable_parameters", "bytes_per_domain")}
        rows.append(row | costs | {"seconds": own["seconds"]["mean"]})
    return rows


def _headlines(summary: Mapping[str, Any]) -> dict[str, str]:
    """Last-IoU of zero_shot, naive, moda and joint."""
    methods = summary["methods"]
    shown = [name for name in ("zero_shot", "naive", "moda", "joint") if name in methods]
    return {f"Last-IoU, {name}": f"{methods[name]['last_iou']['mean']:.1f}" for name in shown}
