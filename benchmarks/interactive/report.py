"""Write the report of `interactive`: numbers, a curve and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.interactive.clicking import Result, target_of
from benchmarks.interactive.grabcut import LONGEST_SIDE, GrabCut
from sam_gym.backbones import Backbone
from sam_gym.data.cache import SampleCache
from sam_gym.metrics.masks import number_of_clicks
from sam_gym.simulation.clicks import Click
from sam_gym.simulation.interactive import Target, click_out
from sam_gym.utils.plots import new_plot, save_figure
from sam_gym.utils.render import draw_episode, save_image
from sam_gym.utils.text import counted, safe_name

_SHOWN_CLICKS = (1, 3, 5)
_FRAME_HEIGHT = 260


def write_report(
    out: Path,
    summary: dict[str, Any],
    results: Sequence[Result],
    backbone: Backbone,
    samples: SampleCache,
) -> None:
    """Write results.json, objects.csv, a plot, pictures and report.html, and print a table."""
    grabcut, settings, clicks = summary["grabcut"], summary["settings"], summary["clicks"]
    rows = object_rows(results, grabcut["clicks"] if grabcut else 0)
    files = report.write_results(out, summary, "objects.csv", rows)
    curve_file = save_figure(out / "curve.png", _curve(summary))

    page = report.Page(
        f"{backbone.name} on {summary['dataset']}: interactive segmentation",
        f"A simulated user segments {counted(summary['n'], 'object')} of "
        f"{summary['dataset']} ({summary['split']}) with {backbone.name}, "
        f"{counted(clicks, 'click')} each. Each click is the "
        "innermost pixel of the widest error region; IoU at image size."
        + " The model looks at each object again in a window around its mask."
        * settings["zoom"],
    )
    page.cards(_headline(summary))
    page.heading("mIoU over clicks")
    page.plot(curve_file, "mean IoU over number of clicks")
    columns, table = _table(summary)
    page.table(columns, table)
    page.text(
        "NoC85, NoC90: mean number of clicks until the IoU reaches 0.85 or 0.90; an object that "
        f"never does counts as {clicks}. NoF90: number of objects that never reach 0.90. "
        "Box: from the box of the object instead of clicks, without zoom. "
        "Milliseconds per click: model time, with encoding shared over the clicks, in batches of "
        f"{settings['batch_size']} on {summary['device']}."
    )
    if grabcut:
        page.text(
            f"cv2.grabCut gets {backbone.name}'s clicks, which are placed on {backbone.name}'s "
            f"errors, not its own. It runs on images of at most {LONGEST_SIDE} pixels a side and "
            "starts from its previous mask at every click. Its column and the next cover the same "
            f"{counted(grabcut['n'], 'object')} and at most "
            f"{counted(grabcut['clicks'], 'click')}."
        )
    if settings["pictures"]:
        page.heading("Objects from best to worst")
        page.text(
            "Evenly spaced by rank, not hand-picked. White: the object. Blue: the mask. Green: "
            "positive clicks. Red: negative clicks."
        )
        folder = out / "pictures"
        folder.mkdir(exist_ok=True)
        shown = [r for r in results if r.baseline] or results
        for rank, result in _spread(shown, settings["pictures"]):
            frames = _frames(backbone, samples, result, settings["zoom"])
            name = safe_name(f"{rank:03d}_{result.item.source}_{result.item.instance}")
            save_image(folder / f"{name}.png", frames)
            caption = f"{rank} of {len(shown)}: {result.item.category}, {result.item.source}"
            page.photograph(frames, caption)
    heading = f"interactive: {backbone.name} on {summary['dataset']}"
    page.finish(files, settings, heading, columns, table)


def _checkpoints(clicks: int) -> list[int]:
    return [k for k in (1, 2, 3, 5, 10, 20) if k <= clicks]


def _headline(summary: dict[str, Any]) -> dict[str, str]:
    curve = summary["miou_at_k"]
    cards = {f"mIoU@{k}": f"{curve[k - 1]:.3f}" for k in _checkpoints(len(curve)) if k != 2}
    cards |= {name: f"{summary[name.lower()]:.2f}" for name in ("NoC85", "NoC90")}
    cards["mIoU, box"] = f"{summary['miou_box']:.3f}"
    return cards | {"ms per click": f"{summary['ms_per_click']:.1f}", "objects": str(summary["n"])}


def _table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows: a column per method, a row per number."""
    methods = {summary["backbone"]: summary}
    if summary["grabcut"]:
        grabcut = summary["grabcut"]
        methods["grabCut"] = grabcut
        methods[f"{summary['backbone']}, those objects"] = grabcut["backbone_on_same_objects"]
    rows = [["objects", *(str(m["n"]) for m in methods.values())]]
    for k in _checkpoints(summary["clicks"]):
        curves = (m["miou_at_k"] for m in methods.values())
        rows.append([f"mIoU@{k}", *(f"{c[k - 1]:.3f}" if k <= len(c) else "" for c in curves)])
    rows.append(["mIoU, box", f"{summary['miou_box']:.3f}", *[""] * (len(methods) - 1)])
    for name in ("NoC85", "NoC90"):
        rows.append([name, *(f"{m[name.lower()]:.2f}" for m in methods.values())])
    rows.append(["NoF90", *(str(m["nof90"]) for m in methods.values())])
    rows.append(["maximum clicks", *(str(len(m["miou_at_k"])) for m in methods.values())])
    rows.append(["ms per click", *(f"{m['ms_per_click']:.1f}" for m in methods.values())])
    return ["", *methods], rows


