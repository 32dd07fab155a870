"""Benchmark a Segment Anything Model, its environments and the agents trained in them.

    python -m benchmarks.run continual
    python -m benchmarks.run interactive --dataset folder --data FOLDER --out DIR
    python -m benchmarks.run semantic --dataset camvid --data FOLDER --out DIR
    python -m benchmarks.run throughput --out DIR
    python -m benchmarks.run throughput --against CHECKOUT --out DIR
    python -m benchmarks.run gpu --out DIR
    python -m benchmarks.run video --dataset davis --data FOLDER --out DIR
    python -m benchmarks.run interactive --help

Each benchmark writes results.json, a CSV table, pictures and a self-contained report.html into
--out, and prints a short table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

from sam_gym.utils import cli
from sam_gym.utils.provenance import own_commit
from sam_gym.utils.registry import Registry, load_entry_point

#: Benchmark name -> "module:function". The function takes a config dataclass as its argument
#: `config` and returns the content of results.json.
BENCHMARKS: Registry[str] = Registry("benchmark")
for _name, _entry_point in {
    "agents": "benchmarks.agents:run",
    "continual": "benchmarks.continual.benchmark:run",
    "epochs": "benchmarks.epochs:run",
    "everything": "benchmarks.everything.benchmark:run",
    "generator": "benchmarks.generator:run",
    "gpu": "benchmarks.gpu:run",
    "interactive": "benchmarks.interactive.benchmark:run",
    "pointing": "benchmarks.pointing:run",
    "semantic": "benchmarks.semantic.benchmark:run",
    "throughput": "benchmarks.throughput.benchmark:run",
    "training": "benchmarks.training.benchmark:run",
    "video": "benchmarks.video.benchmark:run",
    "video_speed": "benchmarks.video_speed.benchmark:run",
}.items():
    BENCHMARKS.add(_name, _entry_point)


def load(name: str) -> tuple[Callable[[Any], dict[str, Any]], type]:
    """Import a benchmark; returns its function and the class of its config."""
    run = load_entry_point(BENCHMARKS.get(name))
    return run, get_type_hints(run)["config"]


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark that a command line names.

    Args:
        args: the command line without the program; None: that of the process.

    Returns:
        The content of results.json.

    Raises:
        SystemExit: after --help, or when the command line cannot be parsed.
        ValueError, FileNotFoundError: a name, a value, the data or the checkpoint is wrong.
    """
    name, *options = list(sys.argv[1:] if args is None else args) or ["--help"]
    if name in ("-h", "--help"):
        summaries = {key: str(load(key)[1].__doc__).splitlines()[0] for key in BENCHMARKS}
        print(f"{__doc__}\nBenchmarks:\n")
        print("\n".join(f"  {key:<12} {summary}" for key, summary in summaries.items()))
        raise SystemExit(0)
    run, config_class = load(name)
    config: Any = cli.parse(config_class, f"python -m benchmarks.run {name}", options)
    own_commit()  # for results.json
    try:
        return run(config)
    except KeyboardInterrupt as stop:
        if hasattr(config, "resume"):
            stop.add_note("Pass --resume to resume from the last checkpoint.")
        raise


if __name__ == "__main__":
    cli.run(main)
