"""Train a click agent with PPO in one file of plain torch, in the style of CleanRL.

python examples/ppo.py
python examples/ppo.py --total-timesteps 1024 --num-envs 16 --train-images 32
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.distributions import Categorical

import sam_gym  # noqa: F401 (registers the environments)


@dataclass
class Args:
    """Options of the script."""

    seed: int = 0
    """Seed of the environments, the network and the exploration."""
    total_timesteps: int = 4_096
    """Environment steps to train for."""
    num_envs: int = 64
    """Number of sub-environments."""
    num_steps: int = 16
    """Steps per sub-environment and rollout."""
    num_minibatches: int = 4
    """Minibatches per epoch."""
    update_epochs: int = 4
    """Passes over each rollout."""
    learning_rate: float = 1e-3
    """Adam's learning rate, which falls linearly to a tenth."""
    gamma: float = 0.8
    """Discount factor. Low, since every click should pay off at once."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    clip_coef: float = 0.2
    """PPO's clip range."""
    ent_coef: float = 0.004
    """Weight of the entropy bonus."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Maximum norm of the gradient."""
    train_images: int = 512
    """Number of procedural images to train on; each is encoded once."""
    eval_episodes: int = 128
    """Held-out episodes before and after the training."""
    out: Path = Path("runs/ppo_example/agent.pt")
    """File of the trained weights."""


def make_envs(num_envs: int, split: str, **options: Any) -> gym.vector.VectorEnv:
    """Make environments that share one SAM; observations hold handles of image embeddings."""
    return gym.make_vec(
        "SamSeg-v0",
        num_envs,
        vectorization_mode="vector_entry_point",
        autoreset_mode="SameStep",
        obs="handle",
        split=split,
        **options,
    )


