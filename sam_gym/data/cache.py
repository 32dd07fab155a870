"""Caches of samples and frames: generating or decoding one costs more than a step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from sam_gym.data.base import Dataset, Sample, Video, VideoDataset
from sam_gym.utils.digest import image_digest


def pack_masks(masks: np.ndarray) -> np.ndarray:
    """Pack masks bool (..., H, W) eight pixels to a byte: uint8 (..., H, ceil(W / 8))."""
    return np.packbits(masks, axis=-1)


def unpack_masks(packed: np.ndarray, width: int) -> np.ndarray:
    """Unpack masks of `pack_masks` of a width: bool (..., H, W)."""
    return np.unpackbits(packed, axis=-1, count=width).view(bool)


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

    def clear(self) -> None:
        """Drop all samples."""
        self._kept.clear()
        self._bytes = 0

    def __getitem__(self, index: int) -> Sample:
        """Return the sample at `index`, with its digest and without its parts.

        Raises:
            ValueError: the dataset or `check` raises it; the message names the sample.
        """
        if index in self._kept:
            self._kept.move_to_end(index)
            sample, packed = self._kept[index]
            return replace(sample, masks=unpack_masks(packed, sample.image.shape[1]))
        self.misses += 1
        sample = self.dataset[index]
        if self._check is not None:
            try:
                self._check(sample.image)
            except ValueError as error:
                raise ValueError(f"{sample.source}: {error}") from error
        sample = replace(sample, parts=None, digest=image_digest(sample.image))
        packed = pack_masks(sample.masks)
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


@dataclass(frozen=True)
class CachedFrame:
    """A frame of a video.

    Attributes:
        image: uint8 (H, W, 3), RGB.
        prepared: uint8 (H', W', 3), the image as the backbone encodes it.
        digest: `image_digest` of `prepared`.
        masks: uint8 (N, H, W / 8), packed bits of the visible mask of each object.
        annotated: bool (N,), whether its mask is known.
    """

    image: np.ndarray
    prepared: np.ndarray
    digest: bytes
    masks: np.ndarray
    annotated: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels."""
        own = self.image.nbytes + self.masks.nbytes
        return own if self.prepared is self.image else own + self.prepared.nbytes

    def mask(self, number: int) -> np.ndarray:
        """Return the mask of an object: bool (H, W)."""
        return unpack_masks(self.masks[number], self.image.shape[1])


class FrameCache:
    """The most recently used frames of a dataset of videos, with packed masks.

    Args:
        dataset: source of the videos.
        max_bytes: maximum size of the frames; 0 caches none.
        prepare: makes what the backbone encodes of an image uint8 (H, W, 3), or returns it.
        check: raises `ValueError` for an image that cannot be used; called once a frame is read.
    """

    #: Maximum number of open videos.
    max_videos = 256

    def __init__(
        self,
        dataset: VideoDataset,
        max_bytes: int,
        prepare: Callable[[np.ndarray], np.ndarray],
        check: Callable[[np.ndarray], None],
    ) -> None:
        self.dataset, self.max_bytes = dataset, max_bytes
        self._prepare, self._check = prepare, check
        self._videos: OrderedDict[int, Video] = OrderedDict()
        self._kept: OrderedDict[tuple[int, int], CachedFrame] = OrderedDict()
        self._bytes = 0
        #: Number of frames read from videos.
        self.misses = 0

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Drop all frames and open videos."""
        self._videos.clear()
        self._kept.clear()
        self._bytes = 0

    def video(self, index: int) -> Video:
        """Return the video at `index`, kept open."""
        if index not in self._videos:
            self._videos[index] = self.dataset[index]
            if len(self._videos) > self.max_videos:
                self._videos.popitem(last=False)
        self._videos.move_to_end(index)
        return self._videos[index]

    def frame(self, index: int, number: int) -> CachedFrame:
        """Return a frame of a video.

        Raises:
            ValueError: the dataset or `check` raises it; the message names video and frame.
        """
        key = index, number
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        self.misses += 1
        video = self.video(index)
        image, annotation = video.image(number), video.annotation(number)
        try:
            self._check(image)
        except ValueError as error:
            raise ValueError(f"{video.name}, frame {video.frames[number]}: {error}") from error
        prepared = self._prepare(image)
        packed = pack_masks(annotation.masks)
        frame = CachedFrame(
            image, prepared, image_digest(prepared), packed, annotation.annotated.copy()
        )
        if frame.nbytes <= self.max_bytes:
            self._kept[key] = frame
            self._bytes += frame.nbytes
            while self._bytes > self.max_bytes:
                _, old = self._kept.popitem(last=False)
                self._bytes -= old.nbytes
        return frame
