"""Baselines of `SamVideo-v0`, by task."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from agents.baselines.base import Agent, Baseline
from agents.baselines.video.memory import MEMORY
from agents.baselines.video.prompt import PROMPT
from agents.baselines.video.when import WHEN
from sam_gym.envs.video import VideoCore
from sam_gym.utils.registry import Registry

#: Task -> its baselines.
BY_TASK: dict[str, Registry[Callable[[int], Agent]]] = {
    "memory": MEMORY,
    "when": WHEN,
    "prompt": PROMPT,
}


class OfTask(Baseline):
    """The baseline of a name in whichever task the environment has.

    Args:
        name: of the baseline.
        seed: of its random generator.
    """

    def __init__(self, name: str, seed: int = 0) -> None:
        super().__init__(seed)
        self.name, self._seed = name, seed
        self._agents: dict[str, Agent] = {}

    def act(self, core: VideoCore, observations: dict[str, np.ndarray]) -> np.ndarray:
        """Return actions, as of `Agent`; raise `ValueError` if the task has no such baseline."""
        task = core.config.task
        if task not in self._agents:
            self._agents[task] = BY_TASK[task].get(self.name)(self._seed)
        return self._agents[task].act(core, observations)


def _named(name: str) -> Callable[[int], Agent]:
    owners = [own.get(name) for own in BY_TASK.values() if name in own]

    def make(seed: int = 0) -> OfTask:
        return OfTask(name, seed)

    make.slow = any(getattr(own, "slow", False) for own in owners)  # type: ignore[attr-defined]
    return make


#: Baseline name -> maker, which takes a seed; of all tasks.
BASELINES: Registry[Callable[[int], Agent]] = Registry("baseline of SamVideo-v0")
for _name in sorted({name for own in BY_TASK.values() for name in own}):
    BASELINES.add(_name, _named(_name))
