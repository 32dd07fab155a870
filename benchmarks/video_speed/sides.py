"""The two sides that are compared: `VideoTracker`, and sam2's `SAM2VideoPredictor` (PyPI)."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from segment_anything.modeling.mask_decoder import MLP

from benchmarks.video_speed.peer import Shape
from sam_gym.backbones import Backbone
from sam_gym.backbones.sam2 import Sam2Encoder, assemble_sam2, split_state
from sam_gym.backbones.video.memory import VideoMemory
from sam_gym.backbones.video.tracker import VideoTracker
from sam_gym.data.synthetic.clips import Clips

ShapeName = Literal["small", "tiny", "base_plus"]
#: A prompt of an object in the first frame: points and labels, or a box, or a mask.
Prompt = Mapping[str, Any]
#: Logits of the objects of each video in one frame, float32 (K, H, W) each.
FrameLogits = list[torch.Tensor]


#: Name -> sizes. "small" are those of `micro_video`, the others those of SAM 2.1.
SHAPES: dict[ShapeName, Shape] = {
    "small": Shape(
        256, 128, 2, 512, {"embed_dim": 24, "stages": (1, 2, 3, 1), "global_att_blocks": (4,)}
    ),
    "tiny": Shape(1024, 256, 4, 2048, {"stages": (1, 2, 7, 2), "global_att_blocks": (5, 7, 9)}),
    "base_plus": Shape(1024, 256, 4, 2048, {"embed_dim": 112, "num_heads": 2}),
}


def random_tracker(shape: Shape, device: torch.device, weights: Any = None) -> VideoTracker:
    """Build our tracker of a shape.

    Args:
        shape: its sizes.
        device: where it runs.
        weights: a predictor whose weights it gets; None: random ones.
    """
    sam = assemble_sam2(Sam2Encoder(shape.image_size, shape.width, **shape.trunk), shape.width)
    # The authors' has 256 channels at any width.
    sam.mask_decoder.iou_prediction_head = MLP(shape.width, 256, 4, 3, sigmoid_output=True)
    memory = VideoMemory(shape.grid, shape.width, hidden=shape.hidden, depth=shape.depth)
    if weights is not None:
        image, own = split_state(weights.state_dict())
        sam.load_state_dict(image)
        memory.load_state_dict(own)
    backbone = Backbone("random SAM 2.1", sam, device, torch.float32)
    return VideoTracker(backbone, memory, correct="sam2", keep="window")


# Videos ------------------------------------------------------------------------------------------


def write_videos(folder: Path, count: int, frames: int, size: int) -> list[str]:
    """Write videos of `clips` as folders of JPEG files, as sam2 reads them; returns the folders."""
    clips = Clips("test", frames=frames, length=count, size=size)
    folders = []
    for number in range(count):
        path = folder / str(number)
        path.mkdir()
        for frame in range(frames):
            image = Image.fromarray(clips[number].image(frame))
            image.save(path / f"{frame:05d}.jpg", quality=95)
        folders.append(os.fspath(path))
    return folders


def draw_prompts(rng: np.random.Generator, objects: int, size: int) -> list[Prompt]:
    """Draw prompts in the first frame: clicks, boxes and masks in turn."""
    prompts: list[Prompt] = []
    for number in range(objects):
        x, y = rng.uniform(0.2 * size, 0.8 * size, 2)
        if number % 3 == 0:
            prompts.append({"points": [[x, y]], "labels": [1]})
        elif number % 3 == 1:
            half = 0.15 * size
            prompts.append({"box": np.array([x - half, y - half, x + half, y + half])})
        else:
            rows, columns = np.mgrid[:size, :size]
            prompts.append({"mask": np.hypot(rows - y, columns - x) < 0.12 * size})
    return prompts


# Sides -------------------------------------------------------------------------------------------


def track_ours(
    tracker: VideoTracker, folders: Sequence[str], prompts: Sequence[Sequence[Prompt]]
) -> Iterator[FrameLogits]:
    """Track with `VideoTracker`: all videos in one session; one item per frame."""
    session = tracker.open(folders)
    for video, own in enumerate(prompts):
        for number, prompt in enumerate(own):
            session.prompt(video, 0, number, **prompt)
    frame: FrameLogits = []
    for step in session.propagate():
        frame.append(tracker.backbone.masks_at(step.logits, step.size))
        if len(frame) == len(folders):
            yield frame
            frame = []


def track_theirs(
    predictor: Any, folders: Sequence[str], prompts: Sequence[Sequence[Prompt]]
) -> Iterator[FrameLogits]:
    """Track with `SAM2VideoPredictor`: one state per video, in turn; one item per frame."""
    passes = []
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        for folder, own in zip(folders, prompts, strict=True):
            state = predictor.init_state(folder)
            for number, prompt in enumerate(own):
                if "mask" in prompt:
                    predictor.add_new_mask(state, 0, number, prompt["mask"])
                else:
                    predictor.add_new_points_or_box(state, 0, number, **prompt)
            passes.append(predictor.propagate_in_video(state))
    while True:
        with contextlib.redirect_stderr(io.StringIO()):
            frame = [next(own, None) for own in passes]
        if any(own is None for own in frame):
            return
        yield [own[2][:, 0] for own in frame if own is not None]
