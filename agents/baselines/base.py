"""The interface of agents: baselines and trained policies."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import numpy as np


class Agent(Protocol):
    """Chooses actions for all sub-environments of a core at once.

    An agent that needs another env config than the given one, for example a larger budget, has a
    method `env_config_for(env_config)` that returns it (see `Task.env_config_for`).
    """

    def act(self, core: Any, observations: dict[str, np.ndarray]) -> np.ndarray:
        """Return actions int64 (num_envs, ...).

        Only agents named "oracle" may read the ground truth.
        """
        ...


class TrainedAgent(Agent, Protocol):
    """An agent that plays a policy.

    Attributes:
        policy: a `SamPolicy`.
    """

    policy: Any


class Baseline:
    """Base class of agents that learn nothing, with a random generator `rng`.

    Attributes:
        slow: whether it decodes many times per step; a training run lets it play in the final
            evaluation only, and fewer episodes.
    """

    slow: ClassVar[bool] = False

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
