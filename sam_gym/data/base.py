"""What a dataset yields, and what a dataset is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from sam_gym.utils.registry import unknown_name


def select_categories(wanted: str | Sequence[str] | None, names: Sequence[str]) -> tuple[str, ...]:
    """The categories that are asked for, in that order, without repetition.

    Args:
        wanted: names, as a sequence or as one string with commas; None: all.
        names: those that there are.

    Raises:
        ValueError: an unknown name, or none at all.
    """
    if wanted is None:
        return tuple(names)
    if isinstance(wanted, str):
        wanted = [name.strip() for name in wanted.split(",")]
    for name in wanted:
        if name not in names:
            raise unknown_name("category", name, names)
    if not wanted:
        raise ValueError("categories is empty. Name at least one, or pass None for all.")
    return tuple(dict.fromkeys(wanted))


def image_digest(image: np.ndarray) -> bytes:
    """What identifies an image: SHA-256 of its shape and pixels."""
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.digest()


@dataclass(frozen=True)
class Sample:
    """One image with its annotated instances.

    Attributes:
        image: uint8 (H, W, 3), RGB.
        masks: bool (N, H, W), one visible mask per instance.
        categories: int64 (N,), index of each instance's category in `Dataset.categories`.
        source: where the sample comes from, for messages and result tables.
        ignore: bool (H, W) of pixels that metrics leave out, or None.
        parts: bool (P, H, W), visible masks of parts of instances (training targets only), or None.
        digest: `image_digest` of the image, if it is known already.
    """

    image: np.ndarray
    masks: np.ndarray
    categories: np.ndarray
    source: str
    ignore: np.ndarray | None = None
    parts: np.ndarray | None = None
    digest: bytes | None = None

    def category_mask(self, category: int) -> np.ndarray:
        """The union of all instances of `category`: bool (H, W)."""
        return self.masks[self.categories == category].any(axis=0)


class MissingSplit(FileNotFoundError):
    """The data has no such split; some come without a test split."""


@runtime_checkable
class Dataset(Protocol):
    """What environments, trainers and benchmarks need of a dataset.

    A dataset validates its annotations when it is made, so that bad input stops before work starts.
    """

    name: str
    categories: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`, always the same; `IndexError` outside `range(len(self))`."""
        ...

    def draw(self, rng: np.random.Generator) -> tuple[int, int | None]:
        """Draw an image: its index, and the category to segment (None: any in the image)."""
        ...
