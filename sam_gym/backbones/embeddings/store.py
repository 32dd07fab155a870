"""A cache of image features on the device: each image is encoded once and has a handle."""

from __future__ import annotations

import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from sam_gym.backbones.embeddings.disk import DiskStore
from sam_gym.backbones.features import ImageFeatures
from sam_gym.backbones.protocols import FeatureSource
from sam_gym.utils.digest import image_digest

#: Handles travel through float32 observations, which hold integers exactly below this.
MAX_HANDLES = 2**24

#: Numbers of handles; no two stores of a process share one.
_numbers = itertools.count()

#: Computes one more feature of images uint8 (H, W, 3): floating (B, ...).
ComputeFeature = Callable[[Sequence[np.ndarray]], Tensor]


@dataclass
class FeatureTable:
    """A registered feature, computed once per image and kept under the image's handle."""

    users: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    table: Tensor | None = None
    known: set[int] = field(default_factory=set)


class EmbeddingStore:
    """A bounded LRU cache of the features of one backbone, keyed by image content.

    A *handle* is the number of an image in the store. An image that is encoded again after its
    eviction gets another, so `gather` recognises stale ones. A pinned image is never evicted:
    environments pin the images of their current episodes, and `pin_new_epoch` pins everything that
    is handed out until the epoch is over. `register_feature` keeps a further feature under the same
    handle, for example similarity maps of words.

    Args:
        source: computes missing features, a backbone for example.
        max_bytes: bound on the memory of all features; at least one image is kept.
        batch_size: images per encoder call.
        disk: second cache, on disk, for features that are not in memory.
    """

    def __init__(
        self,
        source: FeatureSource,
        max_bytes: int = 2**30,
        batch_size: int = 16,
        disk: DiskStore | None = None,
    ) -> None:
        self.source, self.batch_size, self.disk = source, batch_size, disk
        self._table = source.feature_spec.empty(0, source.device)
        self._handles: OrderedDict[bytes, int] = OrderedDict()
        #: Handle of each image in memory -> its row of the table.
        self._rows: dict[int, int] = {}
        #: The same as a tensor on the device, int32; -1: not in memory.
        self._row_of = torch.full((64,), -1, dtype=torch.int32, device=source.device)
        self._free: list[int] = []
        self._pins: dict[int, int] = {}
        self._epoch: set[int] | None = None
        self._registered: dict[str, FeatureTable] = {}
        self.max_bytes = max_bytes
        #: Number of images encoded so far.
        self.encoded = 0
        #: Whether each call computes `batch_size` images, so that the last bits of features do not
        #: depend on how many others were missing at the same time.
        self.fixed_batches = False

    def __len__(self) -> int:
        return len(self._handles)

    @property
    def nbytes(self) -> int:
        """Bytes of the features in memory, without registered ones."""
        return len(self._table) * self.source.feature_spec.nbytes

    @property
    def capacity(self) -> int:
        """Number of images whose features fit."""
        return max(1, min(self.max_bytes // self.source.feature_spec.nbytes, MAX_HANDLES))

    def acquire(
        self, images: Sequence[np.ndarray], digests: Sequence[bytes | None] | None = None
    ) -> list[int]:
        """Return handles of images, each pinned once more; missing images are encoded.

        Args:
            images: uint8 (H, W, 3), sizes may differ; only those without features are read if all
                digests are given.
            digests: `image_digest` of each, where it is known already.

        Raises:
            MemoryError: everything is pinned and the store may not grow; pins are as before.
        """
        pins = self._pins.copy()
        try:
            known = digests or [None] * len(images)
            keys = [digest or image_digest(images[k]) for k, digest in enumerate(known)]
            return self._acquire(keys, images)
        except BaseException:
            self._pins = pins
            raise

    def register_feature(self, name: str, compute: ComputeFeature) -> None:
        """From now on, compute and keep a further feature of each acquired image.

        Its memory does not count towards the bound. It is dropped when nobody else holds any of
        the functions that were registered under its name.

        Args:
            name: for `gather`. Functions of the same name must compute the same.
            compute: images -> floating (B, ...) on the device, always of the same shape.
        """
        self._registered.setdefault(name, FeatureTable()).users.add(compute)

    def _acquire(self, keys: Sequence[bytes], images: Sequence[np.ndarray]) -> list[int]:
        missing: dict[bytes, int] = {}
        for place, key in enumerate(keys):
            if key in self._handles:
                self._handles.move_to_end(key)
                self.pin(self._handles[key])
            elif key not in missing:
                missing[key] = place
        todo = list(missing.items())
        for first in range(0, len(todo), self.batch_size):
            # Only missing images are read, so that a sequence may load them from files.
            chunk = [(key, images[place]) for key, place in todo[first : first + self.batch_size]]
            features = self._features(chunk)
            rows = self._new_rows(len(chunk))
            index = torch.tensor(rows, dtype=torch.int32, device=self.source.device)
            self._table[index] = features
            # Only now, so that no handle of an image ever refers to a row that was not written.
            new = [self._new_handle() for _ in rows]
            self._row_of[torch.tensor(new, device=self.source.device)] = index
            for (key, _), handle, row in zip(chunk, new, rows, strict=True):
                self._handles[key], self._rows[handle] = handle, row
                self.pin(handle)
        counted: set[bytes] = set()
        for key in keys:
            if key in missing and key in counted:
                self.pin(self._handles[key])
            counted.add(key)
        handles = [self._handles[key] for key in keys]
        if self._registered:
            self.compute_features(dict(zip(handles, images, strict=True)))
        return handles

    def compute_features(self, images: dict[int, np.ndarray]) -> None:
        """Compute features that were registered after some handles were acquired.

        Args:
            images: pinned handle -> its image, uint8 (H, W, 3).
        """
        for name, feature in list(self._registered.items()):
            compute = next(iter(feature.users), None)
            if compute is None:
                del self._registered[name]
            else:
                self._compute(feature, compute, images)

    def _compute(
        self, feature: FeatureTable, compute: ComputeFeature, images: dict[int, np.ndarray]
    ) -> None:
        """Fill in the missing rows of a feature."""
        todo = [handle for handle in images if handle not in feature.known]
        for first in range(0, len(todo), self.batch_size):
            chunk = todo[first : first + self.batch_size]
            values = compute(self._batch([images[handle] for handle in chunk]))[: len(chunk)]
            table = feature.table
            if table is None or len(table) < len(self._table):
                # Reading a row before it is computed yields NaN instead of stale values.
                grown = values.new_full((len(self._table), *values.shape[1:]), torch.nan)
                if table is not None:
                    grown[: len(table)] = table
                feature.table = table = grown
            rows = [self._rows[handle] for handle in chunk]
            table[torch.tensor(rows, device=table.device)] = values
            feature.known.update(chunk)

    def _batch(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """Return the images of a call; with `fixed_batches`, the last one fills up the batch."""
        if not self.fixed_batches:
            return images
        return images + images[-1:] * (self.batch_size - len(images))

    def _features(self, chunk: Sequence[tuple[bytes, np.ndarray]]) -> ImageFeatures:
        """Return the features of images: from disk if they are there, else encoded and written."""
        device, disk = self.source.device, self.disk
        found: list[ImageFeatures | None] = [None] * len(chunk)
        if disk is not None:
            found = [disk.get(key) for key, _ in chunk]
        new = [i for i, features in enumerate(found) if features is None]
        if new:
            encoded = self.source.encode(self._batch([chunk[i][1] for i in new]))[: len(new)]
            self.encoded += len(new)
            if disk is None:
                return encoded
            for i, features in zip(new, encoded.split(1), strict=True):
                found[i] = disk.put(chunk[i][0], features)
        return ImageFeatures.cat([own for own in found if own is not None]).to(device)

    @overload
    def gather(
        self, handles: Tensor | np.ndarray, name: None = None, *, check: bool = True
    ) -> ImageFeatures: ...

    @overload
    def gather(self, handles: Tensor | np.ndarray, name: str, *, check: bool = True) -> Tensor: ...

    def gather(
        self, handles: Tensor | np.ndarray, name: str | None = None, *, check: bool = True
    ) -> ImageFeatures | Tensor:
        """Features of integer handles (B,), on the device.

        Args:
            handles: of images that are in memory, int (B,).
            name: return only this feature, of the backbone or a registered one: (B, ...).
            check: make sure that no handle is stale, which waits for the device. Only a caller that
                has pinned the images may pass False.

        Raises:
            KeyError: no such feature was registered before these images were acquired.
            ValueError: a handle is stale, or was never one.
        """
        handles = torch.as_tensor(handles)
        numbers = handles.to(self.source.device, torch.long)
        if not check:
            index = self._row_of[numbers]
        else:
            if handles.is_floating_point() and (numbers != handles.to(numbers.device)).any():
                raise ValueError(
                    f"Handles are whole numbers, got {handles.flatten()[:3].tolist()}. Leave the "
                    "handle out where observations are normalised or scaled (VecNormalize: "
                    "norm_obs=False, or norm_obs_keys without 'handle')."
                )
            known = (numbers >= 0) & (numbers < len(self._row_of))
            index = torch.where(known, self._row_of[torch.where(known, numbers, 0)], -1)
            if (index < 0).any():
                stale = numbers[index < 0].tolist()
                raise ValueError(
                    f"{len(stale)} of {numbers.numel()} handles are stale (first: {stale[0]}): the "
                    "embedding store has evicted their images. Call store.pin_new_epoch() before "
                    "each rollout (env.unwrapped.core.store), or raise the store's bound (now "
                    f"{self.max_bytes / 2**30:.2f} GiB; environments: store_gib=). Handles of an "
                    "environment with another backbone, adapter, device or dtype are in another "
                    "store."
                )
        if name is None:
            return self._table[index]
        if name in self._table:
            return self._table[name][index]
        feature = self._registered.get(name)
        if feature is None or feature.table is None:
            raise KeyError(f"The store has no feature {name!r}: register_feature before reset().")
        return feature.table[index]

    def pin(self, handle: int) -> None:
        """Pin an image; it can be evicted after as many calls of `unpin`."""
        self._pins[handle] = self._pins.get(handle, 0) + 1
        if self._epoch is not None:
            self._epoch.add(handle)

    def unpin(self, handle: int) -> None:
        self._pins[handle] -= 1
        if not self._pins[handle]:
            del self._pins[handle]

    def pin_new_epoch(self) -> None:
        """Start an epoch: images that are pinned now or later stay until the next call.

        Call it before each rollout: the images of its observations then outlive the update.
        """
        self._epoch = set(self._pins)

    def end_epoch(self) -> None:
        """End the epoch: images without another pin can be evicted."""
        self._epoch = None

    def _new_rows(self, count: int) -> list[int]:
        new: list[int] = []
        try:
            while len(new) < count:
                if not self._free and len(self._table) < self.capacity:
                    self._grow()
                if not self._free:
                    self._evict()
                new.append(self._free.pop())
        except BaseException:
            self._free += new
            raise
        return new

    def _new_handle(self) -> int:
        """Return a number that was not used before, as long as there is one."""
        handle = next(_numbers) % MAX_HANDLES
        while handle in self._rows:
            handle = next(_numbers) % MAX_HANDLES
        while handle >= len(self._row_of):
            self._row_of = torch.cat([self._row_of, torch.full_like(self._row_of, -1)])
        return handle

    def _grow(self) -> None:
        old = len(self._table)
        new = min(max(64, 2 * old), self.capacity)
        table = self.source.feature_spec.empty(new, self.source.device)
        table[slice(0, old)] = self._table
        self._table = table
        self._free.extend(range(new - 1, old - 1, -1))

    def _evict(self) -> None:
        held = self._epoch or ()
        for key, handle in self._handles.items():
            if handle not in self._pins and handle not in held:
                del self._handles[key]
                self._row_of[handle] = -1
                for feature in self._registered.values():
                    feature.known.discard(handle)
                self._free.append(self._rows.pop(handle))
                return
        raise MemoryError(
            f"The embedding store is full: all of its {self.capacity} embeddings are in use. "
            f"Raise its bound (now {self.max_bytes / 2**30:.2f} GiB; environments: store_gib=), "
            "use fewer different images, or shorter rollouts."
        )


_stores: dict[int, EmbeddingStore] = {}


def shared_store(
    source: FeatureSource, max_bytes: int = 2**30, disk: DiskStore | None = None
) -> EmbeddingStore:
    """Return the process-wide store of a backbone; its memory bound is the largest of all calls.

    Args:
        source: computes the features.
        max_bytes: bound on the memory of all features.
        disk: keeps features between runs; replaces the previous one, if any.
    """
    store = _stores.get(id(source))
    if store is None:
        store = _stores[id(source)] = EmbeddingStore(source, max_bytes)
    store.max_bytes = max(store.max_bytes, max_bytes)
    if disk is not None:
        store.disk = disk
    return store
