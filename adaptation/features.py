"""Training images, held-out objects and their features, in bounded memory."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adaptation.frame_transform import FrameTransform, low_res_target
from adaptation.sequences import CompressedArrays, LazySequence
from sam_gym.backbones import Backbone
from sam_gym.backbones.embeddings.disk import DiskStore
from sam_gym.backbones.embeddings.store import EmbeddingStore
from sam_gym.backbones.features import ImageFeatures
from sam_gym.data.base import Sample
from sam_gym.data.cache import SampleCache
from sam_gym.data.streams import Domain, Stream
from sam_gym.simulation.interactive import box_of
from sam_gym.utils.digest import image_digest
from sam_gym.utils.lowres import low_res

#: Minimum area of a training object in an augmented image, as a fraction of the frame.
_MIN_AREA = 0.001
#: Images per encoder call.
_ENCODE = 16
#: More images than this mean an endless dataset: a procedural one has 2^31 - 1 by default.
_ENDLESS = 2**30
#: Fraction of the memory for samples; the rest is for features, of at most two kinds.
_SAMPLES = 0.25


@dataclass(frozen=True)
class AugmentedImages:
    """Augmented training images of a domain, and their objects.

    Attributes:
        frames: uint8 (S, S, 3) each, in the frame of the model; computed when they are read.
        digests: `image_digest` of each frame.
        image: int64 (V,), the training image of each frame.
        rows: int64 (P,), the frame of each object.
        targets: uint8 (P, hm, wm), `low_res_target` of each object.
        valid: bool (V, hm, wm), low-res pixels of each frame that count.
        empty: bool (V, hm, wm), valid pixels that no object touches.
        boxes: float32 (P, 4), (x0, y0, x1, y1) in pixels of the frame.
        categories: int64 (P,), the category of each object.
        objects: indices of the objects of each frame.
        digest: of all frames.
    """

    frames: Sequence[np.ndarray]
    digests: list[bytes]
    image: np.ndarray
    rows: np.ndarray
    targets: CompressedArrays
    valid: CompressedArrays
    empty: CompressedArrays
    boxes: np.ndarray
    categories: np.ndarray
    objects: tuple[np.ndarray, ...]
    digest: str

    @property
    def firsts(self) -> np.ndarray:
        """The first frame of each image: the unaugmented one, if it shows an object."""
        return np.unique(self.image, return_index=True)[1]


class Pool(NamedTuple):
    """Augmented images of a domain from which objects are drawn.

    Attributes:
        task: index of the domain.
        images: its augmented images.
        allowed: int64 (A,), indices of the augmented images that may be drawn.
    """

    task: int
    images: AugmentedImages
    allowed: np.ndarray


@dataclass(frozen=True)
class Objects:
    """Objects of held-out images, at the size of the images. Arrays are read when needed.

    Attributes:
        images: uint8 (H, W, 3) each.
        digests: `image_digest` of each image.
        rows: int64 (P,), the image of each object.
        masks: bool (H, W) each.
        ignore: bool (H, W) of each image, or None.
        boxes: float32 (P, 4), in pixels of the model's frame.
    """

    images: Sequence[np.ndarray]
    digests: list[bytes]
    rows: np.ndarray
    masks: Sequence[np.ndarray]
    ignore: Sequence[np.ndarray | None]
    boxes: np.ndarray


@dataclass(frozen=True)
class LabelledImages:
    """Images with label maps. Arrays are read when needed.

    Attributes:
        images: uint8 (H, W, 3) each; of training images, their augmentations, one image after the
            other, in a frame of the model or of a multiple of its side.
        digests: `image_digest` of each.
        labels: uint8 label map of each: of training images (S, S), in the frame of the model, of
            others (H, W).
        digest: of all images and label maps; "" for held-out ones.
    """

    images: Sequence[np.ndarray]
    digests: list[bytes]
    labels: Sequence[np.ndarray] | CompressedArrays
    digest: str = ""


class FeatureBank:
    """Training images, held-out objects and their features, for all domains of a stream.

    All compared methods share one bank: they see the same augmentations, and each image is encoded
    once for all epochs and methods.

    Memory is bounded. Samples that were evicted are read again, augmentations are recomputed from
    their seeds, and features that do not fit are written to disk.

    Args:
        backbone: the frozen SAM.
        stream: the domains.
        augmentations: augmentations per training image; the first is the image itself.
        objects_per_image: maximum number of objects of an augmented or held-out image.
        max_images: maximum number of images per split, the first ones (None: all).
        seed: seed of the augmentations and of the choice of objects.
        memory_gib: bound on cached samples and features, in GiB; features are on the device.
        disk: folder for features, kept between runs. None: only features that do not fit in memory
            are written, to the default folder of `DiskStore`.
    """

    def __init__(
        self,
        backbone: Backbone,
        stream: Stream,
        augmentations: int = 4,
        objects_per_image: int = 8,
        max_images: int | None = None,
        seed: int = 0,
        memory_gib: float = 8.0,
        disk: str | Path | None = None,
    ) -> None:
        self.backbone, self.stream = backbone, stream
        self.augmentations, self.objects_per_image = augmentations, objects_per_image
        self.max_images, self.seed = max_images, seed
        self._bytes, self._disk = int(memory_gib * 2**30), disk
        # Keyed by the identity of the domain (names may repeat) and the split.
        self._train_images: dict[int, AugmentedImages] = {}
        self._objects: dict[tuple[int, str], Objects] = {}
        self._labelled: dict[tuple[int, str, int], LabelledImages] = {}
        self._samples: dict[tuple[int, str], SampleCache] = {}
        self._encoded: set[tuple[int, str, str]] = set()
        self._stores: dict[str, EmbeddingStore] = {}

    # Images and objects ------------------------------------------------------------------------

    def train(self, domain: Domain) -> AugmentedImages:
        """The augmented training images of a domain."""
        if id(domain) not in self._train_images:
            self._train_images[id(domain)] = self._augment_all(domain)
        return self._train_images[id(domain)]

    def pool(self, task: int) -> Pool:
        """All augmented images of a domain, by its index."""
        images = self.train(self.stream[task])
        return Pool(task, images, np.arange(len(images.frames)))

    def held_out(self, domain: Domain, split: str) -> Objects:
        """The objects of a held-out split."""
        key = id(domain), split
        if key not in self._objects:
            self._objects[key] = self._held_out(domain, split)
        return self._objects[key]

    def labelled(self, domain: Domain, split: str, scale: int = 1) -> LabelledImages:
        """The images of a split with label maps; of "train", their augmentations.

        Args:
            domain: one of the stream's, or another one.
            split: "train" for augmented images.
            scale: side of the frames of augmented images, in frames of the model.
        """
        key = id(domain), split, scale
        if key not in self._labelled:
            if split == "train":
                self._labelled[key] = self._augment_labelled(domain, scale)
            else:
                self._labelled[key] = self._held_out_labelled(domain, split)
        return self._labelled[key]

    def count(self, domain: Domain, split: str) -> int:
        """Number of images of a split that are used."""
        dataset = domain.split(split)
        count = len(dataset) if self.max_images is None else min(len(dataset), self.max_images)
        if count > _ENDLESS:
            raise ValueError(f"{dataset.name} is endless: pass --max-images (max_images=).")
        return count

    def _images(self, domain: Domain, split: str) -> tuple[Sequence[np.ndarray], list[bytes]]:
        """The augmented images of a domain or the images of another split, and their digests."""
        if split == "train":
            own = self.train(domain)
            return own.frames, own.digests
        objects = self.held_out(domain, split)
        return objects.images, objects.digests

    def _sample(self, domain: Domain, split: str, index: int) -> Sample:
        """A sample of a domain, from the cache if it is there."""
        key = id(domain), split
        if key not in self._samples:
            # Two splits (training, held-out) of each domain and of the retention set.
            share = int(_SAMPLES * self._bytes) // (2 * (len(self.stream) + 1))
            check = self.backbone.check_image
            self._samples[key] = SampleCache(domain.split(split), share, check)
        return self._samples[key][index]

    def _read(self, domain: Domain, split: str) -> Iterator[tuple[int, Sample]]:
        for number in range(self.count(domain, split)):
            yield number, self._sample(domain, split, number)

    def _rng(self, *words: object) -> np.random.Generator:
        text = "/".join(map(str, words)).encode(errors="backslashreplace")
        return np.random.default_rng([self.seed, *text])

    def _augmented(
        self, domain: Domain, number: int, copy: int, sample: Sample, scale: int = 1
    ) -> tuple[FrameTransform, np.random.Generator]:
        """An augmentation of a training image, and the generator that it was drawn with."""
        rng = self._rng("view", domain.name, number, copy)
        size, image_size = scale * self.backbone.image_size, sample.image.shape[:2]
        squash = self.backbone.squashes
        return FrameTransform.draw(rng, image_size, size, plain=copy == 0, squash=squash), rng

    def _augment_all(self, domain: Domain) -> AugmentedImages:
        shape = self.backbone.mask_shape
        sources: list[tuple[int, int]] = []
        digests: list[bytes] = []
        pixels = hashlib.sha256()
        targets, valid, empty, boxes, categories, objects = [], [], [], [], [], []
        rows: list[int] = []
        total = small = 0
        for number, sample in self._read(domain, "train"):
            ever = np.zeros(len(sample.masks), bool)
            scored = np.ones(sample.image.shape[:2], bool)
            scored = scored if sample.ignore is None else ~sample.ignore
            for copy in range(self.augmentations):
                augmentation, rng = self._augmented(domain, number, copy, sample)
                masks = np.stack([augmentation.mask(mask) for mask in sample.masks])
                large = np.flatnonzero(masks.sum(axis=(1, 2)) >= _MIN_AREA * masks[0].size)
                ever[large] = True
                kept = np.sort(rng.permutation(large)[: self.objects_per_image])
                if not len(kept):
                    continue
                objects.append(len(rows) + np.arange(len(kept)))
                rows += [len(sources)] * len(kept)
                targets += [low_res_target(masks[k], shape) for k in kept]
                boxes += [box_of(masks[k]) for k in kept]
                categories += [int(sample.categories[k]) for k in kept]
                valid.append(low_res(augmentation.mask(scored), shape) >= 0.5)
                anything = np.asarray(masks.any(axis=0))
                empty.append(valid[-1] & (low_res(anything, shape) == 0))
                frame = augmentation.frame(sample.image)
                digests.append(image_digest(frame))
                pixels.update(frame.data)
                sources.append((number, copy))
            total, small = total + len(ever), small + int((~ever).sum())
        if not sources:
            raise ValueError(
                f"Domain {domain.name!r}: no training image shows an object of at least "
                f"{_MIN_AREA:.1%} of the frame. Leave the domain out."
            )
        if small:
            warnings.warn(
                f"{domain.name}: {small} of {total} objects are smaller than {_MIN_AREA:.1%} of "
                "the frame in every augmentation, and are not trained on.",
                stacklevel=2,
            )

        def frame_of(index: int) -> np.ndarray:
            number, copy = sources[index]
            sample = self._sample(domain, "train", number)
            return self._augmented(domain, number, copy, sample)[0].frame(sample.image)

        return AugmentedImages(
            LazySequence(len(sources), frame_of),
            digests,
            np.array([number for number, _ in sources]),
            np.array(rows),
            CompressedArrays(targets),
            CompressedArrays(valid),
            CompressedArrays(empty),
            np.stack(boxes),
            np.array(categories),
            tuple(objects),
            pixels.hexdigest()[:16],
        )

    def _held_out(self, domain: Domain, split: str) -> Objects:
        digests: list[bytes] = []
        places: list[tuple[int, int]] = []
        boxes = []
        for number, sample in self._read(domain, split):
            rng = self._rng("objects", domain.name, split, number)
            chosen = rng.permutation(len(sample.masks))[: self.objects_per_image]
            for k in np.sort(chosen):
                corners = box_of(sample.masks[k]).reshape(2, 2)
                box = self.backbone.to_input_frame(corners, sample.masks[k].shape)
                places.append((number, int(k)))
                boxes.append(box.reshape(4))
            digests.append(sample.digest or image_digest(sample.image))

        def mask_of(index: int) -> np.ndarray:
            number, k = places[index]
            return self._sample(domain, split, number).masks[k]

        return Objects(
            LazySequence(len(digests), lambda k: self._sample(domain, split, k).image),
            digests,
            np.array([number for number, _ in places]),
            LazySequence(len(places), mask_of),
            LazySequence(len(digests), lambda k: self._sample(domain, split, k).ignore),
            np.array(boxes, np.float32),
        )

    def _augment_labelled(self, domain: Domain, scale: int) -> LabelledImages:
        digests: list[bytes] = []
        content = hashlib.sha256()
        background = len(domain.split("train").categories)

        def compressed() -> Iterator[np.ndarray]:
            for number, sample in self._read(domain, "train"):
                truth = sample.label_map(background)
                for copy in range(self.augmentations):
                    own = self._augmented(domain, number, copy, sample)[0].labels(truth)
                    frame = self._frame(domain, number, copy, sample, scale)
                    digests.append(image_digest(frame))
                    content.update(digests[-1])
                    content.update(own.data)
                    yield own

        labels = CompressedArrays(compressed())

        def frame_of(index: int) -> np.ndarray:
            number, copy = divmod(index, self.augmentations)
            return self._frame(domain, number, copy, self._sample(domain, "train", number), scale)

        frames = LazySequence(len(digests), frame_of)
        return LabelledImages(frames, digests, labels, content.hexdigest()[:16])

    def _frame(
        self, domain: Domain, number: int, copy: int, sample: Sample, scale: int
    ) -> np.ndarray:
        return self._augmented(domain, number, copy, sample, scale)[0].frame(sample.image)

    def _held_out_labelled(self, domain: Domain, split: str) -> LabelledImages:
        background = len(domain.split(split).categories)
        digests = [
            sample.digest or image_digest(sample.image) for _, sample in self._read(domain, split)
        ]

        def image_of(index: int) -> np.ndarray:
            return self._sample(domain, split, index).image

        def labels_of(index: int) -> np.ndarray:
            return self._sample(domain, split, index).label_map(background)

        count = len(digests)
        return LabelledImages(
            LazySequence(count, image_of), digests, LazySequence(count, labels_of)
        )

    # Features ----------------------------------------------------------------------------------

    def pixels(self, domain: Domain, split: str, index: Sequence[int] | np.ndarray) -> Tensor:
        """Prepared pixels (B, 3, S, S) of some augmented images, or images of another split."""
        images, _ = self._images(domain, split)
        return self.backbone.prepare([images[int(k)] for k in index])

    def raw(
        self, domain: Domain, split: str, kind: str, index: Sequence[int] | np.ndarray
    ) -> ImageFeatures:
        """`raw_features` of some augmented images of a domain, or images of another split.

        Args:
            domain: one of the stream's, or another one.
            split: "train" for augmented images.
            kind: of `raw_features`.
            index: of B images.
        """
        if kind == "pixels":
            return ImageFeatures({"pixels": self.pixels(domain, split, index)})
        self.encode(domain, split, kind)
        return self._gather_all(*self._images(domain, split), kind, np.asarray(index))

    def encode(self, domain: Domain, split: str, kind: str) -> None:
        """Encode the images of a split, unless they are encoded; `raw` calls this when needed."""
        key = id(domain), split, kind
        if kind == "pixels" or key in self._encoded:
            return
        self._encoded.add(key)
        images, digests = self._images(domain, split)
        for part in self._parts(kind, np.arange(len(images))):
            self._gather(images, digests, kind, part)

    def labelled_features(
        self, images: LabelledImages, kind: str, index: Sequence[int] | np.ndarray
    ) -> ImageFeatures:
        """`raw_features` of some labelled images.

        Args:
            images: of `labelled`.
            kind: of `raw_features`, but not "pixels".
            index: of B images.
        """
        return self._gather_all(images.images, images.digests, kind, np.asarray(index))

    def encode_labelled(self, images: LabelledImages, kind: str) -> None:
        """Encode labelled images, unless they are encoded."""
        for part in self._parts(kind, np.arange(len(images.images))):
            self._gather(images.images, images.digests, kind, part)

    def _parts(self, kind: str, index: np.ndarray) -> list[np.ndarray]:
        """Split indices into those of one call."""
        size = min(_ENCODE, self._store(kind).capacity)
        return np.split(index, range(size, len(index), size))

    def _gather_all(
        self, images: Sequence[np.ndarray], digests: list[bytes], kind: str, index: np.ndarray
    ) -> ImageFeatures:
        parts = self._parts(kind, index)
        return ImageFeatures.cat([self._gather(images, digests, kind, part) for part in parts])

    def _gather(
        self, images: Sequence[np.ndarray], digests: list[bytes], kind: str, index: np.ndarray
    ) -> ImageFeatures:
        store = self._store(kind)
        chosen = LazySequence(len(index), lambda k: images[int(index[k])])
        handles = store.acquire(chosen, [digests[k] for k in index])
        try:
            # The memory layout of the encoder's output; the decoder reads all channels of a cell.
            return store.gather(torch.tensor(handles)).map(
                lambda x: x.contiguous(memory_format=torch.channels_last)
            )
        finally:
            for handle in handles:
                store.unpin(handle)

    def _store(self, kind: str) -> EmbeddingStore:
        if kind not in self._stores:
            source = self.backbone.raw_source(kind)
            store = EmbeddingStore(source, int((1 - _SAMPLES) * self._bytes) // 2, _ENCODE)
            if self._disk is not None or self._expected_images() > store.capacity:
                folder = None if self._disk is None else Path(self._disk).expanduser()
                store.disk = DiskStore(source, folder)
            self._stores[kind] = store
        return self._stores[kind]

    def _expected_images(self) -> int:
        """Number of images with features: augmented ones, and those of the largest other split."""
        total = 0
        for domain in self.stream:
            counts = {
                split: min(len(dataset), self.max_images or len(dataset))
                for split, dataset in domain.datasets.items()
            }
            total += self.augmentations * counts.pop("train", 0)
            total += max((count for count in counts.values() if count <= _ENDLESS), default=0)
        return total

    # Memory ------------------------------------------------------------------------------------

    @property
    def encoded(self) -> int:
        """Number of images that were encoded so far."""
        return sum(store.encoded for store in self._stores.values())

    @property
    def nbytes(self) -> int:
        """Bytes held for samples, targets and features."""
        held = [cache.nbytes for cache in self._samples.values()]
        held += [store.nbytes for store in self._stores.values()]
        for images in self._train_images.values():
            held += [part.nbytes for part in (images.targets, images.valid, images.empty)]
        return sum(held)
