"""`agents`: how well trained agents do, over seeds, on words seen and unseen."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from agents.baselines.base import Agent
from agents.baselines.click import BASELINES
from agents.evaluate import PolicyAgent, evaluate
from benchmarks import report
from benchmarks.options import require_at_least
from sam_gym.envs.click import SamSegConfig
from sam_gym.metrics.masks import mean_and_ci95, with_interval
from sam_gym.utils.files import write_csv, write_json
from sam_gym.utils.plots import save_figure
from sam_gym.utils.progress import ProgressBar
from sam_gym.version import __version__

#: What stands beside the agents, and its colour.
_REFERENCES = {"random": "#999999", "oracle": "#2e8b57"}
#: Restrictions of the training images, which held-out images do not have.
_TRAINING_ONLY = ("categories", "length")


@dataclass
class Config:
    """Compare trained agents over seeds, beside random clicks and the standard click rule.

    All play the same held-out episodes. Where a group of words is given, one of them is asked for;
    the images hold other things too.
    """

    run: tyro.conf.UseAppendAction[list[str]]
    """NAME=FOLDER[,FOLDER...]: runs of train_ppo of one kind of agent, a seed each."""
    words: tyro.conf.UseAppendAction[list[str]]
    """NAME=WORD[,WORD...]: a group of categories that are asked for."""
    out: str = "runs/agents"
    """Folder for results.json, agents.csv, a plot and report.html."""
    split: str = "test"
    """Split to play on."""
    episodes: int = 512
    """Episodes of each run and group."""
    seed: int = 1000
    """Seed of the episodes."""
    iou_target: float | None = None
    """Play once more until this IoU, and count the clicks: those until it, or all of an episode."""
    device: str = "auto"
    """Where the agents run: auto (CUDA, then MPS, then CPU), cpu, mps, cuda, cuda:N."""


@dataclass(frozen=True)
class Row:
    """What agents of one kind came to with one group of words.

    Attributes:
        name: of the agents.
        words: name of the group.
        ious: mean IoU at the end of an episode, of each run.
        used: mean clicks of an episode that ends when the agent ends it, of each run.
        needed: mean clicks until the IoU target, of each run, if there is one.
        reached: share of episodes in which it was reached, of each run, if there is one.
    """

    name: str
    words: str
    ious: list[float]
    used: list[float]
    needed: list[float]
    reached: list[float]

    @property
    def numbers(self) -> list[str]:
        """Names of what was measured."""
        return [name for name in ("ious", "used", "needed", "reached") if getattr(self, name)]

    def as_dict(self) -> dict[str, Any]:
        """Mean and half-width of the 95% interval over runs of each number."""
        columns: dict[str, Any] = {"agent": self.name, "words": self.words, "runs": len(self.ious)}
        for name in self.numbers:
            mean, half = mean_and_ci95(np.array(getattr(self, name)))
            columns |= {name: mean, f"{name}_ci95": half}
        return columns


def run(config: Config) -> dict[str, Any]:
    """Run the benchmark and write its report.

    Raises:
        ValueError, FileNotFoundError: an option or a run is wrong.
    """
    require_at_least(2, episodes=config.episodes)
    out = report.output_folder(config.out)
    runs = {
        name: [read_run(Path(folder), config) for folder in folders]
        for name, folders in _named(config.run, "--run").items()
    }
    if not runs:
        raise ValueError(
            "Nothing to compare: pass --run NAME=FOLDER[,FOLDER...], as train_ppo wrote it."
        )
    words_of = _named(config.words, "--words")
    groups: dict[str, str | None] = {name: ",".join(words) for name, words in words_of.items()}
    groups = groups or {"all": None}
    rows: list[Row] = []
    with ProgressBar() as progress:
        total = len(groups) * (sum(map(len, runs.values())) + len(_REFERENCES))
        task = progress.add_task("playing", total=total)
        for group, words in groups.items():
            for name, settings, agents in _players(config, runs):
                row = Row(name, group, [], [], [], [])
                for folder, own in zip(agents, settings, strict=True):
                    _play(row, folder, replace(own, target_categories=words), config)
                    progress.advance(task)
                rows.append(row)
    summary = {
        "benchmark": "agents",
        "rows": [row.as_dict() for row in rows],
        "gap_closed": gaps_closed(rows),
        "by_run": [asdict(row) for row in rows],
        "versions": {"sam-gym": __version__, "torch": torch.__version__},
        "settings": asdict(config),
    }
    _write(config, summary, rows, out)
    return summary


def _named(entries: list[str], option: str) -> dict[str, list[str]]:
    """NAME=VALUE[,VALUE...] of each entry."""
    named: dict[str, list[str]] = {}
    for entry in entries:
        name, separator, values = entry.partition("=")
        parts = [value.strip() for value in values.split(",") if value.strip()]
        if not (name and separator and parts):
            raise ValueError(f"{option} {entry!r}: expected NAME=VALUE[,VALUE...].")
        if name in named or name in _REFERENCES:
            raise ValueError(f"{option} {entry!r}: the name {name!r} is taken.")
        named[name] = parts
    return named


def read_run(folder: Path, config: Config) -> tuple[SamSegConfig, Path]:
    """The task that a run of train_ppo was trained on, on held-out images, and its policy.

    Raises:
        FileNotFoundError: the folder does not hold a finished run.
        ValueError: results.json is of another kind.
    """
    results, policy = folder / "results.json", folder / "policy.zip"
    for path in (results, policy):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: not there. Pass the --out of a finished train_ppo run."
            )
    settings = json.loads(results.read_text()).get("config", {}).get("settings")
    known = {field.name for field in fields(SamSegConfig)}
    if not isinstance(settings, Mapping) or not set(settings) <= known:
        raise ValueError(f"{results}: not the results of train_ppo.")
    kwargs = {k: v for k, v in settings["dataset_kwargs"].items() if k not in _TRAINING_ONLY}
    task = SamSegConfig(**settings)
    held_out = replace(task, split=config.split, dataset_kwargs=kwargs, iou_target=None)
    return replace(held_out, device=config.device), policy


def _players(
    config: Config, runs: Mapping[str, list[tuple[SamSegConfig, Path]]]
) -> Iterator[tuple[str, list[SamSegConfig], list[Agent]]]:
    """Name, settings and agents of each kind; the references play as the first of the runs."""
    for name, members in runs.items():
        agents: list[Agent] = [PolicyAgent.load(policy, config.device) for _, policy in members]
        yield name, [settings for settings, _ in members], agents
    first = next(iter(runs.values()))[0][0]
    for name in _REFERENCES:
        yield name, [first], [BASELINES.get(name)(config.seed)]


def _play(row: Row, agent: Agent, settings: SamSegConfig, config: Config) -> None:
    """Play the episodes twice: to the end, and until the IoU target."""
    whole = evaluate(agent, settings, episodes=config.episodes, seed=config.seed)
    row.ious.append(float(whole.ious.mean()))
    row.used.append(float(whole.clicks.mean()))
    if config.iou_target is None:
        return
    until = replace(settings, iou_target=config.iou_target)
    played = evaluate(agent, until, episodes=config.episodes, seed=config.seed)
    there = played.ious >= config.iou_target
    row.needed.append(float(np.where(there, played.clicks, settings.max_steps).mean()))
    row.reached.append(float(there.mean()))


def gaps_closed(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Words -> agent -> (agent - random) / (oracle - random), of mean IoUs over runs."""
    means: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        means[row.words][row.name] = float(np.mean(row.ious))
    return {
        words: {
            name: round((value - by["random"]) / (by["oracle"] - by["random"]), 4)
            for name, value in by.items()
            if name not in _REFERENCES
        }
        for words, by in means.items()
        if by["oracle"] != by["random"]
    }


