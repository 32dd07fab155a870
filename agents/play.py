"""Play an environment yourself, by mouse and keys.

python -m agents.play --env SamSeg-v0 --stop --undo
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import tyro

import sam_gym  # noqa: F401  (registers the environments)
from agents.ppo.command_line import env_of
from agents.tasks import task_of
from sam_gym.envs.click import SamSegConfig
from sam_gym.envs.config import EnvConfig
from sam_gym.utils import cli
from sam_gym.utils.fields import documented
from sam_gym.utils.settings import Natural, Seed
from sam_gym.utils.window import Window, has_display, import_pygame

_HELP = """\
Left click: positive click, or the next point. Right click, or Ctrl and left: negative click.
{keys}n: next episode. q: end."""
_FPS = 30
#: Longest wait for an event in milliseconds: Ctrl-C is noticed between two.
_WAIT_MS = 200


@documented
@dataclass(kw_only=True)
class PlayConfig:
    """Play an environment by mouse and keys, in a window (pip install 'sam-gym[human]').

    The frames are those of `render_mode="human"`: white outlines show what is to be found.

    Example: python -m agents.play --env SamEverything-v0 --budget 16
    """

    env: str = "SamSeg-v0"
    """Environment id. It determines the environment options."""
    seed: Seed = 0
    """Seed of the first episode."""
    episodes: Natural = 0
    """End after this many episodes (0: until you end it)."""
    env_config: Annotated[EnvConfig, tyro.conf.arg(name="")] = field(default_factory=SamSegConfig)


class PlayedEnv:
    """An environment that a person plays.

    Args:
        env: made with `render_mode="rgb_array"`.
        seed: of the first episode.
    """

    def __init__(self, env: gym.Env[Any, Any], seed: int) -> None:
        self.env, self.core = env, env.unwrapped.core  # type: ignore[attr-defined]
        self.keys: dict[tuple[str], int] = env.unwrapped.get_keys_to_action()  # type: ignore[attr-defined]
        #: Per finished episode: its return, steps and final IoU.
        self.results: list[dict[str, float]] = []
        self.begin(seed)

    def begin(self, seed: int | None = None) -> None:
        """Begin an episode."""
        _, self.info = self.env.reset(seed=seed)
        self.reward, self.steps, self.is_over = 0.0, 0, False

    def frame(self) -> np.ndarray:
        """Return the present frame: uint8 (H, W, 3), RGB."""
        return np.asarray(self.env.render())

    def click(self, x: int, y: int, positive: bool) -> None:
        """Click a pixel of the frame; clicks that mean nothing are ignored."""
        if (place := self.core.from_frame(0, x, y)) is not None:
            try:
                action = self.core.action_at(*place, positive)
            except NotImplementedError:
                return
            self.act(action)

    def press(self, key: str) -> None:
        """Press a key; those that mean nothing are ignored."""
        if (key,) in self.keys:
            self.act(self.keys[(key,)])

    def act(self, action: int) -> None:
        """Step; after the end of an episode, begin the next one instead."""
        if self.is_over:
            self.begin()
            return
        _, reward, terminated, truncated, self.info = self.env.step(action)
        self.reward += float(reward)
        self.steps += 1
        self.is_over = terminated or truncated
        if self.is_over:
            own = {"reward": self.reward, "steps": self.steps, "iou": float(self.info["iou"])}
            self.results.append(own)
            print(f"Episode {len(self.results)}: {self.status()}")

    def status(self) -> str:
        """Return a line on the present episode."""
        target = self.info.get("target_name")
        return (
            f"{f'{target}, ' if target is not None else ''}step {self.steps}, "
            f"IoU {self.info['iou']:.2f}, reward {self.reward:.2f}"
            f"{'. Click for the next episode' if self.is_over else ''}"
        )


def play(config: PlayConfig) -> list[dict[str, float]]:
    """Let a person play; return the results of the finished episodes.

    Raises:
        ValueError: there is no display, or an option is wrong.
        DependencyNotInstalled: pygame is not installed.
    """
    if not has_display():
        raise ValueError(
            "There is no display to play on. Run python -m agents.app to click in a browser, also "
            "of another machine."
        )
    pygame = import_pygame()
    own = config.env_config
    arguments = {f.name: getattr(own, f.name) for f in fields(own)}
    env = gym.make(config.env, render_mode="rgb_array", disable_env_checker=True, **arguments)
    played, window = PlayedEnv(env, config.seed), Window(config.env, _FPS)
    listed = "".join(f"{key}: action {action}. " for (key,), action in played.keys.items())
    print(_HELP.format(keys=listed))
    try:
        while not (config.episodes and len(played.results) >= config.episodes):
            window.show(played.frame())
            pygame.display.set_caption(f"{config.env}: {played.status()}")
            if not _handle([pygame.event.wait(_WAIT_MS), *pygame.event.get()], played, pygame):
                break
    finally:
        window.close()
        env.close()
    if played.results:
        means = {name: np.mean([row[name] for row in played.results]) for name in ("iou", "reward")}
        count = len(played.results)
        print(f"{count} episodes: mean IoU {means['iou']:.2f}, mean reward {means['reward']:.2f}")
    return played.results


def _handle(events: Sequence[Any], played: PlayedEnv, pygame: Any) -> bool:
    """Handle events of the window; return whether to go on."""
    for event in events:
        if event.type == pygame.QUIT:
            return False
        if event.type == pygame.MOUSEBUTTONDOWN and event.button in (1, 3):
            positive = event.button == 1 and not pygame.key.get_mods() & pygame.KMOD_CTRL
            x, y = event.pos
            played.click(x, y, positive)
        elif event.type == pygame.KEYDOWN:
            key = pygame.key.name(event.key)
            if key in ("q", "escape"):
                return False
            if key == "n":
                played.begin()
            else:
                played.press(key)
    return True


def main(args: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Run the command line."""
    given = sys.argv[1:] if args is None else list(args)
    env_id = env_of(given) or PlayConfig.env
    default = PlayConfig(env=env_id, env_config=task_of(env_id).config_class(split="test"))
    return play(cli.parse(PlayConfig, "python -m agents.play", given, default=default))


if __name__ == "__main__":
    cli.run(main)
