"""Annotated photographs as training images of `micro`: crops, changed colours, pasted objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from sam_gym.data import make_dataset
from sam_gym.data.base import Dataset, Sample
from sam_gym.data.options import ReadingOptions
from sam_gym.data.synthetic.materials import patterned
from sam_gym.utils.fields import documented
from sam_gym.utils.settings import Fraction, Positive

#: Side of a training image.
SIZE = 384
#: The colour that normalises to zero, with which SAM pads an image to a square.
PADDING = (124, 116, 104)
#: Smallest area of a target, in pixels of a training image.
MIN_AREA = 100


class View(NamedTuple):
    """An augmented photograph.

    Attributes:
        image: uint8 (SIZE, SIZE, 3).
        masks: bool (N, SIZE, SIZE), objects of at least `MIN_AREA` pixels.
        ignore: bool (SIZE, SIZE), pixels that belong to unknown objects.
    """

    image: np.ndarray
    masks: np.ndarray
    ignore: np.ndarray


def mask_areas(masks: np.ndarray) -> np.ndarray:
    """Return the number of pixels of each mask: int64 (N,)."""
    return np.array([np.count_nonzero(mask) for mask in masks], np.int64)


class PhotoMixer:
    """Generates training images from annotated photographs.

    Args:
        datasets: where the photographs are; they are read when they are needed.
        weights: how often each dataset is drawn; None: by the square root of its size.
    """

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float] | None = None) -> None:
        self.datasets = datasets
        sizes = np.array([len(dataset) for dataset in datasets], float)
        chances = np.sqrt(sizes) if weights is None else np.array(weights, float)
        self.chances = chances / chances.sum()

    def _draw(self, rng: np.random.Generator) -> Sample:
        """Draw a photograph that has objects."""
        while True:
            dataset = self.datasets[rng.choice(len(self.datasets), p=self.chances)]
            sample = dataset[int(rng.integers(len(dataset)))]
            if sample.masks.any():
                return sample

    def material(self, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
        """Return a texture for a scene: a piece of a photograph or a random pattern."""
        if rng.random() < 0.5:
            return patterned(rng, height, width)
        image = self._draw(rng).image
        zoom = rng.uniform(0.5, 2.0)
        h = min(max(8, int(height * zoom)), image.shape[0])
        w = min(max(8, int(width * zoom)), image.shape[1])
        top = rng.integers(image.shape[0] - h + 1)
        left = rng.integers(image.shape[1] - w + 1)
        piece = image[top : top + h, left : left + w]
        return cv2.resize(piece, (width, height), interpolation=cv2.INTER_LINEAR)

    def view(self, rng: np.random.Generator) -> View:
        """Return a training image: a crop, on which objects of others may be pasted."""
        view = self._crop(rng)
        kind = rng.random()
        if kind < 0.6:
            return view
        if kind < 0.65:
            nothing = np.zeros((SIZE, SIZE), bool)
            ground = cv2.resize(patterned(rng, SIZE // 2, SIZE // 2), (SIZE, SIZE))
            view = View(ground, view.masks[:0], nothing)
        for _ in range(int(rng.integers(1, 3))):
            view = self._paste(rng, view)
        return view

    def cutout(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw an object: uint8 (SIZE, SIZE, 3) around it, and its mask, bool (SIZE, SIZE)."""
        while True:
            view = self._crop(rng, focus_only=True)
            if len(view.masks):
                return view.image, view.masks[0]

    def _crop(self, rng: np.random.Generator, *, focus_only: bool = False) -> View:
        """Crop a photograph, most often around one of its objects."""
        photo = self._draw(rng)
        image, masks = photo.image, photo.masks
        height, width = image.shape[:2]
        areas = mask_areas(masks)
        # Small objects outnumber large ones in photographs; people annotate the large ones.
        focus = int(rng.choice(len(masks), p=np.sqrt(areas) / np.sqrt(areas).sum()))
        if rng.random() < 0.25 and not focus_only:
            left, top, crop_w, crop_h = 0, 0, width, height
        else:
            x, y, w, h = cv2.boundingRect(masks[focus].astype(np.uint8))
            side = max(w, h) * np.exp(rng.uniform(np.log(1.05), np.log(5.0)))
            side = int(np.clip(side, 48, max(height, width)))
            crop_h, crop_w = min(side, height), min(side, width)
            top = _window(rng, y, h, crop_h, height)
            left = _window(rng, x, w, crop_w, width)
        view = (slice(top, top + crop_h), slice(left, left + crop_w))
        scale = SIZE / max(crop_h, crop_w)
        out_w, out_h = max(1, round(crop_w * scale)), max(1, round(crop_h * scale))
        move = _pose(rng, (crop_w, crop_h), (out_w, out_h))

        def moved(array: np.ndarray, border: Sequence[int] = (0,)) -> np.ndarray:
            return cv2.warpAffine(
                array[view], move, (out_w, out_h), flags=cv2.INTER_LINEAR, borderValue=border
            )

        content = image
        if scale < 0.75:
            # Linear interpolation alone would skip pixels.
            content = cv2.GaussianBlur(image, (0, 0), 0.35 / scale)
        framed = np.full((SIZE, SIZE, 3), PADDING, np.uint8)
        framed[:out_h, :out_w] = degraded(rng, moved(content, PADDING))
        inside = np.flatnonzero(masks[(slice(None), *view)].any((1, 2)))
        shown = np.array([focus]) if focus_only else inside
        out = np.zeros((len(shown), SIZE, SIZE), bool)
        for mask, number in zip(out, shown, strict=True):
            mask[:out_h, :out_w] = moved(masks[number].astype(np.uint8) * 255) > 127
        ignore = np.zeros((SIZE, SIZE), bool)
        if photo.ignore is not None:
            ignore[:out_h, :out_w] = moved(photo.ignore.astype(np.uint8) * 255) > 63
        return View(framed, out[mask_areas(out) >= MIN_AREA], ignore)

    def _paste(self, rng: np.random.Generator, view: View) -> View:
        """Paste an object of another photograph over a view, and cut it out of the masks."""
        other = self._crop(rng, focus_only=True)
        if not len(other.masks):
            return view
        shrink = rng.uniform(0.3, 1.1)
        dx, dy = rng.uniform(-0.15, 0.4, 2) * SIZE
        move = np.array([[shrink, 0, dx], [0, shrink, dy]], np.float32)
        alpha = cv2.warpAffine(other.masks[0].astype(np.float32), move, (SIZE, SIZE))
        alpha = cv2.GaussianBlur(alpha, (0, 0), 0.9)[..., None]
        pasted = alpha[..., 0] > 0.5
        if np.count_nonzero(pasted) < 4 * MIN_AREA:
            return view
        moved = cv2.warpAffine(other.image, move, (SIZE, SIZE))
        image = (alpha * moved + (1 - alpha) * view.image).astype(np.uint8)
        masks = np.concatenate([view.masks & ~pasted, pasted[None]])
        return View(image, masks[mask_areas(masks) >= MIN_AREA], view.ignore & ~pasted)


