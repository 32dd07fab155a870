"""Simulate interactive segmentation of many objects in one batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from sam_gym.backbones.features import ImageFeatures
from sam_gym.backbones.prompts import NO_POINT, Prompts
from sam_gym.backbones.protocols import BackboneService
from sam_gym.backbones.zoom import KEEP, Window, low_res_logits
from sam_gym.metrics.masks import iou
from sam_gym.simulation.clicks import Click, error_click


@dataclass(frozen=True)
class Target:
    """One object to segment.

    Attributes:
        image: uint8 (H, W, 3), RGB.
        mask: bool (H, W).
        ignore: bool (H, W), pixels that do not count, or None.
    """

    image: np.ndarray
    mask: np.ndarray
    ignore: np.ndarray | None = None


@dataclass
class Session:
    """Clicks and IoU of one target.

    Attributes:
        clicks: in order; fewer than `num_clicks` if the mask became perfect.
        ious: IoU after each click, padded with the last one.
        mask: bool (H, W), the mask after the last click.
        seconds: model time per click, divided evenly between the targets of a batch.
    """

    clicks: list[Click]
    ious: list[float]
    mask: np.ndarray
    seconds: float


def click_out(
    backbone: BackboneService,
    targets: Sequence[Target],
    num_clicks: int = 20,
    features: ImageFeatures | None = None,
    zoom: bool = False,
) -> list[Session]:
    """Simulate a user who segments objects with a SAM, in one batch.

    Each click is the innermost pixel of the widest error region (`error_click`). Each decode takes
    all clicks so far and the previous logits; after the first click, the mask of the highest
    predicted IoU of three is taken.

    Args:
        backbone: the SAM.
        targets: the objects.
        num_clicks: maximum number of clicks.
        features: of each target's image, if they are known already.
        zoom: look at each object again in a window around its mask (see `sam_gym.backbones.zoom`),
            which is encoded whenever it moves.
    """
    started = time.perf_counter()
    if features is None:
        features = encode_targets(backbone, targets)
    elif zoom:
        features = features.map(torch.clone)  # those of windows are written over them
    model_seconds = time.perf_counter() - started
    users = [_User(target) for target in targets]
    views = _Views(backbone, users, features)
    ious: list[list[float]] = [[] for _ in targets]
    for step in range(num_clicks):
        clicking = [i for i, user in enumerate(users) if user.click()]
        started = time.perf_counter()
        if clicking:
            views.look(clicking, first=step == 0)
        moved = [i for i in clicking if zoom and views.zoom_in(i)]
        if moved:
            views.encode(moved)
            views.look(moved)
        model_seconds += time.perf_counter() - started
        for own, user in zip(ious, users, strict=True):
            own.append(iou(user.mask, user.target.mask, user.target.ignore))
    seconds = model_seconds / (len(targets) * num_clicks)
    return [
        Session(user.clicks, own, user.mask, seconds) for user, own in zip(users, ious, strict=True)
    ]


def encode_targets(backbone: BackboneService, targets: Sequence[Target]) -> ImageFeatures:
    """Encode each image once: features of B targets, in their order."""
    images = {id(target.image): target.image for target in targets}
    order = {key: row for row, key in enumerate(images)}
    encoded = backbone.encode(list(images.values()))
    return encoded[[order[id(target.image)] for target in targets]]


def box_of(mask: np.ndarray) -> np.ndarray:
    """The box (x0, y0, x1, y1) of the pixels of a mask, bool (H, W), which may not be empty."""
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    return np.array([x, y, x + w - 1, y + h - 1], np.float32)


def segment_boxes(backbone: BackboneService, targets: Sequence[Target]) -> list[np.ndarray]:
    """Segment objects by their boxes in one batch; return the single mask of each, bool (H, W).

    Targets may not be empty.
    """
    corners = [
        backbone.to_input_frame(box_of(target.mask).reshape(2, 2), target.mask.shape)
        for target in targets
    ]
    boxes = torch.from_numpy(np.stack(corners).reshape(-1, 4).astype(np.float32))
    prompts = Prompts(boxes=boxes.to(backbone.device))
    logits, _ = backbone.decode(encode_targets(backbone, targets), prompts)
    masks = [
        backbone.masks_at(own[0], t.mask.shape) for own, t in zip(logits, targets, strict=True)
    ]
    return [(mask > backbone.mask_threshold).cpu().numpy() for mask in masks]


class _User:
    """Clicks on one object."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.mask, self.clicked = np.zeros((2, *target.mask.shape), bool)
        self.clicks: list[Click] = []

    def click(self) -> bool:
        """Click on the widest error; return whether there was one."""
        target = self.target
        click = error_click(target.mask, self.mask, self.clicked, target.ignore)
        if click is None:
            return False
        self.clicks.append(click)
        self.clicked[click.y, click.x] = True
        return True


class _Views:
    """What the model sees of each object: a window of the image, and the logits so far.

    Args:
        backbone: the SAM.
        users: one per object; their masks are set.
        features: of the image of each; `encode` overwrites them.
    """

    def __init__(
        self, backbone: BackboneService, users: Sequence[_User], features: ImageFeatures
    ) -> None:
        self.backbone, self.users, self.features = backbone, users, features
        shapes = [user.mask.shape for user in users]
        self.windows = [Window.whole(shape) for shape in shapes]
        self.full = [torch.zeros(shape, device=backbone.device) for shape in shapes]
        self.logits = torch.zeros((len(users), *backbone.mask_shape), device=backbone.device)

    def look(self, rows: Sequence[int], first: bool = False) -> None:
        """Decode all clicks in the windows of some objects.

        Args:
            rows: numbers of the objects.
            first: whether there are no logits yet.
        """
        backbone, device = self.backbone, self.backbone.device
        longest = max(len(self.users[i].clicks) for i in rows)
        points = np.zeros((len(rows), longest, 2), np.float32)
        labels = np.full((len(rows), longest), NO_POINT, np.int64)
        for row, i in enumerate(rows):
            window, clicks = self.windows[i], self.users[i].clicks
            places = np.array([(click.x, click.y) for click in clicks])
            kinds = np.array([click.positive for click in clicks], np.int64)
            frame = backbone.to_input_frame(places - window.start, window.size)
            points[row, : len(clicks)] = frame
            labels[row, : len(clicks)] = np.where(window.inside(places), kinds, NO_POINT)
        index = torch.tensor(rows, device=device)
        prompts = Prompts(
            points=torch.from_numpy(points).to(device),
            labels=torch.from_numpy(labels).to(device),
            masks=None if first else self.logits[index],
        )
        ambiguous = torch.full((len(rows),), first, device=device)
        self.logits[index], _ = backbone.decode_best(self.features[index], prompts, ambiguous)
        for i in rows:
            window = self.windows[i]
            self.full[i][window.slices] = backbone.masks_at(self.logits[i], window.size)
            self.users[i].mask = (self.full[i] > 0).cpu().numpy()

    def zoom_in(self, i: int) -> bool:
        """Move the window of an object to its mask and last click; return whether it moved."""
        user = self.users[i]
        last = np.array([user.clicks[-1][:2]])
        window = Window.around(user.mask, last)
        if window.iou(self.windows[i]) >= KEEP and self.windows[i].inside(last).all():
            return False
        self.windows[i] = window
        self.logits[i] = low_res_logits(self.backbone, self.full[i], window)
        return True

    def encode(self, rows: Sequence[int]) -> None:
        """Encode the windows of some objects."""
        images = [self.users[i].target.image[self.windows[i].slices] for i in rows]
        self.features[torch.tensor(rows, device=self.features.device)] = self.backbone.encode(
            images
        )
