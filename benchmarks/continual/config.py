"""Options of `continual`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import tyro

from adaptation.method_flags import method_flags
from adaptation.options import ModelOptions, StreamOptions, TrainConfig
from adaptation.strategy import STRATEGIES, Strategy
from benchmarks.options import OutputOptions
from sam_gym.backbones.adapters.tuning import TUNINGS, tune_help
from sam_gym.utils.fields import documented
from sam_gym.utils.registry import unknown_name
from sam_gym.utils.settings import Count, check_settings

#: The methods of the paper's table, in its order.
PAPER = ("zero_shot", "joint", "naive", "lwf", "ewc", "er", "l2p", "dualprompt", "coda", "moda")
#: All others that train on the same prompts.
BEYOND = tuple(
    name
    for name, method in STRATEGIES.items()
    if name not in PAPER and method.batch is Strategy.batch and method.evaluations is None
)
#: Options of all registered methods.
MethodFlags: Any = method_flags(STRATEGIES.names())


@documented
@dataclass(frozen=True, kw_only=True)
class ContinualBenchmarkConfig(OutputOptions):
    """Adapt a SAM to a stream of domains with every method, and measure forgetting.

    The default is the quick setting: one seed, the methods of the paper, box prompts.
    """

    methods: tuple[str, ...] = ()
    """Methods to compare (default: those of the paper; with --full: all that train on the same
    prompts)."""
    tune: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            help=f"{tune_help('Tune targets')}. Methods that do not support a target use their own."
        ),
    ] = ("decoder",)
    seeds: Count = 1
    """Runs of each method, with consecutive seeds."""
    orders: tuple[str, ...] = ()
    """Orders of the domains: names with commas, or random:SEED. Each runs with every seed."""
    full: bool = False
    """Use the full setting: five seeds, all methods, boxes, one click and five clicks."""
    resume: bool = False
    """Resume the interrupted runs in the output folder."""
    out: str | None = None
    """Folder for results.json, tables, heat maps, adapters and report.html (None: runs/continual,
    or runs/continual-full with --full)."""
    stream: tyro.conf.OmitArgPrefixes[StreamOptions] = field(default_factory=StreamOptions)
    model: tyro.conf.OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)
    train: tyro.conf.OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)
    method_options: tyro.conf.OmitArgPrefixes[MethodFlags] = field(default_factory=MethodFlags)


def with_defaults(config: ContinualBenchmarkConfig) -> ContinualBenchmarkConfig:
    """Resolve --full and the defaults, and check the values."""
    if config.full:
        train = replace(config.train, prompts=("box", "click", "clicks5"))
        seeds = max(5, config.seeds)
        methods = config.methods or (*PAPER, *BEYOND)
        config = replace(config, train=train, seeds=seeds, methods=methods)
    config = replace(config, methods=config.methods or PAPER)
    check_settings(config)
    config.train.validate()
    for name in config.methods:
        STRATEGIES.get(name)
    for name in config.tune:
        if name not in TUNINGS.names():
            raise unknown_name("tune target", name, TUNINGS.names())
    if not config.tune:
        raise ValueError("--tune is empty: name at least one tune target.")
    return config
