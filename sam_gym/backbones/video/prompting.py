"""Simulated prompts for training on clips: a mask, a box or a click, and clicks on errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from sam_gym.backbones.prompts import NO_POINT, PADDING_POINT, Prompts
from sam_gym.backbones.video.unroll import Decoded, FirstPrompts
from sam_gym.simulation.clicks import interior_distance

PromptKind = Literal["mask", "point", "box"]
#: Standard deviation of the noise on boxes, as a fraction of their sides, and its bound in pixels
#: of a frame of 1024: those of SAM.
_BOX_NOISE, _BOX_BOUND = 0.1, 20 / 1024


def first_prompts(
    rngs: Sequence[np.random.Generator | None],
    masks: np.ndarray,
    kinds: Sequence[PromptKind],
    device: torch.device,
) -> FirstPrompts:
    """Draw a prompt for each object in the first frame.

    Args:
        rngs: the source of randomness of each object; None: the innermost pixel, the exact box.
        masks: bool (P, S, S), in the input frame; none is empty.
        kinds: of each prompt.
        device: of the tensors.
    """
    count, side = len(masks), masks.shape[-1]
    points = np.zeros((count, 1, 2), np.float32)
    labels = np.full((count, 1), NO_POINT, np.int64)
    boxes = np.zeros((count, 4), np.float32)
    for row, (rng, mask, kind) in enumerate(zip(rngs, masks, kinds, strict=True)):
        if kind == "mask":
            labels[row] = PADDING_POINT
        elif kind == "point":
            points[row, 0], labels[row] = _inner_pixel(rng, mask), 1
        else:
            boxes[row] = _noisy_box(rng, mask, side)
    is_mask, is_box = np.array(kinds) == "mask", np.array(kinds) == "box"

    def to(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return FirstPrompts(
        Prompts(to(points), to(labels), to(boxes), to(is_box)),
        to(is_mask),
        to((masks & is_mask[:, None, None]).astype(np.float32)[:, None]),
        to(~is_mask & ~is_box),
    )


def _inner_pixel(rng: np.random.Generator | None, mask: np.ndarray) -> tuple[int, int]:
    """Return a pixel of a mask (x, y), half the time near its middle."""
    if rng is None:
        y, x = divmod(int(interior_distance(mask).argmax()), mask.shape[1])
        return x, y
    chosen = np.flatnonzero(mask)
    if rng.random() < 0.5:
        distance = interior_distance(mask)
        chosen = np.flatnonzero(distance > 0.5 * distance.max())
    y, x = divmod(int(chosen[rng.integers(len(chosen))]), mask.shape[1])
    return x, y


def _noisy_box(rng: np.random.Generator | None, mask: np.ndarray, side: int) -> np.ndarray:
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    bound, noise = _BOX_BOUND * side, np.zeros(4)
    if rng is not None:
        noise = np.clip(rng.normal(0, _BOX_NOISE, 4) * [w, h, w, h], -bound, bound)
    corners = np.clip(np.array([x, y, x + w - 1, y + h - 1]) + noise, 0, side - 1).reshape(2, 2)
    return np.concatenate([corners.min(axis=0), corners.max(axis=0)]).astype(np.float32)


class ErrorClicks:
    """Places clicks where masks are wrong, as a `Corrector`; a mask without errors gets a negative
    click on the background, as in SAM 2's training.

    Args:
        rngs: the source of randomness of each object.
        targets: float32 (P, T, hm, wm), fractions of low-res pixels, on the CPU.
        side: of the input frame, in pixels.
        from_truth: how often a click is anywhere in the object, without regard to errors.
    """

    def __init__(
        self,
        rngs: Sequence[np.random.Generator],
        targets: Tensor,
        side: int,
        from_truth: float = 0.1,
    ) -> None:
        self._rngs, self._from_truth = rngs, from_truth
        self._truth = targets.numpy() >= 0.5
        self._cell = side / targets.shape[-1]

    def __call__(self, frame: int, decoded: Decoded) -> tuple[Tensor, Tensor]:
        device = decoded.entry.logits.device
        predicted = decoded.entry.logits.detach().cpu().numpy() > 0
        placed = [
            self._click(rng, truth, mask)
            for rng, truth, mask in zip(self._rngs, self._truth[:, frame], predicted, strict=True)
        ]
        within = np.stack([rng.random(2) for rng in self._rngs])
        points = (np.array([[x, y] for x, y, _ in placed]) + within) * self._cell - 0.5
        labels = np.array([[positive] for _, _, positive in placed], np.int64)
        return (
            torch.from_numpy(points[:, None].astype(np.float32)).to(device),
            torch.from_numpy(labels).to(device),
        )

    def _click(
        self, rng: np.random.Generator, truth: np.ndarray, mask: np.ndarray
    ) -> tuple[int, int, bool]:
        """Return a low-res pixel (x, y) of one object, and whether the click is positive."""
        missed, extra = truth & ~mask, mask & ~truth
        if truth.any() and rng.random() < self._from_truth:
            wrong = truth
        elif missed.any() or extra.any():
            wrong = missed | extra
            if rng.random() < 0.5:  # the middle of the wider error, as people click
                inner = [interior_distance(region) for region in (missed, extra)]
                widest = max(inner, key=lambda distance: float(distance.max()))
                wrong = widest == widest.max()
        else:
            wrong = ~truth if not truth.all() else truth
        chosen = np.flatnonzero(wrong)
        y, x = divmod(int(chosen[rng.integers(len(chosen))]), truth.shape[1])
        return x, y, bool(truth[y, x])
