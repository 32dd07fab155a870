"""What trainers see of a domain: a fixed bank of augmented views, encoded once and for all."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from torch import Tensor

from sam_gym.backbones import Backbone
from sam_gym.backbones.features import ImageFeatures
from sam_gym.data.base import Dataset, Sample
from sam_gym.data.streams import Domain, Stream
from sam_gym.metrics.masks import iou
from sam_gym.utils.lowres import low_res
from sam_gym.utils.transfer import to_device

#: The colour that normalises to about zero, with which views are padded.
_PADDING = (124, 116, 104)
#: Scales of large-scale jitter, and the smallest object of a view (share of the frame).
_JITTER, _MIN_AREA = (0.6, 1.8), 0.001
#: Shares of a pixel above which a target may begin; of equally good ones the first is taken.
_THRESHOLDS = (0.5, 0.4, 0.3, 0.2, 0.1)
_ENCODE = 16
#: No bank holds the views of so many images: a procedural dataset without a length has 2^31 - 1.
_ENDLESS = 2**30


@dataclass(frozen=True)
class AugmentedImages:
    """AugmentedImages of the training images of a domain, and their objects.

    Attributes:
        frames: uint8 (V, S, S, 3), in the frame of the model.
        image: int64 (V,), the image that each is a view of.
        rows: int64 (P,), the view of each object.
        targets: uint8 (P, hm, wm), `low_res_target` of each object.
        valid: bool (V, hm, wm), low-res pixels of each view that count.
        empty: bool (V, hm, wm), those of them that belong to no object, however small.
        boxes: float32 (P, 4), (x0, y0, x1, y1) in pixels of the frame.
        categories: int64 (P,), the category of each object.
        objects: object numbers of each view.
    """

    frames: np.ndarray
    image: np.ndarray
    rows: np.ndarray
    targets: np.ndarray
    valid: np.ndarray
    empty: np.ndarray
    boxes: np.ndarray
    categories: np.ndarray
    objects: tuple[np.ndarray, ...]

    @property
    def firsts(self) -> np.ndarray:
        """The first view of each image, which is the image as it is if it shows an object."""
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
    """Objects of held-out images, at the size of the images.

    Attributes:
        images: uint8 (H, W, 3) each.
        rows: int64 (P,), the image of each object.
        masks: bool (H, W) each.
        ignore: bool (H, W) of each image, or None.
        boxes: float32 (P, 4), in pixels of the model's frame.
    """

    images: list[np.ndarray]
    rows: np.ndarray
    masks: list[np.ndarray]
    ignore: list[np.ndarray | None]
    boxes: np.ndarray


class FeatureBank:
    """Training images, held-out objects and their features, for all domains of a stream.

    All methods that are compared share one bank, so they see the same views, and no image is
    encoded again in another epoch or for another method.

    Args:
        backbone: the frozen SAM.
        stream: the domains.
        views: augmented views per training image; the first is the image itself.
        objects_per_image: at most so many objects of a training view or a held-out image.
        max_images: at most so many images of a split, the first ones (None: all).
        seed: of the augmentation and of the choice of objects.
    """

    def __init__(
        self,
        backbone: Backbone,
        stream: Stream,
        augmentations: int = 4,
        objects_per_image: int = 8,
        max_images: int | None = None,
        seed: int = 0,
    ) -> None:
        self.backbone, self.stream = backbone, stream
        self.augmentations, self.objects_per_image = augmentations, objects_per_image
        self.seed = seed
        self.max_images = max_images
        #: By kind and by the identity of the domain, whose name another domain may have.
        self._made: dict[tuple[object, ...], object] = {}

    def _once(self, make: Callable[..., object], *key: object) -> object:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def train(self, domain: Domain) -> AugmentedImages:
        """The views of a domain's training images."""
        views = self._once(lambda: self._train(domain), "train", id(domain))
        assert isinstance(views, AugmentedImages)
        return views

    def pool(self, task: int) -> Pool:
        """All augmented images of a domain, by its index."""
        images = self.train(self.stream[task])
        return Pool(task, images, np.arange(len(images.frames)))

    def digest(self, domain: Domain) -> str:
        """Tells the training views of a domain from others."""

        def make() -> str:
            return hashlib.sha256(self.train(domain).frames.tobytes()).hexdigest()[:16]

        return str(self._once(make, "digest", id(domain)))

    def held_out(self, domain: Domain, split: str) -> Objects:
        """The objects of a split that is not trained on."""
        objects = self._once(lambda: self._held_out(domain, split), split, id(domain))
        assert isinstance(objects, Objects)
        return objects

    def images(self, domain: Domain, split: str) -> Sequence[np.ndarray] | np.ndarray:
        """The views of a domain, or the images of another split."""
        if split == "train":
            return self.train(domain).frames
        return self.held_out(domain, split).images

    def raw(self, domain: Domain, split: str, kind: str) -> ImageFeatures:
        """`raw_features` of all views of a domain, or of the images of another split."""
        features = self._once(lambda: self._raw(domain, split, kind), split, id(domain), kind)
        assert isinstance(features, ImageFeatures)
        return features

    def of_views(self, domain: Domain, index: np.ndarray, kind: str) -> ImageFeatures:
        """`raw_features` of some views of a domain."""
        if kind == "pixels":
            return ImageFeatures({"pixels": self.pixels(domain, "train", index)})
        features = self.raw(domain, "train", kind)
        return features[to_device(index, features.device)]

    def pixels(self, domain: Domain, split: str, index: np.ndarray | None = None) -> Tensor:
        """Prepared pixels (B, 3, S, S) of some views, or of images of another split."""
        frames = self.images(domain, split)
        chosen = range(len(frames)) if index is None else index
        return self.backbone.prepare([frames[i] for i in chosen])

    def _raw(self, domain: Domain, split: str, kind: str) -> ImageFeatures:
        count, source = len(self.images(domain, split)), self.backbone.raw_source(kind)
        chunks = []
        for first in range(0, count, _ENCODE):
            pixels = self.pixels(domain, split, np.arange(first, min(first + _ENCODE, count)))
            chunks.append(source.encode_pixels(pixels))
        return ImageFeatures.cat(chunks)

    def _samples(self, dataset: Dataset) -> Iterator[Sample]:
        count = len(dataset) if self.max_images is None else min(len(dataset), self.max_images)
        if count > _ENDLESS:
            raise ValueError(f"{dataset.name} is endless: pass --max-images (max_images=).")
        return (dataset[i] for i in range(count))

    def _rng(self, *words: object) -> np.random.Generator:
        text = "/".join(map(str, words)).encode()
        return np.random.default_rng([self.seed, *text])

    def _train(self, domain: Domain) -> AugmentedImages:
        size, shape = self.backbone.image_size, self.backbone.mask_shape
        frames: list[np.ndarray] = []
        image, targets, valid, empty = [], [], [], []
        boxes, categories, objects = [], [], []
        rows: list[int] = []
        asked = small = 0
        for number, sample in enumerate(self._samples(domain.split("train"))):
            ever = np.zeros(len(sample.masks), bool)
            for view in range(self.augmentations):
                rng = self._rng("view", domain.name, number, view)
                frame, masks, scored = _view(rng, sample, self.backbone, plain=view == 0)
                large = _large(masks)
                ever[large] = True
                kept = np.sort(rng.permutation(large)[: self.objects_per_image])
                if not len(kept):
                    continue
                objects.append(len(rows) + np.arange(len(kept)))
                rows += [len(frames)] * len(kept)
                targets += [low_res_target(masks[k], shape) for k in kept]
                boxes += [box_of(masks[k]) for k in kept]
                categories += [int(sample.categories[k]) for k in kept]
                valid.append(low_res(scored, shape) >= 0.5)
                anything = np.asarray(masks.any(axis=0))
                empty.append(valid[-1] & (low_res(anything, shape) == 0))
                frames.append(frame)
                image.append(number)
            asked, small = asked + len(ever), small + int((~ever).sum())
        if not frames:
            raise ValueError(
                f"Domain {domain.name!r}: no training image shows an object of at least "
                f"{_MIN_AREA:.1%} of the frame. Leave the domain out."
            )
        if small:
            warnings.warn(
                f"{domain.name}: {small} of {asked} objects are smaller than {_MIN_AREA:.1%} of "
                "the frame in every view, and are not trained on.",
                stacklevel=2,
            )
        assert frames[0].shape == (size, size, 3)
        return AugmentedImages(
            np.stack(frames),
            np.array(image),
            np.array(rows),
            np.stack(targets),
            np.stack(valid),
            np.stack(empty),
            np.stack(boxes),
            np.array(categories),
            tuple(objects),
        )

    def _held_out(self, domain: Domain, split: str) -> Objects:
        images: list[np.ndarray] = []
        rows, masks, ignore, boxes = [], [], [], []
        for number, sample in enumerate(self._samples(domain.split(split))):
            rng = self._rng("objects", domain.name, split, number)
            chosen = rng.permutation(len(sample.masks))[: self.objects_per_image]
            for k in np.sort(chosen):
                corners = box_of(sample.masks[k]).reshape(2, 2)
                box = self.backbone.to_input_frame(corners, sample.masks[k].shape)
                rows.append(len(images))
                masks.append(sample.masks[k])
                boxes.append(box.reshape(4))
            images.append(sample.image)
            ignore.append(sample.ignore)
        return Objects(images, np.array(rows), masks, ignore, np.array(boxes, np.float32))


