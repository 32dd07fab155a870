"""Write the report of `semantic`: CSV tables, pictures and one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.semantic.heads import HeadResult
from benchmarks.semantic.zero_shot import ImageResult, ZeroShot
from sam_gym.metrics.semantic import class_iou, confusion, mean_score
from sam_gym.utils.cli import print_table
from sam_gym.utils.files import write_csv
from sam_gym.utils.plots import literal, save_figure
from sam_gym.utils.render import draw_labels, save_image
from sam_gym.utils.text import counted, safe_name

_FRAME_HEIGHT = 260
#: Most classes of a confusion matrix that is drawn.
_DRAWN = 40
_COLUMNS = {
    "class": "class",
    "group": "group",
    "prompts": "points",
    "prompt_iou": "IoU of a point",
    "bound": "bound",
    "mask_iou": "IoU of masks",
    "iou": "IoU",
    "boundary_iou": "boundary IoU",
}
#: Numbers of a phase.
_PHASES = {
    "mean_iou": "mean IoU",
    "pixel_accuracy": "pixel accuracy",
    "mean_boundary_iou": "mean boundary IoU",
    "mean_category_iou": "mean category IoU",
    "image_mean_iou": "mean IoU of an image",
}
#: Numbers of the zero-shot phase, which the others share in part.
NUMBERS = _PHASES | {
    "mean_prompt_iou": "IoU of a point",
    "mean_bound": "bound of a point",
    "mean_mask_iou": "IoU of masks",
}


def write_report(
    out: Path,
    summary: dict[str, Any],
    counts: np.ndarray,
    results: Sequence[ImageResult],
    zero_shot: ZeroShot,
    heads: Sequence[HeadResult],
) -> None:
    """Write results.json, the CSV tables, a plot, pictures and report.html, and print a table.

    Args:
        out: folder of the run.
        summary: the content of results.json.
        counts: confusion matrix, int64 (C, C + 1).
        results: of each image.
        zero_shot: of the run, which segments images once more to draw them.
        heads: results of the trained heads, which do so too.
    """
    names, settings = zero_shot.classes, summary["settings"]
    numbers, classes = summary["zero_shot"], summary["classes"]
    rows = [
        {
            "image": own.name,
            "class": names[prompt.category],
            "iou": prompt.iou,
            "point_x": prompt.point[0],
            "point_y": prompt.point[1],
        }
        for own in results
        for prompt in own.prompts
    ]
    # The names and headers of the SAM-Cityscapes code.
    files = report.write_results(out, summary, "detailed_results.csv", rows)
    means = [{"class": row["class"], "mean_iou": row["prompt_iou"]} for row in classes]
    files.append(write_csv(out / "summary.csv", [x for x in means if x["mean_iou"] is not None]))
    matrices = {"confusion": counts}
    matrices |= {f"confusion_{own.head.name}": own.metric.counts for own in heads}
    for stem, matrix in matrices.items():
        table = [
            {"class": name} | dict(zip((*names, "void"), row.tolist(), strict=True))
            for name, row in zip(names, matrix, strict=True)
        ]
        files.append(write_csv(out / f"{stem}.csv", table))
    if heads:
        keys = [f"{own.head.name}_iou" for own in heads]
        table = [{key: row[key] for key in ("class", "iou", *keys)} for row in classes]
        mean = {"class": "mean", "iou": numbers["mean_iou"]}
        mean |= {f"{name}_iou": own["mean_iou"] for name, own in summary["heads"].items()}
        files.append(write_csv(out / "phases.csv", [*table, mean]))

    point, per = settings["point"], settings["per"]
    page = report.Page(
        f"{zero_shot.backbone.name} on {summary['dataset']}: semantic segmentation",
        f"Zero-shot: {counted(numbers['prompts'], 'point')} ({point}), one per {per} of an "
        f"image, on {counted(summary['images'], 'image')} of {summary['dataset']} "
        f"({summary['split']}). Points and their classes come from the ground truth.",
    )
    page.cards({title: _text(numbers[key]) for key, title in NUMBERS.items() if key in numbers})
    if heads:
        page.heading("Phases")
        keys = [key for key in _PHASES if key in numbers]
        page.table(
            ("phase", *(_PHASES[key] for key in keys), "weights", "training, s", "s an image"),
            [
                [
                    name,
                    *(_text(own[key]) for key in keys),
                    f"{own['parameters']:,}" if "parameters" in own else "",
                    _text(own.get("training_seconds")),
                    _text(own["seconds_per_image"]),
                ]
                for name, own in {"zero-shot": numbers, **summary["heads"]}.items()
            ],
        )
        page.text(
            "Heads classify every pixel by features of the frozen SAM, without prompts; they were "
            "trained on the training split. Zero-shot knows the classes of an image and a point of "
            "each. _masks: with a head's probabilities voted within the masks of everything mode. "
            "_agent: corrected by the clicks of an agent. Training: with encoding and one "
            "evaluation."
        )
    for name, gains in summary["gains"].items():
        shown = "; ".join(
            f"{_PHASES[key]} {value:+.3f} ({low:+.3f} to {high:+.3f})"
            for key, (value, low, high) in gains.items()
        )
        page.text(f"Gain of {name} over the head alone, with 95% intervals over images: {shown}.")
    if summary["agent"]:
        header, cells = _agent_table(summary["agent"])
        page.table(header, cells)
        print_table("Masks of the agent", header, cells)
        page.text(
            "Masks that the agent proposed and that were accepted. Predicted IoU: the lowest of an "
            "accepted mask, chosen on images of the training split for the highest mean IoU, "
            "separately for each class; a class whose gain on these images has a 95% interval that "
            "reaches 0 keeps the head's masks."
        )
    page.heading("Classes")
    columns = {key: title for key, title in _COLUMNS.items() if key in classes[0]}
    columns |= {f"{own.head.name}_iou": f"IoU, {own.head.name} head" for own in heads}
    cells = [[_text(row[key]) for key in columns] for row in classes]
    page.table(list(columns.values()), cells)
    page.text(
        "IoU, boundary IoU: of label maps, in which a pixel has the class of the mask with the "
        "highest logit, out of one confusion matrix of the dataset; ignored pixels do not count. "
        "IoU of masks: the same with each class's masks by themselves, which may overlap. IoU of a "
        "point: mean over the points, in which all pixels count, as in the SAM-Cityscapes code."
    )
    if per == "class":
        page.text(
            "Bound: mean IoU of a class's largest object with all of the class in an image. A mask "
            f"of one object cannot exceed it; it is {_text(numbers['mean_bound'])} on average."
        )
    if point == "seed":
        page.text(
            f"{numbers['border_points']:,} of {numbers['prompts']:,} points lie on the border of "
            "the image, which their distance transform does not know (--point inner does)."
        )
    if numbers["categories"]:
        page.heading("Groups of classes")
        page.table(
            ("group", "IoU"), [[name, _text(x)] for name, x in numbers["categories"].items()]
        )
    if len(names) <= _DRAWN:
        page.heading("Confusion matrix")
        page.plot(_draw_confusion(out / "confusion.png", counts, names), "confusion matrix")
        page.text("Fraction of a class's pixels (row) with each predicted class (column).")
    if summary["speed"]:
        _write_speed(page, summary["speed"], summary["device"])
    if settings["pictures"]:
        page.heading("Images from best to worst")
        shown = ", ".join(f"{own.head.name} head" for own in heads)
        page.text(
            f"Image, ground truth, zero-shot{shown and ', '}{shown}; ranked by zero-shot. Black: "
            "ignored, or in no mask."
        )
        _draw_pictures(page, out / "pictures", results, settings["pictures"], zero_shot, heads)
    phases = ", ".join(["zero-shot", *(f"{own.head.name} head" for own in heads)])
    heading = f"semantic: {zero_shot.backbone.name} on {summary['dataset']}, {phases}"
    total: Mapping[str, Any] = {
        "class": "mean",
        "group": "",
        "prompts": numbers["prompts"],
        "prompt_iou": numbers["mean_prompt_iou"],
        "bound": numbers["mean_bound"],
        "mask_iou": numbers["mean_mask_iou"],
        "iou": numbers["mean_iou"],
        "boundary_iou": numbers.get("mean_boundary_iou"),
        **{f"{name}_iou": own["mean_iou"] for name, own in summary["heads"].items()},
    }
    cells.append([_text(total[key]) for key in columns])
    page.finish(files, settings, heading, list(columns.values()), cells)


def _agent_table(rows: Sequence[Mapping[str, Any]]) -> tuple[Sequence[str], list[list[str]]]:
    """Return header and cells of the table of the agent's masks."""
    header = ("class", "proposed", "accepted", "predicted IoU", "proposed, train", "gain, train")
    cells = []
    for row in rows:
        own = row.get("train_gain")
        cells.append(
            [
                row["class"],
                str(row["proposed"]),
                str(row["accepted"]),
                _text(row.get("threshold", "any")) or "none",
                _text(row.get("train_proposed")),
                "" if own is None else f"{own[0]:+.4f} ({own[1]:+.4f} to {own[2]:+.4f})",
            ]
        )
    return header, cells


