"""The part of the page for images: clicks, the agent, everything mode, saved objects."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, ClassVar

from nicegui import ui

from agents.annotation.interactive.job import Job
from agents.annotation.interactive.panel import Panel, pixel
from agents.annotation.interactive.project import ANNOTATIONS
from agents.annotation.interactive.session import UNFINISHED
from agents.annotation.interactive.widgets import css_colour, icon_button, in_thread, text_button
from sam_gym.utils.text import counted, printable

if TYPE_CHECKING:
    from agents.annotation.interactive.page import Page

#: Seconds between the agent's clicks, so that a person can follow and take over.
_PAUSE = 0.25
#: Seconds between two looks at a search.
_POLL = 0.3


class ImagePanel(Panel):
    """Annotates images; see `Panel`."""

    keys: ClassVar = {
        "Z, R": "undo, reset",
        "Enter": "save the object, or accept the suggestion",
        "J, K": "select the next, previous saved object to correct it",
        "Esc, click in a mask": "select its object to correct it",
        "N, F, Esc": "agent's next click, finish, take over",
        "H": "heat map of the agent",
        "E, Esc": "suggest everything, stop or dismiss",
        "J, K, Backspace": "next and previous suggestion, dismiss it",
        "L": "accept all suggestions",
        "Delete": "remove the selected object, or the last",
        ". and ,": "next, previous image",
    }

    def __init__(self, page: Page) -> None:
        super().__init__(page)
        self.session, self.player = page.workspace.session, page.workspaces.models.player
        self.playing = False
        self._watched: Job | None = None
        self._progress = ""
        self.actions = {
            "z": self.undo,
            "r": self.reset,
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
            ".": lambda: page.go(1),
            ",": lambda: page.go(-1),
        }

    # Layout ------------------------------------------------------------------------------------

    def build(self) -> None:
        with ui.element("div").classes("sg-part") as self.element:
            with ui.element("div").classes("sg-row"):
                text_button("Undo", "undo", "Undo (Z)", self.undo)
                text_button("Reset", "restart_alt", "Reset (R)", self.reset)
                text_button("Save", "save", "Save the object (Enter)", self.enter, "color=positive")
            with ui.element("div").classes("sg-group"):
                self._build_agent()
            with ui.element("div").classes("sg-group"):
                ui.label("Everything").classes("sg-title")
                with ui.element("div").classes("sg-row"):
                    self.finder = text_button(
                        "Suggest", "auto_awesome", "Suggest everything (E)", self.suggest
                    )
                    self.suggested = ui.element("div").classes("sg-row")
            with ui.element("div").classes("sg-group"):
                self.count = ui.label().classes("sg-title")
                self.objects = ui.element("div").classes("sg-list")
        self.timer = ui.timer(_POLL, self._poll, active=False)

    def _build_agent(self) -> None:
        ui.label("Agent").classes("sg-title")
        if self.player is None:
            ui.label("None: start the app with --policy.").classes("sg-note")
        else:
            with ui.element("div").classes("sg-row"):
                text_button("Next click", "ads_click", "Next click (N)", self.next_click)
                text_button("Finish", "smart_toy", "Finish (F)", self.finish)
                self.over = text_button("Take over", "pan_tool", "Esc", self.take_over)
                self.over.set_visibility(False)
            self.hint = ui.label(f"{self.player.known_text()}.").classes("sg-note")
        self.heat = ui.switch("Heat map", on_change=self._show_current)
        self.heat.props("dense").set_visibility(self.player is not None)

    def set_visibility(self, visible: bool) -> None:
        self.element.set_visibility(visible)

    # Of the page -------------------------------------------------------------------------------

    @property
    def has_image(self) -> bool:
        return self.session.image is not None

    def unfinished(self) -> str | None:
        return UNFINISHED if self.session.steps else None

    def pause(self) -> None:
        self.playing = False

    async def finish_file(self) -> bool:
        worked, _ = await self.page.do(self.session.finish_image)
        return worked

    def export(self) -> tuple[str, str]:
        return self.session.project.text(), ANNOTATIONS

    @property
    def name(self) -> str:
        return self.session.name

    def names(self) -> list[str]:
        return self.session.names()

    async def set_name(self, name: str) -> None:
        if name == self.session.name:  # the session has told the page
            return
        await self.page.do(self.session.set_name, name)
        if self.heat.value:
            await self._show_current()

    async def name_given(self) -> None:
        pass  # an object has the name that is typed when it is saved

    async def show(self) -> None:
        self.page.canvas.show(**self.session.picture())
        if self.session.image is None:
            self.page.canvas.show(path="", marks=[], box=None, heat="")
            self.page.status.set_text(self.page.status.text or "Upload an image to begin.")
        await self._show_objects()
        await self._show_current()
        await self._poll()  # a search goes on across a reload

    # The object --------------------------------------------------------------------------------

    async def press(self, at: list[float], positive: bool) -> None:
        self.playing = False
        assert self.session.image is not None
        x, y = pixel(at, self.session.image.size)
        if self.session.suggestions and self.session.correction is None:
            worked, told = await self.page.do(self.session.answer, x, y, positive)
            await self._show_objects()
            self.page.offer()
            if worked and told:
                self.page.tell(told)
            return
        await self._change(self.session.press, x, y, positive)

    async def box(self, corners: list[float]) -> None:
        self.playing = False
        assert self.session.image is not None
        size = self.session.image.size
        await self.page.do(
            self.session.draw_box, *pixel(corners[:2], size), *pixel(corners[2:], size)
        )
        await self._show_current()

    async def _change(self, work: Any, *args: Any, saved: bool = False) -> str:
        """Change the current object and draw it; returns what the work says.

        Args:
            work: of the session.
            *args: its arguments.
            saved: whether it changes saved objects in any case.
        """
        self.playing = False
        before = self.session.correction
        worked, told = await self.page.do(work, *args)
        is_other = told or self.session.correction is not before
        if is_other:
            self.page.name.set_value(self.session.name)
        if is_other or saved:
            await self._show_objects()
        await self._show_current()
        if worked and told:
            self.page.status.set_text(printable(told))
        return told or ""

    async def undo(self) -> None:
        """Remove the last click or box, or undo the last change of saved objects."""
        if told := await self._change(self.session.undo):
            self.page.tell(told)

    async def reset(self) -> None:
        """Remove all clicks."""
        await self._change(self.session.reset)

    async def enter(self) -> None:
        """Save the object, or accept the selected suggestion."""
        session = self.session
        if session.suggestions and not (session.steps or session.correction):
            await self._change(session.accept, session.selected, saved=True)
        else:
            await self._change(session.save_object, saved=True)
        self.page.offer()

    # The agent ---------------------------------------------------------------------------------

    async def next_click(self) -> None:
        """Let the agent click once."""
        self.playing = False
        if self.session.image is not None:
            await self._agent_step()

    async def _agent_step(self) -> bool:
        before = len(self.session.steps)
        worked, goes_on = await self.page.do(self.session.agent_step)
        await self._show_current()
        if worked and not goes_on:
            same = len(self.session.steps) == before
            self.page.status.set_text(
                "The agent would stop here." if same else "The agent is done."
            )
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
        """Stop the agent, or the search, or drop the suggestions, or let the object go."""
        if self.playing:
            self.playing = False
        elif self.session.stop_search():
            self.page.status.set_text("Stopped looking for everything.")
        elif self.session.suggestions:
            await self.page.do(self.session.dismiss_all)
            self._show_suggestions()
        else:
            await self._change(self.session.let_go)

    async def switch_heat(self) -> None:
        """Show or hide the agent's click probabilities."""
        if self.player is not None:
            self.heat.set_value(not self.heat.value)

    # Everything mode ---------------------------------------------------------------------------

    async def suggest(self) -> None:
        """Begin to find the masks of everything; the person may go on meanwhile."""
        if self.session.image is not None:
            worked, job = await self.page.do(self.session.suggest)
            self._watched = job if worked else self._watched
            await self._poll()

    async def _poll(self) -> None:
        """Show how far the search is, and what it has found."""
        job, watched = self.session.search, self._watched
        is_busy = job is not None and job.is_running
        self.timer.active = is_busy
        self.finder.props("loading" if is_busy else None, remove=None if is_busy else "loading")
        self._watched = job if is_busy else None
        if job is not None and is_busy:
            # What else is told stays.
            if self.page.status.text in ("", self._progress):
                self._progress = f"{job.label}: {job.done / job.total:.0%}. Esc stops it."
                self.page.status.set_text(self._progress)
            return
        if watched is None:
            return
        if job is watched:
            self.page.tell(f"{job.label}: {job.error}" if job.error else self._found())
            self._show_suggestions()
        elif self.page.status.text == self._progress:  # it was stopped
            self.page.status.set_text("")

    def _found(self) -> str:
        """Return what a search has found."""
        count, known = len(self.session.suggestions), self.session.known
        saved = f" {known} more cover saved objects." if known else ""
        if count:
            return f"{counted(count, 'suggestion')}: click accepts, right click dismisses.{saved}"
        if known:
            return f"Nothing new: {counted(known, 'mask')} covered by saved objects."
        least, stable = self.page.workspaces.models.generator.thresholds
        return (
            f"No mask has a predicted IoU of {least} and a stability of {stable}: start the "
            "app with lower --pred-iou-thresh and --stability-score-thresh."
        )

    async def select(self, step: int) -> None:
        """Select another suggestion, or without any, another saved object."""
        if self.session.suggestions:
            await self.page.do(self.session.select, step)
            self.page.canvas.show(selected=self.session.selected)
        else:
            await self._change(self.session.correct_beside, step)

    async def accept_all(self) -> None:
        """Save all suggestions."""
        if self.session.suggestions:
            await self.page.do(self.session.accept_all)
            await self._show_objects()
            self.page.offer()

    async def dismiss(self) -> None:
        """Drop the selected suggestion."""
        if self.session.suggestions:
            await self.page.do(self.session.dismiss, self.session.selected)
            self._show_suggestions()

    # Saved objects -----------------------------------------------------------------------------

    async def remove_last(self) -> None:
        """Remove the selected object, or the one that was saved last."""
        if objects := await in_thread(self.session.objects):
            chosen = [own["id"] for own in objects if own["is_current"]] or [objects[-1]["id"]]
            await self._remove(chosen[0])

    async def _remove(self, number: int | str) -> None:
        await self._change(self.session.remove_object, number, saved=True)

    async def _rename(self, number: int | str) -> None:
        await self._change(self.session.rename_object, number, saved=True)
        self.page.offer()

    # Views -------------------------------------------------------------------------------------

    async def _show_current(self) -> None:
        scene = await in_thread(self.session.current)
        self.page.canvas.show(**scene)
        heat = ""
        if self.heat.value and self.session.image is not None:
            try:
                heat = await in_thread(self.session.heat)
            except ValueError as error:  # while the name is being typed
                self.page.status.set_text(str(error))
        self.page.canvas.show(heat=heat)
        iou = self.session.predicted_iou
        presence = await in_thread(self.session.presence)
        text = "" if iou is None else f"IoU {iou:.2f}"
        self.page.score.set_text(text if presence is None else f"{text}, presence {presence:.2f}")

    async def _show_objects(self) -> None:
        objects = await in_thread(self.session.objects)
        for own in objects:
            own["colour"] = css_colour(own["id"])
        others = [own for own in objects if not own["is_current"]]
        drawn = [{key: own[key] for key in ("id", "path", "colour")} for own in others]
        self.page.canvas.show(objects=drawn)
        self.count.set_text(f"Objects: {len(objects)}")
        if self.player is not None:
            self.hint.set_visibility(self.session.knows_no_name())
        self.objects.clear()
        with self.objects:
            for own in objects:
                self._show_object(own)
        self._show_suggestions()

    def _show_object(self, own: dict[str, Any]) -> None:
        number, score = own["id"], own["score"]
        with ui.element("div").classes("sg-item" + (" sg-chosen" if own["is_current"] else "")):
            ui.element("div").classes("sg-dot").style(f"background: {own['colour']}")
            text = own["name"] if score is None else f"{own['name']}  {score:.2f}"
            label = ui.button(text, on_click=lambda: self._change(self.session.correct, number))
            label.props("flat dense no-caps align=left").classes("sg-label").tooltip("Correct it")
            name, remove = lambda: self._rename(number), lambda: self._remove(number)
            icon_button("drive_file_rename_outline", "Give it the name above", name, "size=sm")
            icon_button("delete", "Remove", remove, "size=sm")

    def _show_suggestions(self) -> None:
        found, selected = self.session.suggestions, self.session.selected
        drawn = [{"path": own.path, "colour": css_colour(i)} for i, own in enumerate(found)]
        self.page.canvas.show(suggestions=drawn, selected=selected)
        self.suggested.clear()
        if not found:
            return
        with self.suggested:
            text_button(f"Accept all {len(found)}", "done_all", "L", self.accept_all)
            text_button("Dismiss", "clear_all", "Esc", self.take_over)
