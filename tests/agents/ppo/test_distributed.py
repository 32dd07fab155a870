"""Two processes with half of the environments each learn what one learns with all of them."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor

from agents.ppo.config import TrainPPOConfig
from agents.ppo.distributed import share_gradients
from agents.ppo.run import make_model
from agents.ppo.vec_env import VectorEnvAdaptor, make_vector_env
from agents.train_ppo import main
from sam_gym.envs.click import SamSegConfig
from sam_gym.utils.process_group import ProcessGroup

Start = Callable[..., Any]
Outcome = Callable[[Path], dict[str, Any]]

#: Three rollouts of 32 steps, with a checkpoint after each but the last, often within an episode.
SHORT = ("--total-timesteps", "96", "--checkpoint-every", "32", "--max-steps", "3")


@pytest.fixture
def run_job(start_training: Start) -> Callable[..., list[tuple[int, str]]]:
    """Runs two ranks; exit status of each and what it has printed."""

    def run_job(*arguments: str, first: tuple[str, ...] = ()) -> list[tuple[int, str]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes = [
            start_training(*more, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **job)
            for rank, more in enumerate((first, ()))
        ]
        ended = [process.finish() for process in processes]
        return [(done.returncode, done.stdout + done.stderr) for done in ended]

    return run_job


def assert_close(got: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(got["learned"], expected["learned"], rtol=0, atol=1e-4)
    assert got["logged"].keys() == expected["logged"].keys()
    for tag, curve in expected["logged"].items():
        np.testing.assert_allclose(got["logged"][tag], curve, rtol=1e-3, atol=1e-4, err_msg=tag)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [("--total-timesteps", "64"), ("--recalibrate", "--warm-start", "32")]
)
def test_two_ranks_learn_what_one_process_learns_and_go_on_after_a_stop(
    more: tuple[str, ...],
    tiny_env: dict[str, Any],
    arguments: Callable[..., list[str]],
    run_job: Callable[..., list[tuple[int, str]]],
    outcome: Outcome,
    assert_same: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    alone, together, stopped = (tmp_path / name for name in ("alone", "together", "stopped"))
    # In bfloat16, sums over two halves round to other numbers.
    options = (*SHORT, *more, "--precision", "32-true")
    main(arguments(alone, *options))
    for status, printed in run_job(*arguments(together, *options)):
        assert status == 0, printed
    assert_close(outcome(together), outcome(alone))
    if "--recalibrate" not in more:  # the run with everything is stopped
        return

    (first, _), (second, message) = run_job(*arguments(stopped, *options), first=("--die-at", "72"))
    assert (first, second) == (-9, 1)
    assert (
        "error: Another rank has stopped; see its message above. Resume with --resume." in message
    )
    assert len(list((stopped / "checkpoints").glob("*.ckpt"))) == 2
    for status, printed in run_job(*arguments(stopped, *options, "--resume")):
        assert status == 0, printed
    assert_same(stopped, together)


def test_what_cannot_be_shared_out_is_an_error() -> None:
    assert ProcessGroup(1, 4).share(8) == 2
    with pytest.raises(ValueError, match="num_envs must be a multiple of the 4 processes, got 6"):
        ProcessGroup(1, 4).share(6)


def test_a_batch_has_equally_many_samples_of_each_environment(
    arguments: Callable[..., list[str]], tiny_env: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="multiple of num_envs.* got 18 with 4 environments"):
        main(arguments(tmp_path, "--batch-size", "18"))


def test_what_is_saved_loads_as_plain_ppo_and_learns_on(
    tiny_env: dict[str, Any], tmp_path: Path
) -> None:
    settings = SamSegConfig(**tiny_env, obs="handle")
    config = TrainPPOConfig(num_envs=4, n_steps=8, batch_size=16)
    vector, core = make_vector_env("SamSeg-v0", 4, settings)
    env = VecMonitor(VectorEnvAdaptor(vector))
    make_model(config, settings, env, core).save(tmp_path / "policy.zip")
    loaded = PPO.load(tmp_path / "policy.zip", env=env, device="cpu")
    assert (loaded.normalize_advantage, loaded.max_grad_norm) == (True, 0.5)
    loaded.learn(32)
    assert loaded.num_timesteps == 32


def test_gradients_are_clipped_before_a_step() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    share_gradients(optimizer, ProcessGroup(), max_norm=0.5)
    parameter.grad = torch.tensor([3.0, 0.0, 4.0, 0.0])
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.3, 0.0, -0.4, 0.0]))
