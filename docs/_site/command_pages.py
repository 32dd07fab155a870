"""One page per command, from its own `--help`."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import signal
import sys
import warnings
from pathlib import Path
from textwrap import fill
from unittest import mock

from benchmarks.run import BENCHMARKS
from sam_gym import ENVIRONMENTS

ROOT = Path(__file__).parents[2]
PACKAGES = ("agents", "adaptation", "benchmarks", "sam_gym")

#: Command -> its variants: arguments before --help.
VARIANTS: dict[str, list[str]] = {
    "agents.annotate": ["", "--everything", "--video CLIP", "--semantic"],
    "agents.evaluate": [f"--env {env_id}" for env_id in ENVIRONMENTS],
    "agents.hub": ["", "push", "pull"],
    "agents.train_ppo": [f"--env {env_id}" for env_id in ENVIRONMENTS],
    "benchmarks.run": ["", *sorted(BENCHMARKS)],
}


def commands() -> list[str]:
    """Return the modules that are commands: those that start with `cli.run`."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            _, main, body = path.read_text().partition('\nif __name__ == "__main__":\n')
            if main and "cli.run(" in body:
                found.append(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return found


def help_text(module: str, arguments: str = "", width: int = 76) -> str:
    """Return what `python -m MODULE ARGUMENTS --help` prints on a terminal of `width` columns."""
    argv = [module, *arguments.split(), "--help"]
    printed, handler = io.StringIO(), signal.getsignal(signal.SIGTERM)
    try:
        with (
            mock.patch.object(sys, "argv", argv),
            mock.patch.dict(os.environ, COLUMNS=str(width), NO_COLOR="1"),
            contextlib.redirect_stdout(printed),
            contextlib.suppress(SystemExit),
            warnings.catch_warnings(action="ignore", category=RuntimeWarning),  # of runpy
        ):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        signal.signal(signal.SIGTERM, handler)
    text = re.sub(r"\x1b\[[0-9;]*m", "", printed.getvalue())
    if not text.strip():
        raise RuntimeError(f"python -m {' '.join(argv)} printed nothing.")
    text = re.sub(rf"^usage: {re.escape(module)}", f"usage: python -m {module}", text)
    return "\n\n".join(_wrapped(paragraph, width) for paragraph in text.split("\n\n")).rstrip()


def _wrapped(paragraph: str, width: int) -> str:
    """Wrap a paragraph of a description, which tyro does not."""
    lines = [line.rstrip() for line in paragraph.splitlines()]
    if max(map(len, lines), default=0) <= width:
        return "\n".join(lines)
    if any(line.startswith(" ") for line in lines):
        return "\n".join(line if len(line) <= width else fill(line, width) for line in lines)
    return fill(" ".join(lines), width)


def command_page(module: str) -> str:
    """Return the page of a command as Markdown."""
    parts = [f"# python -m {module}"]
    for arguments in VARIANTS.get(module, [""]):
        if arguments:
            parts.append(f"## {arguments}")
        parts.append(f"```output\n{help_text(module, arguments)}\n```")
    return "\n\n".join(parts) + "\n"


def command_index() -> str:
    """Return the page that lists all commands."""
    rows = ["# Commands", "", "| command | |", "|---|---|"]
    for module in commands():
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        summary = source.split('"""')[1].strip().splitlines()[0]
        rows.append(f"| [`python -m {module}`]({module}.md) | {summary} |")
    rows += [
        "",
        "Each page is the output of `--help`. Wrong input ends a command with one line that starts",
        "with `error:` and status 1 (2 for the commands of videos, as for a wrong option), Ctrl-C",
        "with status 130 and SIGTERM with 143; a run that can resume says how.",
    ]
    return "\n".join(rows) + "\n"