def _write(config: Config, summary: dict[str, Any], rows: list[Row], out: Path) -> None:
    json_file = write_json(out / "results.json", summary)
    csv_file = write_csv(out / "agents.csv", summary["rows"])
    plot_agents(out / "agents.png", rows)

    titles = {
        "ious": "mean IoU",
        "used": "clicks",
        "needed": f"clicks to {config.iou_target}",
        "reached": f"reach {config.iou_target}",
    }
    numbers = rows[0].numbers
    columns = ["agent", "words", "runs", *(titles[name] for name in numbers)]
    cells = [
        [row["agent"], row["words"], str(row["runs"])]
        + [with_interval(row[name], row[f"{name}_ci95"]) for name in numbers]
        for row in summary["rows"]
    ]
    page = report.Page(
        "Agents over seeds",
        f"{config.episodes} held-out episodes of each run and group of words; "
        "half-widths of 95% intervals over runs (Student's t).",
    )
    page.cards(
        {
            f"gap closed by {name}, {words}": f"{value:.2f}"
            for words, by in summary["gap_closed"].items()
            for name, value in by.items()
        }
    )
    page.table(columns, cells)
    page.plot(out / "agents.png", "mean IoU of each agent and group of words")
    page.settings(summary["settings"], [json_file, csv_file])
    page_file = page.write(out / "report.html")
    report.print_table("agents", columns, cells)
    print(f"Report: {page_file}")


def plot_agents(path: Path, rows: list[Row]) -> None:
    """Mean IoU of each kind of agent by group of words: a bar, and a dot for each run."""
    groups = list(dict.fromkeys(row.words for row in rows))
    kinds = list(dict.fromkeys(row.name for row in rows if row.name not in _REFERENCES))
    figure, axes = report.new_plot()
    shades = ["#1464b4", "#9ec5e8", "#c08040", "#b04a9a", "#6a7f3f", "#555555"]
    width = 0.8 / max(len(kinds), 1)
    for row in rows:
        place = groups.index(row.words)
        label = row.name if place == 0 else "_"
        if row.name in _REFERENCES:
            colour = _REFERENCES[row.name]
            axes.hlines(row.ious[0], place - 0.45, place + 0.45, colour, "--", label=label)
            continue
        kind = kinds.index(row.name)
        x = place + (kind - (len(kinds) - 1) / 2) * width
        axes.bar(x, np.mean(row.ious), 0.9 * width, color=shades[kind % len(shades)], label=label)
        axes.plot([x] * len(row.ious), row.ious, "o", color="black", ms=3)
    axes.set_xticks(range(len(groups)), groups)
    axes.set(ylabel="mean IoU at the end of an episode", ylim=(0, 1))
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=6, frameon=False)
    save_figure(path, figure)
