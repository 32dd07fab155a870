"""Track objects through videos: many objects of many videos in one batch.

```python
tracker = VideoTracker("sam2.1_hiera_tiny")
session = tracker.open([frames, "clip.mp4", "folder/of/frames"])
session.prompt(video=0, frame=0, object=1, points=[[210, 350]], labels=[1])
session.prompt(video=1, frame=0, object="dog", box=[40, 60, 200, 180])
for step in session.propagate():
    print(step.video, step.frame, step.objects, step.masks().sum((1, 2)))
```
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sam_gym.backbones.adapters.model import Model
from sam_gym.backbones.features import ImageFeatures
from sam_gym.backbones.loading import load_backbone
from sam_gym.backbones.prompts import Prompts
from sam_gym.backbones.sam2 import VideoSam
from sam_gym.backbones.service import Backbone
from sam_gym.backbones.spec import check_tracks
from sam_gym.backbones.video.frames import Frames, open_video
from sam_gym.backbones.video.memory import VideoMemory
from sam_gym.backbones.video.session import TrackingSession
from sam_gym.backbones.video.unroll import decode_objects


class VideoTracker:
    """Opens sessions in which objects are prompted and tracked.

    Args:
        backbone: a SAM with a video memory: a registered name (see `load_backbone`) or a backbone.
        memory: its memory; by default `backbone.memory`.
        correct: what a prompt on a frame that was tracked already becomes. "conditioning": a
            conditioning frame, which all others attend to and no pass tracks again. "sam2": the
            authors' default, an ordinary memory, which the next pass overwrites.
        postprocess: as the authors' predictor does by default, binarise the masks of prompted
            frames before they are memorized, and replace unstable single masks. Their reported
            numbers are without it.
        keep: "all": keep the entries of all frames, for corrections anywhere. "window": keep
            conditioning frames and what later frames recall; memory does not grow with the video.
        batch_size: maximum number of frames encoded at a time; a batch is filled with the frames
            that come next.

    Raises:
        ValueError: an option is unknown, the backbone has no memory, or whatever `load_backbone`
            raises.
    """

    def __init__(
        self,
        backbone: str | Backbone,
        memory: VideoMemory | None = None,
        *,
        correct: Literal["conditioning", "sam2"] = "conditioning",
        postprocess: bool = False,
        keep: Literal["all", "window"] = "all",
        batch_size: int = 8,
    ) -> None:
        for name, value, valid in (
            ("correct", correct, ("conditioning", "sam2")),
            ("keep", keep, ("all", "window")),
        ):
            if value not in valid:
                raise ValueError(f"{name} must be one of {', '.join(valid)}, got {value!r}.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if isinstance(backbone, str):
            check_tracks(backbone)
            backbone = load_backbone(backbone)
        own = backbone.memory if memory is None else memory
        sam = backbone.model.sam
        if own is None or not isinstance(sam, VideoSam):
            raise ValueError(
                f"{backbone!r} has no video memory: load micro_video, edgetam or a SAM 2.1."
            )
        if type(backbone.model) is not Model:
            raise ValueError(
                f"{backbone!r}: this adapter chooses weights or prompts by image, which tracking "
                "does not support. Take one of another method."
            )
        self.backbone, self.sam = backbone, sam
        self.memory = own.to(backbone.device).eval()
        self.correct, self.postprocess, self.keep = correct, postprocess, keep
        self.batch_size = batch_size

    def open(self, videos: Sequence[Any]) -> TrackingSession:
        """Open a session over videos.

        Args:
            videos: each a path of a video file, a folder of frames, a sequence of images uint8
                (H, W, 3), RGB, or a video of a dataset.

        Raises:
            FileNotFoundError: a path does not exist.
            ValueError: a video has no frames or cannot be read.
        """
        return TrackingSession(self, [open_video(video) for video in videos])

    # The model ---------------------------------------------------------------------------------

    def framed(self, image: np.ndarray) -> np.ndarray:
        """Resize a frame, uint8 (H, W, 3), as the model's authors do: uint8 (H', W', 3).

        `Backbone.encode` makes of the result what `encode` makes of the frame.
        """
        size = (self.backbone.image_size,) * 2
        if self.backbone.squashes and image.shape[:2] != size:
            # Images are resized bilinearly, the frames of videos bicubically.
            return np.array(Image.fromarray(image).resize(size))
        return image

    def pixels(self, images: Sequence[np.ndarray]) -> Tensor:
        """Bring frames, uint8 (H, W, 3), into the input frame: float32 (B, 3, S, S), normalised."""
        return self.backbone.prepare([self.framed(image) for image in images])

    @torch.no_grad()
    def encode(self, images: Sequence[np.ndarray]) -> Frames:
        """Encode frames, uint8 (H, W, 3)."""
        with self.backbone.autocast():
            features = self.sam.encode_frames(self.pixels(images))
        return self.prepared(features)

    def raw(self, features: ImageFeatures) -> ImageFeatures:
        """Take the mark of frames without memories, `no_mem_embed`, off features of `Backbone`."""
        lone = self.sam.no_mem_embed.reshape(1, -1, 1, 1)
        return features.merge(embedding=features.embedding - lone)

    @torch.no_grad()
    def prepared(self, raw: ImageFeatures) -> Frames:
        """Prepare raw features of frames for the memory attention."""
        with self.backbone.autocast():
            return Frames(raw, self.memory.memory_attention.prepare(raw.embedding))

    @torch.no_grad()
    def decode(
        self, features: ImageFeatures, prompts: Prompts, multimask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Decode P objects.

        Args:
            features: P rows, with or without memories in their embedding.
            prompts: P prompt sets, without rows.
            multimask: bool (P,), rows that get the best of three masks.

        Returns:
            logits float32 (P, hm, wm), predicted IoU (P,), object score (P,), pointers (P, C).
        """
        with self.backbone.autocast():
            entry = decode_objects(
                self.sam, self.memory, features, prompts, multimask, self.postprocess
            ).entry
        return entry.logits, entry.iou, entry.score, entry.pointer

    @torch.no_grad()
    def memorize(
        self,
        embedding: Tensor,
        logits: Tensor,
        scores: Tensor,
        prompted: bool,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Encode memories of P objects; see `VideoMemory.memorize`."""
        binary = prompted and self.postprocess
        with self.backbone.autocast():
            return self.memory.memorize(embedding, logits, scores, binary, rows)
