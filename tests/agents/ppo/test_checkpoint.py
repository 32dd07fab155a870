"""A run that was stopped comes to the same as one that was not."""

import hashlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam

from agents.policies.base import resolve_precision
from agents.ppo.checkpoint import (
    Checkpoint,
    _set_rng_state,
    check_same_config,
    checkpoints,
    newest_checkpoint,
    write_checkpoint,
)
from agents.ppo.config import TrainPPOConfig
from agents.train_ppo import main
from sam_gym.backbones.spec import FIRST_MICRO
from sam_gym.utils.training import read_state

Arguments = Callable[..., list[str]]

#: Three rollouts; episodes go on after a checkpoint.
SHORT = ("--total-timesteps", "96", "--eval-every", "32", "--max-steps", "3")
EVERY, FIRST_ONLY = (("--checkpoint-every", steps) for steps in ("32", "10000"))


@pytest.fixture(scope="module")
def through(
    build_tiny: Callable[[], Sam],
    backbone_added: Callable[..., AbstractContextManager[None]],
    arguments: Arguments,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run that was not stopped."""
    out = tmp_path_factory.mktemp("through")
    with backbone_added("tiny", build=build_tiny):
        main(arguments(out, *SHORT, *EVERY))
    return out


def killed(start: Callable[..., Any], *arguments: str) -> str:
    """Let a run be killed; what it had printed."""
    done = start(*arguments).finish()
    assert done.returncode == -9, done
    return done.stdout


@pytest.mark.slow
def test_a_stopped_run_comes_to_the_same(
    tiny_env: dict[str, Any],
    arguments: Arguments,
    start_training: Callable[..., Any],
    assert_same: Callable[[Path, Path], None],
    through: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert not (through / "checkpoints").exists()
    stopped, damaged, short = tmp_path / "stopped", tmp_path / "damaged", (*SHORT, *EVERY)
    killed(start_training, "--die-at", "76", *arguments(stopped, *short))
    shutil.copytree(stopped, damaged)
    newest, before = checkpoints(stopped / "checkpoints")
    # A run goes on as it began, on other hardware too.
    precision = newest_checkpoint(stopped / "checkpoints")["settings"]["precision"]
    assert precision == resolve_precision("auto", torch.device("cpu")) != "auto"
    assert (newest.stem, before.stem) == ("000000000064", "000000000032")
    with pytest.raises(FileExistsError, match="not finished. Pass --resume"):
        main(arguments(stopped, *short))
    with pytest.raises(ValueError, match=r"learning_rate \(0.001 then, 0.5 now\)"):
        main(arguments(stopped, *short, "--resume", "--learning-rate", "0.5"))
    main(arguments(stopped, *short, "--resume"))
    assert_same(stopped, through)
    assert "step 64" in capsys.readouterr().out

    newest = checkpoints(damaged / "checkpoints")[0]
    newest.write_bytes(newest.read_bytes()[:-100])
    assert newest_checkpoint(damaged / "checkpoints")["step"] == 32
    assert f"{newest} is damaged" in capsys.readouterr().out

    writing = tmp_path / "writing"
    killed(start_training, "--die-in-write", "2", *arguments(writing, *short))
    files = sorted(path.name for path in (writing / "checkpoints").iterdir())
    assert len(files) == 2 and files[0].startswith(".000000000064.ckpt.")
    assert newest_checkpoint(writing / "checkpoints")["step"] == 32
    assert capsys.readouterr().out == ""


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
    start_training: Callable[..., Any],
    assert_same: Callable[[Path, Path], None],
    through: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A job that is restarted passes --resume each time."""
    out, short = tmp_path / "out", (*SHORT, *FIRST_ONLY)
    # The first checkpoint follows the first rollout, whatever --checkpoint-every.
    printed = killed(start_training, "--die-at", "40", *arguments(out, *short, "--resume"))
    assert "no checkpoint yet. Starting the run." in printed
    assert [path.stem for path in checkpoints(out / "checkpoints")] == ["000000000032"]
    weights = Path(tiny_env["checkpoint"])
    before = weights.read_bytes()
    with pytest.raises(ValueError, match="with other weights of the backbone: a file has changed"):
        torch.save({k: 1.01 * v for k, v in read_state(weights).items()}, weights)
        main(arguments(out, *short, "--resume"))
    weights.write_bytes(before)
    main(arguments(out, *short, "--resume"))
    assert "Resuming at step 32" in capsys.readouterr().out
    assert_same(out, through)

    stopped = tmp_path / "stopped"
    done = start_training("--stop-at", "76", *arguments(stopped, *short)).finish()
    assert done.returncode == 130 and "Traceback" not in done.stdout + done.stderr
    last = done.stderr.splitlines()[-1]
    assert last == f"Interrupted. Pass --resume to resume {stopped} at step 64."
    assert [path.stem for path in checkpoints(stopped / "checkpoints")] == [
        "000000000064",
        "000000000032",
    ]
    main(arguments(stopped, *short, "--resume"))
    assert_same(stopped, through)

    written = (out / "results.json").read_bytes()
    assert main(arguments(out, *short, "--resume")) == json.loads(written)
    assert "holds the complete run" in capsys.readouterr().out
    assert (out / "results.json").read_bytes() == written
    with pytest.raises(ValueError, match="learning_rate .* then, 0.5 now"):
        main(arguments(out, *short, "--resume", "--learning-rate", "0.5"))


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def put(folder: Path, body: bytes) -> None:
    (folder / "000000000005.ckpt").write_bytes(hashlib.sha256(body).digest() + body)


def test_nothing_in_a_checkpoint_runs(tmp_path: Path) -> None:
    sprung, content = tmp_path / "sprung", io.BytesIO()
    torch.save({"step": 5, "settings": {}, "trap": Trap(sprung)}, content)
    for header in (b"", b"{}\n"):
        put(tmp_path, header + content.getvalue())
        with pytest.raises(ValueError, match="not a checkpoint of train_ppo .*Delete it to resume"):
            newest_checkpoint(tmp_path)
    assert not sprung.exists()


def test_settings_are_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    def check(settings: dict[str, Any]) -> None:
        assert settings == {"seed": 3}
        raise ValueError("another seed")

    put(tmp_path, b'{"seed": 3}\nno state at all')
    with pytest.raises(ValueError, match="another seed"):
        newest_checkpoint(tmp_path, check)


def test_a_state_of_another_kind_is_one_line(tmp_path: Path) -> None:
    model = SimpleNamespace(policy=SimpleNamespace(frozen_weights=dict))
    checkpoint = Checkpoint(tmp_path, {}, 1, SimpleNamespace(venv=None), {})  # type: ignore[arg-type]
    for state, reason in (
        ({}, "does not fit this run .KeyError: 'threads'"),
        ({"threads": 10**9}, "a checkpoint of 1000000000 threads"),
        ({"weights": {"CLIP": "1"}}, "other weights of the CLIP"),
    ):
        with pytest.raises(ValueError, match=reason):
            checkpoint.restore(model, state)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no state of numpy's generator: 700"):
        numpy = ("MT19937", np.zeros(624, np.uint32), 700, 0, 0.0)
        _set_rng_state({"python": random.getstate(), "numpy": numpy}, torch.device("cpu"))


def test_runs_on_the_first_micro_are_resumed_by_its_present_name(tmp_path: Path) -> None:
    def options(backbone: str, **more: Any) -> dict[str, Any]:
        return {"env_config": {"backbone": backbone, "checkpoint": None, **more}}

    check_same_config(options("micro"), options("micro-v0"))
    for then, now in (("micro-v0", "micro"), ("micro", "vit_b")):
        with pytest.raises(ValueError, match=f"backbone \\('{then}' then, '{now}' now\\)"):
            check_same_config(options(then), options(now))

    model = SimpleNamespace(policy=SimpleNamespace(frozen_weights=lambda: {"backbone": "new"}))
    checkpoint = Checkpoint(tmp_path, {}, 1, SimpleNamespace(venv=None), {})  # type: ignore[arg-type]
    former = {"settings": options("micro")["env_config"]}  # without weights, by the former name
    for state in ({"weights": {"backbone": FIRST_MICRO}}, {"settings": former}):
        with pytest.raises(ValueError, match="now called 'micro-v0'. Pass --backbone micro-v0 to"):
            checkpoint.restore(model, state)  # type: ignore[arg-type]
    model.policy.frozen_weights = lambda: {"backbone": FIRST_MICRO}
    for settings in (former, options("micro-v0"), options("micro", checkpoint="own.pth")):
        with pytest.raises(ValueError, match="'threads'"):
            checkpoint.restore(model, {"settings": settings})  # type: ignore[arg-type]


def test_a_state_is_read_as_it_was(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    state: dict[str, Any] = {
        "step": 5,
        "numbers": [np.float32(0.1), np.int64(-3), np.bool_(True), 2**120, 0.1, None, "text"],
        "arrays": (np.arange(6.0).reshape(2, 3).T, np.zeros((0, 3), np.uint8), np.array(7)),
        "rng": np.random.get_state(),
        "generator": rng.bit_generator.state,
        "tensors": {0: torch.arange(3), "x": torch.ones(2, dtype=torch.bfloat16)},
    }
    write_checkpoint(tmp_path, state)
    found = newest_checkpoint(tmp_path)
    assert list(found) == [*state, "settings"]

    def same(one: Any, other: Any) -> None:
        assert type(one) is type(other)
        if isinstance(one, dict):
            assert list(one) == list(other)
            one, other = list(one.values()), list(other.values())
        if isinstance(one, list | tuple):
            for pair in zip(one, other, strict=True):
                same(*pair)
        elif isinstance(one, np.ndarray | np.generic):
            assert one.dtype == other.dtype and one.shape == other.shape and (one == other).all()
        elif isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other)
        else:
            assert one == other

    same(state | {"settings": {}}, found)
    with pytest.raises(TypeError, match="cannot hold PosixPath"):
        write_checkpoint(tmp_path, {"step": 6, "path": tmp_path})


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
