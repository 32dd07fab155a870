"""Write the report of `throughput`: results.json, repeats.csv, plots and report.html."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import report
from sam_gym.utils.cli import print_table
from sam_gym.utils.plots import MUTED, new_panels, new_plot, save_figure
from sam_gym.utils.text import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Side -> colour.
_SIDES = {"vector": report.BLUE, "reference": "#8a6fb3", "scalar": report.ORANGE}
#: Kind of images -> line style.
_KINDS = {"cached": "-", "fresh": "--"}
#: Phase of a step -> colour and description.
_PHASES = {
    "encode": (report.BLUE, "image encoder, with resizing"),
    "decode": ("#7db8e8", "prompt encoder and mask decoder"),
    "samples": (report.ORANGE, "waiting for prefetched images and targets"),
    "store": ("#efb666", "looking up and gathering embeddings"),
    "clicks": ("#c9603f", "mapping actions to clicks"),
    "score": ("#8a6fb3", "IoU and reward"),
    "observation": ("#5a9e6f", "observations and infos"),
    "rest": ("#b8bec6", "everything else"),
}
#: Column of the table of speeds -> format of its cells.
_COLUMNS = {
    "envs": "{envs}",
    "images": "{kind}",
    "vector, steps/s": "{vector_steps_per_second:.0f}",
    "reference": "{reference_steps_per_second:.0f}",
    "scalar loop": "{scalar_steps_per_second:.0f}",
    "vs reference": "{speedup_vs_reference:.2f}x",
    "vs scalar": "{speedup_vs_scalar:.2f}x",
    "outside of the model": "{overhead_share:.1%}",
}
#: Column of the table of both builds -> format of its cells.
_BUILD_COLUMNS = {
    "envs": "{envs}",
    "images": "{kind}",
    "this, steps/s": "{this_steps_per_second:.0f}",
    "other": "{other_steps_per_second:.0f}",
    "this / other": "{ratio:.2f}x",
    "this, peak MiB": "{this_peak_mib:.0f}",
    "other, MiB": "{other_peak_mib:.0f}",
    "largest difference of a reward": "{max_reward_difference:.2g}",
}


def write_report(summary: dict[str, Any], rows: list[dict[str, Any]], out: Path) -> None:
    """Write all files and print the table of speeds.

    Args:
        summary: content of results.json.
        rows: content of repeats.csv.
        out: an existing folder.
    """
    files = report.write_results(out, summary, "repeats.csv", rows)
    speed_file = save_figure(out / "speed.png", _speed_plot(summary))
    settings = summary["settings"]
    middle = str(settings["num_envs"][len(settings["num_envs"]) // 2])
    measured = summary["by_num_envs"][middle]
    phase_file = save_figure(out / "phases.png", _phase_plot(measured))
    growth_file = save_figure(out / "growth.png", _growth_plot(summary))
    columns, table = speed_table(summary)

    page = report.Page(
        f"Throughput of SamSeg-v0 with {summary['backbone']}",
        f"One vector environment against one SamPredictor per environment, on {summary['device']}, "
        f"CPU threads: {summary['threads']}. Same weights, images and actions.",
    )
    page.cards(
        {
            f"env steps per second, {counted(int(middle), 'env')}": (
                f"{measured['cached']['vector_steps_per_second']:.0f}"
            ),
            "speed-up over reference, cached": f"{measured['cached']['speedup_vs_reference']:.1f}",
            "speed-up over reference, fresh": f"{measured['fresh']['speedup_vs_reference']:.1f}",
            "smaller rollouts": f"{summary['rollout_bytes']['ratio']:.0f}x",
        }
    )
    page.table(columns, table)
    page.text(
        "Reference: one SamPredictor per environment under SyncVectorEnv, as in research code; it "
        "encodes at every reset, copies the embedding into every observation, and scores at image "
        "size. Scalar: a Python loop over scalar environments of this package. Cached: images "
        "encoded before, as most are in training. Fresh: new images, so that every episode of "
        f"{counted(settings['max_steps'], 'step')} includes generating and encoding one. "
        "The step that ends an episode includes its reset. Medians of "
        f"{counted(settings['repeats'], 'repeat')} of "
        f"{counted(settings['steps'], 'step')}."
    )
    page.plot(speed_file, "environment steps per second by number of environments")
    if summary["builds"] is not None:
        _write_builds(page, summary["builds"])
    page.heading("Growth of the step time")
    page.plot(growth_file, "milliseconds per vector step by environments and by images seen")
    page.text(_growth_caption(summary))
    environments = counted(int(middle), "environment")
    page.heading(f"Time of a vector step of {environments} by phase")
    page.plot(phase_file, "milliseconds per vector step by phase")
    page.table(
        ("phase", "cached, ms", "fresh, ms"),
        [
            (f"{phase}: {what}", *(f"{measured[k]['phases_ms'][phase]:.2f}" for k in _KINDS))
            for phase, (_, what) in _PHASES.items()
        ],
    )
    page.heading("Model and machine")
    page.table(("", ""), _machine_table(summary))
    page.finish(files, settings, f"throughput: {summary['backbone']}", columns, table)


def _write_builds(page: report.Page, builds: dict[str, Any]) -> None:
    """Append the comparison with another checkout, and print its table."""
    table = build_table(builds)
    page.heading("This checkout and another one")
    page.table(*table)
    page.text(
        "The vector environments of both checkouts play the same actions in turn, each in a process"
        " of its own, whose peak memory it is. Medians over the repeats. Rewards of the same images"
        " and the same SAM differ by rounding only."
    )
    for side, own in builds["sides"].items():
        page.text(
            f"{side}: {own['checkout']}, commit {own['commit'] or 'unknown'}, {own['backbone']}"
        )
    print_table("throughput: both builds", *table)


def _rows(by_num_envs: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"envs": num_envs, "kind": kind} | measured[kind]
        for num_envs, measured in by_num_envs.items()
        for kind in _KINDS
    ]


def speed_table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return columns and cells of the speeds of all sides."""
    return report.formatted(_rows(summary["by_num_envs"]), _COLUMNS)


