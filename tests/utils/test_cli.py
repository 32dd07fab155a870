"""How commands end."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from sam_gym.utils import cli


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    # Jobs in the background of a script ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def noted() -> None:
    error = KeyboardInterrupt()
    error.add_note("Pass --resume.")
    raise error


def killed(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("main", "status", "line"),
    [
        (killed(signal.SIGINT), 130, "Interrupted. Run it again."),
        (killed(signal.SIGTERM), 143, "Terminated. Run it again."),
        (noted, 130, "Interrupted. Pass --resume."),
    ],
)
def test_interrupted_commands_say_in_one_line_how_to_resume(
    main: Callable[[], None], status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.run(main, "Run it again.")
    assert end.value.code == status
    assert capsys.readouterr().err.splitlines() == [line]


def test_control_characters_do_not_reach_the_terminal() -> None:
    def main() -> None:
        raise ValueError("a\x1b[2J\udcff.png: not an image.\nFetch it again.")

    with pytest.raises(SystemExit, match="^error: a.x1b.2J.udcff.png: not an image.\nFetch it"):
        cli.run(main)


def test_commands_may_end_with_another_status(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise ValueError("a.json: no categories.")

    with pytest.raises(SystemExit) as end:
        cli.run(main, status=2)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: a.json: no categories.\n"


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_command_ends_quietly_when_its_reader_has_gone(size: int) -> None:
    code = f"from sam_gym.utils import cli; cli.run(lambda: print('x' * {size}))"
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_other_broken_pipes_are_errors() -> None:
    def main() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(SystemExit, match="error: .*Broken pipe"):
        cli.run(main)


def test_a_forked_worker_ends_as_usual() -> None:
    def main() -> None:
        worker = os.fork()
        if not worker:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        status = os.waitpid(worker, 0)[1]
        assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM

    cli.run(main)


def test_tables_show_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    cli.print_table("title [/x]", ["domain", "[red]"], [["scans [left]", "[/]"]])
    shown = capsys.readouterr().out
    for name in ("title [/x]", "[red]", "scans [left]", "[/]"):
        assert name in shown
