"""Track the objects of annotated videos from one prompt each, by a tracker or without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, get_args

import cv2
import numpy as np
import torch

from sam_gym.backbones.features import ImageFeatures
from sam_gym.backbones.prompts import NO_POINT, Prompts
from sam_gym.backbones.service import Backbone
from sam_gym.backbones.video.prompting import PromptKind
from sam_gym.backbones.video.tracker import VideoTracker
from sam_gym.backbones.zoom import mask_prompt
from sam_gym.data.base import Video
from sam_gym.metrics.video import ObjectScore, Protocol, VideoScorer
from sam_gym.simulation.clicks import interior_distance
from sam_gym.utils.registry import check_choice

#: Frame, and masks bool (N, H, W) of the objects of a video, in its order.
FrameMasks = tuple[int, np.ndarray]
#: Segments the objects of a video in every frame.
Method = Callable[[Video], Iterator[FrameMasks]]


def first_masks(video: Video) -> dict[int, tuple[int, np.ndarray]]:
    """Return where each object is seen first: number of the object -> frame, bool (H, W).

    Objects that are never seen are left out. Reads frames until all were seen.
    """
    found: dict[int, tuple[int, np.ndarray]] = {}
    for frame in np.flatnonzero(video.annotated.any(axis=1)).tolist():
        annotation = video.annotation(frame)
        for number in np.flatnonzero(annotation.visible & annotation.annotated).tolist():
            found.setdefault(number, (frame, annotation.masks[number]))
        if len(found) == len(video.objects):
            break
    return found


def prompt_of(mask: np.ndarray, kind: PromptKind) -> dict[str, Any]:
    """Return the prompt of a kind for a mask, as arguments of `TrackingSession.prompt`.

    Args:
        mask: bool (H, W), not empty.
        kind: the mask, its box, or a click on its innermost pixel.
    """
    check_choice("prompt", kind, get_args(PromptKind))
    if kind == "mask":
        return {"mask": mask}
    if kind == "box":
        return {"box": box_of(mask)}
    y, x = divmod(int(interior_distance(mask).argmax()), mask.shape[1])
    return {"points": [[x, y]], "labels": [1]}


def box_of(mask: np.ndarray) -> np.ndarray:
    """Return the box of a mask that is not empty: int64 (4,), (x0, y0, x1, y1)."""
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    return np.array([x, y, x + w - 1, y + h - 1])


def track(tracker: VideoTracker, video: Video, kind: PromptKind) -> Iterator[FrameMasks]:
    """Track each object from one prompt, in the frame in which it is seen first."""
    first = first_masks(video)
    session = tracker.open([video])
    for number, (frame, mask) in first.items():
        session.prompt(0, frame, number, **prompt_of(mask, kind))
    empty = np.zeros((len(video.objects), *video.size), bool)
    start = min((frame for frame, _ in first.values()), default=len(video))
    for frame in range(start):
        yield frame, empty
    if not first:
        return
    for step in session.propagate():
        masks = empty.copy()
        for name, own in zip(step.objects, step.masks(), strict=True):
            # Memory also reaches back before the prompt.
            if isinstance(name, int) and first[name][0] <= step.frame:
                masks[name] = own
        yield step.frame, masks


def copy_masks(video: Video) -> Iterator[FrameMasks]:
    """Repeat the first mask of each object in all later frames."""
    first = first_masks(video)
    masks = np.zeros((len(video.objects), *video.size), bool)
    for frame in range(len(video)):
        for number, (seen, mask) in first.items():
            if frame == seen:
                masks[number] = mask
        yield frame, masks.copy()


def follow_masks(backbone: Backbone, video: Video) -> Iterator[FrameMasks]:
    """Prompt a SAM for images with the box and the logits of each object's previous mask.

    The first mask is given. An object that is lost stays lost.
    """
    first, size = first_masks(video), video.size
    masks = np.zeros((len(video.objects), *size), bool)
    logits = torch.full((len(masks), *backbone.mask_shape), -10.0, device=backbone.device)
    for frame in range(len(video)):
        given = {number for number, (seen, _) in first.items() if seen == frame}
        known = [number for number in range(len(masks)) if masks[number].any()]
        rows = [number for number in known if number not in given]
        if rows:
            boxes = [box_of(masks[number]) for number in rows]
            features = backbone.encode([video.image(frame)])
            earlier = logits[rows].clamp(-32, 32)
            logits[rows] = _decode_boxes(backbone, features, boxes, size, earlier)
            full = backbone.masks_at(logits[rows], size) > backbone.mask_threshold
            masks[rows] = full.cpu().numpy()
        for number in given:
            masks[number] = first[number][1]
            logits[number] = mask_prompt(backbone, masks[number])
        yield frame, masks.copy()


def true_boxes(backbone: Backbone, video: Video) -> Iterator[FrameMasks]:
    """Prompt a SAM for images with the true box of each object in every frame: an oracle.

    An object out of sight has no box, hence no mask.
    """
    for frame in range(len(video)):
        truth = video.annotation(frame).masks
        masks = np.zeros_like(truth)
        rows = np.flatnonzero(truth.any(axis=(1, 2)))
        if len(rows):
            boxes = [box_of(truth[number]) for number in rows]
            features = backbone.encode([video.image(frame)])
            logits = _decode_boxes(backbone, features, boxes, video.size)
            full = backbone.masks_at(logits, video.size) > backbone.mask_threshold
            masks[rows] = full.cpu().numpy()
        yield frame, masks


def _decode_boxes(
    backbone: Backbone,
    features: ImageFeatures,
    boxes: Sequence[np.ndarray],
    size: tuple[int, int],
    masks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decode boxes of one image, (x0, y0, x1, y1) in its pixels: low-res logits (P, hm, wm).

    Args:
        backbone: the SAM.
        features: of the image.
        boxes: P boxes.
        size: (height, width) of the image.
        masks: (P, hm, wm), earlier logits of the same objects, or None.
    """
    corners = backbone.to_input_frame(np.stack(boxes).reshape(-1, 2), size).reshape(-1, 4)
    device, count = backbone.device, len(boxes)
    prompts = Prompts(
        points=torch.zeros((count, 1, 2), device=device),
        labels=torch.full((count, 1), NO_POINT, device=device),
        boxes=torch.from_numpy(corners).to(device),
        masks=masks,
        rows=torch.zeros(count, dtype=torch.int64, device=device),
    )
    return backbone.decode(features, prompts)[0][:, 0]


def score_videos(
    videos: Iterable[Video],
    categories: Sequence[str],
    method: Method,
    protocol: Protocol = "davis",
) -> list[ObjectScore]:
    """Score a method on videos; see `sam_gym.metrics.video.summarize` for the means."""
    scores: list[ObjectScore] = []
    for video in videos:
        scorer = VideoScorer(video, categories, protocol)
        for frame, masks in method(video):
            scorer.add(frame, masks)
        scores += scorer.results()
    return scores
