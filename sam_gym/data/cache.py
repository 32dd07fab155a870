"""A cache of samples: generating or decoding one costs more than a step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from sam_gym.data.base import Dataset, Sample
from sam_gym.utils.digest import image_digest


class SampleCache:
    """The most recently used samples of a dataset, with masks packed eight pixels to a byte.

    Args:
        dataset: source of the samples.
        max_bytes: maximum size of the cache; 0 caches nothing.
        check: raises `ValueError` for an image that cannot be used; called once an image is read.
    """

    def __init__(
        self,
        dataset: Dataset,
        max_bytes: int,
        check: Callable[[np.ndarray], None] | None = None,
    ) -> None:
        self.dataset, self.max_bytes, self._check = dataset, max_bytes, check
        self._kept: OrderedDict[int, tuple[Sample, np.ndarray]] = OrderedDict()
        self._bytes = 0
        #: Number of samples read from the dataset.
        self.misses = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of the images, masks and label maps that are kept."""
        return self._bytes

    def __getitem__(self, index: int) -> Sample:
        """Return the sample at `index`, with its digest and without its parts.

        Raises:
            ValueError: the dataset or `check` raises it; the message names the sample.
        """
        if index in self._kept:
            self._kept.move_to_end(index)
            sample, packed = self._kept[index]
            masks = np.unpackbits(packed, axis=-1, count=sample.image.shape[1]).view(bool)
            return replace(sample, masks=masks)
        self.misses += 1
        sample = self.dataset[index]
        if self._check is not None:
            try:
                self._check(sample.image)
            except ValueError as error:
                raise ValueError(f"{sample.source}: {error}") from error
        sample = replace(sample, parts=None, digest=image_digest(sample.image))
        packed = np.packbits(sample.masks, axis=-1)
        size = _bytes_of(sample, packed)
        if size <= self.max_bytes:
            self._kept[index] = replace(sample, masks=packed[:0]), packed
            self._bytes += size
            while self._bytes > self.max_bytes:
                _, (old, old_packed) = self._kept.popitem(last=False)
                self._bytes -= _bytes_of(old, old_packed)
        return sample


def _bytes_of(sample: Sample, packed: np.ndarray) -> int:
    labels = 0 if sample.semantic is None else sample.semantic.nbytes
    return sample.image.nbytes + packed.nbytes + labels
