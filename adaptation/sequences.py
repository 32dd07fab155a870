"""Sequences of arrays that are compressed, or computed when they are read."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

T = TypeVar("T")


class LazySequence(Sequence[T], Generic[T]):
    """Items that a function returns when they are read.

    Args:
        count: number of items.
        get: index -> item.
    """

    def __init__(self, count: int, get: Callable[[int], T]) -> None:
        self._count, self._get = count, get

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        chosen = range(self._count)[index]
        if isinstance(chosen, range):
            return LazySequence(len(chosen), lambda k: self._get(chosen[k]))
        return self._get(chosen)


class CompressedArrays:
    """Arrays of one shape and dtype, each compressed (zlib).

    Indexing with an integer returns one array; with a slice or integers, a stacked array.

    Args:
        arrays: at least one array.
    """

    def __init__(self, arrays: Iterable[np.ndarray]) -> None:
        self._parts: list[bytes] = []
        for array in arrays:
            self.shape, self.dtype = array.shape, array.dtype
            self._parts.append(zlib.compress(np.ascontiguousarray(array).data, 1))

    @property
    def nbytes(self) -> int:
        """Bytes of the compressed arrays."""
        return sum(map(len, self._parts))

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: Any) -> np.ndarray:
        rows = np.arange(len(self))[index]
        if rows.ndim == 0:
            return self._array(int(rows))
        out = np.empty((len(rows), *self.shape), self.dtype)
        for number, row in enumerate(rows):
            out[number] = self._array(int(row))
        return out

    def _array(self, row: int) -> np.ndarray:
        content = zlib.decompress(self._parts[row])
        return np.frombuffer(content, self.dtype).reshape(self.shape).copy()