def _text(value: float | int | str | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _write_speed(page: report.Page, speed: Mapping[str, Any], device: str) -> None:
    page.heading("Speed")
    page.table(
        ("images", "points", "s an image", "reference, s", "ratio", "same masks"),
        [
            [
                str(speed["images"]),
                str(speed["points"]),
                f"{speed['ours_seconds']:.3f}",
                f"{speed['reference_seconds']:.3f}",
                f"{speed['ratio']:.2f}x",
                f"{speed['mean_iou_of_masks']:.4f}",
            ]
        ],
    )
    page.text(
        "Reference: segment_anything's SamPredictor with set_image for every class, as in the "
        f"SAM-Cityscapes code. Medians of {speed['repeats']} alternating runs on {device}. Same "
        "masks: mean IoU of both sides' masks."
    )


def _draw_confusion(path: Path, counts: np.ndarray, names: Sequence[str]) -> Path:
    """Draw the confusion matrix as a heat map, each row divided by its sum."""
    from matplotlib.figure import Figure

    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = max(4.0, 0.32 * len(names))
    figure = Figure(figsize=(side + 1.5, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(fractions, cmap="viridis", vmin=0.0, vmax=1.0)
    labels = [literal(name) for name in names]
    axes.set_xticks(range(len(names) + 1), [*labels, "void"], rotation=60, ha="right")
    axes.set_yticks(range(len(names)), labels)
    axes.set(xlabel="predicted", ylabel="class")
    figure.colorbar(image, ax=axes, fraction=0.05, shrink=0.9)
    return save_figure(path, figure)


def _draw_pictures(
    page: report.Page,
    folder: Path,
    results: Sequence[ImageResult],
    count: int,
    zero_shot: ZeroShot,
    heads: Sequence[HeadResult],
) -> None:
    """Draw images evenly spaced by rank."""
    folder.mkdir(exist_ok=True)
    ranked = sorted((own for own in results if own.score == own.score), key=lambda x: -x.score)
    ranks = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
    shown = [ranked[rank] for rank in ranks.tolist()]
    segmented = zero_shot.segment([own.index for own in shown])
    for rank, own, (drawn_image, outcome) in zip(ranks, shown, segmented, strict=True):
        drawn = {
            "image": None,
            "ground truth": drawn_image.truth,
            f"zero-shot, mean IoU {own.score:.2f}": outcome.labels,
        }
        for result in heads:
            labels = result.head.segment([drawn_image.image])[0]
            counts = confusion(labels, drawn_image.truth, len(zero_shot.classes))
            score = mean_score(class_iou(counts))
            drawn[f"{result.head.name} head, mean IoU {score:.2f}"] = labels
        frames = report.side_by_side(
            [
                draw_labels(drawn_image.image, labels, caption=title, height=_FRAME_HEIGHT)
                for title, labels in drawn.items()
            ]
        )
        name = safe_name(f"{rank + 1:03d}_{own.name}")
        save_image(folder / f"{name}.png", frames)
        page.photograph(frames, f"{rank + 1} of {len(ranked)}: {own.name}")
