"""The scripts of `examples/` run, with tiny settings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

#: Script -> tiny settings, a file that it writes into its folder, and what it prints.
RUNS = {
    "predict.py": (["--out", "{out}/masks.png"], "masks.png", "predicted IoU"),
    "train_agent.py": (
        [*"--total-timesteps 64 --num-envs 4 --episodes 4".split(), "--out", "{out}"],
        "policy.zip",
        "trained  mean IoU",
    ),
    "adapt_and_use.py": (
        [*"--steps 2 --max-images 2".split(), "--out", "{out}"],
        "naive-decoder-0/adapter.safetensors",
        "adapted    mean IoU",
    ),
}


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("script", RUNS)
def test_example(script: str, tmp_path: Path) -> None:
    options, written, printed = RUNS[script]
    arguments = [option.format(out=tmp_path / "out") for option in options]
    search = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": search},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout and (tmp_path / "out" / written).is_file()
