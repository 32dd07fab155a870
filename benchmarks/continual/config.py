"""Config of the `continual` benchmark, and its runs: methods, tune targets, seeds and orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import tyro

from adaptation.config import TrainConfig
from adaptation.method_flags import method_flags
from adaptation.options import ModelOptions, StreamOptions
from adaptation.strategy import STRATEGIES
from adaptation.trainer import check_tune
from benchmarks.options import require_at_least
from sam_gym.backbones.adapters.tuning import TUNINGS
from sam_gym.utils.registry import unknown_name

#: The methods of the paper's table, in its order, and those that came after it.
PAPER = ("zero_shot", "joint", "naive", "lwf", "ewc", "er", "l2p", "dualprompt", "coda", "moda")
BEYOND = ("samcl", "regcl")
#: Options of all registered methods.
MethodFlags: Any = method_flags(STRATEGIES.names())


@dataclass
class Config:
    """Adapt a SAM to a stream of domains with every method, and measure forgetting.

    The default is the quick setting: one seed, the methods of the paper, box prompts.
    """

    methods: tuple[str, ...] = ()
    """Methods to compare (default: those of the paper; with --full: all)."""
    tune: tuple[str, ...] = ("decoder",)
    """Tune targets: decoder, hq, hq_small, sam_adapter, lora, lora_decoder. Methods that do not
    support a target (prompt pools, regcl, samcl) use their default."""
    seeds: int = 1
    """Runs of each method, with consecutive seeds from --seed on."""
    orders: tuple[str, ...] = ()
    """Orders of the domains: names with commas, or random:SEED. Each runs with every seed."""
    full: bool = False
    """Use the full setting: five seeds, all methods, boxes, one click and five clicks."""
    resume: bool = False
    """Resume the interrupted runs in the output folder."""
    out: str = "runs/continual"
    """Folder for results.json, tables, heat maps, adapters and report.html."""
    stream: tyro.conf.OmitArgPrefixes[StreamOptions] = field(default_factory=StreamOptions)
    model: tyro.conf.OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)
    train: tyro.conf.OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)
    method_options: tyro.conf.OmitArgPrefixes[MethodFlags] = field(default_factory=MethodFlags)


@dataclass(frozen=True)
class Job:
    """One run: a method with its tune target, a seed and an order."""

    label: str
    method: str
    tune: str
    seed: int
    order: str | None


def with_defaults(config: Config) -> Config:
    """Resolve --full and the defaults, and check the values."""
    if config.full:
        train = replace(config.train, prompts=("box", "click", "clicks5"))
        seeds = max(5, config.seeds)
        methods = config.methods or (*PAPER, *BEYOND)
        config = replace(config, train=train, seeds=seeds, methods=methods)
    config = replace(config, methods=config.methods or PAPER)
    require_at_least(1, seeds=config.seeds)
    config.train.validate()
    for name in config.methods:
        STRATEGIES.get(name)
    for name in config.tune:
        if name not in TUNINGS.names():
            raise unknown_name("tune target", name, TUNINGS.names())
    if not config.tune:
        raise ValueError("--tune is empty: name at least one tune target.")
    return config


def orders_of(config: Config) -> tuple[str | None, ...]:
    return config.orders or (None,)


def make_jobs(config: Config) -> list[Job]:
    """List all runs. With several tune targets, a method is labelled METHOD+TARGET."""
    kinds: dict[str, tuple[str, str]] = {}
    for tune in config.tune:
        for method in config.methods:
            fits = tune in STRATEGIES.get(method).tunes and method != "zero_shot"
            chosen = tune if fits else STRATEGIES.get(method).default_tune
            check_tune(method, chosen)
            label = f"{method}+{chosen}" if len(config.tune) > 1 and fits else method
            kinds.setdefault(label, (method, chosen))
    return [
        Job(label, method, tune, config.train.seed + k, order)
        for order in orders_of(config)
        for k in range(config.seeds)
        for label, (method, tune) in kinds.items()
    ]


def grouped(jobs: Sequence[Job]) -> list[tuple[tuple[int, str | None], list[Job]]]:
    groups: dict[tuple[int, str | None], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.seed, job.order), []).append(job)
    return list(groups.items())
