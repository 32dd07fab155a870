"""What one person does with a video: prompts in frames, objects, passes of the tracker."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict, deque
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agents.annotation.interactive.drawing import jpeg, jpeg_of, measures, outline
from agents.annotation.interactive.job import Job, stepwise
from agents.annotation.interactive.library import VideoLibrary
from agents.annotation.interactive.locking import locked
from agents.annotation.interactive.masklets import (
    UNNAMED,
    FramePrompt,
    Mask,
    Masklets,
    VideoObject,
    ranges,
)
from agents.annotation.interactive.prompting import MAX_CLICKS, Click
from agents.annotation.interactive.propagation import Prompter, propagate, start_of
from agents.annotation.interactive.session import MAX_NAME, Models
from sam_gym.backbones.video.frames import FrameSource
from sam_gym.backbones.zoom import Window

#: Bound on the objects of a video.
MAX_OBJECTS = 200
#: Number of changes that can be undone.
_HISTORY = 100
#: Number of frames of an open video that are held as JPEG.
_SHOWN_FRAMES = 32
#: Frames per second of a video that does not tell.
_RATE = 12.0
#: Why a change that was begun is not made.
_CHANGED = "Somebody else has changed this object meanwhile: try again."


class FrameViewer:
    """Frames of a video as JPEG, decoded when they are looked at; for any thread.

    Args:
        source: the frames.
    """

    def __init__(self, source: FrameSource) -> None:
        self._source, self._lock = source, threading.Lock()
        self._shown: OrderedDict[int, bytes] = OrderedDict()

    def jpeg(self, frame: int, window: Window | None = None) -> bytes | None:
        """Return a frame as it is shown, or a part of it; None: it has no such part.

        Raises:
            ValueError, OSError: it cannot be decoded.
        """
        with self._lock:
            if window is not None:
                return jpeg_of(self._source[frame], window)
            if frame not in self._shown:
                self._shown[frame] = jpeg(self._source[frame])
                if len(self._shown) > _SHOWN_FRAMES:
                    self._shown.popitem(last=False)
            self._shown.move_to_end(frame)
            return self._shown[frame]


@dataclass(frozen=True)
class OpenVideo:
    """The video that a person looks at.

    Attributes:
        file: in the library.
        masklets: its objects, which others may change, too.
        viewer: of its frames.
        prompter: segments prompted frames.
        rate: frames per second.
        key: secret name of its frames, which no other person can guess.
    """

    file: str
    masklets: Masklets
    viewer: FrameViewer
    prompter: Prompter
    rate: float
    key: str = field(default_factory=lambda: secrets.token_urlsafe(16))

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.masklets.size

    def __len__(self) -> int:
        return len(self.masklets.frames)


@dataclass(frozen=True)
class _Change:
    """What can be undone: the objects before a change, and their versions after it.

    Attributes:
        before: the objects before it.
        after: their versions after it.
        frame: in which it was made.
        begins: whether the next click was to begin an object.
    """

    before: Mapping[int, VideoObject | None]
    after: Mapping[int, int | None]
    frame: int
    begins: bool = False


class VideoSession:
    """The work of one person on a video in one browser tab. Methods may be called from any thread.

    Args:
        models: what all people share.
        library: the videos.

    Attributes:
        library: the videos.
        index: of the open video in `library.files`.
        video: the open video, or None.
        frame: number of the frame that is shown.
        selected: id of the object that clicks are for, or None.
        name: name of objects that are begun.
        job: the pass of the tracker that runs or ran last, or None.
    """

    def __init__(self, models: Models, library: VideoLibrary) -> None:
        self.models, self.library = models, library
        self.lock = threading.RLock()
        self.index, self.frame, self.name = 0, 0, ""
        self.video: OpenVideo | None = None
        self.selected: int | None = None
        # Whether the next click begins an object, also inside the mask of another.
        self._begins = False
        # By library: names that are offered, in an order that stays.
        self._offered: dict[Path, dict[str, None]] = {}
        self.job: Job | None = None
        self._tracked: tuple[int, ...] = ()
        # Names that objects get when the pass that tracks them has ended.
        self._waiting: dict[int, str] = {}
        self._history: deque[_Change] = deque(maxlen=_HISTORY)

    # Videos ------------------------------------------------------------------------------------

    @locked
    def open(self, index: int) -> None:
        """Open a video of the library where it was left.

        Raises:
            ValueError, OSError: it, its results or the tracker cannot be read, or the open video
                cannot be closed; the open video stays.
        """
        self.prepare_close()
        file = self.library.files[index]
        tracker = self.models.tracker()
        try:
            source = self.library.read(file)
            if not all(tracker.backbone.input_size(source.size)):
                raise ValueError(f"{file}: too thin for SAM.")
            masklets = self.library.masklets(file, source)
            prompter = Prompter(tracker, self.library.read(file))
        except (ValueError, OSError):
            self.library.broken.add(file)
            raise
        self.library.broken.discard(file)
        self.close()
        rate = float(getattr(source, "rate", 0.0)) or _RATE
        self.video = OpenVideo(file, masklets, FrameViewer(source), prompter, rate)
        self.index, self.frame = index, masklets.frame

    @locked
    def close(self) -> None:
        """Let the open video go; a pass is stopped, and what it has found is saved."""
        self.stop(wait=True)
        if self.video is not None:
            with suppress(OSError):  # `prepare_close` tells those who can still do something
                self.video.masklets.flush()
        self.video, self.selected, self._begins = None, None, False
        self._history.clear()

    @locked
    def prepare_close(self) -> None:
        """Write what has not been written yet, so that `close` loses nothing.

        Raises:
            ValueError: a job is running.
            OSError: masks of a pass could not be written.
        """
        self.check_idle()
        if self.video is None:
            return
        try:
            self.video.masklets.flush()
        except OSError as error:
            raise OSError(
                f"{self.video.file}: masks that were tracked are not written yet, so it stays open "
                f"({error})."
            ) from error

    def _opened(self) -> OpenVideo:
        if self.video is None:
            raise ValueError("No video is open.")
        return self.video

    @locked
    def show(self, frame: int) -> None:
        """Look at another frame; it is limited to those of the video."""
        self.frame = min(max(frame, 0), len(self._opened()) - 1)

    # Prompts -----------------------------------------------------------------------------------

    @locked
    def click(self, x: float, y: float, positive: bool) -> str:
        """Add a click at (x, y), in pixels of the video, to the selected object in this frame.

        Where none is selected, a click inside a mask selects its object and corrects it, unless
        `select(None)` has asked for another object; else a positive click begins one.

        Returns:
            What people are told, or "".

        Raises:
            ValueError: there are too many clicks or objects, a negative click is for none, or
                another tab has changed the object meanwhile.
            OSError: the frame could not be read, or the result not be written.
        """
        video = self._opened()
        height, width = video.size
        click = Click(float(np.clip(x, 0, width - 1)), float(np.clip(y, 0, height - 1)), positive)
        told = ""
        if self.selected not in video.masklets.objects:
            hit = None if self._begins else self._object_at(click)
            if hit is None and not positive:
                raise ValueError(
                    "A negative click corrects an object: select one, or begin with a positive one."
                )
            self.selected = hit
            told = "" if hit is None else "is selected and corrected. Enter, then a click: another."
        own = self._begun()
        if len(own.prompts.get(self.frame, FramePrompt()).clicks) >= MAX_CLICKS:
            raise ValueError(f"{MAX_CLICKS} clicks are enough: clear this frame (R).")
        is_new = not own.id
        mask, prompt = video.prompter.click(own, self.frame, click)
        self._set(own, prompt, mask, FramePrompt(prompt.clicks[:-1], prompt.box))
        video.prompter.keep(own, self.frame)
        told = "begins here." if is_new else told
        return f"{own.name} {own.id} {told}" if told else ""

    @locked
    def draw_box(self, x0: float, y0: float, x1: float, y1: float) -> str:
        """Replace the clicks on the selected object in this frame by a box with two corners.

        Where none is selected, it begins one.

        Returns:
            What people are told, or "".

        Raises:
            ValueError: it has no area, or there are too many objects.
            OSError: as of `click`.
        """
        video = self._opened()
        height, width = video.size
        (x0, x1), (y0, y1) = sorted((x0, x1)), sorted((y0, y1))
        box = (max(x0, 0.0), max(y0, 0.0), min(x1, width - 1.0), min(y1, height - 1.0))
        if box[2] - box[0] < 1 or box[3] - box[1] < 1:
            raise ValueError("This box has no area: drag from corner to corner.")
        own = self._begun()
        is_new = not own.id
        mask, prompt = video.prompter.box(own, self.frame, box)
        self._set(own, prompt, mask)
        video.prompter.keep(own, self.frame)
        return f"{own.name} {own.id} begins here." if is_new else ""

    @locked
    def hide(self) -> None:
        """Say that the selected object is not in sight in this frame."""
        self._set(self._chosen(), FramePrompt(), None)

    @locked
    def clear(self) -> None:
        """Remove the prompt and the mask of the selected object in this frame."""
        own = self._chosen()
        if self.frame not in own.masks:
            return
        with self._editing(own):
            own.prompts.pop(self.frame, None)
            own.masks.pop(self.frame, None)  # another tab may have been faster
            if not own.masks:
                self._opened().masklets.put({own.id: None})
        if own.id not in self._opened().masklets.objects:
            self.selected = None

    def _object_at(self, click: Click) -> int | None:
        """Return the object with the smallest mask at a click in this frame, or None."""
        video = self._opened()
        with video.masklets.lock:
            masks = [(own.id, own.masks.get(self.frame)) for own in video.masklets.objects.values()]
        hits: dict[int, int] = {}
        for number, mask in masks:
            decoded = None if mask is None else mask.decoded(video.size)
            if decoded is not None and decoded[round(click.y), round(click.x)]:
                hits[number] = int(decoded.sum())
        return min(hits, key=lambda number: hits[number], default=None)

    def _begun(self) -> VideoObject:
        """Return the selected object, or another that is not kept yet and has no id."""
        objects = self._opened().masklets.objects
        if self.selected in objects:
            return self._chosen()
        if len(objects) >= MAX_OBJECTS:
            raise ValueError(f"{MAX_OBJECTS} objects are enough for a video.")
        return VideoObject(0, self.name or UNNAMED)

    def _chosen(self) -> VideoObject:
        if self.selected is not None:
            self._interrupt(self.selected)
        own = self._opened().masklets.objects.get(self.selected or 0)
        if own is None:
            raise ValueError("Select an object first.")
        return own

    def _set(
        self,
        own: VideoObject,
        prompt: FramePrompt,
        mask: Mask | None,
        continued: FramePrompt | None = None,
    ) -> None:
        """Write a prompt of this frame and its mask; `continued`: the prompt that it adds to."""
        masklets = self._opened().masklets
        with masklets.lock:
            is_new = not own.id
            own.id = own.id or masklets.new_id()
            with self._editing(own, is_new):
                if is_new:
                    masklets.put({own.id: own})
                if continued not in (None, own.prompts.get(self.frame, FramePrompt())):
                    raise ValueError(_CHANGED)
                own.prompts[self.frame] = prompt
                own.masks[self.frame] = mask
        self.selected, self._begins = own.id, False

    # Objects -----------------------------------------------------------------------------------

    @locked
    def set_name(self, name: str) -> None:
        """Name objects that are begun."""
        self.name = " ".join(name.split())[:MAX_NAME]

    @locked
    def names(self) -> list[str]:
        """Return the names to offer; new ones are added at the end, as long as the tab is open."""
        offered = self._offered.setdefault(self.library.out, {})
        used = [] if self.video is None else self.video.masklets.all_names()
        offered.update(dict.fromkeys(name for name in used if name != UNNAMED))
        return list(offered)

    @locked
    def name_selected(self) -> str:
        """Give the selected object the present name if it has none of its own; can be undone.

        An object that is being tracked gets it when the pass has ended.

        Returns:
            What people are told, or "".
        """
        if self.video is None:
            return ""
        masklets = self.video.masklets
        with masklets.lock:
            own = masklets.objects.get(self.selected or 0)
            if own is None or self.name in ("", own.name):
                return ""
            if own.name != UNNAMED:
                return (
                    f'{own.name} {own.id} keeps its name: the pencil renames it. "{self.name}" is '
                    "for objects that are begun."
                )
            if own.id in self._tracked:
                self._waiting[own.id] = self.name
                return f'{own.name} {own.id} becomes "{self.name}" when tracking has ended.'
            self._name(own, self.name)
        return f'{UNNAMED} {own.id} is "{self.name}" now.'

    def _name(self, own: VideoObject, name: str) -> None:
        with self._editing(own):
            own.name = name

    @locked
    def select(self, number: int | None) -> None:
        """Select the object that clicks are for; None: the next click begins another."""
        self.selected, self._begins = number, number is None

    @locked
    def select_beside(self, step: int) -> None:
        """Select another object, `step` further."""
        ids = list(self._opened().masklets.objects)
        if ids:
            at = ids.index(self.selected) + step if self.selected in ids else min(step, 0)
            self.selected = ids[at % len(ids)]

    @locked
    def rename(self, number: int) -> None:
        """Give an object the present name.

        Raises:
            ValueError: there is no name, or the object is gone.
        """
        if not self.name:
            raise ValueError("Name the object first.")
        self._name(self._object(number), self.name)

    @locked
    def remove(self, number: int) -> None:
        """Remove an object from all frames."""
        with self._editing(self._object(number)):
            self._opened().masklets.put({number: None})
        if self.selected == number:
            self.selected = None

    def _object(self, number: int) -> VideoObject:
        self._interrupt(number)
        own = self._opened().masklets.objects.get(number)
        if own is None:
            raise ValueError("Somebody else has removed this object.")
        return own

    # Changes -----------------------------------------------------------------------------------

    @contextmanager
    def _editing(self, own: VideoObject, is_new: bool = False) -> Iterator[None]:
        """Write a change of an object, which no pass of this tab tracks, and note how to undo it.

        Raises:
            ValueError: another tab has removed or replaced the object since it was looked up.
        """
        masklets = self._opened().masklets
        with masklets.lock:
            if not is_new and masklets.objects.get(own.id) is not own:
                raise ValueError(_CHANGED)
            before = masklets.copies([own.id])
            with masklets.changing(own.id, frame=self.frame):
                yield
            after = masklets.versions([own.id])
            self._history.append(_Change(before, after, self.frame, self._begins))

    @locked
    def undo(self) -> str:
        """Undo the last change of this tab: of a prompt, an object, or a whole pass.

        Returns:
            What people are told, or "".

        Raises:
            ValueError: somebody else has changed the objects since.
            OSError: it could not be written.
        """
        masklets = self._opened().masklets
        for number in self._tracked:
            self._interrupt(number)
        if not self._history:
            return "Nothing to undo in this video."
        change = self._history[-1]
        with masklets.lock:
            if masklets.versions(change.after) != change.after:
                self._history.clear()
                raise ValueError("Somebody else has changed this object since: nothing is undone.")
            with masklets.changing(*change.before, frame=change.frame, is_new=False):
                masklets.put(change.before)
        self._history.pop()
        if self.selected is not None and self.selected not in masklets.objects:
            self.selected, self._begins = None, change.begins
        self.frame = change.frame
        return ""

    # Passes ------------------------------------------------------------------------------------

    @locked
    def propagate(self, reverse: bool, only_selected: bool = False) -> None:
        """Begin to track objects from this frame to an end of the video, in the background.

        Args:
            reverse: to the beginning of the video.
            only_selected: track the selected object only, otherwise all.

        Raises:
            ValueError: another job is running, or there is nothing to track.
            OSError: the video cannot be read.
        """
        video = self._opened()
        self.check_idle()
        masklets = video.masklets
        chosen = [self._chosen().id] if only_selected else list(masklets.objects)
        end = 0 if reverse else len(video) - 1
        with masklets.lock:
            before = {number: own for number, own in masklets.copies(chosen).items() if own}
        begin = {number: start_of(own, self.frame, reverse) for number, own in before.items()}
        starts = {k: frame for k, frame in begin.items() if frame not in (None, end)}
        if not before:
            raise ValueError("Nothing to track: click an object first.")
        if not starts:
            side = "first" if reverse else "last"
            raise ValueError(
                f"Nothing to track: this is the {side} frame."
                if self.frame == end
                else f"Nothing to track from here to the {side} frame: click an object here first."
            )
        source = self.library.read(video.file)
        first = (max if reverse else min)(starts.values())
        work = self._pass(source, masklets, {k: before[k] for k in starts}, starts, reverse)
        self._tracked = tuple(starts)
        label = "Tracking backwards" if reverse else "Tracking"
        self.job = Job(label, stepwise(work), abs(end - first) + 1)

    def _pass(
        self,
        source: FrameSource,
        masklets: Masklets,
        before: Mapping[int, VideoObject],
        starts: Mapping[int, int],
        reverse: bool,
    ) -> Generator[int, None, None]:
        """Track objects; what others have changed meanwhile stays when the pass is undone."""
        versions = {number: own.version for number, own in before.items()}
        try:
            tracker = self.models.tracker()
            ids = list(before)
            yield from propagate(tracker, source, masklets, ids, starts, versions, reverse)
        finally:
            with masklets.lock:
                waiting, self._waiting, self._tracked = self._waiting, {}, ()
                now = masklets.versions(versions)
                after = {
                    number: version
                    for number, version in versions.items()
                    if now[number] == version != before[number].version
                }
                if after:
                    self._history.append(_Change({k: before[k] for k in after}, after, self.frame))
                try:
                    masklets.flush()
                except OSError as error:
                    raise OSError(
                        f"{error}. The masks are kept, and the next change writes them."
                    ) from error
                for number, name in waiting.items():
                    named = masklets.objects.get(number)
                    if named is not None and named.name == UNNAMED:
                        self._name(named, name)

    def _interrupt(self, number: int) -> None:
        """Stop a pass that tracks an object which is about to be edited."""
        if number in self._tracked and self.job is not None and self.job.is_running:
            self.stop(wait=True)

    def stop(self, *, wait: bool = False) -> None:
        """Stop the job after the present frame; what it has found is kept."""
        job = self.job
        if job is not None:
            job.stop()
            if wait:
                job.wait()

    @property
    def is_busy(self) -> bool:
        """Whether a job is running."""
        return self.job is not None and self.job.is_running

    def check_idle(self) -> None:
        """Raise `ValueError` if a job is running."""
        if self.is_busy:
            assert self.job is not None
            raise ValueError(f"{self.job.label}: wait for it, or stop it (Esc).")

    @locked
    def finish(self, *, copy_frames: bool = True) -> Job | None:
        """Write that the video is done; returns the job that adds it to the dataset.

        Args:
            copy_frames: copy its frames into the dataset; else it is left out, without a job.

        Raises:
            ValueError: a job is running.
            OSError: the file could not be written.
        """
        video = self._opened()
        self.check_idle()
        video.masklets.set_done()
        return self.library.copy_frames(video.file) if copy_frames else None

    # Views -------------------------------------------------------------------------------------

    def scene(self) -> dict[str, Any]:
        """Return the frame as the page draws it; positions are fractions of the frame."""
        video, frame = self.video, self.frame
        if video is None:
            return {"src": "", "file": "", "objects": [], "marks": [], "box": None, "path": ""}
        height, width = video.size
        with video.masklets.lock:
            masks = {own.id: own.masks.get(frame) for own in video.masklets.objects.values()}
            own = video.masklets.objects.get(self.selected or 0)
            prompt = own.prompts.get(frame, FramePrompt()) if own else FramePrompt()
        paths = {
            number: outline(mask.decoded(video.size))
            for number, mask in masks.items()
            if mask is not None
        }

        def fraction(x: float, y: float) -> list[float]:
            return [(x + 0.5) / width, (y + 0.5) / height]

        marks = [
            {"at": fraction(c.x, c.y), "positive": c.positive, "agent": False}
            for c in prompt.clicks
        ]
        box = prompt.box
        chosen = masks.get(self.selected or 0)
        return {
            "frame": frame,
            "src": f"/frame/{video.key}/{frame}",
            "file": video.file,
            **measures(video.size),
            "path": paths.pop(self.selected, "") if self.selected is not None else "",
            "objects": [{"id": number, "path": path} for number, path in paths.items()],
            "marks": marks,
            "box": None if box is None else [*fraction(*box[:2]), *fraction(*box[2:])],
            "iou": None if chosen is None else chosen.iou,
        }

    def objects(self) -> list[dict[str, Any]]:
        """Return the objects as lists and timelines show them: id, name, score, ranges, prompts.

        Ranges [first, last] are of the frames in which an object is seen.
        """
        if self.video is None:
            return []
        with self.video.masklets.lock:
            return [
                {
                    "id": own.id,
                    "name": own.name,
                    "score": own.score if any(own.masks.values()) else None,
                    "ranges": ranges([k for k, mask in own.masks.items() if mask]),
                    "absent": ranges([k for k, mask in own.masks.items() if mask is None]),
                    "prompts": sorted(own.prompts),
                }
                for own in self.video.masklets.objects.values()
            ]