def _curve(summary: dict[str, Any]) -> Any:
    figure, axes = new_plot()

    def line(values: Sequence[float], label: str, colour: str, style: str = "-") -> None:
        axes.plot(range(1, len(values) + 1), values, style, marker="o", ms=4, color=colour)
        axes.lines[-1].set_label(label)

    line(
        summary["miou_at_k"],
        f"{summary['backbone']} ({counted(summary['n'], 'object')})",
        report.BLUE,
    )
    grabcut = summary["grabcut"]
    if grabcut:
        if grabcut["n"] != summary["n"]:
            same = grabcut["backbone_on_same_objects"]["miou_at_k"]
            line(same, f"{summary['backbone']} ({grabcut['n']} of them)", report.BLUE, ":")
        line(grabcut["miou_at_k"], f"grabCut, same clicks ({grabcut['n']})", report.ORANGE)
    axes.set(xlabel="clicks", ylabel="mean IoU", ylim=(0, 1), xlim=(0.5, summary["clicks"] + 0.5))
    axes.set_xticks(range(1, summary["clicks"] + 1, 1 + summary["clicks"] // 25))
    axes.legend(frameon=False)
    return figure


def _spread(results: Sequence[Result], count: int) -> list[tuple[int, Result]]:
    """Return objects evenly spaced by their IoU after five clicks, with their rank (1: best)."""
    clicks = min(max(_SHOWN_CLICKS), len(results[0].ious))
    ranked = sorted(results, key=lambda r: -r.ious[clicks - 1])
    ranks = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
    return [(rank + 1, ranked[rank]) for rank in ranks.tolist()]


def _frames(
    backbone: Backbone, samples: SampleCache, result: Result, zoom: bool = False
) -> np.ndarray:
    """Draw the masks after one, three and five clicks and grabCut's mask, side by side."""
    target = target_of(samples[result.item.image], result.item)
    shown: list[tuple[str, np.ndarray, list[Click], float]] = []
    for count in (k for k in _SHOWN_CLICKS if k <= len(result.ious)):
        session = click_out(backbone, [target], count, zoom=zoom)[0]
        title = f"{counted(count, 'click')}"
        shown.append((title, session.mask, session.clicks, session.ious[-1]))
    if result.baseline:
        clicks = result.clicks[: len(result.baseline)]
        grabcut = GrabCut(target.image)
        mask = [grabcut.cut(clicks[:count]) for count in range(1, len(clicks) + 1)][-1]
        shown.append(
            (f"grabCut, {counted(len(clicks), 'click')}", mask, clicks, result.baseline[-1])
        )
    window = _window(target, [click for _, _, clicks, _ in shown for click in clicks])
    top, left = (side.start for side in window)
    return report.side_by_side(
        [
            draw_episode(
                target.image[window],
                mask[window],
                [(x - left, y - top, positive) for x, y, positive in clicks],
                target=target.mask[window],
                caption=f"{title}   IoU {overlap:.2f}",
                height=_FRAME_HEIGHT,
            )
            for title, mask, clicks, overlap in shown
        ]
    )


def _window(target: Target, clicks: Sequence[Click]) -> tuple[slice, slice]:
    """Return rows and columns of a window around an object and its clicks."""
    ys, xs = np.nonzero(target.mask)
    lows = min(ys.min(), *(c.y for c in clicks)), min(xs.min(), *(c.x for c in clicks))
    highs = max(ys.max(), *(c.y for c in clicks)), max(xs.max(), *(c.x for c in clicks))
    extent = max(high - low for low, high in zip(lows, highs, strict=True))
    # Margins of half the extent, and a minimum size that can still be looked at.
    half = max(extent, 48)
    return tuple(
        slice(int(max(0, (low + high) // 2 - half)), int(min(size, (low + high) // 2 + half)))
        for low, high, size in zip(lows, highs, target.mask.shape, strict=True)
    )  # type: ignore[return-value]


def object_rows(results: Sequence[Result], baseline_clicks: int) -> list[dict[str, Any]]:
    """Return one row per object for the CSV."""
    rows = []
    for r in results:
        ious = np.array([r.ious])
        row: dict[str, Any] = {
            "source": r.item.source,
            "instance": r.item.instance,
            "category": r.item.category,
            "noc85": number_of_clicks(ious, 0.85)[0],
            "noc90": number_of_clicks(ious, 0.90)[0],
        }
        row["box_iou"] = r.box_iou
        row |= {f"iou@{k}": value for k, value in enumerate(r.ious, start=1)}
        if baseline_clicks:
            padded = r.baseline + [None] * (baseline_clicks - len(r.baseline))
            row |= {f"grabcut_iou@{k}": value for k, value in enumerate(padded, start=1)}
        marks = (f"{'+' if c.positive else '-'}({c.x} {c.y})" for c in r.clicks)
        rows.append(row | {"clicks": " ".join(marks)})
    return rows
