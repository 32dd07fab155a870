"""Copies between host and device, and how often a step waits for one."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sam_gym.envs import click as core_module
from sam_gym.utils.transfer import to_device, to_host


def test_there_and_back() -> None:
    arrays = [np.arange(6).reshape(2, 3), np.array([True, False]), np.float32([1.5])]
    device = torch.device("cpu")
    for array, copy in zip(arrays, to_host(*(to_device(a, device) for a in arrays)), strict=True):
        np.testing.assert_array_equal(copy, array)
        assert copy.dtype == array.dtype


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a device: reading a value, or a size from one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal"}:
            raise AssertionError(f"a step calls {name}, which waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep_best", [False, True])
def test_a_step_waits_for_the_device_once(
    tiny_env: dict, keep_best: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    env: Any = gym.make_vec(
        "SamSeg-v0",
        4,
        vectorization_mode="vector_entry_point",
        **tiny_env,
        obs="handle",
        keep_best=keep_best,
    )
    env.reset(seed=0)
    waits = []

    def counted(*tensors: torch.Tensor) -> list[np.ndarray]:
        waits.append(len(tensors))
        return to_host(*tensors)

    monkeypatch.setattr(core_module, "to_host", counted)
    with NoWaiting():
        for _ in range(3):
            env.step(env.action_space.sample())
    assert waits == [3, 3, 3]
    env.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_on_cuda_synchronises_nowhere_else(tiny_env: dict) -> None:
    env: Any = gym.make_vec(
        "SamSeg-v0",
        4,
        vectorization_mode="vector_entry_point",
        **tiny_env | {"device": "cuda"},
        obs="handle",
    )
    env.reset(seed=0)
    env.step(env.action_space.sample())
    torch.cuda.set_sync_debug_mode("error")
    try:
        env.step(env.action_space.sample())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    env.close()
