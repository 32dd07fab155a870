"""Tables of docs/results.md, from the files in docs/results.

Blocks of the page call these functions, and cog (cogapp) writes what they return:
`cog -r @docs/_site/cog.txt`. `python docs/_site/result_tables.py runs/NAME/results.json NAME` adds
a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from agents.sharing.run import without_folders
from benchmarks.report import formatted, markdown_table
from benchmarks.semantic.report import NUMBERS
from benchmarks.throughput.report import build_table, speed_table
from benchmarks.training.benchmark import phase_table
from benchmarks.video_speed.benchmark import case_table
from sam_gym.metrics.masks import mean_and_ci95, with_interval
from sam_gym.utils import cli
from sam_gym.utils.files import write_json
from sam_gym.utils.registry import check_choice

RESULTS = Path(__file__).parents[1] / "results"
_SHOWN_CLICKS = (1, 3, 5, 10, 20)
_OVER_SEEDS = "half-width of the 95% interval over seeds (Student's t)"
#: A path of one machine inside a string; "m/s", "a / b", "./a" and "hf://a" are none.
_MACHINE_PATH = re.compile(r"(?<![\w./~])~?/\w[^\",]*")
Table = tuple[Sequence[str], Sequence[Sequence[str]]]


# Blocks of the page ------------------------------------------------------------------------------


def training_runs(*names: str) -> str:
    """Return a table of runs of `train_ppo` on the same options: a row per seed, and the means.

    ±: over the episodes of a row; in the last row, over the seeds.
    """
    runs = [_read(name) for name in names]
    _check_seeds([run["config"] for run in runs], names)
    players = [key for key, own in runs[0].items() if isinstance(own, dict) and "mean_iou" in own]
    episodes = runs[0]["agent"]["episodes"]
    columns = ["seed"]
    for player in players:
        few = runs[0][player]["episodes"]
        title = {"no_search": "agent without search"}.get(player, player)
        columns.append(title if few == episodes else f"{title} ({few} episodes)")
    rows = [
        [
            str(run["config"]["seed"]),
            *(with_interval(run[player]["mean_iou"], run[player]["ci95"]) for player in players),
            _number(run["gap_closed"]),
        ]
        for run in runs
    ]
    note = f"Mean IoU over {episodes} episodes; ±: half-width of the 95% interval over them"
    if len(runs) > 1:
        means = [_over_seeds(run[player]["mean_iou"] for run in runs) for player in players]
        rows.append(["mean", *means, _over_seeds(run["gap_closed"] for run in runs)])
        note += ", in the last row over the seeds (Student's t)"
    return _block(([*columns, "gap closed"], rows), names, note)


def training_time(name: str, *columns: str) -> str:
    """Return two tables of `benchmarks.run training`: whole runs, and seconds by stage and phase.

    The latter may have some of its columns only.
    """
    results = _read(name, "training")
    sides = [
        own
        | {"side": side, "commit": _commit(own), "gap": _number(own["gap_closed"])}
        | {"iou": with_interval(own["mean_iou"], own["ci95"])}
        for side, own in results["sides"].items()
    ]
    titles = {
        **{"side": "{side}", "commit": "{commit}", "s": "{total:.0f}"},
        **{"peak memory, MiB": "{peak_mib:.0f}", "mean IoU": "{iou}", "gap closed": "{gap}"},
    }
    count, notes = results["settings"]["repeats"], []
    if "ratio" in results:
        notes.append(f"Time, this / other: **{results['ratio']:.2f}x**")
    if count > 1:
        notes.append(f"seconds are medians of {count} runs, ±: {_OVER_SEEDS}")
    by_phase = _block(_chosen(phase_table(results), columns), [name], "; ".join(notes), results)
    return f"{markdown_table(*formatted(sides, titles))}\n\n{by_phase}"


def throughput(name: str, *columns: str) -> str:
    """Return the table of speeds of `benchmarks.run throughput`, or some of its columns."""
    results = _read(name, "throughput")
    return _block(_chosen(speed_table(results), columns), [name], "", results)


def throughput_against(name: str, *columns: str) -> str:
    """Return the table of both builds of `benchmarks.run throughput --against`."""
    results = _read(name, "throughput")
    if (builds := results["builds"]) is None:
        raise ValueError(f"{name}.json was measured without --against.")
    note = "; ".join(
        f"{side}: commit {_commit(own)}, `{own['backbone']}`"
        for side, own in builds["sides"].items()
    )
    return _block(_chosen(build_table(builds), columns), [name], note, results)


def video_speed(name: str, *columns: str) -> str:
    """Return the table of `benchmarks.run video_speed`, or some of its columns."""
    results = _read(name, "video_speed")
    return _block(_chosen(case_table(results), columns), [name], "", results)


def interactive(*names: str) -> str:
    """Return a table of runs of `benchmarks.run interactive`: a row per run, one for grabCut."""
    runs = [_read(name, "interactive") for name in names]
    shown = [k for k in _SHOWN_CLICKS if any(k <= run["clicks"] for run in runs)]
    columns = ["data", "objects", "model", *(f"mIoU@{k}" for k in shown)]
    rows = []
    for run in runs:
        zoom = ", zoom" * run["settings"]["zoom"]
        methods = {f"`{run['backbone']}`{zoom}": run | {"box": f"{run['miou_box']:.3f}"}}
        if run["grabcut"]:
            methods["`cv2.grabCut`"] = run["grabcut"] | {"box": ""}
        for title, own in methods.items():
            curve = own["miou_at_k"]
            rows.append(
                [
                    *(f"`{run['dataset']}` {run['split']}", str(own["n"]), title),
                    *(f"{curve[k - 1]:.3f}" if k <= len(curve) else "" for k in shown),
                    *(f"{own['noc85']:.2f}", f"{own['noc90']:.2f}", str(own["nof90"]), own["box"]),
                ]
            )
    return _block(([*columns, "NoC85", "NoC90", "NoF90", "box"], rows), names, "", *runs)


def semantic(*names: str) -> str:
    """Return a table of runs of `benchmarks.run semantic`: a column per SAM and phase.

    Runs of one SAM differ by their seeds only; their cells are means with intervals.
    """
    runs = [_read(name, "semantic") for name in names]
    for backbone in dict.fromkeys(run["backbone"] for run in runs):
        own = {n: run for n, run in zip(names, runs, strict=True) if run["backbone"] == backbone}
        _check_seeds([run["settings"] for run in own.values()], list(own))
    columns: dict[str, list[dict[str, float | None]]] = {}
    for run in runs:
        phases = {"zero-shot": ("iou", run["zero_shot"])}
        phases |= {f"head `{name}`": (f"{name}_iou", own) for name, own in run["heads"].items()}
        for phase, (key, numbers) in phases.items():
            cells = {title: numbers.get(number) for number, title in NUMBERS.items()}
            cells |= {row["class"]: row.get(key) for row in run["classes"]}
            columns.setdefault(f"`{run['backbone']}`, {phase}", []).append(cells)
    titles = dict.fromkeys(title for own in columns.values() for title in own[0])
    rows = [
        [title, *(_over_seeds(cells.get(title) for cells in own) for own in columns.values())]
        for title in titles
    ]
    rows = [row for row in rows if any(row[1:])]
    several = any(len(own) > 1 for own in columns.values())
    return _block((["", *columns], rows), names, f"±: {_OVER_SEEDS}" * several, *runs)


def _block(table: Table, names: Iterable[str], note: str = "", *results: Mapping[str, Any]) -> str:
    """Return a table as Markdown, and a line on its numbers: the note, files, machine and torch."""
    source = [f"`{name}.json`" for name in names]
    for run in results:
        threads = f"{run['threads']} thread{'s' * (run['threads'] > 1)}"
        source.append(f"{run['device']}, {threads}, " if "device" in run else f"{threads}, ")
        source[-1] += f"torch {run['versions']['torch']}"
    text = f"{note}. From " if note else "From "
    return f"{markdown_table(*table)}\n\n{text}{', '.join(dict.fromkeys(source))}."


def _chosen(table: Table, columns: Sequence[str]) -> Table:
    """Return some columns of a table, or all if none are named."""
    names, rows = table
    for column in columns:
        check_choice("column", column, names)
    places = [names.index(column) for column in columns or names]
    return [names[place] for place in places], [[row[place] for place in places] for row in rows]


def _over_seeds(values: Iterable[float | None]) -> str:
    """Return the mean as text, with the interval over several values; empty if one is missing."""
    numbers = list(values)
    known = [number for number in numbers if number is not None]
    if len(known) < len(numbers):
        return ""
    return _number(known[0]) if len(known) == 1 else with_interval(*mean_and_ci95(np.array(known)))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _commit(side: Mapping[str, Any]) -> str:
    """Return the short commit of a checkout, with "-dirty" where it had other changes."""
    return re.sub(r"(?<=^.{7})[0-9a-f]+", "", side["commit"] or "unknown")


# Files -------------------------------------------------------------------------------------------


def _read(name: str, benchmark: str | None = None) -> dict[str, Any]:
    """Read a file of docs/results; raises `ValueError` unless it is one of this benchmark."""
    check_choice("file of docs/results", name, [path.stem for path in sorted(RESULTS.glob("*"))])
    results: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    if results.get("benchmark") != benchmark:
        found = results.get("benchmark", "no benchmark")
        raise ValueError(f"{name}.json: of {found}, not of {benchmark or 'train_ppo'}.")
    return results


def _check_seeds(options: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Raise `ValueError` unless runs differ in their seeds, and in no option that matters."""
    for name, own in zip(names, options, strict=True):
        changed = {key for key in options[0].keys() | own if options[0].get(key) != own.get(key)}
        if different := sorted(changed - {"seed", "out", "overwrite", "resume", "pictures"}):
            raise ValueError(f"{names[0]} and {name} differ in {', '.join(different)}.")
    seeds = [own["seed"] for own in options]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{', '.join(names)}: their seeds are {seeds}; each needs its own.")


@dataclass(frozen=True)
class KeepConfig:
    """Copy a results.json to docs/results/NAME.json; absolute paths in it keep their last part."""

    results: Annotated[Path, tyro.conf.Positional]
    """A results.json, as a command wrote it."""
    name: Annotated[str, tyro.conf.Positional]
    """Name of the copy."""


def main(args: Sequence[str] | None = None) -> Path:
    """Run the command line."""
    config = cli.parse(KeepConfig, "python docs/_site/result_tables.py", args)
    results = without_folders(json.loads(config.results.read_text()))
    if left := _MACHINE_PATH.findall(json.dumps(results)):
        raise ValueError(
            f"{config.results} names folders of this machine: {', '.join(left)}. Run the command "
            "again with paths relative to the current folder."
        )
    path = write_json(RESULTS / f"{config.name}.json", results)
    print(f"Wrote {path}. Call it in docs/results.md, and run: cog -r @docs/_site/cog.txt")
    return path


if __name__ == "__main__":
    cli.run(main)
