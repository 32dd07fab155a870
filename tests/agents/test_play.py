"""A person plays an environment."""

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from agents.play import PlayConfig, PlayedEnv, play
from sam_gym.envs.base_core import FRAME_HEIGHT
from sam_gym.envs.click import SamSegConfig


@pytest.fixture
def pygame(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    module = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    module.init()
    module.display.set_mode((64, 64))
    module.event.clear()
    yield module
    module.quit()


def test_without_display_another_way_is_named(no_display: None) -> None:
    with pytest.raises(ValueError, match="no display to play on.*agents.app"):
        play(PlayConfig())


def test_a_click_of_the_frame_is_drawn_where_it_was(tiny_env: dict[str, Any]) -> None:
    env = gym.make("SamSeg-v0", render_mode="rgb_array", grid=16, **tiny_env)
    played = PlayedEnv(env, 0)
    width = played.frame().shape[1]
    for x, y in ((100, 60), (width - 5, FRAME_HEIGHT - 5), (5, 200)):
        played.begin(0)
        played.click(x, y, True)
        ((column, row, positive),) = played.core.clicks(0)
        height, columns = played.core.ground_truth(0).mask.shape
        cell = FRAME_HEIGHT / 16
        assert positive
        assert abs((column + 0.5) * width / columns - x) <= cell / 2 + 2
        assert abs((row + 0.5) * FRAME_HEIGHT / height - y) <= cell / 2 + 2


def test_clicks_outside_of_the_image_and_other_keys_are_ignored(tiny_env: dict[str, Any]) -> None:
    played = PlayedEnv(gym.make("SamSeg-v0", render_mode="rgb_array", **tiny_env), 0)
    played.click(50, FRAME_HEIGHT + 10, True)  # the caption
    played.press("s")  # there is no stop
    assert played.steps == 0


def test_mouse_and_keys_play(
    pygame: Any, tiny_env: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def press(key: int) -> None:
        pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=key))

    def click(button: int) -> None:
        event = pygame.event.Event(pygame.MOUSEBUTTONDOWN, button=button, pos=(200, 200))
        pygame.event.post(event)

    click(1)
    click(3)
    press(pygame.K_u)
    press(pygame.K_s)  # ends the first episode
    click(1)  # begins the second one
    click(1)
    press(pygame.K_n)  # leaves it
    press(pygame.K_s)
    press(pygame.K_q)
    own = SamSegConfig(stop=True, undo=True, max_steps=6, **tiny_env)
    results = play(PlayConfig(env_config=own))
    assert [row["steps"] for row in results] == [4, 1]
    assert results[1]["iou"] == 0 and np.isclose(results[0]["reward"], results[0]["iou"])
    printed = capsys.readouterr().out
    assert "s: action 512. u: action 513." in printed and "2 episodes: mean IoU" in printed


def test_keys_of_a_video(pygame: Any) -> None:
    env = gym.make("SamVideo-v0", frames=4, device="cpu", render_mode="rgb_array")
    played = PlayedEnv(env, 0)
    played.click(100, 100, True)  # no action is a click
    assert played.steps == 0
    played.press("1")
    assert played.steps == 1 and played.keys[("1",)] == 1
