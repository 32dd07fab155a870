"""A run that was stopped comes to the same as one that was not."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.ppo.checkpoint import (
    check_same_config,
    checkpoints,
    newest_checkpoint,
    write_checkpoint,
)
from agents.ppo.config import TrainPPOConfig
from agents.train_ppo import main

Arguments = Callable[..., list[str]]


def killed(start: Callable[..., subprocess.Popen[str]], *arguments: str) -> str:
    """Let a run be killed; what it had printed."""
    process = start(*arguments)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == -9, printed
    return printed


@pytest.mark.slow
def test_a_stopped_run_comes_to_the_same(
    tiny_env: dict[str, Any],
    arguments: Arguments,
    start_training: Callable[..., subprocess.Popen[str]],
    assert_same: Callable[[Path, Path], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    through = tmp_path / "through"
    main(arguments(through))
    assert not (through / "checkpoints").exists()

    stopped, damaged = tmp_path / "stopped", tmp_path / "damaged"
    killed(start_training, "--die-at", "172", *arguments(stopped))
    shutil.copytree(stopped, damaged)
    newest, before = checkpoints(stopped / "checkpoints")
    assert (newest.stem, before.stem) == ("000000000128", "000000000064")
    with pytest.raises(FileExistsError, match="not finished. Pass --resume"):
        main(arguments(stopped))
    with pytest.raises(ValueError, match=r"learning_rate \(0.001 then, 0.5 now\)"):
        main(arguments(stopped, "--resume", "--learning-rate", "0.5"))
    main(arguments(stopped, "--resume"))
    assert_same(stopped, through)
    assert "step 128" in capsys.readouterr().out

    newest = checkpoints(damaged / "checkpoints")[0]
    newest.write_bytes(newest.read_bytes()[:-100])
    main(arguments(damaged, "--resume"))
    assert_same(damaged, through)
    printed = capsys.readouterr().out
    assert f"{newest} is damaged" in printed and "step 64" in printed

    writing = tmp_path / "writing"
    killed(start_training, "--die-in-write", "2", *arguments(writing))
    files = sorted(path.name for path in (writing / "checkpoints").iterdir())
    assert len(files) == 2 and files[0].startswith(".000000000064.ckpt.")
    main(arguments(writing, "--resume"))
    assert_same(writing, through)


def test_only_the_newest_two_are_kept(tmp_path: Path) -> None:
    left, growing = tmp_path / ".000000000001.ckpt.7", tmp_path / ".000000000001.ckpt.8"
    for unfinished in (left, growing):
        unfinished.write_bytes(b"half a check")
    os.utime(left, (0, 0))
    for step in (5, 50, 500):
        write_checkpoint(tmp_path, {"step": step, "values": torch.arange(step)})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        growing.name,
        "000000000050.ckpt",
        "000000000500.ckpt",
    ]
    assert len(newest_checkpoint(tmp_path)["values"]) == 500


def test_nothing_to_resume_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="without --resume"):
        newest_checkpoint(tmp_path / "nowhere")
    write_checkpoint(tmp_path, {"step": 5}).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        newest_checkpoint(tmp_path)


def test_a_run_that_was_not_started_is_started(
    tiny_env: dict[str, Any],
    arguments: Arguments,
    start_training: Callable[..., subprocess.Popen[str]],
    assert_same: Callable[[Path, Path], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A job that is restarted passes --resume each time."""
    through, out = tmp_path / "through", tmp_path / "out"
    short = ("--total-timesteps", "96", "--checkpoint-every", "10000")
    main(arguments(through, *short))
    # The first checkpoint follows the first rollout, whatever --checkpoint-every.
    printed = killed(start_training, "--die-at", "40", *arguments(out, *short, "--resume"))
    assert "no checkpoint yet. Starting the run." in printed
    assert [path.stem for path in checkpoints(out / "checkpoints")] == ["000000000032"]
    main(arguments(out, *short, "--resume"))
    assert "Resuming at step 32" in capsys.readouterr().out
    assert_same(out, through)
    written = (out / "results.json").read_bytes()
    assert main(arguments(out, *short, "--resume")) == json.loads(written)
    assert "holds the complete run" in capsys.readouterr().out
    assert (out / "results.json").read_bytes() == written
    with pytest.raises(ValueError, match="learning_rate .* then, 0.5 now"):
        main(arguments(out, *short, "--resume", "--learning-rate", "0.5"))


def test_only_settings_that_change_nothing_may_differ() -> None:
    config = TrainPPOConfig()
    moved = replace(
        config, out="elsewhere", resume=True, env_config=replace(config.env_config, cache_mib=7)
    )
    check_same_config(asdict(config), asdict(moved))
    harder = replace(config, seed=4, env_config=replace(config.env_config, max_steps=3))
    with pytest.raises(
        ValueError, match=r"env_config.max_steps \(5 then, 3 now\); seed \(0 then, 4"
    ):
        check_same_config(asdict(config), asdict(harder))
