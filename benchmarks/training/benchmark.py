"""`training`: where the time of a training run goes, in this checkout and in another one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from benchmarks import report
from benchmarks.checkouts import OTHER, OURS, check_imported, checkouts_of, environment_of
from benchmarks.options import OutputOptions
from benchmarks.training import phases
from sam_gym.backbones.spec import backbone_help
from sam_gym.metrics.masks import mean_and_ci95
from sam_gym.utils.fields import documented
from sam_gym.utils.plots import new_plot, save_figure
from sam_gym.utils.provenance import commit_of, provenance
from sam_gym.utils.settings import Count, Natural, Seed, check_settings

#: What the last line of a command begins with after a wrong input.
_WRONG = "error: "
#: Options that train_ppo has under the same name.
_PASSED = (
    *("env", "policy", "backbone", "total_timesteps", "train_images", "num_envs"),
    *("final_episodes", "eval_episodes"),
)
#: Colours of the phases, in the order of `phases.PHASES`.
_COLOURS = ("#1e78c8", "#7fb2e0", "#2e8b57", "#a9d3b5", "#e08a1e", "#b04a9a", "#c0392b", "#c5cad0")


@documented
@dataclass(frozen=True, kw_only=True)
class TrainingBenchmarkConfig(OutputOptions):
    """Profile `python -m agents.train_ppo`, alone or against another checkout, run by run in turn.

    Each run is a process of its own. Runs of both checkouts alternate, so that load of the machine
    affects both. Every repeat has a seed of its own, the same in both.
    """

    out: str = "runs/training"
    """Folder for results.json, phases.csv, phases.png and report.html."""
    against: str | None = None
    """Folder of another checkout of this project, for example of an older commit (git worktree add
    PATH COMMIT)."""
    env: str = "SamSeg-v0"
    """Environment id: SamSeg-v0, SamContinual-v0, ..."""
    policy: str | None = None
    """Policy name (None: the default of each checkout, as of all options below)."""
    backbone: Annotated[str | None, tyro.conf.arg(help=backbone_help("SAM to prompt"))] = None
    total_timesteps: Count | None = None
    """Environment steps of each run."""
    train_images: Count | None = None
    """Number of different procedural images to train on."""
    num_envs: Count | None = None
    """Number of sub-environments."""
    final_episodes: Count | None = None
    """Episodes of the final evaluation, for the agent and for each baseline."""
    eval_episodes: Count | None = None
    """Episodes of each evaluation on the validation split during training."""
    repeats: Count = 1
    """Runs of each checkout."""
    threads: Natural = 0
    """CPU threads of each run (0: as many as the machine decides)."""
    seed: Seed = 0
    """Seed of the first run."""


def run(config: TrainingBenchmarkConfig) -> dict[str, Any]:
    """Run the benchmark and write its report.

    Raises:
        ValueError: an option is wrong.
        RuntimeError: a run failed.
    """
    check_settings(config)
    checkouts = checkouts_of(config.against)
    out = report.output_folder(config.out, config.overwrite, pictures=("phases.png",))
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in checkouts}
    for repeat in range(config.repeats):
        # The order alternates too: whoever comes second finds files in memory. An older checkout
        # comes first: it may not know an option.
        for side in list(checkouts)[:: 2 * (repeat % 2) - 1]:
            print(f"Run {repeat + 1} of {config.repeats}: {checkouts[side]}", flush=True)
            own = _train(config, checkouts[side], config.seed + repeat)
            print(
                f"  {own['total']:.0f} s, mean IoU {own['mean_iou']:.3f}: {_longest(own)}",
                flush=True,
            )
            runs[side].append(own)
    summary = {
        "benchmark": "training",
        "sides": {side: _summary(own) for side, own in runs.items()},
        "runs": runs,
    } | provenance(config)
    if config.against is not None:
        pairs = zip(runs[OURS], runs[OTHER], strict=True)
        summary["ratios"] = [ours["total"] / other["total"] for ours, other in pairs]
        summary["ratio"] = float(np.median(summary["ratios"]))
    _write(summary, out)
    return summary


def _longest(run: dict[str, Any], count: int = 5) -> str:
    """Return the longest phases of a run as text."""
    seconds = {
        f"{phase} ({stage})": own
        for stage, parts in run["seconds"].items()
        for phase, own in parts.items()
    }
    longest = sorted(seconds, key=seconds.__getitem__, reverse=True)[:count]
    return ", ".join(f"{name} {seconds[name]:.0f} s" for name in longest)


def _train(config: TrainingBenchmarkConfig, checkout: Path, seed: int) -> dict[str, Any]:
    """Train in a process of its own; return what `phases.main` writes, and the results."""
    environment = environment_of(checkout)
    if config.threads:
        environment["OMP_NUM_THREADS"] = str(config.threads)
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / "seconds.json"
        options = {name: getattr(config, name) for name in _PASSED} | {"seed": seed}
        command = [sys.executable, phases.__file__, str(written), "--out", f"{scratch}/run"]
        for name, value in options.items():
            command += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
        *_, last = done.stderr.splitlines() or [""]
        if done.returncode == 1 and last.startswith(_WRONG):
            raise ValueError(f"{checkout}: {last.removeprefix(_WRONG)}")
        if done.returncode == 2:  # a command line that it does not understand, in a box
            words = re.sub(r"[^\x20-\x7e]", " ", done.stderr).split()
            raise ValueError(f"{checkout}: {' '.join(words)}")
        if done.returncode:
            raise RuntimeError(f"Training in {checkout} failed:\n{done.stderr[-4000:]}")
        content: dict[str, Any] = json.loads(written.read_text())
        results = json.loads((Path(scratch) / "run" / "results.json").read_text())
    check_imported(content["checkout"], checkout)
    return content | {
        "commit": commit_of(checkout),
        "mean_iou": results["agent"]["mean_iou"],
        "gap_closed": results["gap_closed"],
    }


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return medians over the runs of one checkout, by stage and phase, and the results."""
    stages = {stage: None for run in runs for stage in run["seconds"]}
    seconds = {
        stage: {
            phase: float(np.median([run["seconds"].get(stage, {}).get(phase, 0.0) for run in runs]))
            for phase in (*phases.PHASES, phases.REST)
        }
        for stage in stages
    }
    mean, half = mean_and_ci95(np.array([run["mean_iou"] for run in runs]))
    gaps = [run["gap_closed"] for run in runs]
    return {
        "checkout": runs[0]["checkout"],
        "commit": runs[0]["commit"],
        "total": float(np.median([run["total"] for run in runs])),
        "peak_mib": float(np.median([run["peak_mib"] for run in runs])),
        "mean_iou": mean,
        "ci95": half,
        "gap_closed": None if None in gaps else float(np.mean(gaps)),
        "seconds": seconds,
    }


