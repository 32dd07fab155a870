"""The task of `SamContinual-v0`: clicks on a stream of domains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from agents.tasks.base import C, register
from agents.tasks.click import ClickTask
from sam_gym.data.streams import Stream
from sam_gym.envs.base_core import BaseCore
from sam_gym.envs.config import EnvConfig
from sam_gym.envs.continual import ContinualConfig


@register
class ContinualTask(ClickTask):
    """The click task over domains that are learned one after the other."""

    env_id = "SamContinual-v0"
    config_class = ContinualConfig
    # The domains share one category, and a model card describes results on one dataset.
    supports = ClickTask.supports - {"categories", "hub"}

    def training_config(self, run: Any) -> EnvConfig:
        # `StreamCallback` decides when a domain ends.
        own: Any = self._handles(run)
        return replace(own, episodes_per_domain=None)

    def stream(self, env_config: EnvConfig) -> Stream:
        own: Any = env_config
        return own.open_stream()

    def share_episodes(self, env_config: C, episodes: int, num_envs: int) -> tuple[C, int, int]:
        """Share out the episodes evenly over domains, which follow one another everywhere."""
        count = len(self.stream(env_config))
        _, num_envs, each = super().share_episodes(env_config, -(-episodes // count), num_envs)
        # Results are reported by domain, which hidden boundaries keep out of `info`.
        own: Any = env_config
        own = replace(own, episodes_per_domain=each, cycle=False, boundaries="announced")
        return own, num_envs, each * count

    def reset_options(self, core: BaseCore[Any, Any]) -> dict[str, Any]:
        own: Any = core
        return {"task": np.arange(core.num_envs) % len(own.stream)}
