"""Formats of image files: size, orientation, pixels."""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import cv2
import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, TiffTags

#: EXIF orientation -> stored pixels to upright ones.
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored),
}
#: Orientations that swap height and width -> the orientation that undoes them.
_QUARTER_TURNS = {5: 5, 6: 8, 7: 7, 8: 6}

#: Formats that both Pillow and OpenCV read, apart from TIFF.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "JPEG2000", "AVIF", "SUN")
_NOT_AN_IMAGE = "the file is truncated or not an image", "Fetch or export it again"
_CONVERT = "Convert it to PNG or JPEG"
#: Brands of HEIF files, which neither of the two reads, behind "ftyp".
_HEIF = (b"heic", b"heix", b"heim", b"hevc", b"mif1", b"msf1")
#: OpenCV's limit.
_MAX_PIXELS = 2**30

_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
#: A marker of a JPEG: no restart, and no byte of the pixels.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_END_OF_PNG = b"IEND\xaeB`\x82"
_BIG_TIFF = 43
_SEPARATE = 2
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
#: Tags of the offsets and lengths of the pixels in the file.
_TIFF_DATA = (
    (ExifTags.Base.StripOffsets, ExifTags.Base.StripByteCounts),
    (ExifTags.Base.TileOffsets, ExifTags.Base.TileByteCounts),
)
#: Compressions of TIFF files that OpenCV reads; it returns black images for some others.
_TIFF_COMPRESSIONS = (1, 2, 3, 4, 5, 7, 8, 32773, 32946)
#: Bits per sample -> colour spaces of TIFF files that OpenCV certainly reads, in one plane.
_PLAIN_TIFFS = {8: (0, 1, 2, 3, 5, 6), 16: (0, 1, 2)}
_GREY = (0, 1)
_SAMPLE_FORMATS = {1: "uint", 2: "int", 3: "float", 4: "uint", 5: "complex int", 6: "complex"}


class Unreadable(ValueError):
    """A fault of an image file; its text leaves out the name.

    Attributes:
        problem: the same text for all such files.
        remedy: what to do about it.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}. {remedy}")
        self.problem, self.remedy = problem, remedy


@dataclass(frozen=True)
class ImageHeader:
    """What an image file tells before its pixels are decoded.

    Attributes:
        stored_size: (height, width) of the stored pixels.
        orientation: EXIF orientation, 1 to 8: how viewers turn and flip the stored pixels.
        tags: tags of a TIFF file, else None.
    """

    stored_size: tuple[int, int]
    orientation: int = 1
    tags: TiffImagePlugin.ImageFileDirectory_v2 | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the upright image."""
        height, width = self.stored_size
        return (width, height) if self.orientation in _QUARTER_TURNS else (height, width)

    def fit(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """Return the size that `read_image` and `read_labels` give for their argument `size`."""
        return self.stored_size if size == self.stored_size else self.size


def read_header(path: str) -> ImageHeader:
    """Read size and orientation of an image file; its pixels are not decoded.

    Raises:
        OSError: the file cannot be opened.
        Unreadable: the file is not an image.
    """
    with open(path, "rb") as file:
        return _header(file)


def check_file(path: str) -> ImageHeader:
    """Check that an image file is whole and of a kind that is read; return its header.

    The pixels of JPEG, PNG, WebP and usual TIFF files are not decoded.

    Raises:
        OSError: the file cannot be opened.
        Unreadable: what `decode_image` raises for damage that shows without decoding.
    """
    with open(path, "rb") as file:
        header = _header(file)
        if header.tags is not None:
            _check_samples(header.tags)
        if not _is_whole(file, header):
            file.seek(0)
            decode_image(file.read())
    return header


def decode_image(data: bytes, size: tuple[int, int] | None = None) -> tuple[np.ndarray, int]:
    """Decode the content of an image file; see `sam_gym.data.io.read_image`.

    Returns:
        uint8 (H, W, 3), RGB, and the number of bits per sample that were scaled to 8, or 0.

    Raises:
        Unreadable: the file is no image, is truncated, or has samples without a known range.
    """
    header = _header(io.BytesIO(data))
    if header.tags is not None:
        _check_samples(header.tags)
        data = _mark_alpha_as_associated(data)
    bgr = _decode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    bits = 0
    if bgr.max() <= 64:
        bgr, bits = _scale_low_bits(data, header, bgr)
    return _turn(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), header, size), bits