def box_of(mask: np.ndarray) -> np.ndarray:
    """The box (x0, y0, x1, y1) of the pixels of a mask, bool (H, W), which may not be empty."""
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    return np.array([x, y, x + w - 1, y + h - 1], np.float32)


def low_res_target(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """What a decoder should answer, so that its mask at full size is like the object.

    The share of each low-res pixel that belongs to the object, bent so that a half stands where a
    threshold would give the best mask. Of a compact object that is near half of a pixel; of a thin
    one, which nowhere fills half of a pixel, far less: with plain shares a decoder learns to answer
    nothing.

    Args:
        mask: bool (S, S).
        shape: (hm, wm).

    Returns:
        uint8 (hm, wm), 255 for all of a pixel.
    """
    share = np.round(255 * low_res(mask, shape)) / 255
    side = mask.shape[::-1]
    large = cv2.resize(share, side, interpolation=cv2.INTER_LINEAR)
    overlaps = [iou(large > threshold, mask) for threshold in _THRESHOLDS]
    best = _THRESHOLDS[int(np.argmax(overlaps))]
    bent = np.where(share < best, 0.5 * share / best, 0.5 + 0.5 * (share - best) / (1 - best))
    return np.round(255 * bent).astype(np.uint8)


def _large(masks: np.ndarray) -> np.ndarray:
    """Numbers of the objects that are large enough to be asked for."""
    return np.flatnonzero(masks.sum(axis=(1, 2)) >= _MIN_AREA * masks[0].size)


def _view(
    rng: np.random.Generator, sample: Sample, backbone: Backbone, plain: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A view of a sample in the model's frame: image, masks bool (N, S, S), what counts (S, S).

    Augmentations flip and scale about a random place, as in CoSAM's release (random flip and
    large-scale jitter), in a narrower range of scales.
    """
    size = backbone.image_size
    height, width = sample.image.shape[:2]
    scale = size / max(height, width)
    flip, shift = False, np.zeros(2)
    if not plain:
        scale *= np.exp(rng.uniform(*np.log(_JITTER)))
        flip = rng.random() < 0.5
        room = size - scale * np.array([width, height])
        shift = rng.uniform(np.minimum(room, 0), np.maximum(room, 0))
    matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]], np.float64)
    # Pixel centres: what lies at (x + 0.5) * scale in continuous coordinates.
    matrix[:, 2] += 0.5 * scale - 0.5
    if flip:
        matrix[0] = [-matrix[0, 0], 0, size - 1 - matrix[0, 2]]
    smaller = scale < 1
    image = cv2.GaussianBlur(sample.image, (0, 0), 0.4 / scale) if smaller else sample.image
    frame = cv2.warpAffine(
        image, matrix, (size, size), flags=cv2.INTER_LINEAR, borderValue=_PADDING
    )

    def moved(mask: np.ndarray) -> np.ndarray:
        return cv2.warpAffine(mask.astype(np.uint8) * 255, matrix, (size, size)) > 127

    masks = np.stack([moved(mask) for mask in sample.masks])
    scored = np.ones((height, width), bool) if sample.ignore is None else ~sample.ignore
    return frame, masks, moved(scored)


@dataclass(frozen=True)
class ObjectIndices:
    """Objects that a step trains on.

    Attributes:
        domains: int64 (P,), number of the domain of each.
        objects: int64 (P,), its number in the `AugmentedImages` of that domain.
    """

    domains: np.ndarray
    objects: np.ndarray

    @classmethod
    def draw(
        cls, rng: np.random.Generator, count: int, pools: Sequence[Pool], per_image: int = 1
    ) -> ObjectIndices:
        """Draw objects: first a domain, all alike, then an image, then some of its objects.

        Args:
            rng: the generator.
            count: number of objects.
            pools: what to draw from.
            per_image: objects of an image, one after the other. An image with fewer objects shows
                each of them equally often, give or take one.
        """
        choices = rng.integers(len(pools), size=-(-count // per_image))
        objects: list[int] = []
        for choice in choices:
            _, images, allowed = pools[choice]
            own = images.objects[int(rng.choice(allowed))]
            left = per_image
            while left > 0:
                some = rng.choice(own, min(left, len(own)), replace=False)
                objects.extend(some)
                left -= len(some)
        domains = np.repeat([pools[k][0] for k in choices], per_image)
        return cls(domains[:count], np.array(objects[:count]))

    def part(self, rank: int, world: int) -> ObjectIndices:
        """The share of one of several processes; all shares are of one size."""
        size = len(self.objects) // world
        own = slice(rank * size, (rank + 1) * size)
        return ObjectIndices(self.domains[own], self.objects[own])

    def __add__(self, other: ObjectIndices) -> ObjectIndices:
        return ObjectIndices(
            np.concatenate([self.domains, other.domains]),
            np.concatenate([self.objects, other.objects]),
        )


@dataclass(frozen=True)
class BatchTargets:
    """What a batch needs of a bank.

    Attributes:
        raw: `raw_features` of the B views that occur.
        rows: int64 (P,), the view of each object.
        targets: float32 (P, hm, wm), in [0, 1].
        valid: float32 (P, hm, wm), 1 where a pixel counts.
        empty: bool (P, hm, wm), where the view shows no object.
        boxes: float32 (P, 4), in pixels of the frame.
        categories: int64 (P,).
    """

    raw: ImageFeatures
    rows: Tensor
    targets: Tensor
    valid: Tensor
    empty: Tensor
    boxes: Tensor
    categories: Tensor


def gather_targets(bank: FeatureBank, indices: ObjectIndices, kind: str) -> BatchTargets:
    """The objects of a draw, with `raw_features` of a kind."""
    raw, rows, targets, valid, empty = [], [], [], [], []
    boxes, categories, order = [], [], []
    first = 0
    for number in np.unique(indices.domains):
        domain = bank.stream[int(number)]
        views = bank.train(domain)
        where = np.flatnonzero(indices.domains == number)
        objects = indices.objects[where]
        seen, own = np.unique(views.rows[objects], return_inverse=True)
        raw.append(bank.of_views(domain, seen, kind))
        rows.append(first + own)
        first += len(seen)
        targets.append(views.targets[objects])
        valid.append(views.valid[views.rows[objects]])
        empty.append(views.empty[views.rows[objects]])
        boxes.append(views.boxes[objects])
        categories.append(views.categories[objects])
        order.append(where)
    back = np.argsort(np.concatenate(order))
    device = bank.backbone.device

    def whole(parts: list[np.ndarray]) -> Tensor:
        return to_device(np.concatenate(parts)[back], device)

    return BatchTargets(
        ImageFeatures.cat(raw),
        whole(rows),
        whole(targets).float() / 255.0,
        whole(valid).float(),
        whole(empty),
        whole(boxes),
        whole(categories),
    )
