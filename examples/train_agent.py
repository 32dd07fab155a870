"""Train an agent that clicks objects of a category, and compare it with two baselines.

python examples/train_agent.py
"""

from __future__ import annotations

from pathlib import Path

import tyro

from agents.evaluate import PolicyAgent, evaluate
from agents.ppo.config import TrainPPOConfig
from agents.ppo.run import train
from agents.tasks import task_of


def main(
    total_timesteps: int = 10_000,
    num_envs: int = 64,
    episodes: int = 128,
    out: Path = Path("runs/example_agent"),
) -> None:
    """Train for some steps, then play held-out episodes.

    Args:
        total_timesteps: Environment steps to train for.
        num_envs: Number of sub-environments.
        episodes: Held-out episodes per agent.
        out: Folder of the run.
    """
    config = TrainPPOConfig(
        env="SamSeg-v0",
        total_timesteps=total_timesteps,
        num_envs=num_envs,
        batch_size=4 * num_envs,
        eval_episodes=episodes,
        final_episodes=episodes,
        out=str(out),
        overwrite=True,
    )
    train(config)

    task = task_of(config.env)
    agents = {name: task.baselines.get(name)(0) for name in ("random", "oracle")}
    agents["trained"] = PolicyAgent.load(out / "policy.zip")
    held_out = task.held_out_config(config)
    for name, agent in agents.items():
        result = evaluate(agent, held_out, episodes=episodes, num_envs=num_envs)
        print(f"{name:8} mean IoU {result.ious.mean():.2f}")


if __name__ == "__main__":
    tyro.cli(main)
