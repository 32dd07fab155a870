"""Elements that the parts of the page share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from nicegui import run, ui
from nicegui.element import Element

from sam_gym.utils.render import distinct_colour

T = TypeVar("T")


class Canvas(Element, component="canvas.js", dependencies=["viewport.js"]):
    """The image, which can be zoomed, and what is drawn over it."""

    def show(self, **patch: Any) -> None:
        """Change some of what is drawn."""
        self.run_method("show", patch)

    async def show_frame(self, patch: dict[str, Any], patience: float) -> None:
        """Change the image and what is drawn over it at once, when the image has arrived.

        Args:
            patch: what changes.
            patience: seconds to wait until the browser shows it.

        Raises:
            TimeoutError: it did not.
        """
        await self.run_method("showFrame", patch, timeout=patience)


class Timeline(Element, component="timeline.js"):
    """Frames in which the objects of a video are seen; emits `seek` with a frame."""

    def show(self, **patch: Any) -> None:
        """Change some of what is drawn."""
        self.run_method("show", patch)


def text_button(
    text: str, icon: str, tip: str, work: Callable[..., Any], props: str = ""
) -> ui.button:
    """Add a button with a text."""
    button = ui.button(text, icon=icon, on_click=lambda: work())
    return button.props(f"dense no-caps {props}").tooltip(tip)


def icon_button(icon: str, tip: str, work: Callable[..., Any], props: str = "") -> ui.button:
    """Add a button with an icon only."""
    button = ui.button(icon=icon, on_click=lambda: work()).tooltip(tip)
    return button.props(f'flat dense round aria-label="{tip}" {props}')


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """Call a function in a thread."""
    result: Any = await run.io_bound(function, *args)  # None only while the server shuts down
    return result


def css_colour(number: int | str) -> str:
    """Return the colour of an object by its id."""
    number = number if isinstance(number, int) else len(str(number))
    return "rgb({}, {}, {})".format(*distinct_colour(number))
