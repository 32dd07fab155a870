"""What the page asks of its parts for images and for videos."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from agents.annotation.interactive.page import Page


class Panel(ABC):
    """The part of a page for one kind of file.

    Args:
        page: the page.

    Attributes:
        keys: its keys and what they do, for people.
        repeated: those that act again while they are held down.
        actions: what its keys do.
    """

    keys: ClassVar[Mapping[str, str]] = {}
    repeated: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, page: Page) -> None:
        self.page = page
        self.actions: dict[str, Callable[[], Awaitable[Any]]] = {}

    @abstractmethod
    def build(self) -> None:
        """Add its elements beside the image."""

    @abstractmethod
    def set_visibility(self, visible: bool) -> None:
        """Show or hide its elements."""

    @property
    @abstractmethod
    def has_image(self) -> bool:
        """Whether something is open."""

    @abstractmethod
    def unfinished(self) -> str | None:
        """Return why the file cannot be left now, or None."""

    @abstractmethod
    def pause(self) -> None:
        """Stop what goes on by itself."""

    @abstractmethod
    async def press(self, at: list[float], positive: bool) -> None:
        """Take a click at fractions (x, y) of the image."""

    @abstractmethod
    async def box(self, corners: list[float]) -> None:
        """Take a box (x0, y0, x1, y1) in fractions of the image."""

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names to offer."""

    @abstractmethod
    async def set_name(self, name: str) -> None:
        """Take the name of the object."""

    @abstractmethod
    async def name_given(self) -> None:
        """Apply a name that has been typed or chosen, beyond `set_name`."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the object."""

    @abstractmethod
    async def finish_file(self) -> bool:
        """Mark the file as finished; returns whether that worked."""

    @abstractmethod
    async def show(self) -> None:
        """Draw everything."""

    @abstractmethod
    def export(self) -> tuple[str, str]:
        """Return the content and the name of the COCO file to download."""


def pixel(fraction: list[float], size: tuple[int, int]) -> tuple[float, float]:
    """Return a fraction (x, y) of an image of (H, W) as (x, y) in its pixels."""
    return float(fraction[0]) * size[1] - 0.5, float(fraction[1]) * size[0] - 0.5
