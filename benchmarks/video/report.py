"""Write the report of `video`: numbers, J over time and moving overlays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from sam_gym.backbones.video.evaluation import Method
from sam_gym.data import VideoDataset
from sam_gym.metrics.video import ObjectScore
from sam_gym.utils.plots import new_plot, save_figure
from sam_gym.utils.render import draw_overlays, save_video
from sam_gym.utils.text import counted, safe_name

#: Parts of a video in the plot of J over time.
_PARTS = 10
_COLOURS = (report.BLUE, "#7db8e8", "#8a6fb3", "#b8bec6", report.ORANGE, "#5a9e6f")
_FRAME_HEIGHT = 240
Scores = Mapping[tuple[str, str], Mapping[int | None, Sequence[ObjectScore]]]


def write_report(
    out: Path,
    summary: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    scores: Scores,
    datasets: Mapping[int | None, VideoDataset],
    method: Method,
) -> None:
    """Write results.json, objects.csv, a plot, overlays and report.html, and print a table.

    Args:
        out: an existing folder.
        summary: content of results.json.
        rows: of objects.csv.
        scores: (method, prompt) -> seed -> scores of objects.
        datasets: the videos of each seed.
        method: the tracker with the first prompt, which tracks drawn videos again.
    """
    settings = summary["settings"]
    files = report.write_results(out, summary, "objects.csv", rows)
    page = report.Page(
        f"{summary['backbone']} on {summary['dataset']}: objects in videos",
        f"{counted(summary['rows'][0]['objects'], 'object')} in "
        f"{counted(summary['videos'], 'video')} of {summary['dataset']} "
        f"({summary['split']}), each prompted once, in the frame in which it is seen first. "
        f"Protocol {summary['protocol']}.",
    )
    page.cards(
        {
            f"J&F, {row['prompt']}": f"{row['J&F']:.3f}"
            for row in summary["rows"]
            if row["method"] == "tracker"
        }
    )
    columns, table = _table(summary["rows"])
    page.table(columns, table)
    runs = summary["rows"][0]["seeds"]
    page.text(
        f"Means over objects; {report.over_runs(runs)}. J: IoU. F: boundary measure. Recall: "
        "fraction of frames above 0.5. Decay: first quarter minus last quarter of the frames. "
        "Milliseconds per frame: all objects of a video, reading included."
    )
    if "gains" in summary:
        page.text(
            "mask copied: the first mask in all frames. previous mask and box: both go into "
            f"{summary['image_backbone']}, frame by frame. true box in every frame: an oracle, "
            f"which {summary['image_backbone']} turns into masks."
        )
        page.heading("Difference in J&F")
        page.table(*_gains(summary["gains"]))
        page.text("With 95% intervals, by bootstrap over videos.")
    page.heading("J over time")
    page.plot(save_figure(out / "time.png", _time_plot(scores)), "mean J by part of the video")
    shown = _spread(scores, settings["pictures"])
    if shown:
        page.heading("Videos from best to worst")
        page.text("Evenly spaced by rank, not hand-picked. White: the annotated masks.")
    for rank, count, seed, name in shown:
        dataset = datasets[seed]
        videos = (dataset[index] for index in range(len(dataset)))
        video = next(own for own in videos if own.name == name)
        masks = [found for _, found in method(video)]
        path = out / safe_name(f"overlay-{rank:03d}-{name}.gif")
        save_video(path, list(draw_overlays(video, masks, height=_FRAME_HEIGHT)), fps=8)
        page.animation(path, f"{rank} of {count}: {name}, prompt: {settings['prompts'][0]}")
    heading = f"video: {summary['backbone']} on {summary['dataset']}"
    page.finish(files, settings, heading, columns, table)


def _table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    columns = {"method": "{method}", "prompt": "{prompt}"}
    names = ("J&F", "J", "J recall", "J decay", "F", "F recall", "F decay")
    cells = []
    for row in rows:
        own = {"method": row["method"], "prompt": row["prompt"], "ms": f"{row['ms_per_frame']:.1f}"}
        for name in names:
            spread = f" ± {row[f'{name} std']:.3f}" if f"{name} std" in row else ""
            own[name] = f"{row[name]:.3f}{spread if name in ('J&F', 'J', 'F') else ''}"
        cells.append(own)
    columns |= {name: f"{{{name}}}" for name in names} | {"ms per frame": "{ms}"}
    return report.formatted(cells, columns)


def _with_bounds(gain: Mapping[str, Any]) -> str:
    if gain["low"] is None:  # of one video
        return f"{gain['J&F']:+.3f}"
    return f"{gain['J&F']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"


def _gains(gains: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    baselines = list(next(iter(gains.values())))
    rows = [
        [
            f"tracker, {kind}",
            *map(_with_bounds, own.values()),
        ]
        for kind, own in gains.items()
    ]
    return ["", *(f"minus {name}" for name in baselines)], rows


def _time_plot(scores: Scores) -> Any:
    """Plot mean J in equal parts of the scored frames of each object."""
    figure, axes = new_plot()
    for colour, ((name, kind), by_seed) in zip(_COLOURS, scores.items(), strict=False):
        own = [score.j for found in by_seed.values() for score in found]
        parts = [
            float(np.mean([values[int(part * len(values))] for values in own]))
            for part in np.arange(_PARTS) / _PARTS
        ]
        label = f"{name}, {kind}" if name == "tracker" else name
        style = "-" if name == "tracker" else "--"
        axes.plot(np.arange(_PARTS) / _PARTS, parts, style, color=colour, label=label)
    axes.set(xlabel="time, as a fraction of the scored frames", ylabel="mean J", ylim=(0, 1))
    axes.legend(frameon=False, ncols=2)
    return figure


def _spread(scores: Scores, count: int) -> list[tuple[int, int, int | None, str]]:
    """Return videos evenly spaced by J&F: rank (1: best), number of videos, seed and name."""
    values: dict[tuple[int | None, str], list[float]] = {}
    for seed, found in next(iter(scores.values())).items():
        for score in found:
            values.setdefault((seed, score.video), []).append(score.row()["J&F"])
    ranked = sorted(values, key=lambda key: -float(np.mean(values[key])))
    ranks = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
    return [(rank + 1, len(ranked), *ranked[rank]) for rank in ranks.tolist()]
