"""The scripts of `examples/` run, with tiny settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

#: Script -> tiny settings, a file that it writes into its folder, and what it prints.
RUNS = {
    "predict.py": (["--out", "{out}/masks.png"], "masks.png", "predicted IoU"),
    "train_agent.py": (
        [*"--total-timesteps 32 --num-envs 2 --episodes 2".split(), "--out", "{out}"],
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
def test_example(
    script: str,
    start_script: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options, written, printed = RUNS[script]
    arguments = [option.format(out=tmp_path / "out") for option in options]
    monkeypatch.chdir(tmp_path)
    done = start_script(str(EXAMPLES / script), *arguments).finish()
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout and (tmp_path / "out" / written).is_file()
