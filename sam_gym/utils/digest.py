"""Digests that identify weights, images and files. All are SHA-256, some cut short."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def digest_of(state: Mapping[str, Tensor], label: str = "") -> str:
    """Hex digest of a state dict and a label, 32 characters."""
    import torch  # here, since readers of files need only the other digests

    digest = hashlib.sha256(label.encode())
    for key, value in sorted(state.items()):
        digest.update(key.encode())
        content: Any = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()[:32]


def image_digest(image: np.ndarray) -> bytes:
    """Digest of an image's shape and pixels."""
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.digest()


def file_digest(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_digest(*parts: object) -> str:
    """Hex digest of a sequence of values, each as text; 16 characters."""
    text = "\0".join(map(str, parts))
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:16]