class Agent(nn.Module):
    """Actor and critic over SAM's image embedding, the current mask and the target category."""

    def __init__(self, envs: Any, width: int = 48) -> None:
        super().__init__()
        core = envs.unwrapped.core
        self.store, self.grid = core.store, core.config.grid
        categories = envs.single_observation_space["target_category"].n
        self.reduce = nn.Conv2d(core.backbone.embedding_shape[0], width, 1)
        # The category scales and shifts the channels of the image.
        self.target = nn.Embedding(categories, 2 * width)
        nn.init.normal_(self.target.weight, std=0.3)
        self.mix = nn.Sequential(
            nn.Conv2d(2 * width + 1, width, 1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
        )
        # Two logits per cell of the grid: a positive click there, and a negative one.
        self.actor = nn.Conv2d(width, 2, 1)
        nn.init.normal_(self.actor.weight, std=0.01)
        nn.init.zeros_(self.actor.bias)
        self.critic = nn.Sequential(nn.Linear(2 * width, 64), nn.ReLU(), nn.Linear(64, 1))

    def features(self, obs: dict[str, Tensor]) -> Tensor:
        """Return features (B, width, h, w) on the cells of the embedding."""
        embedding = self.store.gather(obs["handle"][:, 0], "embedding")
        mask = obs["sam_pred_mask_prob"][:, None].float() / 255.0
        gain, bias = self.target(obs["target_category"])[:, :, None, None].chunk(2, dim=1)
        image = torch.relu(self.reduce(embedding) * (1 + gain) + bias)
        return self.mix(torch.cat([image, image * mask, mask], dim=1))

    def get_value(self, obs: dict[str, Tensor]) -> Tensor:
        """Return the values (B,) of observations."""
        return self._value(self.features(obs))

    def _value(self, features: Tensor) -> Tensor:
        pooled = torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1)
        return self.critic(pooled)[:, 0]

    def get_action_and_value(
        self, obs: dict[str, Tensor], action: Tensor | None = None, greedy: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return actions, their log-probabilities, the entropy and values: each (B,)."""
        features = self.features(obs)
        cells = nn.functional.adaptive_avg_pool2d(self.actor(features), self.grid)
        probs = Categorical(logits=cells.flatten(1))
        if action is None:
            action = probs.logits.argmax(dim=1) if greedy else probs.sample()
        return action, probs.log_prob(action), probs.entropy(), self._value(features)


def to_tensors(obs: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Return observations as tensors on a device."""
    return {name: torch.as_tensor(value, device=device) for name, value in obs.items()}


@torch.no_grad()
def evaluate(agent: Agent, args: Args) -> float:
    """Return the mean final IoU of the most likely clicks on images of the test split."""
    num_envs = min(args.num_envs, args.eval_episodes)
    envs = make_envs(num_envs, "test")
    device = next(agent.parameters()).device
    obs, _ = envs.reset(seed=args.seed + 1000)
    ious: list[float] = []
    while len(ious) < args.eval_episodes:
        action, *_ = agent.get_action_and_value(to_tensors(obs, device), greedy=True)
        obs, _, terminations, truncations, infos = envs.step(action.cpu().numpy())
        over = terminations | truncations
        if over.any():
            ious += infos["final_info"]["iou"][over].tolist()
    envs.close()
    return float(np.mean(ious[: args.eval_episodes]))


def main(args: Args) -> None:
    """Train, and compare with the untrained agent on held-out images."""
    torch.manual_seed(args.seed)
    envs = make_envs(args.num_envs, "train", dataset_kwargs={"length": args.train_images})
    core = envs.unwrapped.core  # type: ignore[attr-defined]
    device = core.device
    agent = Agent(envs).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    before = evaluate(agent, args)
    print(f"held-out IoU before training: {before:.3f}")

    batch_size = args.num_envs * args.num_steps
    minibatch_size = batch_size // args.num_minibatches
    num_updates = max(1, args.total_timesteps // batch_size)
    shape = (args.num_steps, args.num_envs)
    actions = torch.zeros(shape, dtype=torch.int64, device=device)
    logprobs, rewards, dones, values = (torch.zeros(shape, device=device) for _ in range(4))

    started = time.perf_counter()
    raw_obs, _ = envs.reset(seed=args.seed)
    next_obs = to_tensors(raw_obs, device)
    for update in range(num_updates):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - 0.9 * update / num_updates)

        # Play. The embeddings of this rollout have to stay until its last minibatch.
        core.store.pin_new_epoch()
        observations: list[dict[str, Tensor]] = []
        finals: list[float] = []
        for step in range(args.num_steps):
            observations.append(next_obs)
            with torch.no_grad():
                action, logprob, _, value = agent.get_action_and_value(next_obs)
            actions[step], logprobs[step], values[step] = action, logprob, value
            raw_obs, reward, terminations, truncations, infos = envs.step(action.cpu().numpy())
            done = terminations | truncations
            rewards[step] = torch.as_tensor(reward, device=device)
            dones[step] = torch.as_tensor(done, device=device)
            next_obs = to_tensors(raw_obs, device)
            if done.any():
                finals += infos["final_info"]["iou"][done].tolist()

        # Generalised advantage estimation. An episode has a fixed number of clicks, so its last
        # step is an end, not an interruption: no value is added there.
        advantages = torch.zeros(shape, device=device)
        with torch.no_grad():
            next_value, last = agent.get_value(next_obs), torch.zeros(args.num_envs, device=device)
        for t in reversed(range(args.num_steps)):
            goes_on = 1.0 - dones[t]
            delta = rewards[t] + args.gamma * next_value * goes_on - values[t]
            advantages[t] = last = delta + args.gamma * args.gae_lambda * goes_on * last
            next_value = values[t]
        returns = advantages + values

        # Learn, from minibatches of the flattened rollout.
        flat_obs = {name: torch.cat([obs[name] for obs in observations]) for name in next_obs}
        flat = [x.flatten() for x in (actions, logprobs, advantages, returns)]
        for _ in range(args.update_epochs):
            for chosen in torch.randperm(batch_size, device=device).split(minibatch_size):
                b_actions, b_logprobs, b_advantages, b_returns = (x[chosen] for x in flat)
                obs = {name: value[chosen] for name, value in flat_obs.items()}
                _, newlogprob, entropy, newvalue = agent.get_action_and_value(obs, b_actions)
                ratio = (newlogprob - b_logprobs).exp()
                scaled = (b_advantages - b_advantages.mean()) / (b_advantages.std() + 1e-8)
                clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                policy_loss = -torch.min(scaled * ratio, scaled * clipped).mean()
                value_loss = 0.5 * (newvalue - b_returns).square().mean()
                loss = policy_loss - args.ent_coef * entropy.mean() + args.vf_coef * value_loss
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
        seconds = time.perf_counter() - started
        steps = (update + 1) * batch_size
        print(f"{steps:7} steps, {seconds:5.0f} s: IoU {np.mean(finals or [0.0]):.3f}")
    core.store.end_epoch()

    print(f"held-out IoU: {before:.3f} before training, {evaluate(agent, args):.3f} after")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(agent.state_dict(), args.out)
    print(f"{args.out}: the weights.")
    envs.close()


if __name__ == "__main__":
    main(tyro.cli(Args))
