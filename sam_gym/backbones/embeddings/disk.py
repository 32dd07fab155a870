"""Image embeddings kept in files, so that an image is encoded once and not once per run."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from sam_gym.backbones.service import DTYPES, Backbone
from sam_gym.utils.files import write_atomic
from sam_gym.utils.home import home
from sam_gym.utils.registry import unknown_name

#: Bound on the files of one backbone and precision, unless somebody says otherwise: 64 GiB.
DEFAULT_BYTES = 2**36

#: A file that was being written this many seconds ago belongs to a writer that died.
_ABANDONED = 3600.0


def default_folder() -> Path:
    """Where embeddings are kept unless somebody says otherwise."""
    return home() / "embeddings"


class DiskStore:
    """Embeddings of one backbone as files, keyed by image content, bounded in size.

    One file per image, `IDENTITY-DTYPE/ab/abcdef....safetensors`, where the identity covers all
    weights, so that another checkpoint never meets embeddings that are not its own. Any number of
    processes may read and write one folder at once: files appear whole, hold their own checksum,
    and a damaged one counts as missing. When the bound is exceeded, the least recently used go.

    Args:
        backbone: whose embeddings.
        folder: root of the store; it is made if it does not exist. None: `default_folder()`.
        dtype: "float32" keeps embeddings exactly; "float16" and "bfloat16" take half the space.
        max_bytes: bound on all files of this backbone and precision together.

    Raises:
        ValueError: unknown dtype.
    """

    def __init__(
        self,
        backbone: Backbone,
        folder: Path | None = None,
        dtype: str = "float32",
        max_bytes: int = DEFAULT_BYTES,
    ) -> None:
        if dtype not in DTYPES:
            raise unknown_name("dtype of embeddings on disk", dtype, DTYPES)
        self.folder = (folder or default_folder()) / f"{backbone.identity}-{dtype}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shape, self.dtype, self.max_bytes = backbone.embedding_shape, DTYPES[dtype], max_bytes
        #: How many files were found damaged, and removed.
        self.damaged = 0
        self._bytes = self._since_scan = 0
        self._scanned = False

    def path(self, key: bytes) -> Path:
        """Where the embedding of an image with this digest is or would be."""
        name = key.hex()
        return self.folder / name[:2] / f"{name}.safetensors"

    def __contains__(self, key: bytes) -> bool:
        return self.path(key).is_file()

    def get(self, key: bytes) -> Tensor | None:
        """The embedding float32 (C, h, w), on the CPU; None if it is not there or damaged."""
        path = self.path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        embedding = self._parse(content)
        if embedding is None:
            self.damaged += 1
            with suppress(OSError):  # it may be somebody else's folder
                path.unlink()
            return None
        with suppress(OSError):  # it may just have been evicted, or the folder be read-only
            os.utime(path)
        return embedding.float()

    def _parse(self, content: bytes) -> Tensor | None:
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            length = int.from_bytes(content[:8], "little")
            checksum = json.loads(content[8 : 8 + length])["__metadata__"]["sha256"]
            if checksum != hashlib.sha256(content[8 + length :]).hexdigest():
                return None
            embedding = load(content)["embedding"]
        except (SafetensorError, KeyError, TypeError, ValueError):
            return None
        fits = embedding.shape == self.shape and embedding.dtype == self.dtype
        return embedding if fits else None

    def put(self, key: bytes, embedding: Tensor) -> Tensor:
        """Keep the embedding (C, h, w) of an image with this digest; returns what `get` will.

        Raises:
            ValueError: it has another shape, or values that the precision cannot hold.
        """
        from safetensors.torch import save

        if embedding.shape != self.shape:
            raise ValueError(f"Expected an embedding {self.shape}, got {tuple(embedding.shape)}.")
        kept = embedding.detach().to("cpu", self.dtype).contiguous()
        if not kept.isfinite().all():
            raise ValueError(
                f"An embedding has values that {self.dtype} cannot hold (largest: "
                f"{float(embedding.abs().max()):.3g}). Keep embeddings as bfloat16 or float32."
            )
        values = kept.view(torch.uint8).numpy()
        checksum = hashlib.sha256(values.data).hexdigest()
        content = save({"embedding": kept}, metadata={"sha256": checksum})
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
        self._count(len(content))
        return kept.float()

    # Bound -------------------------------------------------------------------------------------

    def _count(self, size: int) -> None:
        """Note what was written; look at the whole folder when it may have grown too large."""
        self._bytes += size
        self._since_scan += size
        # Other processes write too: what they do shows when the folder is looked at.
        if (
            not self._scanned
            or self._bytes > self.max_bytes
            or self._since_scan > self.max_bytes / 20
        ):
            self.evict()

    def evict(self) -> None:
        """Remove the least recently used files until a tenth of the bound is free, if it is hit."""
        with FileLock(self.folder / ".evict.lock"):
            files = sorted(self._files())
            total = sum(size for _, size, _ in files)
            if total > self.max_bytes:
                for _, size, path in files:
                    with suppress(OSError):
                        Path(path).unlink(missing_ok=True)
                        total -= size
                    if total <= 0.9 * self.max_bytes:
                        break
        self._bytes, self._since_scan, self._scanned = total, 0, True

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """When it was used, its size and path, of every embedding; abandoned pieces are removed."""
        now = time.time()
        for shard in os.scandir(self.folder):
            if not shard.is_dir():
                continue
            for entry in os.scandir(shard.path):
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue
                if entry.name.endswith(".safetensors"):
                    yield status.st_mtime, status.st_size, entry.path
                elif now - status.st_mtime > _ABANDONED:
                    Path(entry.path).unlink(missing_ok=True)
