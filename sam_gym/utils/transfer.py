"""Arrays between the host and a device, without waiting where waiting is not needed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An array on a device. The copy runs while the host goes on; on a CPU there is none."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_host(*tensors: Tensor) -> list[np.ndarray]:
    """Tensors of one device as arrays: all copies are under way before one wait for all of them.

    From a CPU the arrays share memory with the tensors.
    """
    copies = [tensor.detach().to("cpu", non_blocking=True) for tensor in tensors]
    synchronise(tensors[0].device)
    return [copy.numpy() for copy in copies]


def synchronise(device: torch.device) -> None:
    """Wait until a device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()
