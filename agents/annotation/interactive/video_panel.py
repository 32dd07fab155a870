"""The part of the page for videos: frames, objects, passes of the tracker."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from nicegui import ui

from agents.annotation.interactive.panel import Panel, pixel
from agents.annotation.interactive.widgets import (
    Timeline,
    css_colour,
    icon_button,
    in_thread,
    text_button,
)
from sam_gym.utils.text import counted, printable

if TYPE_CHECKING:
    from agents.annotation.interactive.page import Page

#: Seconds between two looks at a pass of the tracker.
_POLL = 0.3
#: Seconds to wait until a browser shows a frame.
_PATIENCE = 30.0
#: Frames of a long step.
_LONG = 10


class VideoPanel(Panel):
    """Annotates videos; see `Panel`."""

    keys: ClassVar = {
        ". and ,": "next, previous frame",
        "> and <": f"{_LONG} frames on, back",
        "Home, End": "first, last frame",
        "P": "play, pause",
        "F, V, Esc": "track forwards, backwards, stop",
        "Enter": "begin another object",
        "J, K": "select the next, previous object",
        "Z": "undo",
        "R": "clear the object in this frame",
        "O": "the object is not in sight in this frame",
        "Delete": "remove the selected object",
    }
    repeated: ClassVar = frozenset({".", ",", ">", "<"})

    def __init__(self, page: Page) -> None:
        super().__init__(page)
        self.session = page.workspace.videos
        self.playing = False
        self._wanted: int | None = None
        self._showing = False
        self._watched: Any = None
        self._listed: Any = None
        self._labels: dict[int, ui.button] = {}
        self.actions = {
            ".": lambda: self.step(1),
            ",": lambda: self.step(-1),
            ">": lambda: self.step(_LONG),
            "<": lambda: self.step(-_LONG),
            "home": lambda: self.go_to(0),
            "end": lambda: self.go_to(self._count - 1),
            "p": self.play,
            "f": lambda: self.track(False),
            "v": lambda: self.track(True),
            "escape": self.stop,
            "enter": self.begin_object,
            "j": lambda: self._change(self.session.select_beside, 1),
            "k": lambda: self._change(self.session.select_beside, -1),
            "z": self.undo,
            "r": lambda: self._change(self.session.clear),
            "o": lambda: self._change(self.session.hide),
            "delete": self.remove,
        }

    # Layout ------------------------------------------------------------------------------------

    def build_transport(self) -> None:
        """Add what moves through the frames, below the image."""
        with ui.element("div").classes("sg-transport") as self.transport:
            with ui.element("div").classes("sg-frames"):
                self.player = icon_button("play_arrow", "Play, pause (P)", self.play)
                icon_button("navigate_before", "Previous frame (,)", lambda: self.step(-1))
                icon_button("navigate_next", "Next frame (.)", lambda: self.step(1))
                with ui.element("div").classes("sg-track"):
                    self.slider = ui.slider(min=1, max=1, value=1).props('aria-label="Frame"')
                    self.timeline = Timeline()
                self.number = ui.label().classes("sg-number").props("data-testid=frame")
        self.slider.on(
            "update:model-value", lambda event: self.go_to(int(event.args) - 1), throttle=0.05
        )
        self.timeline.on("seek", lambda event: self.go_to(int(event.args["frame"])))

    def build(self) -> None:
        with ui.element("div").classes("sg-part") as self.element:
            with ui.element("div").classes("sg-row"):
                text_button("Undo", "undo", "Undo (Z)", self.undo)
                text_button("New object", "add", "Begin another (Enter)", self.begin_object)
            with ui.element("div").classes("sg-row"):
                clear, hide = self.actions["r"], self.actions["o"]
                text_button("Clear", "backspace", "Clear in this frame (R)", clear, "flat")
                text_button("Not in sight", "visibility_off", "In this frame (O)", hide, "flat")
            with ui.element("div").classes("sg-group"):
                ui.label("Track from this frame").classes("sg-title")
                self.scope = ui.toggle({False: "All objects", True: "Selected"}, value=False).props(
                    "dense no-caps"
                )
                with ui.element("div").classes("sg-row"):
                    text_button(
                        "Backwards", "fast_rewind", "To the beginning (V)", self.actions["v"]
                    )
                    text_button("Forwards", "fast_forward", "To the end (F)", self.actions["f"])
                    self.stopper = text_button("Stop", "stop", "Esc", self.stop, "color=negative")
                self.bar = ui.linear_progress(value=0, show_value=False)
                self.bar.props('instant-feedback aria-label="Progress"')
                self.told = ui.label().classes("sg-note").props("data-testid=progress")
            with ui.element("div").classes("sg-group"):
                self.total = ui.label().classes("sg-title")
                self.objects = ui.element("div").classes("sg-list")
        self.stopper.set_visibility(False)
        self.bar.set_visibility(False)
        self.timer = ui.timer(_POLL, self._poll, active=False)

    def set_visibility(self, visible: bool) -> None:
        self.element.set_visibility(visible)
        self.transport.set_visibility(visible)
        if not visible:
            self.timer.deactivate()

    # Of the page -------------------------------------------------------------------------------

    @property
    def _count(self) -> int:
        return 0 if self.session.video is None else len(self.session.video)

    @property
    def has_image(self) -> bool:
        return self.session.video is not None

    def unfinished(self) -> str | None:
        job = self.session.job
        is_busy = job is not None and job.is_running
        return f"{job.label}: wait for it, or stop it (Esc)." if job and is_busy else None

    def pause(self) -> None:
        self.playing = False

    async def finish_file(self) -> bool:
        copy_frames = self.page.workspaces.copy_frames
        worked, _ = await self.page.do(lambda: self.session.finish(copy_frames=copy_frames))
        return worked

    def export(self) -> tuple[str, str]:
        assert self.session.video is not None
        masklets = self.session.video.masklets
        return masklets.text(), f"{printable(masklets.name)}.json"

    @property
    def name(self) -> str:
        return self.session.name

    def names(self) -> list[str]:
        return self.session.names()

    async def set_name(self, name: str) -> None:
        await self.page.do(self.session.set_name, name)

    async def name_given(self) -> None:
        await self._change(self.session.name_selected)

    async def show(self) -> None:
        if self.session.video is None:
            self.page.canvas.show(src="")
            self.page.status.set_text(self.page.status.text or "Upload a video to begin.")
        else:
            self.slider.props(f"max={self._count}")
            self.timeline.show(count=self._count)
            self.timer.activate()
        await self._show_objects()
        await self._show_frame()

    # Frames ------------------------------------------------------------------------------------

    async def step(self, by: int) -> None:
        """Show the frame `by` frames further."""
        self.playing = False
        at = self.session.frame if self._wanted is None else self._wanted
        await self.go_to(at + by)

    async def go_to(self, frame: int) -> None:
        """Show a frame; of several that are asked for meanwhile, the last."""
        if self.session.video is None:
            return
        self._wanted = min(max(frame, 0), self._count - 1)
        if self._showing:
            return
        self._showing = True
        try:
            while self._wanted is not None:
                if self._wanted != self.session.frame:
                    await in_thread(self.session.show, self._wanted)
                    await self._show_frame(wait=True)
                if self._wanted == self.session.frame:
                    self._wanted = None
        except TimeoutError:  # the browser is away
            self.playing, self._wanted = False, None
        finally:
            self._showing = False

    async def play(self) -> None:
        """Play from this frame on, or pause; at the end, from the beginning."""
        video = self.session.video
        if self.playing or video is None:
            self.playing = False
            return
        self.playing = True
        self.player.props("icon=pause")
        try:
            if self.session.frame == self._count - 1:
                await self.go_to(0)
            while self.playing and self.session.frame < self._count - 1:
                began = time.monotonic()
                await self.go_to(self.session.frame + 1)
                await asyncio.sleep(max(0.01, 1 / video.rate - (time.monotonic() - began)))
        finally:
            self.playing = False
            self.player.props("icon=play_arrow")

    # Objects -----------------------------------------------------------------------------------

    async def press(self, at: list[float], positive: bool) -> None:
        assert self.session.video is not None
        x, y = pixel(at, self.session.video.size)
        await self._change(self.session.click, x, y, positive)

    async def box(self, corners: list[float]) -> None:
        assert self.session.video is not None
        size = self.session.video.size
        await self._change(
            self.session.draw_box, *pixel(corners[:2], size), *pixel(corners[2:], size)
        )

    async def _change(self, work: Any, *args: Any) -> None:
        """Change objects, draw them, and tell what the work returns, if anything."""
        self.playing = False
        before = self.session.frame
        worked, told = await self.page.do(work, *args)
        if worked and told:
            self.page.status.set_text(printable(told))
        await self._show_objects()
        if self.session.frame != before:
            self._wanted = None
        await self._show_frame()

    async def undo(self) -> None:
        """Undo the last change."""
        await self._change(self.session.undo)

    async def begin_object(self) -> None:
        """Let the next click begin another object, wherever it is."""
        await self._change(self.session.select, None)
        self.page.status.set_text("The next click begins another object.")

    async def remove(self) -> None:
        """Remove the selected object."""
        if self.session.selected is not None:
            await self._change(self.session.remove, self.session.selected)

    async def _rename(self, number: int) -> None:
        await self._change(self.session.rename, number)

    # Passes ------------------------------------------------------------------------------------

    async def track(self, reverse: bool) -> None:
        """Begin to track from this frame on."""
        self.playing = False
        await self.page.do(self.session.propagate, reverse, bool(self.scope.value))
        await self._poll()

    async def stop(self) -> None:
        """Stop the pass, or the film."""
        self.playing = False
        self.session.stop()

    async def _poll(self) -> None:
        """Show how far a job is, and what it has found."""
        job = self.session.job
        is_busy = job is not None and job.is_running
        self.stopper.set_visibility(is_busy)
        if job is not None and (is_busy or self._watched is job):
            self._watched = job if is_busy else None
            await self._show_objects()
            await self._show_frame()
            if not is_busy and job.error:
                self.page.tell(f"{job.label}: {job.error}")
        own = job if is_busy else self.session.library.copying
        self.bar.set_visibility(own is not None)
        self.told.set_text("" if own is None else f"{own.label}: {own.done} / {own.total} frames")
        if own is not None:
            self.bar.set_value(own.done / max(own.total, 1))

    # Views -------------------------------------------------------------------------------------

    async def _show_frame(self, wait: bool = False) -> None:
        scene = await in_thread(self.session.scene)
        for own in scene["objects"]:
            own["colour"] = css_colour(own["id"])
        iou, frame = scene.pop("iou", None), scene.pop("frame", 0)
        self.page.score.set_text("" if iou is None else f"IoU {iou:.2f}")
        self.slider.set_value(frame + 1)
        self.number.set_text(f"{frame + 1} / {self._count}")
        scene["file"] = printable(scene["file"])
        if wait:
            await self.page.canvas.show_frame(scene, _PATIENCE)
        else:
            self.page.canvas.show(**scene)

    async def _show_objects(self) -> None:
        objects = await in_thread(self.session.objects)
        for own in objects:
            own["colour"] = css_colour(own["id"])
        self.timeline.show(rows=objects)
        shape = self.session.selected, [(own["id"], own["name"]) for own in objects]
        if shape != self._listed:  # else what a person is about to press stays
            self._listed = shape
            self.page.offer()
            self.total.set_text(f"Objects: {len(objects)}")
            self.objects.clear()
            with self.objects:
                self._labels = {own["id"]: self._add_object(own) for own in objects}
        for own in objects:
            seen = sum(last - first + 1 for first, last in own["ranges"])
            score = "" if own["score"] is None else f", {own['score']:.2f}"
            self._labels[own["id"]].set_text(
                f"{own['name']} {own['id']}: {counted(seen, 'frame')}{score}"
            )

    def _add_object(self, own: dict[str, Any]) -> ui.button:
        """Add an object to the list; returns its label."""
        number = own["id"]
        is_selected = number == self.session.selected
        with ui.element("div").classes("sg-item" + (" sg-chosen" if is_selected else "")):
            ui.element("div").classes("sg-dot").style(f"background: {own['colour']}")
            label = ui.button("", on_click=lambda: self._change(self.session.select, number))
            label.props("flat dense no-caps align=left").classes("sg-label").tooltip("Select")
            icon_button(
                "drive_file_rename_outline",
                "Give it the name above",
                lambda: self._rename(number),
                "size=sm",
            )
            remove = partial(self._change, self.session.remove, number)
            icon_button("delete", "Remove", remove, "size=sm")
        return label
