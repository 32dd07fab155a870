"""Masks of a video's objects by a tracker: of a prompted frame, and from there on."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

import numpy as np

from agents.annotation.interactive.masklets import FramePrompt, Mask, Masklets, VideoObject
from agents.annotation.interactive.prompting import Click
from sam_gym.backbones.video.frames import FrameSource
from sam_gym.backbones.video.memory import closest_frames
from sam_gym.backbones.video.session import TrackedFrame, TrackingSession
from sam_gym.backbones.video.tracker import VideoTracker

#: Name of the object in the session of a `Prompter`.
_OBJECT = "object"
#: Maximum number of prompted frames that a pass, and a click, remember.
_CONDITIONING, _CLICK_CONDITIONING = 8, 2
#: Seconds from one write of what a pass has found to the next; and how often what writing took.
_EVERY, _SHARE = 3.0, 20.0


class Prompter:
    """Segments one object at a time in prompted frames.

    The masks of other prompted frames tell what the object looks like, and the present mask of the
    frame is corrected, as in SAM 2.

    Args:
        tracker: the tracker.
        source: frames of the video, for this object alone.
    """

    def __init__(self, tracker: VideoTracker, source: FrameSource) -> None:
        self._session, self._size = tracker.open([source]), source.size
        #: Object, its version and the frame of the last prompt, which a further click continues.
        self._last: tuple[int, int, int] | None = None

    def click(self, own: VideoObject, frame: int, click: Click) -> tuple[Mask | None, FramePrompt]:
        """Add a click; returns the mask and the prompt of the frame."""
        before = own.prompts.get(frame, FramePrompt())
        prompt = FramePrompt((*before.clicks, click), before.box)
        if self._last == (own.id, own.version, frame):
            return self._prompt(frame, [click], None, clear=False), prompt
        self._begin(own, frame, own.masks.get(frame))
        return self._prompt(frame, prompt.clicks, prompt.box), prompt

    def box(
        self, own: VideoObject, frame: int, box: tuple[float, float, float, float]
    ) -> tuple[Mask | None, FramePrompt]:
        """Replace the prompt by a box; returns the mask and the prompt of the frame."""
        self._begin(own, frame, None)  # the mask of another box would mislead
        return self._prompt(frame, (), box), FramePrompt((), box)

    def keep(self, own: VideoObject, frame: int) -> None:
        """Note that the last result was kept: the next click on the object continues it."""
        self._last = own.id, own.version, frame

    def _begin(self, own: VideoObject, frame: int, mask: Mask | None) -> None:
        """Let the session know the object by its prompted frames, and its mask in this one."""
        session = self._session
        with suppress(KeyError):  # the first one, or one that failed
            session.remove(0, _OBJECT)
        others = [other for other in sorted(own.prompts) if other != frame]
        for other in closest_frames(frame, others, _CLICK_CONDITIONING):
            seen = _decoded(own.masks.get(other), self._size)
            session.restore(0, other, _OBJECT, seen, prompted=True)
        if mask is not None:
            session.restore(0, frame, _OBJECT, mask.decoded(self._size), prompted=False)

    def _prompt(
        self,
        frame: int,
        clicks: Sequence[Click],
        box: tuple[float, float, float, float] | None,
        clear: bool = True,
    ) -> Mask | None:
        self._last = None
        shown = self._session.prompt(
            0,
            frame,
            _OBJECT,
            [(click.x, click.y) for click in clicks] if clicks else None,
            [int(click.positive) for click in clicks] if clicks else None,
            box,
            clear=clear,
        )
        return Mask.of(shown.masks()[0], float(shown.ious[0]))


def propagate(
    tracker: VideoTracker,
    source: FrameSource,
    masklets: Masklets,
    ids: Sequence[int],
    starts: Mapping[int, int],
    versions: dict[int, int],
    reverse: bool,
) -> Iterator[int]:
    """Track objects from their starts to an end of the video; prompted frames stay as they are.

    Writes the COCO file every few seconds; the caller does at the end.

    Args:
        tracker: with keep="window": memory does not grow with the video.
        source: frames of the video, for this pass alone.
        masklets: objects, and where the masks go.
        ids: of the objects.
        starts: last frame of each object whose mask stays, see `start_of`.
        versions: of the objects; see `Masklets.track`.
        reverse: track backwards.

    Yields:
        The number of each frame that is done.
    """
    step = -1 if reverse else 1
    saved, cost = time.monotonic(), 0.0
    for found in _tracked(tracker, source, masklets, ids, starts, step):
        keys = [key for key in found.objects if isinstance(key, int)]
        results = zip(keys, found.masks(), found.ious.tolist(), strict=True)
        ahead = {
            key: Mask.of(mask, iou)
            for key, mask, iou in results
            if step * (found.frame - starts[key]) > 0
        }
        masklets.track(found.frame, ahead, versions)
        yield found.frame
        if time.monotonic() - saved > max(_EVERY, _SHARE * cost):
            began = time.monotonic()
            masklets.flush()
            saved = time.monotonic()
            cost = saved - began


def _tracked(
    tracker: VideoTracker,
    source: FrameSource,
    masklets: Masklets,
    ids: Sequence[int],
    starts: Mapping[int, int],
    step: int,
) -> Iterator[TrackedFrame]:
    """Track objects, each from its start on: a pass is divided where another object begins."""
    session, is_empty = tracker.open([source]), True
    stages = sorted({starts[number] for number in ids}, reverse=step < 0)
    for start, end in itertools.zip_longest(stages, stages[1:]):
        for number in ids:
            # Somebody else may have removed it.
            own = masklets.copies([number])[number] if starts[number] == start else None
            if own is not None:
                _restore(session, own, start, masklets.size, tracker.memory.slots - 1, step)
                is_empty = False
        length = None if end is None else abs(end - start) - 1
        if not is_empty:
            yield from session.propagate(start=start, max_frames=length, reverse=step < 0)


def start_of(own: VideoObject, frame: int, reverse: bool) -> int | None:
    """Return where a pass from a frame on begins: the last frame of the object that is known.

    That is the frame itself, else the closest before it in the direction of the pass, else the
    first prompted one behind it; None: the object has no prompt and no mask there.
    """
    step = -1 if reverse else 1
    before = [other for other in own.masks if step * (frame - other) >= 0]
    if before:
        return min(before, key=lambda other: abs(frame - other))
    behind = [other for other in own.prompts if step * (other - frame) > 0]
    return min(behind, key=lambda other: abs(frame - other), default=None)


def _restore(
    session: TrackingSession,
    own: VideoObject,
    start: int,
    size: tuple[int, int],
    window: int,
    step: int,
) -> None:
    """Let a session know the prompted frames of an object, and the frames before a pass."""
    prompted = closest_frames(start, sorted(own.prompts), _CONDITIONING) or [start]
    for frame in prompted:
        session.restore(0, frame, own.id, _decoded(own.masks.get(frame), size), prompted=True)
    for frame in (start - step * distance for distance in range(window)):
        if frame in own.masks and frame not in prompted:
            mask = _decoded(own.masks[frame], size)
            session.restore(0, frame, own.id, mask, prompted=False, reverse=step < 0)


def _decoded(mask: Mask | None, size: tuple[int, int]) -> np.ndarray:
    return np.zeros(size, bool) if mask is None else mask.decoded(size)
