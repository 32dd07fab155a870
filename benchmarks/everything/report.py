"""Write the report of `everything`: tables, pictures, one page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.everything.measuring import BUDGETS
from sam_gym.data import Sample
from sam_gym.utils.plots import MUTED, new_plot, save_figure
from sam_gym.utils.render import draw_masks, save_image, tile
from sam_gym.utils.text import counted

_ROWS = {
    "miou": "mIoU",
    "macc": "mAcc",
    "pq": "PQ",
    "ar100": "AR@100",
    "ar1000": "AR@1000",
    "found": "found",
    "masks_per_object": "masks/object",
    "part_share": "parts %",
    "class_accuracy": "class",
    "predicted_iou": "predicted IoU >",
    "stability": "stability >=",
    "one_miou": "mIoU, one mask per object",
    "one_macc": "mAcc, one mask per object",
    "one_masks_per_object": "masks/object, budget of one",
    "same_miou": "mIoU, zero_shot budget",
    "same_macc": "mAcc, zero_shot budget",
    "same_masks_per_object": "masks/object, zero_shot budget",
    "seconds_per_image": "s/image",
    "released_miou": "mIoU, released",
    "released_macc": "mAcc, released",
}
_FINE = ("masks_per_object", "predicted_iou", "stability", "seconds_per_image")
_BRIEF = ("miou", "macc", "pq", "ar100", "masks_per_object", "one_miou", "same_miou")


def write_report(
    results: dict[str, Any],
    samples: Sequence[Sample],
    shown: Mapping[str, Sequence[np.ndarray]],
    out: Path,
) -> None:
    """Write results.json, models.csv, two pictures and report.html, and print a short table.

    Args:
        results: content of results.json.
        samples: images for the pictures.
        shown: model -> masks bool (K, H, W) of each image.
        out: folder.
    """
    rows = [
        {"split": split, "model": name} | {key: own.get(key) for key in _ROWS}
        for split, models in {"test": results["models"], **results["transfer"]}.items()
        for name, own in models.items()
    ]
    files = report.write_results(out, results, "models.csv", rows)
    grid = "x".join(map(str, results["grid"]))
    page = report.Page(
        "Everything mode: whole objects",
        f"{results['dataset']}, {counted(results['images']['test'], 'test image')} with "
        f"{counted(results['objects']['test'], 'object')}; a grid of {grid} points, no "
        "ground truth in the prompts. In %; "
        f"{report.over_runs(results['settings']['seeds'], ' of each fine-tuning')}.",
    )
    page.cards(_headlines(results["models"]))
    page.table(*_table(results["models"]))
    page.text(
        "Thresholds of predicted IoU and stability are chosen on val for each model: those of the "
        "best panoptic quality; one mask per object: of the best mIoU with no more masks than "
        "objects; zero_shot budget: with no more masks than the pretrained SAM (zero_shot) keeps. "
        "Masks are matched one to one with the objects; an object without a mask counts 0. mIoU "
        "and mAcc (covered fraction of the object) are means over classes. AR: COCO's "
        "class-agnostic average recall of the 100 or 1000 masks of the highest predicted IoU, of "
        "all masks (merged: of those kept). Parts: masks that lie in one object and cover less "
        "than half of it. merged: masks of the pretrained SAM, filtered by thresholds of its own "
        "and merged without training."
    )
    page.text(
        "Rows marked released follow the protocol of the released code, as published figures do: "
        "one prompt per object, derived from the ground truth."
    )
    plot = _plot(results["curves"]["test"], out / "masks_per_object.png")
    page.plot(plot, "mIoU by masks per object; for each budget, the best thresholds on val")
    for split, models in results["transfer"].items():
        page.heading(f"On photographs, without training on them ({split})")
        page.table(*_table(models))
    sheet = []
    for number, sample in enumerate(samples):
        frames = [draw_masks(sample.image, sample.masks, caption="objects", height=256)]
        for name, masks in shown.items():
            count = len(masks[number])
            caption = f"{name}, {counted(count, 'mask')}"
            frames.append(draw_masks(sample.image, masks[number], caption=caption, height=256))
        sheet.append(report.side_by_side(frames))
        page.photograph(sheet[-1], "Objects, and the masks of each model")
    save_image(out / "masks.png", tile(sheet, 1))
    heading = f"everything ({results['dataset']}, {grid} points), in %"
    page.finish(files, results["settings"], heading, *_table(results["models"], _BRIEF))


def _plot(curves: Mapping[str, Any], path: Path) -> Path:
    """Plot mIoU by masks per object for each model."""
    figure, axes = new_plot()
    colours = (MUTED, report.BLUE, report.ORANGE, report.INK)
    for colour, (name, runs) in zip(colours, curves.items(), strict=False):
        for number, curve in enumerate(runs):
            points = sorted((point["masks_per_object"], point["miou"]) for point in curve)
            x, y = zip(*points, strict=True)
            axes.plot(x, y, "o-", color=colour, ms=4, label=None if number else name)
    axes.set(xlabel="masks per object", ylabel="mIoU", xscale="log", ylim=(0, 100))
    axes.set_xticks(BUDGETS, [f"{budget:g}" for budget in BUDGETS])
    axes.minorticks_off()
    axes.legend(frameon=False)
    return save_figure(path, figure)


def _table(
    models: Mapping[str, Any], keys: Iterable[str] = _ROWS
) -> tuple[list[str], list[list[str]]]:
    """Return a column per model, and a row per number that at least one model has."""
    rows = [
        [_ROWS[key], *(_cell(own, key) for own in models.values())]
        for key in keys
        if any(key in own for own in models.values())
    ]
    return ["", *models], rows


def _cell(own: Mapping[str, Any], key: str) -> str:
    if key not in own:
        return ""
    digits = 2 if key.endswith(_FINE) else 1
    deviation = own["std"][key]
    return f"{own[key]:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation else "")


def _headlines(models: Mapping[str, Any]) -> dict[str, str]:
    cards = {f"mIoU, {name}": f"{own['miou']:.1f}" for name, own in models.items()}
    before = models["zero_shot"]
    for name, own in models.items():
        if name not in ("zero_shot", "merged") and before["miou"]:
            change = 100 * (own["miou"] / before["miou"] - 1)
            cards[f"change of mIoU by {name}"] = f"{change:+.0f}%"
    return cards
