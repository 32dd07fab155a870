"""The classical baseline: cv2.grabCut with the same clicks."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from sam_gym.simulation.clicks import Click

#: Longer side of the image in grabCut, in pixels; on larger images it takes a second or longer.
LONGEST_SIDE = 320
#: Radius of the disc of certain labels around a click, as a fraction of the longer side.
CLICK_RADIUS = 0.015
#: Radius of the disc of probable foreground around the first positive clicks. Of 0.05 to 0.4, 0.2
#: gave grabCut its best IoU on the GrabCut images.
START_RADIUS = 0.2
ITERATIONS = 5


class GrabCut:
    """cv2.grabCut on one image, click after click.

    A click labels a small disc as certain foreground or background. At the first click a larger
    disc is probable foreground and the rest probable background. Later clicks start from the
    previous mask, as SAM does from its logits; restarting at every click gives a lower IoU.

    Args:
        image: uint8 (H, W, 3), RGB.
    """

    def __init__(self, image: np.ndarray) -> None:
        self.shape = image.shape[:2]
        self.scale = min(1.0, LONGEST_SIDE / max(self.shape))
        height, width = (max(1, round(side * self.scale)) for side in self.shape)
        small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        self._image = np.ascontiguousarray(small[..., ::-1])
        self._object: np.ndarray | None = None

    def cut(self, clicks: Sequence[Click]) -> np.ndarray:
        """Return the mask after all clicks so far, bool (H, W); empty without a positive click."""
        if not any(click.positive for click in clicks):
            return np.zeros(self.shape, bool)
        labels = np.full(self._image.shape[:2], cv2.GC_PR_BGD, np.uint8)
        if self._object is None:
            for click in clicks:
                if click.positive:
                    self._disc(labels, click, START_RADIUS, cv2.GC_PR_FGD)
        else:
            labels[self._object] = cv2.GC_PR_FGD
        for click in clicks:
            self._disc(labels, click, CLICK_RADIUS, cv2.GC_FGD if click.positive else cv2.GC_BGD)
        self._object = self._run(labels)
        large = cv2.resize(
            self._object.astype(np.uint8), self.shape[::-1], interpolation=cv2.INTER_NEAREST
        )
        return large > 0

    def _disc(self, labels: np.ndarray, click: Click, radius: float, label: int) -> None:
        center = int((click.x + 0.5) * self.scale), int((click.y + 0.5) * self.scale)
        cv2.circle(labels, center, max(1, round(radius * max(labels.shape))), label, -1)

    def _run(self, labels: np.ndarray) -> np.ndarray:
        """Return the foreground, bool (h, w). OpenCV asserts that both classes have pixels."""
        if not _foreground(labels).any():  # negative discs cover all foreground
            return np.zeros(labels.shape, bool)
        if _foreground(labels).all():
            border = np.ones(labels.shape, bool)
            border[1:-1, 1:-1] = False
            labels[border] = cv2.GC_PR_BGD
        if _foreground(labels).any():
            cv2.setRNGSeed(0)  # its mixture models start from random clusters
            background, foreground = np.zeros((1, 65)), np.zeros((1, 65))
            rect = (0, 0, 1, 1)  # ignored in GC_INIT_WITH_MASK mode
            mode = cv2.GC_INIT_WITH_MASK
            cv2.grabCut(self._image, labels, rect, background, foreground, ITERATIONS, mode)
        return _foreground(labels)


def _foreground(labels: np.ndarray) -> np.ndarray:
    return (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
