"""`rooms-panoramas`: wide procedural rooms, their overlapping views, and views put together."""

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
        "need more images: views do not overlap enough, or have too little texture. "
        "Take them closer to each other"
    ),
    cv2.Stitcher_ERR_HOMOGRAPHY_EST_FAIL: (
        "no homography: views do not match each other. Check that all are of one scene"
    ),
    cv2.Stitcher_ERR_CAMERA_PARAMS_ADJUST_FAIL: (
        "no camera fits: the views are not of a camera that turns on the spot. "
        'Pass mode="scans" for a camera that moves along something flat'
    ),
}

_MODES = {"panorama": cv2.Stitcher_PANORAMA, "scans": cv2.Stitcher_SCANS}


@dataclass(frozen=True)
class View:
    """A part of a panorama, of its full height.

    Attributes:
        x: column of the panorama at which it begins.
        image: uint8 (H, w, 3), RGB.
        masks: bool (N, H, w), what is seen of the instances that are in it.
        categories: int64 (N,), of each.
        instances: int64 (N,), index of each in the panorama, by which views know it again.
    """

    x: int
    image: np.ndarray
    masks: np.ndarray
    categories: np.ndarray
    instances: np.ndarray


class RoomsPanoramas(Procedural):
    """Wide `rooms`, with as many more things, and the views that a camera would take of them.

    Sample `i` of a split and seed is always the same panorama.

    Args:
        split: "train", "val" or "test"; disjoint by seed.
        categories: as in `Rooms`.
        length: how many different panoramas there are (None: 2^31 - 1, in effect endless).
        height, width: of a panorama, in pixels.
        view: width of a view in pixels (None: as wide as high).
        overlap: the least share of a view that the next one sees too, from 0 up to 0.9.
        seed: of all panoramas.

    Raises:
        ValueError: unknown split or category, or a number out of range.
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
        view: int | None = None,
        overlap: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__(split, length, height, seed=seed)
        if not height <= width <= 8 * height:
            raise ValueError(f"width must be from {height} to {8 * height} pixels, got {width}.")
        view = height if view is None else view
        if not 64 <= view <= width:
            raise ValueError(f"view must be from 64 to {width} pixels wide, got {view}.")
        if not 0 <= overlap <= 0.9:
            raise ValueError(f"overlap must be from 0 to 0.9, got {overlap}.")
        self.categories = select_categories(categories, Rooms.categories)
        self.height, self.width, self.view, self.overlap = height, width, view, overlap

    def __getitem__(self, index: int) -> Sample:
        room = furnished_room(self.words(index), self.height, self.width, self.categories)
        return room.sample(self.source(index))

    def views(self, index: int) -> list[View]:
        """The views of a panorama from left to right; together they show all of it."""
        sample, way = self[index], self.width - self.view
        step = max(1.0, (1 - self.overlap) * self.view)
        views = []
        for x in np.linspace(0, way, int(np.ceil(way / step)) + 1).round().astype(int).tolist():
            masks = sample.masks[:, :, x : x + self.view]
            instances = np.flatnonzero(masks.any(axis=(1, 2)))
            views.append(
                View(
                    x=x,
                    image=sample.image[:, x : x + self.view].copy(),
                    masks=masks[instances],
                    categories=sample.categories[instances],
                    instances=instances.astype(np.int64),
                )
            )
        return views


def stitch_exact(views: Sequence[View]) -> tuple[np.ndarray, np.ndarray]:
    """Put views whose place is known together.

    Returns:
        The image, uint8 (H, W, 3), and the masks by instance, bool (N, H, W).

    Raises:
        ValueError: no views, views of different heights, columns that no view shows, or views that
            contradict each other where they overlap.
    """
    if not views:
        raise ValueError("There are no views to stitch.")
    heights = sorted({view.image.shape[0] for view in views})
    if len(heights) > 1:
        raise ValueError(f"The views differ in height: {', '.join(map(str, heights))} pixels.")
    width = max(view.x + view.image.shape[1] for view in views)
    number = max(
        (int(view.instances.max()) + 1 for view in views if len(view.instances)), default=0
    )
    image = np.zeros((heights[0], width, 3), np.uint8)
    masks = np.zeros((number, heights[0], width), bool)
    seen = np.zeros(width, bool)
    for order, view in enumerate(views):
        columns = slice(view.x, view.x + view.image.shape[1])
        again = seen[columns]
        own = np.zeros((number, *view.image.shape[:2]), bool)
        own[view.instances] = view.masks
        same = (image[:, columns] == view.image)[:, again].all()
        if not same or (masks[:, :, columns] != own)[:, :, again].any():
            raise ValueError(
                f"View {order} at x={view.x} contradicts the views before it where they overlap. "
                "Check that all are of one panorama and that x is right."
            )
        image[:, columns], masks[:, :, columns] = view.image, own
        seen[columns] = True
    if not seen.all():
        raise ValueError(f"No view shows column {int(np.flatnonzero(~seen)[0])} of the panorama.")
    return image, masks


def stitch(
    images: Sequence[np.ndarray], mode: Literal["panorama", "scans"] = "panorama"
) -> np.ndarray:
    """Put photographs whose places are not known together, through OpenCV's stitcher.

    OpenCV's generator is seeded for it, so that the same images give the same panorama.

    Args:
        images: uint8 (H, W, 3), RGB, at least two that overlap by a third or more.
        mode: "panorama" for a camera that turns on the spot, "scans" for one that moves along
            something flat, as the views of `RoomsPanoramas` are.

    Returns:
        uint8 (H, W, 3), RGB; black where no image shows anything.

    Raises:
        ValueError: fewer than two images, an image of another form, an unknown mode, or the
            stitcher found no way to put them together.
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
