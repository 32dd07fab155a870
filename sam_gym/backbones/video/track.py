"""What a session knows of one object: its prompts, and what is remembered of it."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam_gym.backbones.prompts import PADDING_POINT, Prompts
from sam_gym.backbones.video.memory import Entry, MemoryKeys


@dataclass
class Clicks:
    """Prompt of an object in a frame, in the input frame."""

    points: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.float32))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    box: np.ndarray | None = None  # float32 (4,)

    @property
    def count(self) -> int:
        """Number of points; a box has two."""
        return len(self.labels) + 2 * (self.box is not None)

    def prompts(self, count: int, device: torch.device, masks: Tensor | None = None) -> Prompts:
        """The same prompt for `count` rows; an empty one has a padding point, as in SAM 2.

        Args:
            count: number of rows.
            device: of the tensors.
            masks: (count, hm, wm), earlier logits, or None.
        """
        points, labels = self.points, self.labels
        if not self.count:
            points, labels = np.zeros((1, 2), np.float32), np.array([PADDING_POINT])
        box = None if self.box is None else torch.from_numpy(self.box).to(device)
        return Prompts(
            torch.from_numpy(points).to(device).expand(count, -1, -1),
            torch.from_numpy(labels).to(device).expand(count, -1),
            None if box is None else box.expand(count, -1),
            masks=masks,
        )

    @classmethod
    def parse(
        cls, points: Any, labels: Any, box: Any, to_input: Callable[[np.ndarray], np.ndarray]
    ) -> Clicks:
        """Check a prompt.

        Args:
            points: (N, 2), (x, y) in pixels of the video, or None.
            labels: (N,), 1 positive, 0 negative, or None.
            box: (x0, y0, x1, y1), or None.
            to_input: (N, 2) in pixels of the video -> in the input frame.

        Raises:
            ValueError: nothing was given, or it has a wrong shape or wrong values.
        """
        if box is None and (points is None or np.size(points) == 0):
            raise ValueError("A prompt needs points and labels, a box, or a mask.")
        if (points is None) != (labels is None):
            raise ValueError("points and labels come together.")
        own = cls()
        if points is not None:
            places = np.asarray(points, np.float32).reshape(-1, 2)
            kinds = np.asarray(labels, np.int64).reshape(-1)
            if len(places) != len(kinds):
                raise ValueError(f"{len(places)} points with {len(kinds)} labels.")
            if not np.isin(kinds, (0, 1)).all():
                raise ValueError("labels must be 0 or 1.")
            if not np.isfinite(places).all():
                raise ValueError("points have values that are NaN or infinite.")
            own.points, own.labels = to_input(places).astype(np.float32), kinds
        if box is not None:
            corners = np.asarray(box, np.float32)
            if corners.shape != (4,):
                raise ValueError(f"box must be (x0, y0, x1, y1), got {corners.shape}.")
            if not np.isfinite(corners).all():
                raise ValueError("box has values that are NaN or infinite.")
            if (corners[2:] < corners[:2]).any():
                raise ValueError(
                    "box ends before it begins: pass (x0, y0, x1, y1), not (x, y, width, height) "
                    "as in COCO."
                )
            own.box = to_input(corners.reshape(2, 2)).astype(np.float32).reshape(4)
        return own

    def after(self, before: Clicks) -> Clicks:
        """Both prompts together; raises `ValueError` if this one has a box."""
        if self.box is not None:
            raise ValueError("A box comes before points: pass it with clear=True.")
        return Clicks(
            np.concatenate([before.points, self.points]),
            np.concatenate([before.labels, self.labels]),
            before.box,
        )


class Track:
    """What is remembered of an object of a video.

    Attributes:
        conditioning: entries of prompted frames, by frame.
        tracked: entries of the other frames.
        passed: frames that were tracked or shown -> whether backwards.
        pending: entries of prompts since the last propagation, and whether they condition.
        clicks: points and boxes of prompted frames.
        keys: of the memories that the latest frame recalled, by frame.
    """

    def __init__(self) -> None:
        self.conditioning: dict[int, Entry] = {}
        self.tracked: dict[int, Entry] = {}
        self.passed: dict[int, bool] = {}
        self.pending: dict[int, tuple[Entry, bool]] = {}
        self.clicks: dict[int, Clicks] = {}
        self.keys: dict[int, MemoryKeys] = {}

    def latest(self, frame: int) -> Entry | None:
        """The most recent entry of a frame, or None."""
        if frame in self.pending:
            return self.pending[frame][0]
        return self.conditioning.get(frame) or self.tracked.get(frame)

    @property
    def first(self) -> int:
        """The first prompted frame."""
        return min(self.conditioning)

    @property
    def known(self) -> Mapping[int, Entry]:
        """Entries of all frames."""
        return ChainMap(self.conditioning, self.tracked)

    def forget(self, frame: int, reverse: bool, memories: int, pointers: int) -> None:
        """Drop what no frame after this one of the pass will recall.

        Args:
            frame: the frame that was tracked last.
            reverse: whether the pass goes backwards.
            memories: number of frames before whose memories are recalled.
            pointers: number of frames before whose pointers are recalled.
        """
        for other, entry in list(self.tracked.items()):
            distance = other - frame if reverse else frame - other
            if distance >= pointers:
                del self.tracked[other]
            elif distance >= memories:
                entry.memory = None
