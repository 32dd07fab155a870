"""Plots of results; matplotlib is imported on first use."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from sam_gym.utils.files import write_atomic
from sam_gym.utils.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colour of ticks and secondary lines.
MUTED = "#68727e"


def new_plot(width: float = 9.0, height: float = 4.2) -> tuple[Figure, Axes]:
    """Return a matplotlib figure with one pair of axes, without a window system."""
    figure, (axes,) = new_panels(1, width, height)
    return figure, axes


def new_panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure like that of `new_plot`, with several axes side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False, gridspec_kw={"wspace": 0.08})[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=MUTED)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    return figure, panels


def plot_matrix(
    path: Path,
    matrix: ArrayLike,
    names: Sequence[str],
    title: str,
    score: str = "mean IoU",
    row: str | None = None,
) -> Path:
    """Draw the scores of all stages and domains as a heat map.

    A line separates the domains not yet learned at a stage, on its right.

    Args:
        path: of the PNG.
        matrix: float (stages, domains) in [0, 1], in order of learning.
        names: of the domains.
        title: above the map.
        score: name of the score.
        row: name of the only row of a model that does not learn the domains in turn; None: one row
            per learned domain.
    """
    from matplotlib.figure import Figure

    scores = np.asarray(matrix, np.float64)
    stages, domains = scores.shape
    if domains != len(names):
        raise ValueError(f"Expected a name for each of {domains} domains, got {len(names)}.")
    names, title = [literal(name) for name in names], literal(title)
    side = 0.62
    figure = Figure(figsize=(2.8 + side * domains, 2.0 + side * stages), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(scores, cmap="viridis", vmin=0.0, vmax=1.0)
    for stage, domain in np.ndindex(stages, domains):
        value = scores[stage, domain]
        style: dict[str, Any] = {
            "color": "white" if value < 0.6 else "black",
            "weight": "bold" if row is None and stage == domain else "normal",
        }
        axes.text(domain, stage, f"{value:.2f}", ha="center", va="center", size=9, **style)
    axes.set_xticks(range(domains), names, rotation=40, ha="right")
    axes.set(xlabel="evaluated on", title=title)
    if row is None:
        steps = np.arange(min(stages, domains) + 1) - 0.5
        axes.autoscale(False)
        axes.plot(np.repeat(steps[1:], 2), np.repeat(steps, 2)[1:-1], color="white", lw=2)
        axes.set_yticks(range(stages), names[:stages])
        axes.set_ylabel("after learning")
    else:
        axes.set_yticks(range(stages), [row])
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label=score, fraction=0.05, shrink=0.9)
    return save_figure(path, figure)


def literal(text: str) -> str:
    """Return a name as matplotlib takes it: dollar signs begin no formula, on one line."""
    return printable(text).replace("$", r"\$")


def save_figure(path: Path, figure: Figure) -> Path:
    """Write a figure as PNG, including legends outside of its axes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    return write_atomic(path, buffer.getvalue())
