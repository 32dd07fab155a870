"""Track objects through videos: many objects of many videos in one batch.

```python
tracker = VideoTracker(load_backbone("sam2.1_hiera_tiny"))
session = tracker.open([frames, "clip.mp4", "folder/of/frames"])
session.prompt(video=0, frame=0, object=1, points=[[210, 350]], labels=[1])
session.prompt(video=1, frame=0, object="dog", box=[40, 60, 200, 180])
for step in session.propagate():
    print(step.video, step.frame, step.objects, step.masks().sum((1, 2)))
```
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sam_gym.backbones.adapters.model import Model
from sam_gym.backbones.decode import PADDING_POINT, Prompts
from sam_gym.backbones.features import ImageFeatures
from sam_gym.backbones.sam2 import VideoSam
from sam_gym.backbones.service import Backbone
from sam_gym.backbones.video.frames import FrameSource, open_video
from sam_gym.backbones.video.memory import ABSENT, Entry, Recall, VideoMemory, recall
from sam_gym.backbones.video.unroll import (
    CERTAIN,
    LIMIT,
    POINTERS,
    decode_objects,
    mask_logits,
)


@dataclass(frozen=True)
class TrackedFrame:
    """The objects of a video in one frame.

    Attributes:
        video: number of the video in the session.
        frame: number of the frame.
        objects: K names of objects, in the order of their first prompts.
        logits: float32 (K, hm, wm), low-res mask logits.
        ious: float32 (K,), predicted IoU.
        scores: float32 (K,), logit that the object is in the frame.
        size: (height, width) of the video.
    """

    video: int
    frame: int
    objects: tuple[Hashable, ...]
    logits: Tensor
    ious: Tensor
    scores: Tensor
    size: tuple[int, int]
    _backbone: Backbone = field(repr=False)

    def masks(self, *, overlap: bool = True) -> np.ndarray:
        """Masks at the size of the video: bool (K, height, width).

        Args:
            overlap: let objects overlap; otherwise a pixel belongs to the highest logit.
        """
        full = self._backbone.masks_at(self.logits, self.size)
        masks = full > self._backbone.mask_threshold
        if not overlap and len(full) > 1:
            masks &= full == full.amax(dim=0)
        return masks.cpu().numpy()


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


class Track:
    """What is remembered of an object of a video.

    Attributes:
        conditioning: entries of prompted frames, by frame.
        tracked: entries of the other frames.
        passed: frames that were tracked or shown -> whether backwards.
        pending: entries of prompts since the last propagation, and whether they condition.
    """

    def __init__(self) -> None:
        self.conditioning: dict[int, Entry] = {}
        self.tracked: dict[int, Entry] = {}
        self.passed: dict[int, bool] = {}
        self.pending: dict[int, tuple[Entry, bool]] = {}
        self.clicks: dict[int, Clicks] = {}

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


@dataclass
class Frames:
    """Encoded frames: raw features, and the embedding as the memory attention prepares it."""

    features: ImageFeatures
    prepared: Tensor


class VideoTracker:
    """Opens sessions in which objects are prompted and tracked.

    Args:
        backbone: a SAM 2.
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
        ValueError: an option is unknown, or the backbone has no memory.
    """

    def __init__(
        self,
        backbone: Backbone,
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
        own = backbone.memory if memory is None else memory
        sam = backbone.model.sam
        if own is None or not isinstance(sam, VideoSam):
            raise ValueError(f"{backbone!r} has no video memory: load micro_video or a SAM 2.1.")
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
        if self.backbone.squashes:
            # Images are resized bilinearly, the frames of videos bicubically.
            size = (self.backbone.image_size,) * 2
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
    def memorize(self, embedding: Tensor, logits: Tensor, scores: Tensor, prompted: bool) -> Tensor:
        """Encode memories of P objects; see `VideoMemory.memorize`."""
        binary = prompted and self.postprocess
        with self.backbone.autocast():
            return self.memory.memorize(embedding, logits, scores, binary)


class TrackingSession:
    """Objects of several videos, their prompts and memories; see `VideoTracker.open`."""

    def __init__(self, tracker: VideoTracker, videos: Sequence[FrameSource]) -> None:
        self.tracker, self.videos = tracker, videos
        self._tracks: list[dict[Hashable, Track]] = [{} for _ in videos]
        self._cache: dict[tuple[int, int], Frames] = {}

    # Frames --------------------------------------------------------------------------------------

    def _encoded(
        self, wanted: Sequence[tuple[int, int]], ahead: Sequence[tuple[int, int]] = ()
    ) -> tuple[Frames, list[int]]:
        """Encode frames (video, frame), or look them up.

        Args:
            wanted: the frames.
            ahead: frames that are wanted next: they fill the last batch.

        Returns:
            Encoded frames, and the row of each that is wanted.
        """
        unique = list(dict.fromkeys(wanted))
        missing = [key for key in unique if key not in self._cache]
        size = self.tracker.batch_size
        missing += [key for key in ahead if key not in self._cache][: -len(missing) % size]
        for first in range(0, len(missing), size):
            chunk = missing[first : first + size]
            frames = self.tracker.encode([self.videos[video][frame] for video, frame in chunk])
            for row, key in enumerate(chunk):
                rows = slice(row, row + 1)
                self._cache[key] = Frames(frames.features[rows], frames.prepared[rows])
        surplus = max(0, len(self._cache) - max(size, len(unique)))
        for key in list(self._cache)[:surplus]:  # the oldest
            if key not in unique:
                del self._cache[key]
        parts = [self._cache[key] for key in unique]
        together = Frames(
            ImageFeatures.cat([part.features for part in parts]),
            torch.cat([part.prepared for part in parts]),
        )
        return together, [unique.index(key) for key in wanted]

    # Prompts -------------------------------------------------------------------------------------

    def prompt(
        self,
        video: int,
        frame: int,
        object: Hashable,
        points: Any = None,
        labels: Any = None,
        box: Any = None,
        mask: Any = None,
        *,
        clear: bool = True,
    ) -> TrackedFrame:
        """Prompt an object in a frame, new or known, and show the result.

        Args:
            video: number of the video.
            frame: number of the frame.
            object: name of the object.
            points: (N, 2), (x, y) in pixels of the video.
            labels: (N,), 1 positive, 0 negative.
            box: (x0, y0, x1, y1); only alone or before points.
            mask: bool (H, W), taken as the result.
            clear: forget earlier points of this object in this frame.

        Raises:
            IndexError: there is no such video or frame.
            ValueError: no prompt, a mask beside others, or a wrong shape.
        """
        self._check_place(video, frame)
        track = self._tracks[video].setdefault(object, Track())
        try:
            entry = self._prompted(track, video, frame, points, labels, box, mask, clear)
        except Exception:
            if track.latest(frame) is None and not (track.pending or track.conditioning):
                del self._tracks[video][object]
            raise
        conditions = frame not in track.passed or self.tracker.correct == "conditioning"
        track.pending[frame] = entry, conditions
        return self._shown(video, frame)

    def restore(
        self,
        video: int,
        frame: int,
        object: Hashable,
        mask: Any,
        *,
        prompted: bool,
        reverse: bool = False,
    ) -> None:
        """Take a mask that is known of an earlier session as this one's own result.

        A new session goes on where another ended: restore the prompted frames of each object, and
        the `slots - 1` frames of its memory before the first one to track.

        Args:
            video: number of the video.
            frame: number of the frame.
            object: name of the object, new or known.
            mask: bool (H, W); all False: the object is not in sight.
            prompted: whether the frame conditions all others, as prompted ones do; otherwise it is
                one that a pass has tracked.
            reverse: whether that pass went backwards.

        Raises:
            IndexError: there is no such video or frame.
            ValueError: the mask has another size than the video.
        """
        self._check_place(video, frame)
        frames, _ = self._encoded([(video, frame)])
        entry = self._from_mask(frames.features, np.asarray(mask), self.videos[video].size)
        entry.memory = self.tracker.memorize(
            frames.features.embedding, entry.logits[None], entry.score[None], prompted
        )[0]
        track = self._tracks[video].setdefault(object, Track())
        (track.conditioning if prompted else track.tracked)[frame] = entry
        track.passed[frame] = reverse

    def _check_place(self, video: int, frame: int) -> None:
        if not 0 <= video < len(self.videos):
            raise IndexError(f"video must be from 0 to {len(self.videos) - 1}, got {video}.")
        last = len(self.videos[video]) - 1
        if not 0 <= frame <= last:
            raise IndexError(f"frame must be from 0 to {last} in video {video}, got {frame}.")

    def _prompted(
        self,
        track: Track,
        video: int,
        frame: int,
        points: Any,
        labels: Any,
        box: Any,
        mask: Any,
        clear: bool,
    ) -> Entry:
        size = self.videos[video].size
        frames, _ = self._encoded([(video, frame)])
        if mask is not None:
            if points is not None or box is not None:
                raise ValueError("Pass a mask, or points and a box, not both.")
            track.clicks.pop(frame, None)
            return self._from_mask(frames.features, np.asarray(mask), size)
        clicks = self._clicks(size, points, labels, box)
        if not clear and frame in track.clicks:
            if box is not None:
                raise ValueError("A box comes before points: pass it with clear=True.")
            before = track.clicks[frame]
            clicks = Clicks(
                np.concatenate([before.points, clicks.points]),
                np.concatenate([before.labels, clicks.labels]),
                before.box,
            )
        features = frames.features
        if frame in track.passed and track.conditioning:
            own = self._recall(track, frame, track.passed[frame], len(self.videos[video]))
            conditioned = self._conditioned(frames.prepared, [own], [track.known])
            features = features.merge(embedding=conditioned)
        else:
            features = self.tracker.sam.without_memory(features)
        earlier = track.latest(frame)
        device = self.tracker.backbone.device
        masks = None if earlier is None else earlier.logits[None].clamp(-LIMIT, LIMIT)
        prompts = clicks.prompts(1, device, masks)
        multimask = torch.tensor([clicks.count <= 1], device=device)
        decoded = self.tracker.decode(features, prompts, multimask)
        track.clicks[frame] = clicks
        return Entry(*(part[0] for part in decoded))

    def _clicks(self, size: tuple[int, int], points: Any, labels: Any, box: Any) -> Clicks:
        if points is None and box is None:
            raise ValueError("A prompt needs points and labels, a box, or a mask.")
        if (points is None) != (labels is None):
            raise ValueError("points and labels come together.")
        own, scaled = Clicks(), self.tracker.backbone.to_input_frame
        if points is not None:
            places = np.asarray(points, np.float32).reshape(-1, 2)
            kinds = np.asarray(labels, np.int64).reshape(-1)
            if len(places) != len(kinds):
                raise ValueError(f"{len(places)} points with {len(kinds)} labels.")
            if not np.isin(kinds, (0, 1)).all():
                raise ValueError("labels must be 0 or 1.")
            own.points, own.labels = scaled(places, size).astype(np.float32), kinds
        if box is not None:
            corners = np.asarray(box, np.float32)
            if corners.shape != (4,):
                raise ValueError(f"box must be (x0, y0, x1, y1), got {corners.shape}.")
            own.box = scaled(corners.reshape(2, 2), size).astype(np.float32).reshape(4)
        return own

    def _from_mask(self, features: ImageFeatures, mask: np.ndarray, size: tuple[int, int]) -> Entry:
        """The entry of a mask prompt: the mask is the result, the decoder gives its pointer."""
        if mask.shape != size:
            raise ValueError(f"mask must have the size of the video, {size}, got {mask.shape}.")
        backbone, side = self.tracker.backbone, self.tracker.backbone.image_size
        full = torch.from_numpy(mask.astype(np.float32))[None, None].to(backbone.device)
        height, width = backbone.input_size(size)
        if tuple(size) != (height, width):
            full = F.interpolate(
                full, (height, width), mode="bilinear", align_corners=False, antialias=True
            )
            # Even the smallest object keeps a pixel.
            full = (full >= full.amax().clamp(1e-6, 0.5)).float()
        full = F.pad(full, (0, side - width, 0, side - height))
        logits = mask_logits(full, backbone.mask_shape)
        tracker = self.tracker
        with torch.no_grad():
            prompts = Clicks().prompts(1, full.device, tracker.memory.mask_downsample(full)[:, 0])
            single = torch.zeros(1, dtype=torch.bool, device=full.device)
            *_, pointer = tracker.decode(features, prompts, single)
            present = full.flatten(1).any(dim=1)
            pointer = torch.where(present[:, None], pointer, tracker.memory.no_obj_ptr)
        score = torch.where(present, CERTAIN, -CERTAIN)
        return Entry(logits[0], torch.ones((), device=full.device), score[0], pointer[0])

    def remove(self, video: int, object: Hashable) -> None:
        """Forget an object.

        Raises:
            KeyError: there is none of this name.
        """
        if object not in self._tracks[video]:
            raise KeyError(f"Video {video} has no object {object!r}.")
        del self._tracks[video][object]

    # Tracking ------------------------------------------------------------------------------------

    def propagate(
        self,
        *,
        start: int | None = None,
        max_frames: int | None = None,
        reverse: bool = False,
        from_prompts: bool = False,
        videos: Collection[int] | None = None,
    ) -> Iterator[TrackedFrame]:
        """Track all objects of all videos, one frame of each video at a time.

        Args:
            start: first frame (None: the earliest prompted one of each video; backwards with
                `from_prompts`, the latest of the first prompted ones of its objects).
            max_frames: maximum number of frames after the first (None: to the end).
            reverse: track backwards.
            from_prompts: track each object from its own first prompted frame on. By default, as in
                SAM 2, an object that is prompted late is tracked forwards in earlier frames too.
            videos: numbers of the videos to track (None: all).

        Raises:
            ValueError: nothing was prompted, or an object has no conditioning frame.
        """
        self._settle()
        spans: dict[int, range] = {}
        for video, tracks in enumerate(self._tracks):
            if not tracks or (videos is not None and video not in videos):
                continue
            first = start
            if first is None:
                firsts = [track.first for track in tracks.values()]
                first = max(firsts) if reverse and from_prompts else min(firsts)
            last = 0 if reverse else len(self.videos[video]) - 1
            if max_frames is not None:
                last = max(last, first - max_frames) if reverse else min(last, first + max_frames)
            if not (reverse and first == 0):
                spans[video] = range(first, last - 1, -1) if reverse else range(first, last + 1)
        steps = max((len(span) for span in spans.values()), default=0)

        def at(step: int) -> dict[int, int]:
            return {video: span[step] for video, span in spans.items() if step < len(span)}

        for step in range(steps):
            now = at(step)
            later = range(step + 1, min(step + self.tracker.batch_size, steps))
            ahead = [key for other in later for key in at(other).items()]
            self._track(now, reverse, ahead, from_prompts)
            for video, frame in now.items():
                yield self._shown(video, frame)

    def _settle(self) -> None:
        """Encode the memories of new prompts and let them take effect."""
        if not any(self._tracks):
            raise ValueError("Nothing to track: prompt an object first.")
        for video, tracks in enumerate(self._tracks):
            for name, track in tracks.items():
                for frame, (entry, conditions) in track.pending.items():
                    frames, _ = self._encoded([(video, frame)])
                    entry.memory = self.tracker.memorize(
                        frames.features.embedding, entry.logits[None], entry.score[None], True
                    )[0]
                    (track.conditioning if conditions else track.tracked)[frame] = entry
                track.pending = {}
                for frame in track.conditioning:
                    track.tracked.pop(frame, None)
                if not track.conditioning:
                    raise ValueError(f"Object {name!r} of video {video} has no prompt.")

    def _track(
        self,
        now: dict[int, int],
        reverse: bool,
        ahead: Sequence[tuple[int, int]],
        from_prompts: bool,
    ) -> None:
        """Track the objects in the present frames of their videos; see `_encoded` for `ahead`."""
        rows = [
            (video, frame, track)
            for video, frame in now.items()
            for track in self._tracks[video].values()
            if not from_prompts or (frame <= track.first if reverse else frame >= track.first)
        ]
        buckets: dict[tuple[int, int], list[tuple[int, int, Track, Recall]]] = {}
        for video, frame, track in rows:
            if frame not in track.conditioning:
                own = self._recall(track, frame, reverse, len(self.videos[video]))
                buckets.setdefault(own.size, []).append((video, frame, track, own))
        wanted = list(dict.fromkeys(row[:2] for bucket in buckets.values() for row in bucket))
        if wanted:
            # Of all buckets at once: a frame may be in several.
            frames, _ = self._encoded(wanted, ahead)
        for bucket in buckets.values():
            index = [wanted.index(row[:2]) for row in bucket]
            where = torch.tensor(index, device=frames.prepared.device)
            features = frames.features[where]
            conditioned = self._conditioned(
                frames.prepared[where],
                [own for *_, own in bucket],
                [track.known for _, _, track, _ in bucket],
            )
            logits, ious, scores, pointers = self.tracker.decode(
                features.merge(embedding=conditioned),
                Clicks().prompts(len(bucket), where.device),
                torch.ones(len(bucket), dtype=torch.bool, device=where.device),
            )
            memories = self.tracker.memorize(features.embedding, logits, scores, False)
            for row, (_, frame, track, _) in enumerate(bucket):
                track.tracked[frame] = Entry(
                    logits[row], ious[row], scores[row], pointers[row], memories[row]
                )
        for _, frame, track in rows:
            track.passed[frame] = reverse
            if self.tracker.keep == "window":
                track.forget(frame, reverse, self.tracker.memory.slots - 1, POINTERS - 1)

    def _recall(self, track: Track, frame: int, reverse: bool, num_frames: int) -> Recall:
        return recall(
            frame,
            list(track.conditioning),
            track.tracked,
            reverse=reverse,
            num_frames=num_frames,
            memories=self.tracker.memory.slots,
            pointers=POINTERS,
        )

    @torch.no_grad()
    def _conditioned(
        self, prepared: Tensor, recalls: Sequence[Recall], known: Sequence[Mapping[int, Entry]]
    ) -> Tensor:
        with self.tracker.backbone.autocast():
            return self.tracker.memory.condition(prepared, recalls, known)

    def _shown(self, video: int, frame: int) -> TrackedFrame:
        """The present results of all objects of a frame; absent where an object has none."""
        backbone = self.tracker.backbone
        entries = [track.latest(frame) for track in self._tracks[video].values()]
        none = torch.full(backbone.mask_shape, ABSENT, device=backbone.device)
        zero = torch.zeros((), device=backbone.device)

        def stacked(name: str, missing: Tensor) -> Tensor:
            return torch.stack([getattr(own, name) if own else missing for own in entries])

        return TrackedFrame(
            video,
            frame,
            tuple(self._tracks[video]),
            stacked("logits", none),
            stacked("iou", zero),
            stacked("score", zero + ABSENT),
            self.videos[video].size,
            backbone,
        )
