"""The page of the app: buttons, keys and lists over a `Session`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from nicegui import Client, run, ui
from nicegui.element import Element

from agents.annotation.interactive.project import ANNOTATIONS, Project
from agents.annotation.interactive.workspaces import Workspace, Workspaces
from sam_gym.utils.render import distinct_colour
from sam_gym.utils.text import printable

T = TypeVar("T")

_CSS = Path(__file__).with_name("page.css")
#: Seconds between the agent's clicks, so that a person can follow and take over.
_PAUSE = 0.25
#: Names offered as buttons.
_OFFERED = 12
KEYS = {
    "click, right click": "positive, negative click (M switches)",
    "drag": "box",
    "arrows (Shift: further)": "move the crosshair",
    "Space, X at the crosshair": "positive, negative click",
    "B at the crosshair, twice": "corners of a box",
    "Z, R": "undo, reset",
    "T, 1 to 9": "type the name, take an offered name",
    "Enter": "save the object, or accept the suggestion",
    "N, F, Esc": "agent's next click, finish, take over",
    "H": "heat map of the agent",
    "E": "suggest everything",
    "J, K, Backspace": "next and previous suggestion, dismiss it",
    "L": "accept all suggestions",
    "Delete": "remove the last object",
    "D": "done with the image, open the next",
    "PageDown or ., PageUp or ,": "next, previous image",
    "?": "this list",
}


class Canvas(Element, component="canvas.js"):
    """The image, and what is drawn over it."""

    def show(self, **patch: Any) -> None:
        """Change some of what is drawn."""
        self.run_method("show", patch)


class Page:
    """One tab's page.

    Args:
        client: the tab.
        workspaces: of all tabs.
        workspace: of this tab.
    """

    def __init__(self, client: Client, workspaces: Workspaces, workspace: Workspace) -> None:
        self.client, self.workspaces, self.workspace = client, workspaces, workspace
        self.session, self.player = workspace.session, workspaces.models.player
        self.playing = False
        self._turn = asyncio.Lock()
        self._opening = False
        self._actions: dict[str, Callable[[], Awaitable[Any]]] = {
            "z": self.undo,
            "r": self.reset,
            "m": self.switch_polarity,
            "t": self.type_name,
            "enter": self.enter,
            "n": self.next_click,
            "f": self.finish,
            "escape": self.take_over,
            "h": self.switch_heat,
            "e": self.suggest,
            "j": lambda: self.select(1),
            "k": lambda: self.select(-1),
            "l": self.accept_all,
            "backspace": self.dismiss,
            "delete": self.remove_last,
            "d": self.done,
            "pagedown": lambda: self.go(1),
            ".": lambda: self.go(1),
            "pageup": lambda: self.go(-1),
            ",": lambda: self.go(-1),
            "?": self.help,
        }
        self._build()
        client.on_disconnect(self._stop)

    def _stop(self) -> None:
        self.playing = False

    # Layout ------------------------------------------------------------------------------------

    def _build(self) -> None:
        with ui.element("div").classes("sg-app"):
            with ui.element("div").classes("sg-bar"):
                self._icon("chevron_left", "Previous image (,)", lambda: self.go(-1))
                self.position = ui.number(min=1, format="%d").props("dense borderless")
                self.position.classes("w-12").style("width: 52px")
                self.position.props('aria-label="Number of the image"')
                self.position.on("keydown.enter", self.jump)
                self.total = ui.label()
                self._icon("chevron_right", "Next image (.)", lambda: self.go(1))
                self.file = ui.label().classes("sg-file")
                self.progress = ui.label().classes("sg-wide sg-note")
                self.source = ui.button(on_click=self.switch_source).props("flat dense no-caps")
                self._button("Done", "check", "Done with this image (D)", self.done)
                self._icon("upload_file", "Upload images", self.choose_files)
                self._icon("download", "Download the COCO JSON", self.export)
                self._icon("help_outline", "Keys (?)", self.help).classes("sg-wide")
            with ui.element("div").classes("sg-main"):
                with ui.element("div").classes("sg-view"):
                    self.canvas = Canvas().classes("sg-canvas")
                    self.canvas.on("press", self._on_press)
                    self.canvas.on("box", self._on_box)
                    self.canvas.on("key", self._on_key)
                with ui.element("div").classes("sg-panel"):
                    self._build_panel()
        self.upload = ui.upload(
            on_upload=self._on_upload,
            on_rejected=lambda: self.tell("Too large, or no image (--max-upload-mib)."),
            multiple=True,
            auto_upload=True,
            max_file_size=self.workspaces.max_upload,
        )
        self.upload.props('accept="image/*,.tif,.tiff"').style("display: none")
        self.canvas.show(uploader=self.upload.id)
        with ui.dialog() as self.keys, ui.card():
            for key, meaning in KEYS.items():
                with ui.row().classes("no-wrap"):
                    ui.label(key).style("width: 190px; font-weight: 600")
                    ui.label(meaning)

    def _build_panel(self) -> None:
        self.status = ui.label().classes("sg-note sg-status").props("role=status aria-live=polite")
        self.name = ui.input("Name of the object", on_change=self._on_name).props("dense outlined")
        self.name.props("maxlength=100 clearable")
        self.offered = ui.element("div").classes("sg-row")
        with ui.element("div").classes("sg-row"):
            self.polarity = ui.toggle(
                {False: "+ positive", True: "- negative"}, value=False, on_change=self._on_polarity
            ).props("dense no-caps")
            self.score = ui.label().classes("sg-score").props("data-testid=score")
        with ui.element("div").classes("sg-row"):
            self._button("Undo", "undo", "Undo (Z)", self.undo)
            self._button("Reset", "restart_alt", "Reset (R)", self.reset)
            self._button("Save", "save", "Save the object (Enter)", self.enter, "color=positive")
        with ui.element("div").classes("sg-group"):
            ui.label("Agent").classes("sg-title")
            if self.player is None:
                ui.label("None: start the app with --policy.").classes("sg-note")
            else:
                with ui.element("div").classes("sg-row"):
                    self._button("Next click", "ads_click", "Next click (N)", self.next_click)
                    self._button("Finish", "smart_toy", "Finish (F)", self.finish)
                    self.over = self._button("Take over", "pan_tool", "Esc", self.take_over)
                    self.over.set_visibility(False)
            self.heat = ui.switch("Heat map", on_change=self._show_current)
            self.heat.props("dense").set_visibility(self.player is not None)
        with ui.element("div").classes("sg-group"):
            ui.label("Everything").classes("sg-title")
            with ui.element("div").classes("sg-row"):
                self.finder = self._button(
                    "Suggest", "auto_awesome", "Suggest everything (E)", self.suggest
                )
                self.suggested = ui.element("div").classes("sg-row")
        with ui.element("div").classes("sg-group"):
            self.count = ui.label().classes("sg-title")
            self.objects = ui.element("div").classes("sg-list")

    def _button(
        self, text: str, icon: str, tip: str, work: Callable[..., Any], props: str = ""
    ) -> ui.button:
        button = ui.button(text, icon=icon, on_click=lambda: work())
        return button.props(f"dense no-caps {props}").tooltip(tip)

    def _icon(self, icon: str, tip: str, work: Callable[..., Any], props: str = "") -> ui.button:
        button = ui.button(icon=icon, on_click=lambda: work()).tooltip(tip)
        return button.props(f'flat dense round aria-label="{tip}" {props}')

    # Work --------------------------------------------------------------------------------------

    def tell(self, text: str) -> None:
        """Tell the person something."""
        text = printable(text)  # names of files that are no UTF-8 cannot be sent
        self.status.set_text(text)
        ui.notify(text, position="top", multi_line=True, timeout=4000)

    async def _do(self, work: Callable[..., Any], *args: Any) -> tuple[bool, Any]:
        """Run an action of the session in a thread, in the order in which they were asked for.

        Returns:
            Whether it worked, and its result; the person is told why not.
        """
        async with self._turn:
            try:
                self.workspaces.use(self.workspace)
                result = await _in_thread(work, *args)
            except (ValueError, OSError, MemoryError) as error:
                self.tell(str(error))
                return False, None
        self.status.set_text("")
        return True, result

    async def begin(self) -> None:
        """Open the first image, or go on where the tab was."""
        project = self.session.project
        if self.session.image is None and project.files:
            self.status.set_text("Encoding the image ...")
            await self._do(self.workspace.show, project)
        await self._show_all()

    async def _open(self, project: Project, index: int | None = None) -> None:
        if self.session.steps:
            self.tell("Save (Enter) or reset (R) the object first.")
            return
        self.playing = False
        self.status.set_text("Encoding the image ...")
        await self._do(self.workspace.show, project, index)
        await self._show_all()

    async def go(self, step: int) -> None:
        """Open the next image in the direction of `step`, 1 or -1."""
        project = self.session.project
        index = project.beside(self.session.index, step)
        if index is not None:
            await self._open(project, index)

    async def jump(self) -> None:
        """Open the image whose number was typed."""
        count = len(self.session.project.files)
        if self.position.value and 1 <= self.position.value <= count:
            await self._open(self.session.project, int(self.position.value) - 1)

    async def done(self) -> None:
        """Mark the image as finished and open the next that is not."""
        if self.session.image is None:
            return
        if self.session.steps:
            self.tell("Save (Enter) or reset (R) the object first.")
            return
        worked, _ = await self._do(self.session.finish_image)
        project = self.session.project
        if worked and project.count_done() < len(project.files):
            await self._open(project)
        elif worked:
            await self._show_queue()
            self.tell("All images are done.")

    async def switch_source(self) -> None:
        """Change between the folder and the uploads."""
        folder, uploads = self.workspace.folder, self.workspace.uploads
        if folder is not None:
            await self._open(uploads if self.session.project is folder else folder)

    def choose_files(self) -> None:
        """Ask the browser for files."""
        self.upload.run_method("pickFiles")

    async def _on_upload(self, event: Any) -> None:
        """Keep an image; open it unless another of the same selection is being opened."""
        data, name = await event.file.read(), event.file.name
        self.upload.run_method("removeUploadedFiles")
        worked, index = await self._do(self.workspaces.upload, self.workspace, name, data)
        if worked and not (self._opening or self.session.steps):
            self._opening = True
            await self._open(self.workspace.uploads, index)
            self._opening = False
        elif worked:
            self.status.set_text(f"{name} is in the uploads.")
            await self._show_queue()

    def export(self) -> None:
        """Download the COCO file."""
        ui.download.content(
            self.session.project.text().encode(errors="backslashreplace"), ANNOTATIONS
        )

    async def help(self) -> None:
        """Show the keys."""
        self.keys.open()

    # The object --------------------------------------------------------------------------------

    def _at(self, fraction: list[float]) -> tuple[float, float]:
        """Return a fraction of the image as (x, y) in its pixels."""
        image = self.session.image
        assert image is not None
        height, width = image.size
        return float(fraction[0]) * width - 0.5, float(fraction[1]) * height - 0.5

    def _has_image(self) -> bool:
        if self.session.image is None:
            self.tell("No image is open: reload the page.")
        return self.session.image is not None

    async def _on_press(self, event: Any) -> None:
        if not self._has_image():
            return
        self.playing = False
        x, y = self._at(event.args["at"])
        positive = bool(event.args["positive"])
        if self.session.suggestions:
            await self._do(self.session.answer, x, y, positive)
            await self._show_objects()
            return
        await self._do(self.session.click, x, y, positive)
        await self._show_current()

    async def _on_box(self, event: Any) -> None:
        if not self._has_image():
            return
        self.playing = False
        x0, y0, x1, y1 = event.args["box"]
        await self._do(self.session.draw_box, *self._at([x0, y0]), *self._at([x1, y1]))
        await self._show_current()

    async def _on_key(self, event: Any) -> None:
        key = event.args["key"]
        if key.isdigit():
            self._take(int(key) - 1)
        elif not event.args["repeat"]:
            await self._actions[key]()

    async def undo(self) -> None:
        """Remove the last click or box."""
        self.playing = False
        await self._do(self.session.undo)
        await self._show_current()

    async def reset(self) -> None:
        """Remove all clicks."""
        self.playing = False
        await self._do(self.session.reset)
        await self._show_current()

    async def enter(self) -> None:
        """Save the object, or accept the selected suggestion."""
        self.playing = False
        session = self.session
        if session.suggestions and not session.steps:
            await self._do(session.accept, session.selected)
        else:
            await self._do(session.save_object)
        await self._show_objects()
        self._offer()
        await self._show_current()

    async def switch_polarity(self) -> None:
        """Switch what a click means."""
        self.polarity.set_value(not self.polarity.value)

    def _on_polarity(self, event: Any) -> None:
        self.canvas.show(negative=bool(event.value))

    # Names -------------------------------------------------------------------------------------

    async def type_name(self) -> None:
        """Put the keyboard into the field of the name."""
        self.name.run_method("focus")

    async def _on_name(self, event: Any) -> None:
        await self._do(self.session.set_name, event.value or "")
        if self.heat.value:
            await self._show_current()

    def _names(self) -> list[str]:
        known = [] if self.player is None or self.player.needs_cue else self.player.known
        return list(dict.fromkeys([*self.session.project.names, *known]))

    def _offer(self) -> None:
        """Show names as buttons."""
        self.name.set_autocomplete(self._names())
        self.offered.clear()
        with self.offered:
            for number, name in enumerate(self._names()[:_OFFERED]):
                chip = ui.button(name, on_click=lambda _, number=number: self._take(number))
                chip.props("dense outline no-caps").classes("sg-chip")
                if number < 9:
                    chip.tooltip(f"Key {number + 1}")

    def _take(self, number: int) -> None:
        names = self._names()
        if number < len(names):
            self.name.set_value(names[number])

    # The agent ---------------------------------------------------------------------------------

    async def next_click(self) -> None:
        """Let the agent click once."""
        self.playing = False
        if self.session.image is not None:
            await self._agent_step()

    async def _agent_step(self) -> bool:
        before = len(self.session.steps)
        worked, goes_on = await self._do(self.session.agent_step)
        await self._show_current()
        if worked and not goes_on:
            same = len(self.session.steps) == before
            self.status.set_text("The agent would stop here." if same else "The agent is done.")
        return bool(worked and goes_on)

    async def finish(self) -> None:
        """Let the agent click until it is done or somebody takes over."""
        if self.session.image is None or self.playing or self.player is None:
            return
        self.playing = True
        self.over.set_visibility(True)
        try:
            while self.playing and await self._agent_step():
                await asyncio.sleep(_PAUSE)
        finally:
            self.playing = False
            self.over.set_visibility(False)

    async def take_over(self) -> None:
        """Stop the agent, or else drop the suggestions."""
        if not self.playing and self.session.suggestions:
            await self._do(self.session.dismiss_all)
            self._show_suggestions()
        self.playing = False

    async def switch_heat(self) -> None:
        """Show or hide the agent's click probabilities."""
        if self.player is not None:
            self.heat.set_value(not self.heat.value)

    # Everything mode ---------------------------------------------------------------------------

    async def suggest(self) -> None:
        """Find the masks of everything; the person may go on meanwhile."""
        if self.session.image is None or not self.finder.enabled:
            return
        self.finder.props("loading").disable()
        self.status.set_text("Looking for everything ...")
        try:
            count = await _in_thread(self.session.suggest)
            least, stable = self.workspaces.models.generator.thresholds
            none = (
                f"No mask has a predicted IoU of {least} and a stability of {stable}: start the "
                "app with lower --pred-iou-thresh and --stability-score-thresh."
            )
            found = f"{count} suggestions: click one to accept it, right-click to dismiss it."
            self.status.set_text(found if count else none)
        except (ValueError, OSError, MemoryError) as error:
            self.tell(str(error))
        finally:
            self.finder.props(remove="loading").enable()
        self._show_suggestions()

    async def select(self, step: int) -> None:
        """Select another suggestion."""
        await self._do(self.session.select, step)
        self.canvas.show(selected=self.session.selected)

    async def accept_all(self) -> None:
        """Save all suggestions."""
        if self.session.suggestions:
            await self._do(self.session.accept_all)
            await self._show_objects()
            self._offer()

    async def dismiss(self) -> None:
        """Drop the selected suggestion."""
        if self.session.suggestions:
            await self._do(self.session.dismiss, self.session.selected)
            self._show_suggestions()

    # Saved objects -----------------------------------------------------------------------------

    async def remove_last(self) -> None:
        """Remove the object that was saved last."""
        if objects := await _in_thread(self.session.objects):
            await self._remove(objects[-1]["id"])

    async def _remove(self, number: int | str) -> None:
        await self._do(self.session.remove_object, number)
        await self._show_objects()

    async def _rename(self, number: int | str) -> None:
        await self._do(self.session.rename_object, number)
        await self._show_objects()
        self._offer()

    # Views -------------------------------------------------------------------------------------

    async def _show_all(self) -> None:
        image = self.session.image
        if image is None:
            self.canvas.show(src="", path="", marks=[], box=None, heat="")
            self.status.set_text(self.status.text or "Upload an image to begin.")
        else:
            height, width = image.size
            src = f"/shown/{image.key}"
            self.canvas.show(src=src, file=printable(image.file), width=width, height=height)
        await self._show_queue()
        await self._show_objects()
        self.name.set_value(self.session.name)
        self._offer()
        await self._show_current()

    async def _show_queue(self) -> None:
        project, image = self.session.project, self.session.image
        done = await _in_thread(project.count_done)
        self.position.set_value(self.session.index + 1 if project.files else None)
        self.total.set_text(f"/ {len(project.files)}")
        self.file.set_text(printable(image.file) if image is not None else "")
        self.progress.set_text(f"{done} done")
        is_folder = project is self.workspace.folder
        self.source.set_text("Uploads" if is_folder else "Folder")
        both = self.workspace.folder is not None and bool(self.workspace.uploads.files)
        self.source.set_visibility(both)

    async def _show_current(self) -> None:
        scene = await _in_thread(self.session.current)
        self.canvas.show(**scene)
        heat = ""
        if self.heat.value and self.session.image is not None:
            try:
                heat = await _in_thread(self.session.heat)
            except ValueError as error:  # while the name is being typed
                self.status.set_text(str(error))
        self.canvas.show(heat=heat)
        iou = self.session.predicted_iou
        self.score.set_text("" if iou is None else f"IoU {iou:.2f}")
        self.score.tooltip("IoU that SAM predicts for this mask")

    async def _show_objects(self) -> None:
        objects = await _in_thread(self.session.objects)
        for own in objects:
            own["colour"] = _css(_number(own["id"]))
        drawn = [{key: own[key] for key in ("id", "path", "colour")} for own in objects]
        self.canvas.show(objects=drawn)
        self.count.set_text(f"Objects: {len(objects)}")
        self.objects.clear()
        with self.objects:
            for own in objects:
                self._show_object(own)
        self._show_suggestions()

    def _show_object(self, own: dict[str, Any]) -> None:
        number, score = own["id"], own["score"]
        with ui.element("div").classes("sg-item"):
            ui.element("div").classes("sg-dot").style(f"background: {own['colour']}")
            text = own["name"] if score is None else f"{own['name']}  {score:.2f}"
            ui.label(text).classes("sg-label")
            name, remove = lambda: self._rename(number), lambda: self._remove(number)
            self._icon("drive_file_rename_outline", "Give it the name above", name, "size=sm")
            self._icon("delete", "Remove", remove, "size=sm")

    def _show_suggestions(self) -> None:
        found, selected = self.session.suggestions, self.session.selected
        drawn = [{"path": own.path, "colour": _css(i)} for i, own in enumerate(found)]
        self.canvas.show(suggestions=drawn, selected=selected)
        self.suggested.clear()
        if not found:
            return
        with self.suggested:
            self._button(f"Accept all {len(found)}", "done_all", "L", self.accept_all)
            self._button("Dismiss", "clear_all", "Esc", self.take_over)


async def _in_thread(function: Callable[..., T], *args: Any) -> T:
    """Call a function in a thread."""
    result: Any = await run.io_bound(function, *args)  # None only while the server shuts down
    return result


def _number(number: int | str) -> int:
    """Return the number of a colour for an id."""
    return number if isinstance(number, int) else len(str(number))


def _css(number: int) -> str:
    return "rgb({}, {}, {})".format(*distinct_colour(number))


def add_page(workspaces: Workspaces) -> None:
    """Register the page at "/"."""

    @ui.page("/", title="sam-gym", dark=True, response_timeout=60)
    async def index(client: Client) -> None:
        ui.add_css(_CSS)
        await client.connected()
        assert client.tab_id is not None
        workspace = await _in_thread(workspaces.get, client.tab_id)
        await Page(client, workspaces, workspace).begin()
