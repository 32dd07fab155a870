"""File reading for datasets: confined paths, images, and records that fail validation."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import cv2
import numpy as np

from sam_gym.data.images import (
    ImageHeader,
    Unreadable,
    check_file,
    decode_image,
    decode_labels,
    read_header,
)
from sam_gym.utils.files import write_atomic
from sam_gym.utils.registry import check_choice
from sam_gym.utils.text import printable

T = TypeVar("T")
R = TypeVar("R")

OnError = Literal["raise", "skip"]
#: Decodes the content of a label file, in the size of its image; raises `Unreadable`.
Decode = Callable[[bytes, tuple[int, int] | None], np.ndarray]

#: Suffixes of image files.
IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pgm .png .pnm .ppm .tif .tiff .webp".split()
)

#: Number of files per task of a checking thread.
_CHUNK = 16


class Reject(Exception):
    """Raised by a validator for an invalid record; `Records` turns it into a message.

    Attributes:
        reason: the problem, with the same text for all such records: skipped records are counted
            by reason.
        detail: the value found.
        error: type of the exception that the user sees.
    """

    def __init__(
        self, reason: str, detail: str = "", error: type[ValueError | OSError] = ValueError
    ) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail, self.error = reason, detail, error


def flag(option: str, value: str = "VALUE") -> str:
    """Name an option of a dataset in a message, as an argument and as command lines take it."""
    return f"{option}={value} (--dataset-kwargs {option} {value})"


class Records:
    """Raises at the first invalid record, or skips and counts invalid records.

    Args:
        file: annotation file or folder, for messages.
        on_error: "raise" or "skip".
        can_skip: whether the caller takes on_error="skip", for messages.

    Attributes:
        skipped: number of skipped records, by reason.
    """

    def __init__(self, file: str, on_error: str, can_skip: bool = True) -> None:
        check_choice("on_error", on_error, ("raise", "skip"))
        self.file = file
        self.on_error = on_error
        skip = ', or pass on_error="skip" (--on-error skip) to count and skip such records'
        self._advice = f"Fix or drop it{skip if can_skip else ''}."
        self.skipped: Counter[str] = Counter()

    @contextmanager
    def validate(self, record: str) -> Iterator[None]:
        """Run the body, which validates `record`; raise or count a `Reject` from it."""
        try:
            yield
        except Reject as reject:
            if self.on_error == "raise":
                detail = f" ({reject.detail})" if reject.detail else ""
                raise reject.error(
                    f"{self.file}: {record}: {reject.reason}{detail}. {self._advice}"
                ) from None
            self.skipped[reject.reason] += 1

    def __str__(self) -> str:
        """The skipped records in total and by reason; empty without any."""
        if not self.skipped:
            return ""
        reasons = "; ".join(f"{n} x {reason}" for reason, n in self.skipped.most_common())
        return f"skipped {self.skipped.total()} records: {reasons}"

    def warn(self, note: str = "") -> None:
        """Warn once, with totals, if records were skipped, or if there is a note."""
        told = ". ".join(text for text in (str(self), note) if text)
        if told:
            warnings.warn(printable(f"{self.file}: {told}."), stacklevel=3)


def read_json(path: str, kind: str) -> Any:
    """Read a JSON file in UTF-8, or in UTF-16 or UTF-32; a byte order mark may come first.

    Args:
        path: the file.
        kind: what the file is, for messages.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is not JSON.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: the {kind} does not exist. Check the path.")
    try:
        with open(path, "rb") as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}). Fetch or export it again.") from error


def whole_number(value: Any) -> int | None:
    """Return a whole number, which pandas writes as 1.0, as int; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def number_as_text(value: Any) -> Any:
    """Return a whole number as text, and anything else as it is."""
    number = whole_number(value)
    return value if number is None else str(number)


def resolve(folder: str, name: object) -> str:
    """Return the path of the file `name` inside `folder`.

    `folder` is trusted and may be a symbolic link; `name` comes from a file and is not trusted. A
    backslash separates folders, as Windows writes it, unless a file has it in its name.

    Raises:
        Reject: `name` is no file name, cannot be encoded, is absolute, contains `..`, or links out
            of `folder`.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise Reject("file name is not a non-empty string", f"got {name!r}")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise Reject("file name cannot be encoded", f"got {name!r}") from None
    parts = name.replace("\\", "/").split("/")
    inside = os.path.join(os.path.realpath(folder), "")
    path = os.path.join(folder, name)
    if "\\" in name and not os.path.exists(path):
        path = os.path.join(folder, *parts)
    leaves = ".." in parts or not parts[0] or os.path.isabs(name) or os.path.splitdrive(name)[0]
    if leaves or not os.path.realpath(path).startswith(inside):
        raise Reject("file name leaves its folder", f"got {name!r}, confined to {folder}")
    return path


def read_image(
    path: str, record: str, size: tuple[int, int] | None = None, content: bytes | None = None
) -> np.ndarray:
    """Read a colour or grey image as uint8 (H, W, 3), RGB, without its alpha channel.

    The image is upright, as viewers and annotation tools show it: turned and flipped by its EXIF
    orientation. Annotations may refer to the stored pixels instead: a quarter turn is left out if
    the annotated `size` tells so. Flips and half turns always follow the tag.

    16-bit images whose values fit into 8, 10, 12 or 14 bits are scaled as images of that depth,
    with a warning.

    Args:
        path: the image file.
        record: name of the record, for messages.
        size: annotated (height, width), or None.
        content: of the file, if it has been read.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is not an image, is truncated, or holds samples without a known range.
    """
    with _naming(path, record):
        pixels, bits = decode_image(_read(path) if content is None else content, size)
    if bits:
        folder = printable(os.path.dirname(path))
        warnings.warn(
            f"{folder}: images of 16 bits whose values fit into {bits} are scaled as images of "
            f"{bits} bits. Convert the files to 8 bits to choose another scale.",
            stacklevel=2,
        )
    return pixels


