"""`agents`: compare trained agents over seeds, on categories seen and unseen in training."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from agents.baselines.base import Agent
from agents.baselines.click import BASELINES
from agents.evaluate import PolicyAgent, evaluate
from agents.ppo.config import with_present_names
from benchmarks import report
from benchmarks.options import OutputOptions
from sam_gym.data.io import OnError
from sam_gym.data.splits import ALL, check_held_out
from sam_gym.envs.click import SamSegConfig
from sam_gym.metrics.masks import mean_and_ci95, with_interval
from sam_gym.utils.fields import documented
from sam_gym.utils.plots import literal, new_plot, save_figure
from sam_gym.utils.progress import ProgressBar
from sam_gym.utils.provenance import provenance
from sam_gym.utils.settings import Seed, check_settings, real, whole

#: Baselines to compare with, and their colours.
_REFERENCES = {"random": "#999999", "oracle": "#2e8b57"}
#: Dataset options that restrict the training images, but not held-out images.
_TRAINING_ONLY = ("categories", "length")


@documented
@dataclass(frozen=True, kw_only=True)
class AgentsBenchmarkConfig(OutputOptions):
    """Compare trained agents over seeds with random clicks and the standard click rule.

    All play the same held-out episodes. With groups of words, each group is evaluated on targets of
    its own categories; the images also show other objects.
    """

    run: tyro.conf.UseAppendAction[list[str]]
    """NAME=FOLDER[,FOLDER...]: runs of train_ppo of one kind of agent, one per seed."""
    words: tyro.conf.UseAppendAction[list[str]]
    """NAME=WORD[,WORD...]: a group of target categories."""
    out: str = "runs/agents"
    """Folder for results.json, agents.csv, a plot and report.html."""
    split: str = "test"
    """Split to evaluate on."""
    episodes: Annotated[int, whole(2)] = 512
    """Episodes per run and group."""
    seed: Seed = 1000
    """Seed of the episodes."""
    iou_target: Annotated[float, real(above=0, high=1)] | None = None
    """Play again until this IoU and count the clicks; an episode that fails counts max_steps."""
    on_error: OnError | None = None
    """Stop at the first invalid record or file of the dataset, or skip and count them (None: as in
    training)."""
    device: str = "auto"
    """Device: auto (CUDA, then MPS, then CPU), cpu, mps, cuda, cuda:N."""


@dataclass(frozen=True)
class Row:
    """Results of agents of one kind on one group of words; each list has one number per run.

    Attributes:
        name: name of the agents.
        words: name of the group.
        ious: mean final IoU.
        used: mean clicks of an episode that ends when the agent ends it.
        needed: mean clicks until the IoU target; empty without a target.
        reached: share of episodes that reach the IoU target; empty without a target.
    """

    name: str
    words: str
    ious: list[float] = field(default_factory=list)
    used: list[float] = field(default_factory=list)
    needed: list[float] = field(default_factory=list)
    reached: list[float] = field(default_factory=list)

    @property
    def numbers(self) -> list[str]:
        """Names of the measured numbers."""
        return [name for name in ("ious", "used", "needed", "reached") if getattr(self, name)]

    def as_dict(self) -> dict[str, Any]:
        """Return the mean and the half-width of the 95% interval over runs of each number."""
        columns: dict[str, Any] = {"agent": self.name, "words": self.words, "runs": len(self.ious)}
        for name in self.numbers:
            mean, half = mean_and_ci95(np.array(getattr(self, name)))
            columns |= {name: mean, f"{name}_ci95": half}
        return columns


def run(config: AgentsBenchmarkConfig) -> dict[str, Any]:
    """Run the benchmark and write its report.

    Raises:
        ValueError, FileNotFoundError: an option or a run is wrong.
    """
    check_settings(config)
    out = report.output_folder(config.out, config.overwrite)
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
            for name, members in _players(config, runs):
                row = Row(name, group)
                for agent, env_config in members:
                    _play(row, agent, replace(env_config, target_categories=words), config)
                    progress.advance(task)
                rows.append(row)
    summary = {
        "benchmark": "agents",
        "rows": [row.as_dict() for row in rows],
        "gap_closed": gaps_closed(rows),
        "by_run": [asdict(row) for row in rows],
        **provenance(config),
    }
    _write(config, summary, rows, out)
    return summary


def _named(entries: list[str], option: str) -> dict[str, list[str]]:
    """Parse entries of the form NAME=VALUE[,VALUE...]."""
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


def read_run(folder: Path, config: AgentsBenchmarkConfig) -> tuple[SamSegConfig, Path]:
    """Return the env config of a run of train_ppo, on held-out images, and its policy.

    Raises:
        FileNotFoundError: the folder does not hold a finished run.
        ValueError: results.json is not that of a click agent on one dataset, or held-out images may
            be training images.
    """
    results, policy = folder / "results.json", folder / "policy.zip"
    for path in (results, policy):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: not there. Pass the --out of a finished train_ppo run."
            )
    run = with_present_names(json.loads(results.read_text()).get("config", {}), str(results))
    own = run.get("env_config")
    if not isinstance(own, dict) or not own.keys() <= {
        known.name for known in fields(SamSegConfig)
    }:
        raise ValueError(f"{results}: not the results of train_ppo on SamSeg-v0.")
    kwargs = {k: v for k, v in own["dataset_kwargs"].items() if k not in _TRAINING_ONLY}
    held_out: dict[str, Any] = {"split": config.split, "dataset_kwargs": kwargs, "iou_target": None}
    if config.on_error is not None:
        held_out["on_error"] = config.on_error
    env_config = SamSegConfig(**own | held_out | {"device": config.device})
    # By its own options, the other splits hold none of its training images.
    train = SamSegConfig(**own).open_dataset() if config.split == ALL else None
    check_held_out(env_config.open_dataset(), env_config.split, train)
    return env_config, policy


def _players(
    config: AgentsBenchmarkConfig, runs: Mapping[str, list[tuple[SamSegConfig, Path]]]
) -> Iterator[tuple[str, list[tuple[Agent, SamSegConfig]]]]:
    """Yield the agents of each kind; the baselines play under the first run's env config."""
    for name, members in runs.items():
        yield name, [(PolicyAgent.load(policy, config.device), own) for own, policy in members]
    first = next(iter(runs.values()))[0][0]
    for name in _REFERENCES:
        yield name, [(BASELINES.get(name)(config.seed), first)]


