"""Image embeddings kept on the device: an image is encoded once and passed around as a number."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam_gym.backbones.embeddings.disk import DiskStore
from sam_gym.backbones.service import Backbone
from sam_gym.data.base import image_digest

#: Handles travel through float32 observations, which hold integers exactly below this.
MAX_HANDLES = 2**24


#: Images uint8 (H, W, 3) -> what is to be known of each, (B, ...).
Describe = Callable[[Sequence[np.ndarray]], Tensor]


@dataclass
class FeatureTable:
    """Something else that is computed once per image and kept under the embedding's handle."""

    users: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    table: Tensor | None = None
    known: set[int] = field(default_factory=set)


class EmbeddingStore:
    """Embeddings of one backbone, keyed by image content, bounded, least recently used out first.

    A *handle* is the index of an embedding in the store; it is recycled once its embedding has been
    evicted. A pinned embedding is never evicted: environments pin what their slots show, and
    `pin_new_epoch` pins everything that is handed out until the epoch is over. `attach` keeps more
    about each image under the same handle, for example how like some words its places are.

    Args:
        backbone: encodes what is missing.
        max_bytes: bound on the memory of all embeddings, at least one embedding.
        batch_size: images per encoder call.
        disk: where embeddings are looked for before they are computed, and kept afterwards.
    """

    def __init__(
        self,
        backbone: Backbone,
        max_bytes: int = 2**30,
        batch_size: int = 16,
        disk: DiskStore | None = None,
    ) -> None:
        self.backbone, self.batch_size, self.disk = backbone, batch_size, disk
        self._table = torch.empty((0, *backbone.embedding_shape), device=backbone.device)
        self._handles: OrderedDict[bytes, int] = OrderedDict()
        self._keys: dict[int, bytes] = {}
        self._free: list[int] = []
        self._pins: dict[int, int] = {}
        self._epoch: set[int] | None = None
        self._companions: dict[str, FeatureTable] = {}
        self.max_bytes = max_bytes
        #: How many images were encoded so far.
        self.encoded = 0

    def __len__(self) -> int:
        return len(self._handles)

    @property
    def capacity(self) -> int:
        """How many embeddings fit."""
        size = int(np.prod(self.backbone.embedding_shape)) * 4
        return max(1, min(self.max_bytes // size, MAX_HANDLES))

    def acquire(
        self, images: Sequence[np.ndarray], digests: Sequence[bytes | None] | None = None
    ) -> list[int]:
        """Handles of images, each pinned once more; images that are not here yet are encoded.

        Args:
            images: uint8 (H, W, 3), sizes may differ.
            digests: `image_digest` of each, where it is known already.

        Raises:
            MemoryError: everything in the store is pinned and it may not grow; no pin is left.
        """
        pins = self._pins.copy()
        try:
            known = digests or [None] * len(images)
            keys = [
                digest or image_digest(image) for digest, image in zip(known, images, strict=True)
            ]
            return self._acquire(keys, images)
        except BaseException:
            self._pins = pins
            raise

    def attach(self, name: str, describe: Describe) -> None:
        """From now on, keep what `describe` says of each image that is acquired.

        It is kept beside the bound on embeddings, and let go when nobody else holds any of the
        functions that were attached under its name.

        Args:
            name: for `gather`. What is attached under one name says the same.
            describe: images -> floating (B, ...) on the device, always of the same shape.
        """
        self._companions.setdefault(name, FeatureTable()).users.add(describe)

    def _acquire(self, keys: Sequence[bytes], images: Sequence[np.ndarray]) -> list[int]:
        missing: dict[bytes, np.ndarray] = {}
        for key, image in zip(keys, images, strict=True):
            if key in self._handles:
                self._handles.move_to_end(key)
                self.pin(self._handles[key])
            elif key not in missing:
                missing[key] = image
        todo = list(missing.items())
        for first in range(0, len(todo), self.batch_size):
            chunk = todo[first : first + self.batch_size]
            for (key, _), embedding in zip(chunk, self._embeddings(chunk), strict=True):
                handle = self._new_handle()
                self._table[handle] = embedding
                self._handles[key], self._keys[handle] = handle, key
                self.pin(handle)
        counted: set[bytes] = set()
        for key in keys:
            if key in missing and key in counted:
                self.pin(self._handles[key])
            counted.add(key)
        handles = [self._handles[key] for key in keys]
        self.describe(dict(zip(handles, images, strict=True)))
        return handles

    def describe(self, images: dict[int, np.ndarray]) -> None:
        """Fill in what was attached since some handles were acquired.

        Args:
            images: pinned handle -> its image, uint8 (H, W, 3).
        """
        for name, companion in list(self._companions.items()):
            describe = next(iter(companion.users), None)
            if describe is None:
                del self._companions[name]
            else:
                self._describe(companion, describe, images)

    def _describe(
        self, companion: FeatureTable, describe: Describe, images: dict[int, np.ndarray]
    ) -> None:
        """Fill in what one companion does not know yet."""
        todo = [handle for handle in images if handle not in companion.known]
        for first in range(0, len(todo), self.batch_size):
            chunk = todo[first : first + self.batch_size]
            values = describe([images[handle] for handle in chunk])
            table = companion.table
            if table is None or len(table) < len(self._table):
                # What is asked for without having been described shows in every number after it.
                grown = values.new_full((len(self._table), *values.shape[1:]), torch.nan)
                if table is not None:
                    grown[: len(table)] = table
                companion.table = table = grown
            table[torch.tensor(chunk, device=table.device)] = values
            companion.known.update(chunk)

    def _embeddings(self, chunk: Sequence[tuple[bytes, np.ndarray]]) -> Sequence[Tensor]:
        """Embeddings of images: those on disk from there, the others encoded and kept there."""
        found: list[Tensor | None] = [None] * len(chunk)
        if self.disk is not None:
            found = [self.disk.get(key) for key, _ in chunk]
        new = [i for i, embedding in enumerate(found) if embedding is None]
        if new:
            encoded = self.backbone.encode([chunk[i][1] for i in new])
            self.encoded += len(new)
            for i, embedding in zip(new, encoded, strict=True):
                disk = self.disk
                found[i] = embedding if disk is None else disk.put(chunk[i][0], embedding)
        return [embedding for embedding in found if embedding is not None]

    def gather(self, handles: Tensor, name: str | None = None) -> Tensor:
        """Embeddings float32 (B, C, h, w) of integer handles (B,), on the device.

        Args:
            handles: of images that are still in use.
            name: instead of embeddings, what was attached under this name, (B, ...).

        Raises:
            KeyError: nothing was attached under this name before these images were acquired.
        """
        index = handles.to(self.backbone.device, torch.long)
        if name is None:
            return self._table[index]
        companion = self._companions.get(name)
        if companion is None or companion.table is None:
            raise KeyError(f"Nothing is attached to the store as {name!r}: attach before reset().")
        return companion.table[index]

    def pin(self, handle: int) -> None:
        """Keep an embedding until it is unpinned as often as it was pinned."""
        self._pins[handle] = self._pins.get(handle, 0) + 1
        if self._epoch is not None:
            self._epoch.add(handle)

    def unpin(self, handle: int) -> None:
        self._pins[handle] -= 1
        if not self._pins[handle]:
            del self._pins[handle]

    def pin_new_epoch(self) -> None:
        """Keep every embedding that is pinned now or from now on, until the next call.

        Call it before each rollout: what the rollout's observations refer to then outlives the
        update that follows.
        """
        self._epoch = set(self._pins)

    def end_epoch(self) -> None:
        """Stop keeping what only the current epoch keeps."""
        self._epoch = None

    def _new_handle(self) -> int:
        if not self._free and len(self._table) < self.capacity:
            self._grow()
        if not self._free:
            self._evict()
        return self._free.pop()

    def _grow(self) -> None:
        old = len(self._table)
        new = min(max(64, 2 * old), self.capacity)
        table = self._table.new_empty((new, *self.backbone.embedding_shape))
        table[:old] = self._table
        self._table = table
        self._free.extend(range(new - 1, old - 1, -1))

    def _evict(self) -> None:
        held = self._epoch or ()
        for key, handle in self._handles.items():
            if handle not in self._pins and handle not in held:
                del self._handles[key], self._keys[handle]
                for companion in self._companions.values():
                    companion.known.discard(handle)
                self._free.append(handle)
                return
        raise MemoryError(
            f"The embedding store is full: all of its {self.capacity} embeddings are in use. "
            f"Raise its bound (now {self.max_bytes / 2**30:.2f} GiB; environments: store_gib=), "
            "use fewer different images, or shorter rollouts."
        )


_stores: dict[int, EmbeddingStore] = {}


def shared_store(
    backbone: Backbone, max_bytes: int = 2**30, disk: DiskStore | None = None
) -> EmbeddingStore:
    """The process-wide store of a backbone; its bound is the largest that was ever asked for.

    Args:
        backbone: whose embeddings.
        max_bytes: bound on the memory of all embeddings.
        disk: keeps embeddings between runs; once given, it stays until another is given.
    """
    store = _stores.get(id(backbone))
    if store is None:
        store = _stores[id(backbone)] = EmbeddingStore(backbone, max_bytes)
    store.max_bytes = max(store.max_bytes, max_bytes)
    if disk is not None:
        store.disk = disk
    return store
