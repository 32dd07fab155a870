"""The training command over the tiny SAM, in a process that may be made to stop.

    python train_tiny.py [--die-at STEP] [--stop-at STEP] [--die-in-write N] [training arguments]

`--die-at` kills the process at an environment step, `--stop-at` interrupts it as Ctrl-C does, and
`--die-in-write` while it writes its N-th
checkpoint. A kill leaves no time to do anything about it.
"""

import argparse
import importlib.util
import itertools
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from agents.ppo import checkpoint
from agents.ppo.callbacks import PinRolloutsCallback
from agents.train_ppo import main
from sam_gym.backbones import BackboneSpec, register_backbone
from sam_gym.utils import cli


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    # Jobs in the background of a script ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGINT)


def at(step: int, end: Callable[[], None]) -> None:
    on_step = PinRolloutsCallback._on_step

    def on_step_or_die(self: PinRolloutsCallback) -> bool:
        if self.num_timesteps >= step:
            end()
        return on_step(self)

    PinRolloutsCallback._on_step = on_step_or_die  # type: ignore[method-assign]


def die_in_write(number: int) -> None:
    replace, writes = os.replace, itertools.count(1)

    def replace_or_die(unfinished: Path, path: Path) -> None:
        if path.suffix == ".ckpt" and next(writes) == number:
            os.truncate(unfinished, unfinished.stat().st_size // 2)
            die()
        replace(unfinished, path)

    os.replace = replace_or_die  # type: ignore[assignment]


def add_tiny() -> None:
    """Make `--backbone tiny` known, as the fixture `tiny_env` does."""
    path = Path(__file__).parents[1] / "conftest.py"
    spec = importlib.util.spec_from_file_location("shared_fixtures", path)
    assert spec is not None and spec.loader is not None
    fixtures: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fixtures)
    build = partial(fixtures.seeded, fixtures.tiny_sam)
    register_backbone(BackboneSpec(name="tiny", build=build, description="A SAM of the tests"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--die-at", type=int)
    parser.add_argument("--stop-at", type=int)
    parser.add_argument("--die-in-write", type=int)
    known, rest = parser.parse_known_args()
    add_tiny()
    if known.die_at is not None:
        at(known.die_at, die)
    if known.stop_at is not None:
        checkpoint._SLOW = float("inf")
        at(known.stop_at, interrupt)
    if known.die_in_write is not None:
        die_in_write(known.die_in_write)
    cli.run(lambda: main(rest))
