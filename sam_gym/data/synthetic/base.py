"""The base class of procedural datasets, which generate images from a seed and an index."""

from __future__ import annotations

import zlib

import numpy as np

from sam_gym.utils.registry import check_choice
from sam_gym.utils.settings import Count, Natural, checked

#: Split name -> first word of the seed, which makes the splits disjoint.
SPLITS = {"train": 1, "val": 2, "test": 3}


class Procedural:
    """A dataset whose images are generated; the same index always gives the same image.

    Args:
        split: "train", "val" or "test"; disjoint by seed.
        length: number of different images (None: 2^31 - 1, practically endless).
        size: height of the images, in pixels.
        largest: maximum size.
        seed: seed of all images.

    Raises:
        ValueError: the split, length, size or seed is impossible.
    """

    name: str
    #: Name of an image in messages.
    noun = "image"

    @checked
    def __init__(
        self, split: str, length: Count | None, size: int, largest: int = 1024, seed: Natural = 0
    ) -> None:
        check_choice("split", split, SPLITS)
        if not 64 <= size <= largest:
            raise ValueError(f"size must be from 64 to {largest} pixels, got {size}.")
        self.split, self.length, self.size, self.seed = split, length, size, seed

    def __len__(self) -> int:
        return 2**31 - 1 if self.length is None else self.length

    def draw(self, rng: np.random.Generator) -> tuple[int, int | None]:
        """Draw an image uniformly; the category is None: any in the image."""
        return int(rng.integers(len(self))), None

    def check_index(self, index: int) -> None:
        """Raise `IndexError` for an index out of range."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.noun} {index} is not in range({len(self)}).")

    def words(self, index: int) -> list[int]:
        """Return the seed of an image's random generator; raise as `check_index` does."""
        self.check_index(index)
        return [SPLITS[self.split], self.seed, zlib.crc32(self.name.encode()), index]

    def source(self, index: int) -> str:
        """Return the name of a sample."""
        return f"{self.name}/{self.split}/{index}"
