"""Command lines: entry point and printed tables."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro
from gymnasium.error import DependencyNotInstalled

from sam_gym.utils.memory import keep_freed_memory
from sam_gym.utils.registry import PLUGINS, import_named
from sam_gym.utils.settings import check_settings
from sam_gym.utils.text import printable

T = TypeVar("T")

#: Errors that end a command with one line.
_WRONG_INPUT = (
    *(ValueError, OSError, MemoryError, ImportError, FloatingPointError),
    DependencyNotInstalled,
)


#: How `python -m MODULE` was called instead, for `--help`: the former and the latter.
called_as = ("", "")


def option(name: str) -> str:
    """Return the option of a field: --num-envs of num_envs."""
    return f"--{name.replace('_', '-')}"


def parse(options: type[T], prog: str, args: Sequence[str] | None = None, **tyro_options: Any) -> T:
    """Parse a command line and check its values.

    Args:
        options: dataclass of the options.
        prog: command, for `--help`.
        args: command line without the program; None: that of the process.
        **tyro_options: see `tyro.cli`.

    Raises:
        SystemExit: after --help, or if the command line cannot be parsed.
        ValueError: a value is out of range, NaN or infinite.
    """
    prog = prog.replace(*called_as, 1) if called_as[0] else prog
    parsed = tyro.cli(options, prog=prog, args=args, **tyro_options)
    check_settings(parsed, option)
    return parsed


class Terminated(KeyboardInterrupt):
    """Raised where a process is when it receives SIGTERM, as KeyboardInterrupt is at Ctrl-C."""


def stop_at_sigterm() -> Any:
    """Let SIGTERM, which preempted jobs get, end this process as Ctrl-C does.

    Returns:
        The previous handler; None outside of the main thread, where nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    process = os.getpid()

    def stop(number: int, frame: object) -> None:
        if os.getpid() == process:
            raise Terminated
        # A forked worker has inherited the handler.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    return signal.signal(signal.SIGTERM, stop)


def _reader_has_gone() -> bool:
    """Return whether stdout is the broken pipe; then, what is left to write is dropped."""
    if not hasattr(select, "poll"):  # Windows
        return False
    stdout = 1
    poll = select.poll()
    poll.register(stdout, 0)  # errors are always reported
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stdout)
    os.close(null)
    return True


def run(
    main: Callable[[], Any], resume: str = "Run the same command again.", status: int = 1
) -> None:
    """Run a command that owns its process.

    Wrong input ends it with its message and a status, Ctrl-C with status 130, SIGTERM with status
    143; none of them with a traceback. If the reader of its output has gone (`| head`), it ends
    without a word, with status 141. Freed memory is kept for the next tensor
    (`keep_freed_memory`). Modules that `SAM_GYM_PLUGINS` names are imported first, for what they
    register.

    Args:
        main: the command.
        resume: what to do after an interruption, unless the exception has notes that say it.
        status: exit status of wrong input.
    """
    keep_freed_memory()
    stop_at_sigterm()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: text must not end a run
    try:
        for module in filter(None, map(str.strip, os.environ.get(PLUGINS, "").split(","))):
            try:
                import_named(module)
            except ValueError as error:
                raise ValueError(f"{PLUGINS}: {error}") from error
        try:
            main()
        finally:  # of --help too; the interpreter's own flush comes after all handlers
            if sys.stdout is not None:
                sys.stdout.flush()
    except _WRONG_INPUT as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            raise SystemExit(141) from error
        # Names of files may hold control characters.
        message = "\n".join(map(printable, str(error).splitlines()))
        if status == 1:  # that of a text
            raise SystemExit(f"error: {message}") from error
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(status) from error
    except KeyboardInterrupt as stop:
        what, code = ("Terminated", 143) if isinstance(stop, Terminated) else ("Interrupted", 130)
        print(f"{what}. {' '.join(getattr(stop, '__notes__', [resume]))}", file=sys.stderr)
        raise SystemExit(code) from stop


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is left-aligned, the others right-aligned."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(escape(name), justify="right" if number else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)
