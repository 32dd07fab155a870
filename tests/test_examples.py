"""The scripts of `examples/` run, with tiny settings, and the tutorials show their code."""

import re
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
    "tune_agent.py": (
        [*"--trials 2 --total-timesteps 32 --num-envs 2 --episodes 2".split(), "--out", "{out}"],
        "study.log",
        "best: trial",
    ),
    "adapt_and_use.py": (
        [*"--steps 2 --max-images 2".split(), "--out", "{out}"],
        "naive-decoder-0/adapter.safetensors",
        "adapted    mean IoU",
    ),
    "ppo.py": (
        [
            *"--total-timesteps 32 --num-envs 2 --train-images 2 --eval-episodes 2".split(),
            *("--out", "{out}/agent.pt"),
        ],
        "agent.pt",
        "32 steps",
    ),
    "custom_dataset.py": (
        [*"--images 2 --episodes 1 --workers 0".split(), "--data", "{out}"],
        "coins.csv",
        "oracle    mean IoU",
    ),
    "custom_reward.py": (
        [*"--total-timesteps 32 --num-envs 2 --episodes 1".split(), "--out", "{out}"],
        "policy.zip",
        "trained: mean IoU",
    ),
    "custom_backbone.py": (["--images", "1"], None, "custom_backbone:HALF  mean IoU"),
    "continual_folders.py": (
        [*"--steps 1 --images 1 --methods naive".split(), "--out", "{out}"],
        "naive-decoder-0/adapter.safetensors",
        "after night",
    ),
    "whole_objects.py": (
        [*"--steps 1 --max-images 1 --grid 4".split(), "--out", "{out}"],
        "saom_v1-decoder-0/adapter.safetensors",
        "whole objects",
    ),
    "semantic_head.py": (
        [*"--steps 1 --max-images 1 --head seed".split(), "--out", "{out}"],
        "labels.png",
        "mean IoU",
    ),
    "track_video.py": (
        [*"--frames 4 --corrections 1".split(), "--out", "{out}/film.gif"],
        "film.gif",
        "and a correction in frame",
    ),
    "fine_tune_tracker.py": (
        [*"--videos 4 --held-out 1 --frames 8 --steps 1".split(), "--out", "{out}"],
        "run-0/adapter.safetensors",
        "held-out J&F",
    ),
}
TUTORIALS = sorted((EXAMPLES.parent / "docs" / "tutorials").glob("*.md"))


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
    if "import optuna" in (EXAMPLES / script).read_text():
        pytest.importorskip("optuna")
    options, written, printed = RUNS[script]
    arguments = [option.format(out=tmp_path / "out") for option in options]
    monkeypatch.chdir(tmp_path)
    done = start_script(str(EXAMPLES / script), *arguments).finish()
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout
    assert written is None or (tmp_path / "out" / written).is_file()


def test_every_tutorial_is_listed() -> None:
    names = {path.stem for path in TUTORIALS} - {"index"}
    index = next(path for path in TUTORIALS if path.stem == "index").read_text()
    assert names == set(re.findall(r"\((\w+)\.md\)", index))
    assert names == set(re.findall(r"\| `examples/(\w+)\.py` \|", index))


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda path: path.stem)
def test_tutorials_show_the_code_of_their_script(page: Path) -> None:
    if page.stem == "index":
        return
    script = _tokens((EXAMPLES / f"{page.stem}.py").read_text())
    shown = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    assert shown
    for block in shown:
        assert _tokens(block) in script, block


def _tokens(code: str) -> str:
    """Return code without what a formatter changes where it is indented less."""
    return re.sub(r"[\s,]", "", code)


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda path: path.stem)
def test_links_of_tutorials_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link
