"""`rooms-panoramas`: wide procedural rooms, overlapping camera images of them, and stitching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from sam_gym.data.base import Sample, select_categories
from sam_gym.data.synthetic.base import Procedural
from sam_gym.data.synthetic.rooms.dataset import Rooms, furnished_room
from sam_gym.utils.registry import unknown_name

#: Status of OpenCV's stitcher -> what it means and what to do.
_STATUS = {
    cv2.Stitcher_ERR_NEED_MORE_IMGS: (
        "need more images: they do not overlap enough, or have too little texture. "
        "Take them closer to each other"
    ),
    cv2.Stitcher_ERR_HOMOGRAPHY_EST_FAIL: (
        "no homography: images do not match each other. Check that all show one scene"
    ),
    cv2.Stitcher_ERR_CAMERA_PARAMS_ADJUST_FAIL: (
        "no camera fits: the camera did not turn on the spot. "
        'Pass mode="scans" for a camera that moves along a flat scene'
    ),
}

_MODES = {"panorama": cv2.Stitcher_PANORAMA, "scans": cv2.Stitcher_SCANS}


@dataclass(frozen=True)
class CameraImage:
    """A section of a panorama, of its full height.

    Attributes:
        x: its first column in the panorama.
        image: uint8 (H, w, 3), RGB.
        masks: bool (N, H, w), visible masks of the instances in it.
        categories: int64 (N,), category of each instance.
        instances: int64 (N,), index of each instance in the panorama.
    """

    x: int
    image: np.ndarray
    masks: np.ndarray
    categories: np.ndarray
    instances: np.ndarray


class RoomsPanoramas(Procedural):
    """Wide `rooms` with proportionally more objects, and overlapping camera images of them.

    The same index of a split and seed always gives the same panorama.

    Args:
        split: "train", "val" or "test"; disjoint by seed.
        categories: as in `Rooms`.
        length: number of different panoramas (None: 2^31 - 1, practically endless).
        height, width: size of a panorama, in pixels.
        camera_width: width of a camera image in pixels (None: `height`).
        overlap: minimum overlap of adjacent camera images, as a fraction of their width, 0 to 0.9.
        seed: seed of all panoramas.

    Raises:
        ValueError: the split or a category is unknown, or a number is out of range.
    """

    name, noun = "rooms-panoramas", "panorama"
    categories: tuple[str, ...] = Rooms.categories

    def __init__(
        self,
        split: str = "train",
        *,
        categories: str | Sequence[str] | None = None,
        length: int | None = None,
        height: int = 256,
        width: int = 1024,
        camera_width: int | None = None,
        overlap: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__(split, length, height, seed=seed)
        if not height <= width <= 8 * height:
            raise ValueError(f"width must be from {height} to {8 * height} pixels, got {width}.")
        camera_width = height if camera_width is None else camera_width
        if not 64 <= camera_width <= width:
            raise ValueError(f"camera_width must be from 64 to {width}, got {camera_width}.")
        if not 0 <= overlap <= 0.9:
            raise ValueError(f"overlap must be from 0 to 0.9, got {overlap}.")
        self.categories = select_categories(categories, Rooms.categories)
        self.height, self.width = height, width
        self.camera_width, self.overlap = camera_width, overlap

    def __getitem__(self, index: int) -> Sample:
        room = furnished_room(self.words(index), self.height, self.width, self.categories)
        return room.sample(self.source(index))

    def camera_images(self, index: int) -> list[CameraImage]:
        """Return the camera images of a panorama, from left to right; they cover all of it."""
        sample, way = self[index], self.width - self.camera_width
        step = max(1.0, (1 - self.overlap) * self.camera_width)
        cameras = []
        for x in np.linspace(0, way, int(np.ceil(way / step)) + 1).round().astype(int).tolist():
            masks = sample.masks[:, :, x : x + self.camera_width]
            instances = np.flatnonzero(masks.any(axis=(1, 2)))
            cameras.append(
                CameraImage(
                    x=x,
                    image=sample.image[:, x : x + self.camera_width].copy(),
                    masks=masks[instances],
                    categories=sample.categories[instances],
                    instances=instances.astype(np.int64),
                )
            )
        return cameras


def stitch_exact(cameras: Sequence[CameraImage]) -> tuple[np.ndarray, np.ndarray]:
    """Stitch camera images at known positions.

    Returns:
        The image, uint8 (H, W, 3), and the masks by instance, bool (N, H, W).

    Raises:
        ValueError: no images, images of different heights, columns that no image covers, or images
            that contradict each other where they overlap.
    """
    if not cameras:
        raise ValueError("There are no images to stitch.")
    heights = sorted({camera.image.shape[0] for camera in cameras})
    if len(heights) > 1:
        raise ValueError(f"The images differ in height: {', '.join(map(str, heights))} pixels.")
    width = max(camera.x + camera.image.shape[1] for camera in cameras)
    number = max(
        (int(camera.instances.max()) + 1 for camera in cameras if len(camera.instances)), default=0
    )
    image = np.zeros((heights[0], width, 3), np.uint8)
    masks = np.zeros((number, heights[0], width), bool)
    seen = np.zeros(width, bool)
    for order, camera in enumerate(cameras):
        columns = slice(camera.x, camera.x + camera.image.shape[1])
        again = seen[columns]
        own = np.zeros((number, *camera.image.shape[:2]), bool)
        own[camera.instances] = camera.masks
        same = (image[:, columns] == camera.image)[:, again].all()
        if not same or (masks[:, :, columns] != own)[:, :, again].any():
            raise ValueError(
                f"Image {order} at x={camera.x} contradicts the images before it where they "
                "overlap. Check that all are of one panorama and that x is right."
            )
        image[:, columns], masks[:, :, columns] = camera.image, own
        seen[columns] = True
    if not seen.all():
        raise ValueError(f"No image covers column {int(np.flatnonzero(~seen)[0])} of the panorama.")
    return image, masks


def stitch(
    images: Sequence[np.ndarray], mode: Literal["panorama", "scans"] = "panorama"
) -> np.ndarray:
    """Stitch photographs at unknown positions with OpenCV's stitcher.

    Seeds OpenCV's generator, so that the same images give the same panorama.

    Args:
        images: uint8 (H, W, 3), RGB, at least two that overlap by a third or more.
        mode: "panorama" for a camera that turns on the spot, "scans" for one that moves along a
            flat scene, as the camera images of `RoomsPanoramas`.

    Returns:
        uint8 (H, W, 3), RGB; black where no image covers it.

    Raises:
        ValueError: fewer than two images, an image of another shape or dtype, an unknown mode, or
            the stitcher failed.
    """
    if mode not in _MODES:
        raise unknown_name("mode", mode, _MODES)
    if len(images) < 2:
        raise ValueError(f"Stitching takes at least two images, got {len(images)}.")
    for number, image in enumerate(images):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"Image {number} must be uint8 (H, W, 3), got {image.dtype} {image.shape}."
            )
    cv2.setRNGSeed(0)
    stitcher = cv2.Stitcher.create(_MODES[mode])
    status, panorama = stitcher.stitch([cv2.cvtColor(i, cv2.COLOR_RGB2BGR) for i in images])
    if status != cv2.Stitcher_OK:
        raise ValueError(
            f"Stitching {len(images)} images failed: {_STATUS.get(status, f'status {status}')}."
        )
    used = set(np.ravel(stitcher.component()).tolist())
    if len(used) < len(images):
        left_out = ", ".join(str(n) for n in range(len(images)) if n not in used)
        raise ValueError(
            f"Stitching {len(images)} images failed: {_STATUS[cv2.Stitcher_ERR_NEED_MORE_IMGS]}. "
            f"These, counted from 0, match none of the others: {left_out}."
        )
    if panorama.shape[0] * panorama.shape[1] < max(i.shape[0] * i.shape[1] for i in images):
        raise ValueError(
            f"Stitching {len(images)} images failed: "
            f"{_STATUS[cv2.Stitcher_ERR_CAMERA_PARAMS_ADJUST_FAIL]}."
        )
    return cv2.cvtColor(panorama, cv2.COLOR_BGR2RGB)
