"""Train an agent on a reward of your own.

python examples/custom_reward.py
python examples/custom_reward.py --total-timesteps 32 --num-envs 2 --episodes 2
"""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro

import sam_gym  # noqa: F401 (registers the environments)
from agents.evaluate import PolicyAgent, evaluate
from agents.ppo.config import TrainPPOConfig
from agents.ppo.run import train
from agents.tasks import task_of
from sam_gym import Transition
from sam_gym.envs.click import SamSegConfig

#: Name of the reward below, as commands, environments and worker processes take it.
REWARD = "custom_reward:good_enough"


def good_enough(steps: Transition) -> np.ndarray:
    """Gain in IoU up to 0.9, and 0.1 less for every click on a mask that is that good already.

    Args:
        steps: N transitions; every attribute is an array (N,).

    Returns:
        float (N,), the reward of each.
    """
    gain = np.minimum(steps.iou_after, 0.9) - np.minimum(steps.iou_before, 0.9)
    return gain - 0.1 * (steps.is_click & (steps.iou_before >= 0.9))


def main(
    total_timesteps: int = 20_000,
    num_envs: int = 64,
    episodes: int = 128,
    out: Path = Path("runs/example_reward"),
) -> None:
    """Train with the reward and an action that stops, then count the clicks.

    Args:
        total_timesteps: Environment steps to train for.
        num_envs: Number of sub-environments.
        episodes: Held-out episodes.
        out: Folder of the run.
    """
    env = gym.make("SamSeg-v0", reward=REWARD)
    env.reset(seed=0)
    _, reward, *_, info = env.step(env.action_space.sample())
    print(f"a random click: reward {reward:.2f}, IoU {info['iou']:.2f}")

    config = TrainPPOConfig(
        env_config=SamSegConfig(obs="handle", reward=REWARD, stop=True),
        total_timesteps=total_timesteps,
        num_envs=num_envs,
        batch_size=4 * num_envs,
        eval_episodes=episodes,
        final_episodes=episodes,
        out=str(out),
        overwrite=True,
    )
    train(config)
    held_out = task_of(config.env).held_out_config(config)
    agent = PolicyAgent.load(out / "policy.zip")
    result = evaluate(agent, held_out, episodes=episodes, num_envs=num_envs)
    print(f"trained: mean IoU {result.ious.mean():.2f} with {result.clicks.mean():.1f} clicks")


if __name__ == "__main__":
    tyro.cli(main)
