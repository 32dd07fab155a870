"""The window of `render_mode="human"`."""

import copy
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import DependencyNotInstalled

from sam_gym.utils.window import Window


def test_without_display_it_is_said_once(
    no_display: None, recwarn: pytest.WarningsRecorder
) -> None:
    window = Window("title", 30)
    for _ in range(2):
        window.show(np.zeros((4, 6, 3), np.uint8))
    assert [str(warning.message) for warning in recwarn] == [
        "render_mode='human' shows nothing: there is no display."
    ]


def test_without_pygame_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(DependencyNotInstalled, match=r"pip install 'sam-gym\[human\]'"):
        Window("title", 30).show(np.zeros((4, 6, 3), np.uint8))


def test_it_shows_the_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    pygame = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    frame = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    window = Window("title", 1000)
    for shown in (frame, frame[:, ::-1]):
        window.show(shown)
        surface = pygame.display.get_surface()
        np.testing.assert_array_equal(pygame.surfarray.array3d(surface).swapaxes(0, 1), shown)
    assert pygame.display.get_caption()[0] == "title"
    assert copy.deepcopy(window).title == "title"
    window.close()
    assert not pygame.display.get_init()


def test_an_environment_draws_into_its_window(
    tiny_env: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    pygame = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    human = gym.make("SamSeg-v0", render_mode="human", **tiny_env)
    drawn = gym.make("SamSeg-v0", render_mode="rgb_array", **tiny_env)
    human.unwrapped.window.fps = 1000  # type: ignore[attr-defined]
    for env in (human, drawn):
        env.reset(seed=3)
        env.step(7)
    surface = pygame.display.get_surface()
    np.testing.assert_array_equal(pygame.surfarray.array3d(surface).swapaxes(0, 1), drawn.render())
    human.close()
    assert not pygame.display.get_init()
