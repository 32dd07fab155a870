"""Clips from annotated photographs: the camera moves over one, objects of others pass through."""

from __future__ import annotations

import cv2
import numpy as np

from sam_gym.backbones.micro.photos import SIZE, PhotoMixer
from sam_gym.data.synthetic.clips import random_path, waves

#: Largest fraction of unknown pixels; photographs with more are drawn again.
_UNKNOWN = 0.05


def photo_clip(
    rng: np.random.Generator, photos: PhotoMixer, frames: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Draw a clip.

    Args:
        rng: the source of randomness.
        photos: where images and objects are drawn.
        frames: T.

    Returns:
        T images uint8 (SIZE, SIZE, 3), and the visible masks of N objects, bool (T, N, SIZE, SIZE).
    """
    ground = photos.view(rng)
    while ground.ignore.mean() > _UNKNOWN:
        ground = photos.view(rng)
    passing = [_Passing(rng, photos, frames) for _ in range(int(rng.integers(1, 4)))]
    middle = np.full(2, (SIZE - 1) / 2)
    turns, sizes = waves(rng, frames, 0.2), np.exp(waves(rng, frames, 0.2))
    pan = SIZE * np.stack([waves(rng, frames, 0.15) for _ in range(2)], axis=1)
    gains = np.exp(waves(rng, frames, 0.2))
    images, masks = [], []
    for time in range(frames):
        matrix = sizes[time] * _rotation(turns[time])
        move = np.column_stack([matrix, middle - matrix @ middle + pan[time]])
        image = cv2.warpAffine(
            ground.image, move, (SIZE, SIZE), borderMode=cv2.BORDER_REFLECT_101
        ).astype(np.float32)
        shown = [_moved(mask.astype(np.float32), move) > 0.5 for mask in ground.masks]
        for own in passing:
            alpha = own.draw(image, time)
            shown = [mask & (alpha <= 0.5) for mask in shown] + [alpha > 0.5]
        image = gains[time] * image + rng.normal(0, 3, image.shape)
        images.append(image.clip(0, 255).astype(np.uint8))
        masks.append(np.stack(shown))
    return images, np.stack(masks)


class _Passing:
    """An object that was cut out of a photograph, and its path."""

    def __init__(self, rng: np.random.Generator, photos: PhotoMixer, frames: int) -> None:
        self._image, mask = photos.cutout(rng)
        self._alpha = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 0.9)
        rows, columns = np.nonzero(mask)
        self._middle = np.array([columns.mean(), rows.mean()])
        self._scale = SIZE * rng.uniform(0.12, 0.4) / np.sqrt(len(rows))
        self._path = random_path(rng, frames, int(rng.integers(frames)))

    def draw(self, image: np.ndarray, time: int) -> np.ndarray:
        """Draw it over an image float32 (SIZE, SIZE, 3), in place; returns its alpha."""
        matrix = self._scale * self._path.poses[time]
        shift = SIZE * self._path.places[time] - matrix @ self._middle
        move = np.column_stack([matrix, shift])
        alpha = _moved(self._alpha, move)
        image += alpha[..., None] * (_moved(self._image, move) - image)
        return alpha


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _moved(array: np.ndarray, move: np.ndarray) -> np.ndarray:
    return np.asarray(cv2.warpAffine(array, move, (SIZE, SIZE)))
