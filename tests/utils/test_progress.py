"""One progress bar for all commands: on stderr, so that stdout holds results only."""

import io

import pytest

from sam_gym.utils.progress import ProgressBar, track


def test_track_yields_all_and_leaves_stdout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(3), "counting")) == [0, 1, 2]
    assert list(track(iter("ab"), "counting", total=2)) == ["a", "b"]
    captured = capsys.readouterr()
    assert captured.out == "" and "counting" in captured.err and "2/2" in captured.err


def test_a_disabled_bar_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(3), "counting", disable=True)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_numbers_are_optional() -> None:
    bar = ProgressBar(in_bytes=True)
    bar.console.file = io.StringIO()
    with bar:
        plain = bar.add_task("plain", total=2)
        told = bar.add_task("told", total=2)
        bar.update(told, completed=1, numbers="IoU 0.5", description="scans [left][/]")
        bar.advance(plain)
    assert "IoU 0.5" in bar.console.file.getvalue()
    assert "scans [left][/]" in bar.console.file.getvalue()