def decode_labels(data: bytes, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode the content of a mask or label file; see `sam_gym.data.io.read_labels`.

    Raises:
        Unreadable: the file is no image, is truncated, or is not one channel of 8 or 16 bits.
    """
    header = _header(io.BytesIO(data))
    if header.tags is not None:
        _check_compression(header.tags)
    if _is_palette_png(data):
        labels = _palette_indices(data)
    else:
        labels = _decode(data, cv2.IMREAD_UNCHANGED)
    if labels.ndim != 2 or labels.dtype not in (np.uint8, np.uint16):
        channels = 1 if labels.ndim == 2 else labels.shape[2]
        raise Unreadable(
            f"expected one channel of uint8 or uint16 labels, got {channels} of {labels.dtype}",
            "Save it as grey PNG of 8 or 16 bits, or with a palette",
        )
    return _turn(labels, header, size)


def decode_colours(data: bytes, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode the content of a label file whose colours are codes; see `read_annotated`.

    Raises:
        Unreadable: the file is no image, is truncated, or is not three channels of 8 bits.
    """
    header = _header(io.BytesIO(data))
    colours = _decode(data, cv2.IMREAD_UNCHANGED)
    if colours.dtype != np.uint8 or colours.shape[2:] != (3,):
        channels = 1 if colours.ndim == 2 else colours.shape[2]
        raise Unreadable(
            f"expected three channels of uint8 colour codes, got {channels} of {colours.dtype}",
            "Fetch the original file again",
        )
    return _turn(colours[..., ::-1], header, size)


def _is_palette_png(data: bytes) -> bool:
    return data.startswith(b"\x89PNG") and data[25:26] == b"\3"


def _palette_indices(data: bytes) -> np.ndarray:
    """Return the indices of a PNG with a palette, as Pillow does; OpenCV returns the colours."""
    try:
        return np.array(_open(io.BytesIO(data), data[:16]))
    except Exception:  # as in `_header`
        raise Unreadable(*_NOT_AN_IMAGE) from None


def _turn(pixels: np.ndarray, header: ImageHeader, size: tuple[int, int] | None) -> np.ndarray:
    """Turn decoded pixels upright, or leave out a quarter turn; OpenCV returns TIFF upright."""
    orientation = header.orientation
    decoded_upright = header.tags is not None
    if header.fit(size) == header.size:
        turn = 1 if decoded_upright else orientation
    else:
        turn = _QUARTER_TURNS[orientation] if decoded_upright else 1
    return np.ascontiguousarray(_TURNS[turn](pixels))


def _header(file: BinaryIO) -> ImageHeader:
    try:
        start = file.read(16)
        file.seek(0)
        if start.startswith(_TIFF):
            header = _tiff_header(file, start)
        else:
            image = _open(file, start)
            header = ImageHeader(image.size[::-1], _orientation(image))
    except Exception:  # Pillow's readers raise many classes, and lack formats that OpenCV reads
        file.seek(0)
        return ImageHeader(_decode(file.read(), cv2.IMREAD_UNCHANGED).shape[:2])
    height, width = header.stored_size
    if height * width > _MAX_PIXELS:
        raise Unreadable(f"{width} x {height} pixels are more than OpenCV reads", "Scale it down")
    return header


def _open(file: BinaryIO, start: bytes) -> Image.Image:
    """Do what `Image.open` does, without its limit on the number of pixels."""
    Image.init()
    for name in _FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory is not None and accept is not None and accept(start) is True:
            return factory(file, "")
    raise Image.UnidentifiedImageError


def _orientation(image: Image.Image) -> int:
    try:
        # PNG's own `getexif` decodes the pixels.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # as in `_header`
        return 1
    return value if value in _TURNS else 1


def _tiff_header(file: BinaryIO, start: bytes) -> ImageHeader:
    big = _BIG_TIFF in start[2:4]
    tags = TiffImagePlugin.ImageFileDirectory_v2(start if big else start[:8])
    file.seek(tags.next)
    tags.load(file)
    orientation = tags.get(ExifTags.Base.Orientation, 1)
    size = tags[ExifTags.Base.ImageLength], tags[ExifTags.Base.ImageWidth]
    return ImageHeader(size, orientation if orientation in _TURNS else 1, tags)


def _decode(data: bytes, flags: int) -> np.ndarray:
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    except cv2.error as error:
        raise Unreadable(f"OpenCV cannot decode the file: {error.err}", "Export it again") from None
    if pixels is not None and not _is_cut_jpeg(data):
        return pixels
    raise Unreadable(*_why(data))


def _why(data: bytes) -> tuple[str, str]:
    """Return why OpenCV cannot decode a file, and what to do about it."""
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF:
        return "HEIF files are not read", _CONVERT
    try:
        with Image.open(io.BytesIO(data)) as image:
            # Other formats are not decoded: Pillow runs Ghostscript for some.
            if image.format in (*_FORMATS, "TIFF"):
                image.load()
            return f"{image.format} files of mode {image.mode} are not read", _CONVERT
    except Exception:  # as in `_header`
        if data.startswith(_TIFF):
            return f"{_NOT_AN_IMAGE[0]} in a supported kind of TIFF", _CONVERT
        return _NOT_AN_IMAGE


def _is_whole(file: BinaryIO, header: ImageHeader) -> bool:
    """Return whether a file certainly has its end, as its format tells."""
    size = file.seek(0, os.SEEK_END)
    if header.tags is not None:
        ends = [
            offset + length
            for offsets, lengths in _TIFF_DATA
            for offset, length in zip(
                np.ravel(header.tags.get(offsets, ())),
                np.ravel(header.tags.get(lengths, ())),
                strict=False,
            )
        ]
        return _is_plain(header.tags) and bool(ends) and max(ends) <= size
    file.seek(0)
    start = file.read(12)
    file.seek(max(0, size - 2**16))
    end = file.read()
    if start.startswith(b"\x89PNG"):
        return _END_OF_PNG in end
    if start.startswith(b"RIFF"):
        return int.from_bytes(start[4:8], "little") + 8 <= size
    return start.startswith(b"\xff\xd8") and end.rfind(_END_OF_IMAGE) > end.rfind(_START_OF_SCAN)


def _is_cut_jpeg(data: bytes) -> bool:
    """Detect a truncated JPEG, whose missing part OpenCV silently fills with grey."""
    start = b"\xff\xd8"
    if not data.startswith(start) or data.rfind(_END_OF_IMAGE) > data.rfind(_START_OF_SCAN):
        return False
    # Phones append videos, which hold any bytes: look for the end of the image itself.
    place = len(start)
    while marker := _MARKER.search(data, place):
        if marker[0] == _END_OF_IMAGE:
            return False
        place = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return True


def _check_samples(tags: TiffImagePlugin.ImageFileDirectory_v2) -> None:
    """Refuse samples without a known range (signed, float, more than 16 bits) or colour."""
    _check_compression(tags)
    bits = np.max(tags.get(ExifTags.Base.BitsPerSample, 1))
    kind = _SAMPLE_FORMATS.get(np.max(tags.get(ExifTags.Base.SampleFormat, 1)), "unknown")
    if kind != "uint" or bits > 16:
        raise Unreadable(
            f"expected samples of uint8 or uint16, got {kind}{bits}, whose range is unknown",
            "Scale it to 8 bits",
        )
    bands = tags.get(ExifTags.Base.SamplesPerPixel, 1)
    if bands > 4 or (bands > 2 and tags.get(ExifTags.Base.PhotometricInterpretation) in _GREY):
        raise Unreadable(
            f"the file has {bands} bands that are not marked as RGB",
            "Save three of them as an RGB image",
        )


def _check_compression(tags: TiffImagePlugin.ImageFileDirectory_v2) -> None:
    compression = tags.get(ExifTags.Base.Compression, 1)
    if compression not in _TIFF_COMPRESSIONS:
        name = TiffImagePlugin.COMPRESSION_INFO.get(compression, compression)
        raise Unreadable(f"TIFF files with compression {name} are not read", _CONVERT)


def _is_plain(tags: TiffImagePlugin.ImageFileDirectory_v2) -> bool:
    """Return whether a TIFF file is of a usual kind, which OpenCV certainly reads."""
    kinds = _PLAIN_TIFFS.get(np.max(tags.get(ExifTags.Base.BitsPerSample, 1)), ())
    planes = tags.get(ExifTags.Base.PlanarConfiguration) == _SEPARATE
    return tags.get(ExifTags.Base.PhotometricInterpretation) in kinds and not planes


def _mark_alpha_as_associated(data: bytes) -> bytes:
    """Change the tag of a TIFF file's alpha channel: libtiff multiplies colours by another one."""
    order = "<" if data.startswith(b"I") else ">"
    count = "Q" if _BIG_TIFF in data[2:4] else "I"
    entry = struct.pack(f"{order}HH{count}", ExifTags.Base.ExtraSamples, TiffTags.SHORT, 1)
    unassociated, associated = (struct.pack(f"{order}H", value) for value in (2, 1))
    return data.replace(entry + unassociated, entry + associated, 1)


def _scale_low_bits(data: bytes, header: ImageHeader, bgr: np.ndarray) -> tuple[np.ndarray, int]:
    """Scale a dark image that holds fewer bits than its samples of 16 bits could."""
    tags: Any = header.tags or {}
    planes = tags.get(ExifTags.Base.PlanarConfiguration) == _SEPARATE
    if planes and np.max(tags.get(ExifTags.Base.BitsPerSample, 1)) > 8:
        # OpenCV mixes up the planes.
        raise Unreadable(
            "low 16-bit values in separate planes cannot be read", "Scale it to 8 bits"
        )
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    wide = _decode(data, flags)
    if wide.dtype.kind == "f":
        raise Unreadable(f"samples of {wide.dtype} have no known range", "Scale it to 8 bits")
    bits = next(bits for bits in (8, 10, 12, 14, 16) if wide.max() < 2**bits)
    if wide.dtype != np.uint16 or not wide.any() or bits == 16:
        return bgr, 0
    return (wide >> (bits - 8)).astype(np.uint8), bits