def read_labels(path: str, record: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """Read a mask or label image, upright and otherwise unchanged: uint8 or uint16 (H, W).

    Of a PNG with a palette, the labels are its indices, as Pillow reads them.

    Args:
        path: the mask file.
        record: name of the record, for messages.
        size: (height, width) of its image, or None; see `read_image`.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is not an image, is truncated, or is not one channel of 8 or 16 bits.
    """
    with _naming(path, record):
        return decode_labels(_read(path), size)


def read_annotated(
    path: str, label_paths: Sequence[str], record: str, decode: Decode = decode_labels
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Read an image and its label images as `read_image` and `read_labels` do, in one size.

    Args:
        path: the image file.
        label_paths: the label files.
        record: name of the record, for messages.
        decode: decodes label files: `decode_labels`, or `decode_colours`, which gives
            uint8 (H, W, 3), RGB.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file cannot be read, or the sizes differ.
    """
    with _naming(path, record):
        header = read_header(path)
    labels = []
    for label_path in label_paths:
        with _naming(label_path, record):
            labels.append(decode(_read(label_path), header.size))
        with Records(label_path, "raise").validate(record):
            check_size(path, header, labels[-1].shape[:2], "mask")
    return read_image(path, record, labels[0].shape[:2]), labels


def check_annotated(
    path: str, label_paths: Sequence[str], decode: Decode = decode_labels
) -> list[np.ndarray]:
    """Check an image file as `check_image` does; decode and return its label images.

    Raises:
        Reject: a file is missing or cannot be read, or the sizes differ.
    """
    header = check_image(path)
    labels = []
    for label_path in label_paths:
        with _rejecting(label_path, "mask file"):
            labels.append(decode(_read(label_path), header.size))
        check_size(path, header, labels[-1].shape[:2], label_path)
        if labels[-1].shape != labels[0].shape:
            raise Reject("masks differ in size", f"{label_path} and {label_paths[0]}")
    return labels


def check_image(path: str, size: tuple[int, int] | None = None, kind: str = "image") -> ImageHeader:
    """Check that an image file is whole and has the annotated size; the pixels are not decoded.

    Raises:
        Reject: the file is missing, is truncated, cannot be read, or has another size.
    """
    with _rejecting(path, f"{kind} file"):
        header = check_file(path)
    if size is not None:
        check_size(path, header, size, "record")
    return header


def check_size(path: str, header: ImageHeader, size: tuple[int, int], annotation: str) -> None:
    """Reject an image file that has another size, upright or stored, than its annotation."""
    if header.fit(size) != size:
        (height, width), (expected_height, expected_width) = header.size, size
        raise Reject(
            "image and annotation differ in size",
            f"{path} is {width} x {height}, {annotation} is {expected_width} x {expected_height}",
        )


def check_all(check: Callable[[T], R], items: Sequence[T]) -> list[R | Reject]:
    """Check items in threads; return results, or the `Reject` that was raised, in order."""

    def check_some(start: int) -> list[R | Reject]:
        return [_attempt(check, item) for item in items[start : start + _CHUNK]]

    # No generator: if one is left in the middle, garbage collection closes its pool in any thread,
    # which may be one that is just starting and holds a lock that the pool waits for.
    with ThreadPoolExecutor() as pool:
        chunks = list(pool.map(check_some, range(0, len(items), _CHUNK)))
    return [result for chunk in chunks for result in chunk]


def _attempt(check: Callable[[T], R], item: T) -> R | Reject:
    try:
        return check(item)
    except Reject as reject:
        return reject


def image_size(path: str) -> tuple[int, int]:
    """Read (height, width) of an image, upright, from the header of its file.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is not an image.
    """
    try:
        return read_header(path).size
    except Unreadable as error:
        raise ValueError(f"{path}: {error}.") from None


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


@contextmanager
def _naming(path: str, record: str) -> Iterator[None]:
    """Name file and record in errors from the body."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: {record}: the file is missing. Restore it, or drop the record."
        ) from None
    except Unreadable as error:
        raise ValueError(f"{path}: {record}: {error}, or drop the record.") from None


@contextmanager
def _rejecting(path: str, kind: str) -> Iterator[None]:
    """Turn errors of a file from the body into a `Reject`."""
    try:
        yield
    except FileNotFoundError:
        raise Reject(f"{kind} is missing", f"looked for {path}", FileNotFoundError) from None
    except Unreadable as error:
        detail = f"{path}: {error.remedy}"
        raise Reject(f"{kind} cannot be read: {error.problem}", detail) from None
    except OSError as error:
        raise Reject(f"{kind} cannot be read: {error.strerror}", path) from None


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write a PNG file atomically, and the folder that it is in.

    Args:
        path: of the file.
        pixels: uint8 or uint16 (H, W), or uint8 (H, W, 3), RGB.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = pixels[..., ::-1] if pixels.ndim == 3 else pixels
    write_atomic(path, cv2.imencode(".png", stored)[1].tobytes())
