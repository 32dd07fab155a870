"""The command line: what it teaches and what it refuses."""

from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.run import BENCHMARKS, load, main


def refusal(*args: str) -> str:
    """The message with which a command line is refused."""
    with pytest.raises((SystemExit, ValueError, FileNotFoundError)) as caught:
        main(args)
    return str(caught.value)


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_help_lists_every_benchmark(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "python -m benchmarks.run" in shown
    for name in BENCHMARKS:
        assert name in shown


def options_of(config: Any) -> list[Field[Any]]:
    """The fields that are options, those of groups of options included."""
    found: list[Field[Any]] = []
    for field in fields(config):
        group = field.default_factory
        if is_dataclass(group):
            found += options_of(group)
        elif "Suppress" not in str(field.type):
            found.append(field)
    return found


@pytest.mark.parametrize("name", BENCHMARKS.names())
def test_help_explains_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = capsys.readouterr().out
    # An option without a docstring would be followed at once by its default.
    entries = " ".join(shown.replace("│", " ").split()).split(" --")
    for field in options_of(load(name)[1]):
        option = field.name.replace("_", "-")
        entry = next(e for e in entries if e.split()[0].strip(",") == option)
        words = entry.split("(default")[0].split()
        if entry.split()[0].endswith(","):  # a flag and its negation, which holds the text
            words = (
                next(e for e in entries if e.startswith(f"no-{option}"))
                .split("(default")[0]
                .split()
            )
        assert len(words) > 4, f"--{option} is not explained: {entry}"


def test_unknown_benchmark_names_the_nearest() -> None:
    assert "Did you mean 'interactive'?" in refusal("interactve")
    assert "Did you mean 'throughput'?" in refusal("throughputs", "--out", "x")


def test_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal("throughput", "--num-env", "3") == "2"
    assert "--num-envs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["interactive", "--dataset", "foldr"], "Did you mean 'folder'?"),
        (["interactive", "--dataset", "folder"], "pass its folder (--data PATH"),
        (["interactive", "--dataset", "folder", "--data", "nowhere"], "nowhere"),
        (["interactive", "--categories", "person"], "Unknown category"),
        (["interactive", "--split", "tset"], "Did you mean 'test'?"),
        (["interactive", "--backbone", "mikro"], "Did you mean 'micro'?"),
        (["interactive", "--checkpoint", "nothing.pth"], "nothing.pth"),
        (["interactive", "--clicks", "0"], "--clicks must be at least 1, got 0"),
        (["interactive", "--max-objects", "0"], "--max-objects"),
        (["throughput", "--backbone", "vitb"], "Did you mean 'vit_b'?"),
        (["throughput", "--device", "gpu"], "gpu"),
        (["throughput", "--num-envs", "0"], "--num-envs"),
        (["throughput", "--steps", "7", "--max-steps", "5"], "multiple of --max-steps (5), got 7"),
    ],
)
def test_wrong_values_are_refused_before_work(
    args: list[str], message: str, tmp_path: Path, micro_checkpoint: str
) -> None:
    given = [] if "--checkpoint" in args else ["--checkpoint", micro_checkpoint]
    out = tmp_path / "out"
    assert message in refusal(*args, *given, "--out", str(out))
    assert not list(out.glob("*"))


def test_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for name in BENCHMARKS:
        options = ("--device", "cpu", "--quick") if name == "gpu" else ()
        assert f"--out {file}" in refusal(name, *options, "--out", str(file))
