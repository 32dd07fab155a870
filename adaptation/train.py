"""Adapt a SAM to a stream of domains with one method, and evaluate all domains after each.

    python -m adaptation.train --method moda --tune decoder --out runs/moda
    python -m adaptation.train --method ewc+er --ewc-weight 300 --data FOLDER1 FOLDER2
    python -m adaptation.train --method ewc --help

Writes a folder METHOD-TUNE-SEED into --out: adapter.safetensors (for `load_backbone(...,
adapter=PATH)`, and so for `gym.make("SamSeg-v0", adapter=PATH)`), run.json, a heat map for each
prompt, TensorBoard logs and a checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from adaptation.method_flags import method_flags, options_from_flags
from adaptation.options import ModelOptions, StreamOptions, TrainConfig
from adaptation.results import RunResult, folder_name
from adaptation.strategies.saom import Saom
from adaptation.strategy import STRATEGIES
from adaptation.trainer import Trainer, check_tune
from sam_gym.backbones.adapters.tuning import tune_help
from sam_gym.utils import cli
from sam_gym.utils.fields import documented
from sam_gym.utils.plots import plot_matrix


def method_help() -> str:
    """Return the help text of `--method`: the registered methods, by what they learn."""
    learning = {name: own for name, own in STRATEGIES.items() if own.learns}
    objects = [name for name, own in learning.items() if issubclass(own, Saom)]
    pixels = [name for name, own in learning.items() if own.evaluations is not None]
    domains = [name for name in learning if name not in (*objects, *pixels)]
    return (
        f"Method: {', '.join(domains)} (domains); {', '.join(objects)} (whole objects, with "
        f"--stream rooms or another dataset); {', '.join(pixels)} (the class of every pixel). "
        "A plus sign combines methods: ewc+er. "
        "`--method NAME --help` lists the method's own options."
    )


@documented
@dataclass
class AdaptConfig:
    """Adapt a SAM to a stream of domains."""

    method: Annotated[str, tyro.conf.arg(help=method_help())] = "naive"
    tune: Annotated[
        str | None, tyro.conf.arg(help=f"{tune_help('Tune target')} (None: the method's own).")
    ] = None
    out: str = "runs/adaptation"
    """Folder for everything that the run writes, in a folder METHOD-TUNE-SEED of it."""
    overwrite: bool = False
    """Replace the run in that folder. Without --overwrite, a run in it is an error."""
    resume: bool = False
    """Resume an interrupted run from the checkpoint in --out. Bit-exact on a CPU."""
    order: str | None = None
    """Order of the domains: their names with commas, or random:SEED."""
    stream: StreamOptions = field(default_factory=StreamOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    train: TrainConfig = field(default_factory=TrainConfig)


def main(args: Sequence[str] | None = None) -> RunResult:
    """Run the command line.

    Raises:
        ValueError, FileNotFoundError: a name, a value, the data or the checkpoint is wrong.
    """
    config, method_options = _parse(sys.argv[1:] if args is None else args)
    method = STRATEGIES.get(config.method)
    tune = method.default_tune if config.tune is None else config.tune
    check_tune(config.method, tune)
    stream = config.stream.open(config.order)
    out = Path(config.out).expanduser()
    retention = config.stream.open_retention()
    trainer = Trainer(config.train, config.model.arguments, out, retention)
    result = trainer.fit(
        stream,
        config.method,
        tune,
        method_options=method_options,
        resume=config.resume,
        overwrite=config.overwrite,
    )
    if trainer.fabric.is_global_zero:
        folder = out / folder_name(result.method, result.tune, result.seed)
        for prompt in result.scores:
            matrix = np.array(result.scores[prompt]["iou"]) / 100
            title = f"{result.method}, {prompt}"
            path = folder / f"{prompt}.png"
            plot_matrix(path, matrix, result.domains, title, row=result.only_stage)
        print_result(result)
        print(f"Everything is in {folder}.")
    return result


def _parse(args: Sequence[str]) -> tuple[AdaptConfig, Any]:
    """Parse the command line, with the flags of the method that it names."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--method", default=AdaptConfig.method)
    method = finder.parse_known_args(args)[0].method
    options = [("method_options", method_flags([method]))]
    parsed: Any = make_dataclass("Config", options, bases=(AdaptConfig,), kw_only=True)
    config = cli.parse(
        parsed,
        "python -m adaptation.train",
        args,
        description=__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return config, options_from_flags(config.method_options, method)


def print_result(result: RunResult) -> None:
    """Print the scores of each domain, and the summary."""
    for prompt in result.scores:
        rows = []
        matrix = np.array(result.scores[prompt]["iou"])
        for number, name in enumerate(result.domains):
            learned = f"{matrix[number, number]:.1f}" if len(matrix) == len(result.domains) else ""
            before = result.zero_shot.get(prompt, {}).get("iou")
            zero_shot = "" if before is None else f"{before[number]:.1f}"
            rows.append([name, zero_shot, learned, f"{matrix[-1, number]:.1f}"])
        title = f"{result.method} ({result.tune}), IoU by {prompt} on {result.split}, in %"
        cli.print_table(title, ("domain", "zero-shot", "just learned", "in the end"), rows)
        numbers = result.summary(prompt)
        shown = [f"{key} {value:.1f}" for key, value in numbers.items() if value is not None]
        print(", ".join(shown))


if __name__ == "__main__":
    cli.run(main, "Pass --resume to resume from the last checkpoint, if there is one.")
