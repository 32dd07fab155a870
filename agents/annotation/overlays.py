"""Overlays: images with masks drawn over them, in one flat folder."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from array import array
from collections.abc import Callable, Collection, Iterable
from itertools import chain
from typing import Any

import numpy as np
from filelock import FileLock

from agents.annotation.files import OVERLAY_SUFFIX, OutputPaths
from sam_gym.utils.digest import text_digest
from sam_gym.utils.files import atomic_file, json_line, write_atomic
from sam_gym.utils.render import save_image
from sam_gym.utils.text import safe_name


class NameSet:
    """A set of names that takes 8 bytes of memory for each.

    Args:
        names: the names.
    """

    def __init__(self, names: Iterable[str]) -> None:
        # The zero keeps the array from being empty.
        hashes = np.frombuffer(array("Q", chain(map(self.hash, names), (0,))), np.uint64)[:-1]
        self._hashes, self._counts = np.unique(hashes, return_counts=True)

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, name: str) -> bool:
        number = np.uint64(self.hash(name))
        place = np.searchsorted(self._hashes, number)
        return bool(place < len(self._hashes) and self._hashes[place] == number)

    @property
    def repeated(self) -> list[int]:
        """Hashes of the names that occurred several times."""
        return self._hashes[self._counts > 1].tolist()

    @staticmethod
    def hash(name: str) -> int:
        """Return 64 bits of a digest of a name."""
        content = name.encode(errors="backslashreplace")
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


class OverlayNames:
    """Unique names of overlays, safe on every file system: `names(key, label)`.

    Args:
        repeated: hashes that several labels have; see `repeated_names`.
    """

    def __init__(self, repeated: Collection[int]) -> None:
        self.repeated = sorted(repeated)
        self._repeated = frozenset(repeated)

    def __call__(self, key: Any, label: str) -> str:
        name = safe_name(label)
        is_repeated = bool(self._repeated) and NameSet.hash(_folded(name)) in self._repeated
        if is_repeated or name != label.replace("/", "__"):
            name += "-" + text_digest(repr(key))[:8]
        return name + OVERLAY_SUFFIX


def repeated_names(labels: Iterable[str]) -> list[int]:
    """Return hashes of the file names that several labels would have."""
    return NameSet(_folded(safe_name(label)) for label in labels).repeated


def _folded(name: str) -> str:
    """Return the form in which file systems that ignore case compare names."""
    return unicodedata.normalize("NFC", name).casefold()


class OverlayWriter:
    """Write overlays; a list beside the annotations names them, so that a later run removes them.

    Any number of processes may write.

    Args:
        outputs: paths of the run.

    Attributes:
        failed: overlay -> why it could not be written.
    """

    def __init__(self, outputs: OutputPaths) -> None:
        self._outputs = outputs
        self.failed: dict[str, str] = {}

    def start_list(self) -> None:
        """Begin the list, unless earlier runs have, with the same folder."""
        if not self._outputs.lists_overlays():
            write_atomic(self._outputs.overlay_list, self._header())

    def write(self, name: str, overlay: np.ndarray) -> None:
        """Save an overlay, uint8 (H, W, 3)."""
        outputs = self._outputs
        try:
            with FileLock(outputs.overlay_lock), outputs.overlay_list.open("a") as file:
                file.write(json.dumps(name) + "\n")
            save_image(outputs.overlays / name, overlay)
        except (OSError, ValueError) as error:
            self.failed[name] = str(error)

    def keep_only(self, names: Callable[[], Iterable[str]]) -> None:
        """Remove the listed overlays of other names: those of earlier runs with the same --out."""
        kept, outputs = NameSet(names()), self._outputs
        for name in outputs.listed_overlays():
            if name not in kept:
                (outputs.overlays / name).unlink(missing_ok=True)
        if len(kept):
            with atomic_file(outputs.overlay_list) as file:
                file.write(self._header())
                for name in names():
                    file.write(json_line(name) + b"\n")
        else:
            outputs.overlay_list.unlink(missing_ok=True)
        outputs.overlay_lock.unlink(missing_ok=True)

    def _header(self) -> bytes:
        return json_line(os.path.abspath(self._outputs.overlays)) + b"\n"