def _window(rng: np.random.Generator, start: int, extent: int, crop: int, total: int) -> int:
    """Draw the start of a crop that contains the object if it fits."""
    low, high = start + extent - crop, start
    first = int(rng.integers(min(low, high), max(low, high) + 1))
    return int(np.clip(first, 0, total - crop))


def _pose(rng: np.random.Generator, size: tuple[int, int], out: tuple[int, int]) -> np.ndarray:
    """Return a matrix (2, 3) that scales a crop to its frame; it may mirror, turn and stretch it.

    Args:
        rng: the source of randomness.
        size: (width, height) of the crop.
        out: (width, height) of the result.
    """
    scale = np.diag([out[0] / size[0], out[1] / size[1]])
    if rng.random() < 0.5:
        scale[0] *= -1
    if rng.random() < 0.3:
        angle, stretch = rng.normal(0, 0.2), np.exp(rng.normal(0, 0.12))
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        scale = turn @ np.diag([stretch, 1 / stretch]) @ scale
    # Pixel centres lie at half-integers; the middle of the crop stays in the middle.
    middle, target = (np.array(size) - 1) / 2, (np.array(out) - 1) / 2
    return np.column_stack([scale, target - scale @ middle])


def degraded(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Change colours, and sometimes blur, add noise or compress: uint8 (H, W, 3)."""
    if rng.random() < 0.12:
        image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    elif rng.random() < 0.5:
        saturation = rng.uniform(0.4, 1.6)
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
        mixed = saturation * image.astype(np.float32) + (1 - saturation) * grey
        image = np.clip(mixed, 0, 255).astype(np.uint8)
    level = np.arange(256)[:, None] / 255
    gain = rng.uniform(0.65, 1.35) * rng.uniform(0.88, 1.12, 3)
    table = 255 * level ** np.exp(rng.normal(0, 0.2)) * gain + rng.uniform(-30, 30)
    image = cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8)[None])
    kind = rng.random()
    if kind < 0.1:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.5, 2.0))
    elif kind < 0.2:
        noise = rng.normal(0, rng.uniform(3, 15), image.shape)
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
    elif kind < 0.35:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(25, 85))]
        coded = cv2.imencode(".jpg", image, quality)[1]
        image = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR))
    return image


@documented
@dataclass(frozen=True, kw_only=True)
class PhotoOptions(ReadingOptions):
    """Which photographs a training mixes in."""

    photos: tuple[str, ...] = ()
    """Folders of annotated photographs to mix in, train split: COCO-style (instances_train.json),
    or images/ with instances/ (PNG files of instance numbers). Without any: generated images
    only."""
    photo_weights: tuple[Positive, ...] = ()
    """How often each folder is drawn (empty: by the square root of its number of images)."""
    photo_fraction: Fraction = 0.5
    """Fraction of training data from photographs, if there are any."""

    def photo_mixer(self) -> PhotoMixer | None:
        """Open the folders; None if there are none.

        Raises:
            ValueError: there are not as many weights as folders, or an annotation is wrong.
            FileNotFoundError: a folder does not exist.
        """
        if self.photo_weights and len(self.photo_weights) != len(self.photos):
            raise ValueError(
                f"photo_weights has length {len(self.photo_weights)} for {len(self.photos)} "
                "folders of photos: pass one each."
            )
        if not self.photos:
            return None
        return PhotoMixer([self._open(root) for root in self.photos], self.photo_weights or None)

    def _open(self, root: str) -> Dataset:
        folder = Path(root)
        instances = (folder / "instances").is_dir()
        annotated = instances or any(folder.glob("instances_*.json"))
        if folder.is_dir() and not annotated and "annotations" not in self.dataset_kwargs:
            raise FileNotFoundError(
                f"{root}: no folder of photos. It needs instances_train.json (COCO-style), or "
                "images/ with instances/ (PNG files of instance numbers)."
            )
        name, own = ("folder", {"target": "instances"}) if instances else ("coco", {})
        return make_dataset(name, "train", root=root, **own, **self.options_of(name))
