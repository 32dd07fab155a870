"""Adapt a SAM to a stream of domains with one method, and measure all domains after each.

    python -m adaptation.train --method moda --tune decoder --out runs/moda
    python -m adaptation.train --method er --data FOLDER1 FOLDER2 --out runs/er

Writes a folder METHOD-TUNE-SEED into --out: adapter.safetensors (for `load_backbone(...,
adapter=PATH)`, and so for `gym.make("SamSeg-v0", adapter=PATH)`), run.json, a heat map for each
prompt, TensorBoard logs and a checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from adaptation.options import ModelOptions, StreamOptions
from adaptation.results import Run, folder_name
from adaptation.strategy import STRATEGIES, Options
from adaptation.trainer import TrainConfig, Trainer, check_tune
from sam_gym.utils import cli
from sam_gym.utils.plots import plot_matrix


@dataclass
class TrainOptions:
    """Adapt a SAM to a stream of domains."""

    method: str = "naive"
    """Method: naive, joint, lwf, ewc, er, l2p, dualprompt, coda, moda, samcl, regcl (domains);
    saom_v1, saom_v2, panosam (whole objects, with --stream rooms or another dataset)."""
    tune: str | None = None
    """What is tuned: decoder, hq, hq_small, sam_adapter, lora, lora_decoder (default: the
    method's own)."""
    out: str = "runs/adaptation"
    """Folder for everything that the run writes."""
    resume: bool = False
    """Go on from the checkpoint in --out, as if the run had never stopped."""
    order: str | None = None
    """Order of the domains: their names with commas, or random:SEED."""
    stream: tyro.conf.OmitArgPrefixes[StreamOptions] = field(default_factory=StreamOptions)
    model: tyro.conf.OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)
    train: tyro.conf.OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)
    weights: tyro.conf.OmitArgPrefixes[Options] = field(default_factory=Options)


def main(args: Sequence[str] | None = None) -> Run:
    """Run the command line.

    Raises:
        ValueError, FileNotFoundError: a name, a value, the data or the checkpoint is wrong.
    """
    options = tyro.cli(
        TrainOptions,
        args=sys.argv[1:] if args is None else args,
        prog="python -m adaptation.train",
        description=__doc__,
    )
    method = STRATEGIES.get(options.method)
    tune = method.default_tune if options.tune is None else options.tune
    check_tune(options.method, tune)
    stream = options.stream.open(options.order)
    out = Path(options.out).expanduser()
    trainer = Trainer(
        options.train,
        options.weights,
        options.model.arguments,
        out,
        options.stream.open_retention(),
    )
    run = trainer.fit(stream, options.method, tune, options.resume)
    if trainer.fabric.is_global_zero:
        folder = out / folder_name(run.method, run.tune, run.seed)
        for prompt in run.scores:
            matrix = np.array(run.scores[prompt]["iou"]) / 100
            plot_matrix(folder / f"{prompt}.png", matrix, run.domains, f"{run.method}, {prompt}")
        print_run(run)
        print(f"Everything is in {folder}.")
    return run


def print_run(run: Run) -> None:
    """Print the numbers of a run: each domain at the end, and the summary."""
    console = Console()
    for prompt in run.scores:
        table = Table(title=f"{run.method} ({run.tune}), IoU by {prompt}, in points of 100")
        for name in ("domain", "zero-shot", "just learned", "in the end"):
            table.add_column(name, justify="left" if name == "domain" else "right")
        matrix = np.array(run.scores[prompt]["iou"])
        for number, name in enumerate(run.domains):
            learned = f"{matrix[number, number]:.1f}" if len(matrix) == len(run.domains) else ""
            before = run.zero_shot[prompt]["iou"][number]
            table.add_row(name, f"{before:.1f}", learned, f"{matrix[-1, number]:.1f}")
        console.print(table)
        numbers = run.summary(prompt)
        shown = [f"{key} {value:.1f}" for key, value in numbers.items() if value is not None]
        console.print(", ".join(shown))


if __name__ == "__main__":
    cli.run(main)
