"""The page of the app: what images and videos have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from nicegui import Client, ui

from agents.annotation.interactive.image_panel import ImagePanel
from agents.annotation.interactive.library import VideoLibrary
from agents.annotation.interactive.panel import Panel
from agents.annotation.interactive.queue import Queue
from agents.annotation.interactive.video_panel import VideoPanel
from agents.annotation.interactive.widgets import Canvas, icon_button, in_thread, text_button
from agents.annotation.interactive.workspaces import Workspace, Workspaces
from agents.annotation.video_frames import VIDEO_SUFFIXES
from sam_gym.utils.text import printable

_CSS = Path(__file__).with_name("page.css")
#: Names offered as buttons.
_OFFERED = 20
#: Keys that images and videos have in common.
KEYS = {
    "click, right click": "positive, negative click (M switches)",
    "drag": "box",
    "wheel, pinch, + and -": "zoom",
    "0": "whole image",
    "Space or middle button, drag": "move the zoomed image",
    "arrows (Shift: further)": "move the crosshair",
    "Space, X at the crosshair": "positive, negative click",
    "B at the crosshair, twice": "corners of a box",
    "T, 1 to 9": "type the name, take an offered name",
    "D": "done with the file, open the next",
    "PageDown, PageUp": "next, previous file",
    "?": "this list",
}


class Page:
    """One tab's page.

    Args:
        client: the tab.
        workspaces: of all tabs.
        workspace: of this tab.
    """

    def __init__(self, client: Client, workspaces: Workspaces, workspace: Workspace) -> None:
        self.client, self.workspaces, self.workspace = client, workspaces, workspace
        self.images, self.videos = ImagePanel(self), VideoPanel(self)
        self._turn = asyncio.Lock()
        self._opening = False
        self.actions: dict[str, Callable[[], Awaitable[Any]]] = {
            "m": self.switch_polarity,
            "d": self.done,
            "pagedown": lambda: self.go(1),
            "pageup": lambda: self.go(-1),
            "?": self.help,
        }
        self._build()
        client.on_disconnect(lambda: self.panel.pause())

    @property
    def panel(self) -> Panel:
        """The part for the kind of file that is worked on."""
        return self.videos if isinstance(self.workspace.queue, VideoLibrary) else self.images

    # Layout ------------------------------------------------------------------------------------

    def _build(self) -> None:
        with ui.element("div").classes("sg-app"):
            with ui.element("div").classes("sg-bar"):
                self._build_bar()
            with ui.element("div").classes("sg-main"):
                with ui.element("div").classes("sg-view"):
                    with ui.element("div").classes("sg-image"):
                        self.canvas = Canvas().classes("sg-canvas")
                    self.canvas.on("press", self._on_press)
                    self.canvas.on("box", self._on_box)
                    self.canvas.on("key", self._on_key)
                    self.videos.build_transport()
                with ui.element("div").classes("sg-panel"):
                    self._build_object()
                    self.images.build()
                    self.videos.build()
        self.upload = ui.upload(
            on_upload=self._on_upload,
            on_rejected=lambda: self.tell("Too large, or no image or video (--max-upload-mib)."),
            multiple=True,
            auto_upload=True,
            max_file_size=self.workspaces.max_upload,
        )
        kinds = ",".join(["image/*", ".tif", ".tiff", *sorted(VIDEO_SUFFIXES)])
        self.upload.props(f'accept="{kinds}"').style("display: none")
        self.canvas.show(uploader=self.upload.id)
        with ui.dialog() as self.keys, ui.card():
            self.key_list = ui.column().classes("gap-1")

    def _build_bar(self) -> None:
        icon_button("chevron_left", "Previous file (PageUp)", lambda: self.go(-1))
        self.position = ui.number(min=1, format="%d").props("dense borderless")
        self.position.classes("w-12").style("width: 52px")
        self.position.props('aria-label="Number of the file"')
        self.position.on("keydown.enter", self.jump)
        self.total = ui.label()
        icon_button("chevron_right", "Next file (PageDown)", lambda: self.go(1))
        self.file = ui.label().classes("sg-file")
        self.progress = ui.label().classes("sg-wide sg-note")
        with ui.button(icon="folder_open").props("flat dense no-caps") as self.source, ui.menu():
            self.sources = ui.element("div")
        self.source.classes("sg-source").tooltip("Images, videos, uploads")
        text_button("Done", "check", "Done with this file (D)", self.done)
        icon_button("upload_file", "Upload images or videos", self.choose_files)
        icon_button("download", "Download the COCO JSON", self.export)
        icon_button("help_outline", "Keys (?)", self.help).classes("sg-wide")

    def _build_object(self) -> None:
        self.status = ui.label().classes("sg-note sg-status").props("role=status aria-live=polite")
        self.name = ui.input("Name of the object", on_change=self._on_name).props("dense outlined")
        self.name.props("maxlength=100 clearable").classes("sg-name")
        self.name.on("blur", self.name_given)  # also after Enter, see canvas.js
        self.offered = ui.element("div").classes("sg-row")
        with ui.element("div").classes("sg-row"):
            self.polarity = ui.toggle(
                {False: "+ positive", True: "- negative"}, value=False, on_change=self._on_polarity
            ).props("dense no-caps")
            self.score = ui.label().classes("sg-score").props("data-testid=score")
            self.score.tooltip(
                "IoU that SAM predicts for this mask; after the agent's clicks, the probability "
                "that the image shows the named object at all"
            )

    # Work --------------------------------------------------------------------------------------

    def tell(self, text: str) -> None:
        """Tell the person something."""
        text = printable(text)  # names of files that are no UTF-8 cannot be sent
        self.status.set_text(text)
        ui.notify(text, position="top", multi_line=True, timeout=4000)

    async def do(self, work: Callable[..., Any], *args: Any) -> tuple[bool, Any]:
        """Run an action of a session in a thread, in the order in which they were asked for.

        Returns:
            Whether it worked, and its result; the person is told why not.
        """
        async with self._turn:
            try:
                self.workspaces.use(self.workspace)
                result = await in_thread(work, *args)
            except (ValueError, OSError, MemoryError) as error:
                self.tell(str(error))
                return False, None
        self.status.set_text("")
        return True, result

    async def begin(self) -> None:
        """Open the first file, or go on where the tab was."""
        queue = self.workspace.queue
        if self.workspace.file is None and queue.files:
            await self._show(queue)
        else:
            await self._show_all()

    async def _open(self, queue: Queue, index: int | None = None) -> None:
        if reason := self.panel.unfinished():
            self.tell(reason)
            return
        self.panel.pause()
        await self._show(queue, index)

    async def _show(self, queue: Queue, index: int | None = None) -> None:
        self.status.set_text("Opening ...")
        _, reasons = await self.do(self.workspace.show, queue, index)
        await self._show_all()
        for reason in reasons or []:
            self.tell(reason)

    async def go(self, step: int) -> None:
        """Open the next file in the direction of `step`, 1 or -1."""
        queue = self.workspace.queue
        index = queue.beside(self.workspace.index, step)
        if index is not None:
            await self._open(queue, index)
        elif self.panel.has_image:
            self.tell(f"This is the {'last' if step > 0 else 'first'} file that can be opened.")

    async def jump(self) -> None:
        """Open the file whose number was typed."""
        queue, number = self.workspace.queue, self.position.value
        if number and 1 <= number <= len(queue.files):
            await self._open(queue, int(number) - 1)
        elif queue.files:
            await self.show_queue()
            self.tell(f"The files are numbered from 1 to {len(queue.files)}.")

    async def done(self) -> None:
        """Mark the file as finished and open the next that is not."""
        if not self.panel.has_image:
            return
        if reason := self.panel.unfinished():
            self.tell(reason)
            return
        queue = self.workspace.queue
        if not await self.panel.finish_file():
            return
        if not await in_thread(lambda: queue.is_finished):
            await self._open(queue)
        # The files that were left may have turned out to be broken.
        if await in_thread(lambda: queue.is_finished):
            await self.show_queue()
            broken = await in_thread(queue.count_broken)
            self.tell(
                f"All readable files are done ({broken} could not be read)."
                if broken
                else "All files are done."
            )

    def choose_files(self) -> None:
        """Ask the browser for files."""
        self.upload.run_method("pickFiles")

    async def _on_upload(self, event: Any) -> None:
        """Keep a file; open it unless another of the same selection is being opened."""
        data, name = await event.file.read(), event.file.name
        self.upload.run_method("removeUploadedFiles")
        worked, kept = await self.do(self.workspaces.upload, self.workspace, name, data)
        if worked and not (self._opening or self.panel.unfinished()):
            self._opening = True
            await self._open(*kept)
            self._opening = False
        elif worked:
            self.status.set_text(f"{name} is in the uploads.")
            await self.show_queue()

    def export(self) -> None:
        """Download the COCO file."""
        if self.panel.has_image:
            text, name = self.panel.export()
            ui.download.content(text.encode(errors="backslashreplace"), name)

    async def help(self) -> None:
        """Show the keys."""
        self.key_list.clear()
        with self.key_list:
            for key, meaning in {**KEYS, **self.panel.keys}.items():
                with ui.row().classes("no-wrap"):
                    ui.label(key).style("width: 190px; font-weight: 600")
                    ui.label(meaning)
        self.keys.open()

    # Events ------------------------------------------------------------------------------------

    def _has_image(self) -> bool:
        if not self.panel.has_image:
            self.tell("Nothing is open: reload the page.")
        return self.panel.has_image

    async def _on_press(self, event: Any) -> None:
        if self._has_image():
            await self.panel.press(event.args["at"], bool(event.args["positive"]))

    async def _on_box(self, event: Any) -> None:
        if self._has_image():
            await self.panel.box(event.args["box"])

    async def _on_key(self, event: Any) -> None:
        key = event.args["key"]
        action = self.actions.get(key) or self.panel.actions.get(key)
        if key.isdigit():
            await self._take(int(key) - 1)
        elif action is not None and (not event.args["repeat"] or key in self.panel.repeated):
            await action()

    async def switch_polarity(self) -> None:
        """Switch what a click means."""
        self.polarity.set_value(not self.polarity.value)

    def _on_polarity(self, event: Any) -> None:
        self.canvas.show(negative=bool(event.value))

    # Names -------------------------------------------------------------------------------------

    async def _on_name(self, event: Any) -> None:
        await self.panel.set_name(event.value or "")

    async def name_given(self) -> None:
        """Apply the name that has been typed or chosen."""
        if self.panel.has_image:
            await self.panel.name_given()

    def offer(self) -> None:
        """Show names as buttons."""
        names = self.panel.names()
        self.name.set_autocomplete(names)
        self.offered.clear()
        with self.offered:
            for number, name in enumerate(names[:_OFFERED]):
                chip = ui.button(name, on_click=partial(self._take, number))
                chip.props("dense outline no-caps").classes("sg-chip")
                if number < 9:
                    chip.tooltip(f"Key {number + 1}")

    async def _take(self, number: int) -> None:
        names = self.panel.names()
        if number < len(names):
            self.name.set_value(names[number])
            await self.panel.set_name(names[number])
            await self.name_given()

    # Views -------------------------------------------------------------------------------------

    async def _show_all(self) -> None:
        for panel in (self.images, self.videos):
            panel.set_visibility(panel is self.panel)
        self.canvas.show(
            heat="", suggestions=[], objects=[], marks=[], box=None, path="", selected=-1
        )
        await self.show_queue()
        self.name.set_value(self.panel.name)
        self.offer()
        await self.panel.show()

    async def show_queue(self) -> None:
        """Show which file is open, and how many are done."""
        queue, file = self.workspace.queue, self.workspace.file
        done = await in_thread(queue.count_done)
        self.position.set_value(self.workspace.index + 1 if queue.files else None)
        self.total.set_text(f"/ {len(queue.files)}")
        self.file.set_text("" if file is None else printable(file))
        broken = await in_thread(queue.count_broken)
        self.progress.set_text(f"{done} done" + (f", {broken} unreadable" if broken else ""))
        queues = self.workspace.queues()
        self.source.set_text(next((name for name, own in queues.items() if own is queue), ""))
        self.source.set_visibility(len(queues) > 1)
        self.sources.clear()
        with self.sources:
            for name, own in queues.items():
                ui.menu_item(f"{name}: {len(own.files)}", lambda own=own: self._open(own))


def add_page(workspaces: Workspaces) -> None:
    """Register the page at "/"."""

    @ui.page("/", title="sam-gym", dark=True, response_timeout=60)
    async def index(client: Client) -> None:
        ui.add_css(_CSS)
        await client.connected()
        assert client.tab_id is not None
        workspace = await in_thread(workspaces.get, client.tab_id)
        await Page(client, workspaces, workspace).begin()