# Report ------------------------------------------------------------------------------------------


def _rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row per stage and phase, with the seconds and the share of each side."""
    sides = summary["sides"]
    stages = [*phases.STAGES, phases.REST]
    rows = []
    for stage in stages:
        for phase in (*phases.PHASES, phases.REST):
            row: dict[str, Any] = {"stage": stage, "phase": phase}
            for side, own in sides.items():
                seconds = own["seconds"].get(stage, {}).get(phase, 0.0)
                row |= {f"{side}_seconds": seconds, f"{side}_share": seconds / own["total"]}
            if any(row[f"{side}_share"] >= 0.0005 for side in sides):
                rows.append(row)
    return rows


def phase_table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return columns and cells of the seconds and shares of all stages and phases."""
    columns = {"stage": "{stage}", "phase": "{phase}"}
    for side in summary["sides"]:
        columns[f"{side}, s"] = f"{{{side}_seconds:.1f}}"
        columns[f"share, {side}"] = f"{{{side}_share:.1%}}"
    names, cells = report.formatted(_rows(summary), columns)
    totals = [f"{own['total']:.1f}" for own in summary["sides"].values()]
    cells.append(["all", "", *(cell for total in totals for cell in (total, ""))])
    return names, cells


def _write(summary: dict[str, Any], out: Path) -> None:
    sides, settings = summary["sides"], summary["settings"]
    files = report.write_results(out, summary, "phases.csv", _rows(summary))
    names, cells = phase_table(summary)
    files.append(_plot(sides, out / "phases.png"))
    page = report.Page(
        "Time of a training run",
        f"Runs of agents.train_ppo on {settings['env']}, CPU threads: "
        f"{settings['threads'] or summary['threads']}; {report.over_runs(settings['repeats'])}.",
    )
    cards = {f"seconds, {side}": f"{own['total']:.0f}" for side, own in sides.items()}
    cards |= {f"mean IoU, {side}": f"{own['mean_iou']:.3f}" for side, own in sides.items()}
    cards |= {f"peak memory, {side}": f"{own['peak_mib']:.0f} MiB" for side, own in sides.items()}
    if "ratio" in summary:
        cards["time, this / other"] = f"{summary['ratio']:.2f}"
    page.cards(cards)
    page.plot(out / "phases.png", "Seconds of each phase")
    page.table(names, cells)
    page.text(
        "Seconds of each phase are exclusive: a step does not count its decode. Seconds are medians"
        " over the runs."
    )
    for side, own in sides.items():
        page.text(f"{side}: {own['checkout']}, commit {own['commit'] or 'unknown'}")
    page.finish(files, settings, "training, seconds by phase", names, cells)
    if "ratio" in summary:
        print(f"time, this / other: {summary['ratio']:.3f}")


def _plot(sides: dict[str, Any], path: Path) -> Path:
    """Draw a bar for each stage and side, divided into phases."""
    bars = [
        (f"{stage}, {side}", own["seconds"][stage])
        for stage in (*phases.STAGES, phases.REST)
        for side, own in sides.items()
        if stage in own["seconds"]
    ]
    figure, axes = new_plot(height=1.2 + 0.45 * len(bars))
    left = np.zeros(len(bars))
    for phase, colour in zip((*phases.PHASES, phases.REST), _COLOURS, strict=True):
        widths = np.array([seconds[phase] for _, seconds in bars])
        axes.barh([name for name, _ in bars], widths, left=left, color=colour, label=phase)
        left += widths
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    return save_figure(path, figure)
