"""Image features in files, so that an image is encoded once and not once per run."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from sam_gym.backbones.features import FeatureSpec, ImageFeatures
from sam_gym.backbones.protocols import FeatureSource
from sam_gym.backbones.service import DTYPES
from sam_gym.utils.files import write_atomic
from sam_gym.utils.home import home
from sam_gym.utils.registry import check_choice

#: Default bound on the files of one backbone and precision: 64 GiB.
DEFAULT_BYTES = 2**36

#: After this many seconds, an unfinished file belongs to a writer that died.
_ABANDONED = 3600.0


def default_folder() -> Path:
    """The default folder of embeddings, `SAM_GYM_HOME/embeddings`."""
    return home() / "embeddings"


class DiskStore:
    """Features of one backbone as files, keyed by image content, bounded in size.

    One file per image, `IDENTITY-DTYPE/ab/abcdef....safetensors`. The identity covers all weights,
    so features of another checkpoint are never read. Any number of processes may read and write
    one folder at once: files appear whole and hold their own checksum; a damaged file, or one with
    other features, counts as missing. When the bound is exceeded, the least recently used files are
    removed. On a disk that is full or read-only, one warning is given, and nothing more is written.

    Args:
        source: computes the features.
        folder: root of the store; it is made if it does not exist. None: `default_folder()`.
        dtype: "float32" keeps features exactly; "float16" and "bfloat16" take half the space.
            Integer features and those that the source computes in half precision keep their dtype.
        max_bytes: bound on all files of this backbone and precision together.

    Raises:
        ValueError: unknown dtype, or the folder is a file.
    """

    def __init__(
        self,
        source: FeatureSource,
        folder: Path | None = None,
        dtype: str = "float32",
        max_bytes: int = DEFAULT_BYTES,
    ) -> None:
        check_choice("dtype of embeddings on disk", dtype, DTYPES)
        self.folder = (folder or default_folder()) / f"{source.identity}-{dtype}"
        #: What stopped the writing, if anything.
        self.failure: OSError | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(
                f"{self.folder}: no folder for embeddings, since a part of the path is a file "
                f"({error.strerror}). Pass another folder."
            ) from error
        except OSError as error:
            self._stop_writing(error)
        self.dtype, self.max_bytes = DTYPES[dtype], max_bytes
        self._source_spec = source.feature_spec
        #: Shapes and dtypes in the files.
        self.spec = FeatureSpec(
            {
                name: own._replace(dtype=self.dtype) if own.dtype == torch.float32 else own
                for name, own in source.feature_spec.tensors.items()
            }
        )
        #: Number of files that were found damaged, and removed.
        self.damaged = 0
        self._bytes = self._since_scan = 0
        self._scanned = False

    def path(self, key: bytes) -> Path:
        """Path of the file for an image with this digest, whether it exists or not."""
        name = key.hex()
        return self.folder / name[:2] / f"{name}.safetensors"

    def __contains__(self, key: bytes) -> bool:
        return self.path(key).is_file()

    def get(self, key: bytes) -> ImageFeatures | None:
        """Read the features of one image, on the CPU, in the dtypes of the source.

        None: they are missing or damaged.
        """
        path = self.path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._stop_writing(error)
            return None
        features = self._parse(content)
        if features is None:
            self.damaged += 1
            with suppress(OSError):  # it may be somebody else's folder
                path.unlink()
            return None
        with suppress(OSError):  # it may just have been evicted, or the folder be read-only
            os.utime(path)
        return features.as_in(self._source_spec)

    def _parse(self, content: bytes) -> ImageFeatures | None:
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            length = int.from_bytes(content[:8], "little")
            checksum = json.loads(content[8 : 8 + length])["__metadata__"]["sha256"]
            if checksum != hashlib.sha256(content[8 + length :]).hexdigest():
                return None
            tensors = load(content)
        except (SafetensorError, KeyError, TypeError, ValueError):
            return None
        if tensors.keys() != self.spec.tensors.keys():
            return None
        features = ImageFeatures({name: tensors[name][None] for name in self.spec.tensors})
        return features if features.spec == self.spec else None

    def put(self, key: bytes, features: ImageFeatures) -> ImageFeatures:
        """Keep the features of one image with this digest; returns them as `get` would.

        Raises:
            ValueError: they have other shapes, or values that the precision cannot hold.
        """
        expected, got = self._source_spec, features.spec
        if len(features) != 1 or got != expected:
            raise ValueError(f"Expected one image with {expected}, got {len(features)} with {got}.")
        kept = features.to("cpu").as_in(self.spec).map(Tensor.contiguous)
        for name, tensor in kept.tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(
                    f"The feature {name!r} has values that {self.dtype} cannot hold (largest: "
                    f"{float(features[name].abs().max()):.3g}). Keep it as bfloat16 or float32."
                )
        if self.failure is None:
            try:
                self._write(self.path(key), {k: v[0] for k, v in kept.tensors.items()})
            except OSError as error:
                self._stop_writing(error)
        return kept.as_in(self._source_spec)

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Write a file with its own checksum, and count its bytes."""
        from safetensors.torch import save

        blank = "0" * 64
        content = save(tensors, metadata={"sha256": blank})
        length = int.from_bytes(content[:8], "little")
        checksum = hashlib.sha256(memoryview(content)[8 + length :]).hexdigest()
        content = content.replace(blank.encode(), checksum.encode(), 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
        self._count(len(content))

    def _stop_writing(self, error: OSError) -> None:
        """Warn of the first failure; from now on, the features of new images are not kept."""
        if self.failure is None:
            self.failure = error
            warnings.warn(
                f"{self.folder}: embeddings are not kept on disk any longer ({error}). The run "
                "goes on and encodes what is missing. Free some space, or pass another folder.",
                stacklevel=2,
            )

    # Bound -------------------------------------------------------------------------------------

    def _count(self, size: int) -> None:
        """Count bytes written; scan the folder when it may have grown too large."""
        self._bytes += size
        self._since_scan += size
        # Other processes write too; their files are counted when the folder is scanned.
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
        """Time of use, size and path of every file; abandoned unfinished files are removed."""
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
