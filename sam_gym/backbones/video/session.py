"""Sessions of a `VideoTracker`: objects are prompted, tracked and removed."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sam_gym.backbones.features import ImageFeatures
from sam_gym.backbones.service import Backbone
from sam_gym.backbones.video.frames import Frames, FrameSource
from sam_gym.backbones.video.memory import ABSENT, Entry, Recall, recall
from sam_gym.backbones.video.modules import Workspace
from sam_gym.backbones.video.track import Clicks, Track
from sam_gym.backbones.video.unroll import CERTAIN, LIMIT, POINTERS, mask_logits

if TYPE_CHECKING:
    from sam_gym.backbones.video.tracker import VideoTracker


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


class TrackingSession:
    """Objects of several videos, their prompts and memories; see `VideoTracker.open`."""

    def __init__(self, tracker: VideoTracker, videos: Sequence[FrameSource]) -> None:
        self.tracker, self.videos = tracker, videos
        self._tracks: list[dict[Hashable, Track]] = [{} for _ in videos]
        self._cache: dict[tuple[int, int], Frames] = {}
        self._work = Workspace()

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
            mask: bool (H, W), or numbers 0 and 1, taken as the result.
            clear: forget earlier points of this object in this frame.

        Raises:
            IndexError: there is no such video or frame.
            ValueError: no prompt, a mask beside others, or a wrong shape or wrong values.
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
            mask: bool (H, W), or numbers 0 and 1; all False: the object is not in sight.
            prompted: whether the frame conditions all others, as prompted ones do; otherwise it is
                one that a pass has tracked.
            reverse: whether that pass went backwards.

        Raises:
            IndexError: there is no such video or frame.
            ValueError: the mask has another size than the video, or other values.
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

    def _check_video(self, video: int) -> None:
        if not 0 <= video < len(self.videos):
            raise IndexError(f"video must be from 0 to {len(self.videos) - 1}, got {video}.")

    def _check_place(self, video: int, frame: int) -> None:
        self._check_video(video)
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
        clicks = Clicks.parse(
            points, labels, box, lambda own: self.tracker.backbone.to_input_frame(own, size)
        )
        if not clear and frame in track.clicks:
            clicks = clicks.after(track.clicks[frame])
        features = frames.features
        if frame in track.passed and track.conditioning:
            own = self._recall(track, frame, track.passed[frame], len(self.videos[video]))
            conditioned = self._conditioned(frames.prepared, [own], [track])
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

    def _from_mask(self, features: ImageFeatures, mask: np.ndarray, size: tuple[int, int]) -> Entry:
        """The entry of a mask prompt: the mask is the result, the decoder gives its pointer."""
        if mask.shape != size:
            raise ValueError(f"mask must have the size of the video, {size}, got {mask.shape}.")
        if mask.dtype != bool and not np.isin(mask, (0, 1)).all():
            raise ValueError(f"mask must be bool, or 0 and 1, got other values ({mask.dtype}).")
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

        Objects may be removed meanwhile; a video without objects is tracked no further.

        Args:
            start: first frame, which every video has (None: the earliest prompted one of each
                video; backwards with `from_prompts`, the latest of the first prompted ones of its
                objects).
            max_frames: maximum number of frames after the first (None: to the end).
            reverse: track backwards.
            from_prompts: track each object from its own first prompted frame on. By default, as in
                SAM 2, an object that is prompted late is tracked forwards in earlier frames too.
            videos: numbers of the videos to track (None: all).

        Raises:
            IndexError: there is no such video, or it has no frame `start`.
            ValueError: nothing was prompted, an object has no conditioning frame, or `max_frames`
                is negative.
        """
        for video in videos or ():
            self._check_video(video)
        if max_frames is not None and max_frames < 0:
            raise ValueError(f"max_frames must be at least 0, got {max_frames}.")
        self._settle()
        spans: dict[int, range] = {}
        for video, tracks in enumerate(self._tracks):
            if not tracks or (videos is not None and video not in videos):
                continue
            first = start
            if first is not None:
                self._check_place(video, first)
            else:
                firsts = [track.first for track in tracks.values()]
                first = max(firsts) if reverse and from_prompts else min(firsts)
            last = 0 if reverse else len(self.videos[video]) - 1
            if max_frames is not None:
                last = max(last, first - max_frames) if reverse else min(last, first + max_frames)
            if not (reverse and first == 0):
                spans[video] = range(first, last - 1, -1) if reverse else range(first, last + 1)
        steps = max((len(span) for span in spans.values()), default=0)

        def at(step: int) -> dict[int, int]:
            return {
                video: span[step]
                for video, span in spans.items()
                if step < len(span) and self._tracks[video]
            }

        for step in range(steps):
            now = at(step)
            later = range(step + 1, min(step + self.tracker.batch_size, steps))
            ahead = [key for other in later for key in at(other).items()]
            self._track(now, reverse, ahead, from_prompts)
            for video, frame in now.items():
                if self._tracks[video]:
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
            features = _of_rows(frames.features, index)
            conditioned = self._conditioned(
                frames.prepared,
                [own for *_, own in bucket],
                [track for _, _, track, _ in bucket],
                where,
            )
            logits, ious, scores, pointers = self.tracker.decode(
                features.merge(embedding=conditioned),
                Clicks().prompts(len(bucket), where.device),
                torch.ones(len(bucket), dtype=torch.bool, device=where.device),
            )
            memories = self.tracker.memorize(
                frames.features.embedding, logits, scores, False, where
            )
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
        self,
        prepared: Tensor,
        recalls: Sequence[Recall],
        tracks: Sequence[Track],
        rows: Tensor | None = None,
    ) -> Tensor:
        """See `VideoMemory.condition`."""
        known, kept = [track.known for track in tracks], [track.keys for track in tracks]
        with self.tracker.backbone.autocast():
            return self.tracker.memory.condition(prepared, recalls, known, rows, kept, self._work)

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


def _of_rows(features: ImageFeatures, rows: Sequence[int]) -> ImageFeatures:
    """Select frames; the rows of a single one share its memory."""
    if len(set(rows)) > 1:
        return features[torch.tensor(rows, device=features.embedding.device)]
    own = features[rows[0] : rows[0] + 1]
    return own.map(lambda tensor: tensor.expand(len(rows), *tensor.shape[1:]))
