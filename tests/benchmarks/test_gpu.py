"""`benchmarks/gpu.sh`: a dry run on a CPU, the commands for a GPU, and parts that do not finish."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu import GpuConfig, Part
from benchmarks.run import load, main
from sam_gym.utils import cli
from sam_gym.utils.provenance import HERE

SCRIPT = HERE / "benchmarks" / "gpu.sh"
#: Limits that no part reaches, however busy the machine is.
PATIENT = ("--minutes", "60", "--part-minutes", "30")


def command(out: Path, *more: str) -> list[str]:
    return ["--device", "cpu", "--quick", "--out", str(out), *PATIENT, *more]


@pytest.mark.slow
def test_the_script_runs_all_parts_and_keeps_what_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], forking_python: str
) -> None:
    out = tmp_path / "out"
    path = os.pathsep.join([os.path.dirname(forking_python), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", SCRIPT, *command(out)],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    names = [part.name for part in gpu.quick_parts()]
    assert list(results["parts"]) == names and len(names) == 3
    for number, (name, part) in enumerate(results["parts"].items(), 1):
        assert f"[{number}/3] {name}: done after" in done.stdout
        assert part["status"] == "done" and part["seconds"] > 0 and not part["message"]
        assert part["results"] == json.loads((out / name / "results.json").read_text())
    dtypes = [results["parts"][name]["results"]["dtype"] for name in names[:2]]
    assert dtypes == ["float32", "bfloat16"]
    table = (out / "table.md").read_text()
    for heading in ("Environments", "Models", "Everything mode", "Tracking", "Parts"):
        assert f"\n## {heading}\n\n| " in table
    assert "| micro-v0, random weights | float32 | 2 | cached |" in table
    assert "A trial of the script" in table and f"Table: {out / 'table.md'}" in done.stdout
    assert (out / "report.html").is_file() and (out / "parts.csv").is_file()

    again = main(["gpu", *command(out)])
    assert again == results
    assert capsys.readouterr().out.count(": finished before.") == 3
    with pytest.raises(FileExistsError, match="holds a run of another command"):
        main(["gpu", *command(out, "--seed", "1")])


def test_the_help_of_the_script_is_that_of_the_benchmark(
    capsys: pytest.CaptureFixture[str],
) -> None:
    interpreter = {"PYTHON": "echo"}
    done = subprocess.run(
        ["bash", SCRIPT, "--help"], capture_output=True, text=True, env=os.environ | interpreter
    )
    assert done.stdout == "-m benchmarks.run gpu --help\n"
    with pytest.raises(SystemExit, match="0"):
        main(["gpu", "--help"])
    assert "Measure one GPU in about ten minutes" in capsys.readouterr().out
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.parametrize("downloaded", [False, True])
def test_commands_for_a_gpu_are_valid(
    downloaded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if downloaded:
        (tmp_path / "weights.pth").touch()
    monkeypatch.setattr(gpu, "default_path", lambda name: tmp_path / "weights.pth")
    parts, found = gpu.full_parts(), []
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        config: Any = cli.parse(load(part.benchmark)[1], "x", [*part.options, "--device", "cpu"])
        config.validate()
        if part.benchmark == "throughput":
            found.append((config.backbone, config.dtype, config.compile))
        if part.benchmark != "video_speed":
            assert config.random_weights is not downloaded
        if part.benchmark == "generator":
            assert config.pred_iou_thresh == (0.88 if downloaded else 0.0)
    sizes = [(name, dtype) for name in ("vit_b", "vit_l", "vit_h") for dtype in gpu._DTYPES]
    assert sorted(found) == sorted([*((*own, False) for own in sizes), ("vit_b", "bfloat16", True)])


def two_parts() -> Sequence[Part]:
    return [
        Part("wrong", "interactive", ("--dataset", "foldr")),
        Part("slow", "generator", ("--grids", "64x64", "--images", "4", "--no-memory")),
    ]


@pytest.mark.slow
def test_a_part_that_fails_or_takes_too_long_does_not_stop_the_others(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    forking_python: str,
) -> None:
    monkeypatch.setattr(sys, "executable", forking_python)
    monkeypatch.setattr(gpu, "quick_parts", two_parts)
    options = ["gpu", "--device", "cpu", "--quick", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="2 of 2 parts are missing: wrong, slow"):
        main([*options, "--minutes", "1e-9"])
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert [part["status"] for part in parts.values()] == ["not run", "not run"]

    with pytest.raises(SystemExit, match="1 of 1 parts are missing: wrong"):
        main([*options, *PATIENT, "--parts", "wrong"])
    # A part of which the first results were there: they are shown.
    with pytest.raises(SystemExit, match="1 of 1 parts are missing: slow"):
        main([*options, "--part-minutes", "0.001", "--parts", "slow"])
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert [part["status"] for part in parts.values()] == ["failed", "failed"]
    assert "Did you mean 'folder'?" in parts["wrong"]["message"]
    assert parts["slow"]["message"] == "stopped after 0.001 minutes"
    assert (
        parts["wrong"]["results"] is None
        and "wrong | failed" in (tmp_path / "table.md").read_text()
    )
    assert "wrong: failed after" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (("--device", "cpu"), "sized for a GPU. Pass --quick"),
        (("--device", "gpu"), "Unknown device 'gpu'"),
        (
            ("--quick", "--device", "cpu", "--parts", "video-speed"),
            "Did you mean 'video_speed-small'",
        ),
        (("--quick", "--device", "cpu", "--minutes", "0"), "--minutes must be positive"),
    ],
)
def test_options_that_cannot_work_are_refused(
    tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        main(["gpu", *options, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_every_part_has_its_own_command(tmp_path: Path) -> None:
    config = GpuConfig(device="cuda:1", seed=4, out=str(tmp_path))
    commands = [part.command(config)[3:] for part in gpu.full_parts()]
    assert len({tuple(own) for own in commands}) == len(commands)
    for own in commands:
        assert own[own.index("--device") + 1] == "cuda:1" and own[own.index("--seed") + 1] == "4"
