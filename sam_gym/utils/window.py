"""The window of `render_mode="human"`, drawn by pygame as those of gymnasium's environments."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from typing import Any

import numpy as np


def import_pygame() -> Any:
    """Return pygame.

    Raises:
        DependencyNotInstalled: it is not installed.
    """
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        import pygame
    except ImportError as error:
        from gymnasium.error import DependencyNotInstalled

        raise DependencyNotInstalled(
            "pygame is not installed, run `pip install 'sam-gym[human]'`"
        ) from error
    return pygame


def has_display() -> bool:
    """Return whether windows can be opened."""
    if sys.platform.startswith("linux"):
        names = ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")
        return any(os.environ.get(name) for name in names)
    return True


class Window:
    """Shows frames in a window, which opens with the first one.

    Without a display nothing is shown, and a warning says so once.

    Args:
        title: of the window.
        fps: bound on the frames per second.
    """

    def __init__(self, title: str, fps: float) -> None:
        self.title, self.fps = title, fps
        self._screen: Any = None
        self._clock: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies of an environment open windows of their own.
        return Window, (self.title, self.fps)

    def show(self, frame: np.ndarray) -> None:
        """Show uint8 (H, W, 3), RGB, and wait until the next frame is due.

        Raises:
            DependencyNotInstalled: pygame is not installed.
        """
        if not has_display():
            warn_no_window("there is no display")
            return
        pygame = import_pygame()
        size = frame.shape[1], frame.shape[0]
        if self._screen is None or self._screen.get_size() != size:
            pygame.init()
            pygame.display.init()
            pygame.display.set_caption(self.title)
            self._screen = pygame.display.set_mode(size)
            self._clock = pygame.time.Clock()
        self._screen.blit(pygame.surfarray.make_surface(frame.swapaxes(0, 1)), (0, 0))
        pygame.event.pump()
        self._clock.tick(self.fps)
        pygame.display.flip()

    def close(self) -> None:
        """Close the window."""
        if self._screen is not None:
            pygame = import_pygame()
            pygame.display.quit()
            pygame.quit()
            self._screen = None


@functools.cache
def warn_no_window(reason: str) -> None:
    """Warn that nothing is shown, once per reason."""
    warnings.warn(f"render_mode='human' shows nothing: {reason}.", stacklevel=4)
