"""Policy plots: what a click policy sees, and where it is about to click."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch

from agents.clip.surgery import min_max
from agents.evaluate import PolicyAgent
from agents.policies.explicit import TextFeatures
from agents.ppo.vec_env import make_vector_env
from agents.tasks import task_of
from sam_gym.envs.base_core import EnvConfig
from sam_gym.envs.click import ClickCore
from sam_gym.utils.render import draw_heat, tile

_HEIGHT = 224


@torch.no_grad()
def draw_policy_plots(
    agent: PolicyAgent,
    env_config: EnvConfig,
    *,
    env_id: str = "SamSeg-v0",
    count: int = 4,
    clicks: int = 1,
    seed: int = 0,
) -> np.ndarray:
    """Play some episodes for a few clicks and draw what the policy sees then, a row for each.

    From left to right: the episode so far; of the explicit policy, the map of the word that is
    asked for, and how far it is ahead of other words; the mask's probability; where the policy
    would click positive and negative, each scaled to its own maximum, which the caption has.

    Args:
        agent: the policy.
        env_config: of the environment.
        env_id: a registered environment.
        count: episodes.
        clicks: how many the agent makes first.
        seed: of the episodes.

    Returns:
        uint8 (H, W, 3), RGB.
    """
    task = task_of(env_id)
    task.require("policy_plots")
    env, made = make_vector_env(env_id, count, env_config)
    core = cast(ClickCore, made)
    observations, _ = env.reset(seed=seed, options=task.reset_options(core))
    for _ in range(min(clicks, env_config.max_episode_steps - 1)):
        observations, *_ = env.step(agent.act(core, observations))
    tensors = agent.policy.to_tensors(observations)
    with agent.policy.playing():
        chances = agent.policy.logits_and_value(tensors)[0].softmax(dim=1)
    words = _word_planes(agent.policy.features_extractor, tensors)
    frames = []
    for slot in range(count):
        frames += _row(core, slot, chances[slot].cpu().numpy(), words[slot])
    env.close()
    return tile(frames, len(frames) // count)


def _word_planes(extractor: Any, tensors: dict[str, torch.Tensor]) -> list[list[np.ndarray]]:
    """Per slot: the target's map, and how far it is ahead of other words, scaled to [0, 1]."""
    count = len(tensors["num_steps"])
    if not isinstance(extractor, TextFeatures):
        return [[] for _ in range(count)]
    planes = extractor.map_planes(tensors)
    pairs = torch.stack([planes[:, 0], min_max(planes[:, 2])], dim=1).cpu().numpy()
    return [list(pair) for pair in pairs]


def _row(
    core: ClickCore, slot: int, chances: np.ndarray, words: list[np.ndarray]
) -> list[np.ndarray]:
    target = core.ground_truth(slot)
    image, cells = core.backbone.framed(target.image), core.config.grid**2
    name = core.dataset.categories[target.category]
    episode = core.render(slot, height=_HEIGHT)
    captions = [f"map of {name!r}", "ahead of other words"]
    maps = list(zip(captions, words, strict=False))
    maps.append(("mask probability", core.shown[slot] / 255.0))
    for number, sign in enumerate(("+", "-")):
        chance = chances[number * cells : (number + 1) * cells]
        text = f"click {sign}: {chance.sum():.0%}, most likely {chance.max():.1%}"
        maps.append((text, chance.reshape(core.config.grid, -1) / max(chance.max(), 1e-9)))
    return [episode] + [
        draw_heat(image, heat, peak=caption.startswith("click"), caption=caption, height=_HEIGHT)
        for caption, heat in maps
    ]
