"""Digests that identify weights, images and files. All are SHA-256, some cut short."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def digest_of(state: Mapping[str, Tensor], label: str = "") -> str:
    """Hex digest of a state dict and a label, 32 characters."""
    digest = hashlib.sha256(label.encode())
    for key, value in sorted(state.items()):
        digest.update(key.encode())
        content: Any = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()[:32]
