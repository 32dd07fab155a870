"""Torch works in forked processes, whose parent has used its thread pool."""

import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv

import sam_gym  # noqa: F401
from sam_gym.utils.processes import survive_forks

pytestmark = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork"
)


def use_torch() -> None:
    """Run an operation that is large enough for several threads."""
    torch.ones(2**20).sigmoid()


@pytest.fixture(autouse=True)
def thread_pool() -> Iterator[None]:
    """The threads of torch's pool are running in this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    use_torch()
    yield
    torch.set_num_threads(before)


def fork(work: Callable[[], None]) -> None:
    """Run a function in a forked process; fail if it raises or takes too long."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(timeout=60)
    process.kill()
    assert process.exitcode == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_torch_works_in_a_fork_and_in_a_fork_of_a_fork() -> None:
    def child() -> None:
        use_torch()
        assert torch.get_num_threads() == 1
        fork(use_torch)

    fork(child)
    assert torch.get_num_threads() == 2


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_importing_the_package_in_a_fork_is_soon_enough() -> None:
    def child() -> None:
        torch.set_num_threads(2)  # as in a fork of a process that has not imported the package
        survive_forks()
        use_torch()

    fork(child)
    survive_forks()
    assert torch.get_num_threads() == 2


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_workers_play(tiny_env: dict[str, Any]) -> None:
    envs = AsyncVectorEnv([lambda: gym.make("SamSeg-v0", **tiny_env)] * 2, context="fork")
    try:
        envs.reset_async(seed=0)
        observations, _ = envs.reset_wait(timeout=60)
        envs.step_async(envs.action_space.sample())
        envs.step_wait(timeout=60)
        assert observations["image"].any()
    finally:
        envs.close(terminate=True)
