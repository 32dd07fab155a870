"""Copy arrays between host and device with few synchronisations."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device asynchronously; on a CPU, share its memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_host(*tensors: Tensor) -> list[np.ndarray]:
    """Copy tensors of one device to arrays with one synchronisation.

    Arrays of CPU tensors share their memory.
    """
    copies = [tensor.detach().to("cpu", non_blocking=True) for tensor in tensors]
    synchronise(tensors[0].device)
    return [copy.numpy() for copy in copies]


def synchronise(device: torch.device) -> None:
    """Wait for all queued work of a device."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()
