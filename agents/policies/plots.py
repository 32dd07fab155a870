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
from sam_gym.envs.click import ClickCore
from sam_gym.envs.config import EnvConfig
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
    """Play a few clicks of some episodes and draw what the policy sees, a row per episode.

    From left to right: the image with clicks and mask; for the explicit policy, the map of the
    target word and its margin over other words; the mask probability; the probabilities of
    positive and of negative clicks, each scaled to its maximum, which the caption states.

    Args:
        agent: the policy.
        env_config: of the environment.
        env_id: a registered environment.
        count: episodes.
        clicks: number of clicks before drawing.
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
    for i in range(count):
        frames += _row(core, i, chances[i].cpu().numpy(), words[i])
    env.close()
    return tile(frames, len(frames) // count)


def _word_planes(extractor: Any, tensors: dict[str, torch.Tensor]) -> list[list[np.ndarray]]:
    """Return the target's map and its margin over other words, 0 to 1, per sub-environment."""
    count = len(tensors["num_steps"])
    if not isinstance(extractor, TextFeatures):
        return [[] for _ in range(count)]
    planes = extractor.map_planes(tensors)
    pairs = torch.stack([planes[:, 0], min_max(planes[:, 2])], dim=1).cpu().numpy()
    return [list(pair) for pair in pairs]


def _row(
    core: ClickCore, env_index: int, chances: np.ndarray, words: list[np.ndarray]
) -> list[np.ndarray]:
    target = core.ground_truth(env_index)
    image, cells = core.backbone.framed(target.image), core.config.grid**2
    name = core.dataset.categories[target.category]
    episode = core.render(env_index, height=_HEIGHT)
    captions = [f"map of {name!r}", "margin over other words"]
    maps = list(zip(captions, words, strict=False))
    maps.append(("mask probability", core.shown[env_index] / 255.0))
    for number, sign in enumerate(("+", "-")):
        chance = chances[number * cells : (number + 1) * cells]
        text = f"click {sign}: {chance.sum():.0%}, most likely {chance.max():.1%}"
        maps.append((text, chance.reshape(core.config.grid, -1) / max(chance.max(), 1e-9)))
    return [episode] + [
        draw_heat(image, heat, peak=caption.startswith("click"), caption=caption, height=_HEIGHT)
        for caption, heat in maps
    ]