def _play(row: Row, agent: Agent, env_config: SamSegConfig, config: AgentsBenchmarkConfig) -> None:
    """Play the episodes to the end and, with an IoU target, once more until they reach it."""
    whole = evaluate(agent, env_config, episodes=config.episodes, seed=config.seed)
    row.ious.append(float(whole.ious.mean()))
    row.used.append(float(whole.clicks.mean()))
    if config.iou_target is None:
        return
    until = replace(env_config, iou_target=config.iou_target)
    played = evaluate(agent, until, episodes=config.episodes, seed=config.seed)
    there = played.ious >= config.iou_target
    row.needed.append(float(np.where(there, played.clicks, env_config.max_steps).mean()))
    row.reached.append(float(there.mean()))


def gaps_closed(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Return group -> agent -> (agent - random) / (oracle - random), from mean IoUs over runs."""
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


def _write(
    config: AgentsBenchmarkConfig, summary: dict[str, Any], rows: list[Row], out: Path
) -> None:
    files = report.write_results(out, summary, "agents.csv", summary["rows"])
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
    any_spread = any(row["runs"] > 1 for row in summary["rows"])
    page = report.Page(
        "Agents over seeds",
        f"{config.episodes} held-out episodes per run and group of words"
        + "; half-widths of 95% intervals over runs (Student's t)" * any_spread
        + ".",
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
    page.finish(files, summary["settings"], "agents", columns, cells)


def plot_agents(path: Path, rows: list[Row]) -> None:
    """Plot the mean IoU by kind of agent and group of words: a bar, and a dot per run."""
    groups = list(dict.fromkeys(row.words for row in rows))
    kinds = list(dict.fromkeys(row.name for row in rows if row.name not in _REFERENCES))
    figure, axes = new_plot()
    shades = ["#1464b4", "#9ec5e8", "#c08040", "#b04a9a", "#6a7f3f", "#555555"]
    width = 0.8 / max(len(kinds), 1)
    for row in rows:
        place = groups.index(row.words)
        label = literal(row.name) if place == 0 else "_"
        if row.name in _REFERENCES:
            colour = _REFERENCES[row.name]
            axes.hlines(row.ious[0], place - 0.45, place + 0.45, colour, "--", label=label)
            continue
        kind = kinds.index(row.name)
        x = place + (kind - (len(kinds) - 1) / 2) * width
        axes.bar(x, np.mean(row.ious), 0.9 * width, color=shades[kind % len(shades)], label=label)
        axes.plot([x] * len(row.ious), row.ious, "o", color="black", ms=3)
    axes.set_xticks(range(len(groups)), [literal(group) for group in groups])
    axes.set(ylabel="mean IoU at the end of an episode", ylim=(0, 1))
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=6, frameon=False)
    save_figure(path, figure)
