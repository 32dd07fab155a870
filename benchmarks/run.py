"""Measure a Segment Anything Model, the environments that play it, and the agents that learn to.

    python -m benchmarks.run continual
    python -m benchmarks.run interactive --dataset folder --data FOLDER --out DIR
    python -m benchmarks.run throughput --out DIR
    python -m benchmarks.run interactive --help

Each benchmark writes results.json, CSV tables, pictures and one self-contained report.html into
--out, and prints a short table.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from sam_gym.utils import cli
from sam_gym.utils.registry import unknown_name

#: Benchmark name -> module with a dataclass `Config` and `run(config) -> results`.
BENCHMARKS = {
    "agents": "benchmarks.agents",
    "continual": "benchmarks.continual",
    "epochs": "benchmarks.epochs",
    "everything": "benchmarks.everything.benchmark",
    "generator": "benchmarks.generator",
    "interactive": "benchmarks.interactive.benchmark",
    "pointing": "benchmarks.pointing",
    "throughput": "benchmarks.throughput.benchmark",
}


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark that a command line asks for.

    Args:
        args: the command line without the program; None: that of the process.

    Returns:
        What results.json holds.

    Raises:
        SystemExit: after --help, or when the command line cannot be parsed.
        ValueError, FileNotFoundError: a name, a value, the data or the checkpoint is wrong.
    """
    args = list(sys.argv[1:] if args is None else args)
    if args and not args[0].startswith("-") and args[0] not in BENCHMARKS:
        raise unknown_name("benchmark", args[0], BENCHMARKS)
    modules = {name: importlib.import_module(path) for name, path in BENCHMARKS.items()}
    config = tyro.extras.subcommand_cli_from_dict(
        {name: module.Config for name, module in modules.items()},
        prog="python -m benchmarks.run",
        description=__doc__,
        args=args or ["--help"],
    )
    return modules[args[0]].run(config)


if __name__ == "__main__":
    cli.run(main)