def build_table(builds: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return columns and cells of the comparison with another checkout."""
    return report.formatted(_rows(builds["by_num_envs"]), _BUILD_COLUMNS)


def _machine_table(summary: dict[str, Any]) -> list[tuple[str, str]]:
    encoder, decoder = summary["encoder"], summary["decoder"]
    rollout, vit_b = summary["rollout_bytes"], summary["rollout_bytes_vit_b"]
    return [
        ("encode, images per second", f"{encoder['images_per_second']:.1f}"),
        ("segment_anything, images per second", f"{encoder['plain_images_per_second']:.1f}"),
        (f"decode, ms per prompt of {decoder['prompts']}", f"{decoder['ms_per_prompt']:.3f}"),
        ("one click, ms", f"{decoder['click_latency_ms']:.2f}"),
        ("decode, fraction of the roofline", f"{decoder['fraction_of_roofline']:.1%}"),
        ("large matrix product, GFLOP/s", f"{decoder['matmul_gflop_per_second']:.0f}"),
        ("large copy, GB/s", f"{decoder['copy_gb_per_second']:.1f}"),
        ("rollout of 128 steps, full form, MiB", f"{rollout['full'] / 2**20:.1f}"),
        ("rollout of 128 steps, handle form, MiB", f"{rollout['handle'] / 2**20:.3f}"),
        ("the same at ViT-B size, full form, MiB", f"{vit_b['full'] / 2**20:.1f}"),
        ("the same at ViT-B size, handle form, MiB", f"{vit_b['handle'] / 2**20:.3f}"),
        ("full form over handle form, at ViT-B size", f"{vit_b['ratio']:.0f}x"),
        ("peak memory while playing, MiB", report.mib(summary["peak_memory_mib"])),
        *(
            (f"mask IoU with float32, {what} in {dtype}", f"{value:.4f}")
            for dtype, effect in summary["mask_iou_with_float32"].items()
            for what, value in effect.items()
        ),
    ]


def _growth_caption(summary: dict[str, Any]) -> str:
    sentences = [
        f"{kind.capitalize()} images: {fit['ms_per_env']:.2f} ms per additional environment, "
        f"linear fit with R² {fit['r_squared']:.4f}."
        for kind, fit in summary["linear_fit"].items()
        if fit is not None
    ]
    growth = summary["growth"]
    if growth is not None:
        sentences.append(
            f"Over {growth['images'][-1]} fresh images, of which the embedding store holds "
            f"{growth['capacity']}, the last quarter of the steps took "
            f"{growth['last_over_first']:.3f} times as long as the first."
        )
    return " ".join(sentences)


def _speed_plot(summary: dict[str, Any]) -> Figure:
    figure, axes = new_plot()
    sizes = _sizes(summary)
    for side, colour in _SIDES.items():
        for kind, dashes in _KINDS.items():
            speed = _series(summary, kind, f"{side}_steps_per_second")
            label = f"{side}, {kind}"
            axes.plot(sizes, speed, dashes, color=colour, marker="o", ms=4, label=label)
    axes.set(xscale="log", xlabel="environments", ylabel="env steps per second")
    axes.set_ylim(bottom=0)
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.minorticks_off()
    _legend_above(axes, columns=3)
    return figure


def _growth_plot(summary: dict[str, Any]) -> Figure:
    figure, (by_envs, by_images) = new_panels(2, width=11.0, height=3.8)
    sizes = np.array(_sizes(summary))
    for kind, colour in (("cached", report.BLUE), ("fresh", report.ORANGE)):
        times = _series(summary, kind, "vector_step_ms")
        by_envs.plot(sizes, times, "o", color=colour, ms=5, label=f"{kind} images")
        fit = summary["linear_fit"][kind]
        if fit is not None:
            line = fit["intercept_ms"] + fit["ms_per_env"] * sizes
            label = f"linear fit, R² {fit['r_squared']:.4f}"
            by_envs.plot(sizes, line, color=colour, lw=1, label=label)
    by_envs.set(xlabel="environments", ylabel="ms per vector step")
    _begin_at_zero(by_envs)
    _legend_above(by_envs, columns=2)

    growth = summary["growth"]
    if growth is None:
        by_images.set_axis_off()
        return figure
    label = f"{growth['num_envs']} environments, fresh images"
    by_images.plot(
        growth["images"], growth["step_ms"], "o-", color=report.ORANGE, ms=4, label=label
    )
    by_images.axvline(growth["capacity"], color=MUTED, lw=1, ls=":", label="first eviction")
    by_images.set(xlabel="images seen", ylabel="ms per vector step")
    _begin_at_zero(by_images)
    _legend_above(by_images, columns=2)
    return figure


def _phase_plot(measured: dict[str, Any]) -> Figure:
    figure, axes = new_plot(height=2.6)
    kinds = list(_KINDS)[::-1]  # a bar plot starts at the bottom
    left = np.zeros(len(kinds))
    for phase, (colour, _) in _PHASES.items():
        width = np.array([measured[kind]["phases_ms"][phase] for kind in kinds])
        axes.barh([f"{kind} images" for kind in kinds], width, 0.6, left, color=colour, label=phase)
        left += width
    axes.set_xlabel("milliseconds per vector step")
    _legend_above(axes, columns=4)
    return figure


def _sizes(summary: dict[str, Any]) -> list[int]:
    return [int(n) for n in summary["by_num_envs"]]


def _series(summary: dict[str, Any], kind: str, number: str) -> list[float]:
    """Return a number of all measurements of a kind, in the order of `_sizes`."""
    return [measured[kind][number] for measured in summary["by_num_envs"].values()]


def _begin_at_zero(axes: Axes) -> None:
    axes.margins(0.06, 0.1)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)


def _legend_above(axes: Axes, columns: int) -> None:
    axes.legend(frameon=False, ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1.0))
