"""Plots of a training run and its agents; matplotlib is imported by the first one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sam_gym.utils.plots import new_plot, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {
    "agent": "#1464b4",
    "no_search": "#7fb2e5",
    "random": "#999999",
    "center": "#c08040",
    "confident": "#b04a9a",
    "greedy": "#c08040",
    "grid": "#b04a9a",
    "oracle": "#2e8b57",
}


def plot_learning_curve(
    path: Path,
    train: list[tuple[int, float]],
    evaluations: list[tuple[int, float]],
    baselines: Mapping[str, float],
    split: str,
) -> Path:
    """Plot the mean IoU over environment steps, with a line for each baseline.

    Args:
        path: of the PNG.
        train: environment steps and mean IoU of recent training episodes.
        evaluations: environment steps and mean IoU of held-out episodes.
        baselines: baseline -> mean IoU of the same held-out episodes.
        split: of the held-out episodes.
    """
    figure, axes = new_plot()
    axes.set_ylim(0, 1)
    if train:
        axes.plot(*zip(*train, strict=True), color="#9ec5e8", lw=1.5, label="training (exploring)")
    if evaluations:
        steps, values = zip(*evaluations, strict=True)
        axes.plot(
            steps, values, "o-", color=_colour("agent"), lw=2.5, ms=4, label=f"agent, {split}"
        )
    if baselines:
        axes.plot([], [], "--", color="black", lw=1.2, label=f"baselines, {split}")
    for name, value in baselines.items():
        axes.axhline(value, color=_colour(name), ls="--", lw=1.2)
    _name_at_the_right(axes, baselines)
    axes.set(xlabel="environment steps", ylabel="mean IoU at the end of an episode")
    if train or evaluations:
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, frameon=False)
    return save_figure(path, figure)


def plot_iou_after_steps(path: Path, curves: Mapping[str, Sequence[float]]) -> Path:
    """Plot the mean IoU of each agent after each step of its episodes.

    Args:
        path: of the PNG.
        curves: agent -> mean IoU after each step. Shorter curves keep their last value; a single
            value is a horizontal line.
    """
    from matplotlib.ticker import MaxNLocator

    longest = max(map(len, curves.values()))
    figure, axes = new_plot()
    axes.set_ylim(0, 1)
    for name, curve in curves.items():
        if len(curve) == 1:
            axes.axhline(curve[0], color=_colour(name), ls="--", lw=1.2)
        else:
            held = [*curve, *[curve[-1]] * (longest - len(curve))]
            width = 2.5 if name == "agent" else 1.5
            axes.plot(range(1, longest + 1), held, color=_colour(name), lw=width)
    _name_at_the_right(axes, {name: curve[-1] for name, curve in curves.items()})
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="step of an episode", ylabel="mean IoU after it")
    return save_figure(path, figure)


def _colour(name: str) -> str:
    return _COLOURS.get(name, "black")


def _name_at_the_right(axes: Axes, heights: Mapping[str, float]) -> None:
    """Label the curves at the right edge, without overlaps."""
    height = -1.0
    for name, value in sorted(heights.items(), key=lambda item: item[1]):
        height = max(value, height + 0.04)
        axes.annotate(
            name,
            (1.0, height),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=_colour(name),
        )
