"""Warm start: imitate an expert before PPO explores.

DAgger (Ross et al. 2011, "A Reduction of Imitation Learning and Structured Prediction to No-Regret
Online Learning"): the expert acts first, the policy acts increasingly often, and the expert labels
every state with its own action.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from stable_baselines3.common.utils import obs_as_tensor
from torch.nn import functional as F

from agents.baselines import Agent
from agents.ppo.distributed import DistributedPPO
from agents.ppo.sb3 import rollout_start, set_rollout_start
from sam_gym.envs.base_core import BaseCore
from sam_gym.utils.progress import track


def imitate(
    model: DistributedPPO,
    core: BaseCore[Any, Any],
    expert: Agent,
    steps: int,
    after_step: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Train the policy of a new model by imitation. Environments are left in mid-episode.

    Args:
        model: with the environments of `core`; its rollouts, minibatches, epochs and initial
            learning rate are used.
        core: the sub-environments of this rank.
        expert: the agent to imitate; it may see the ground truth.
        steps: environment steps over all ranks, rounded up to whole rollouts. They count as
            steps of the model.
        after_step: called after each of them with the observations that it gave.
    """
    env, buffer = model.get_env(), model.rollout_buffer
    assert env is not None
    rounds = -(-steps // (model.n_steps * model.n_envs * model.ranks.world))
    set_rollout_start(model, env.reset(), np.ones(model.n_envs, bool))
    hide = not model.ranks.is_first
    for number in track(range(rounds), "imitating the expert", disable=hide):
        core.store.pin_new_epoch()
        model.policy.set_training_mode(False)
        buffer.reset()
        for _ in range(model.n_steps):
            _play(model, core, expert, own_fraction=number / rounds)
            if after_step is not None:
                after_step(rollout_start(model)[0])
        observations, starts = rollout_start(model)
        with torch.no_grad():
            last = model.policy.predict_values(obs_as_tensor(observations, model.device))
        buffer.compute_returns_and_advantage(last, starts)
        loss = model.ranks.sum(torch.tensor(_learn(model), dtype=torch.float64))
        model.logger.record("imitation/loss", float(loss) / model.ranks.world)
        model.logger.dump(model.num_timesteps)


@torch.no_grad()
def _play(
    model: DistributedPPO, core: BaseCore[Any, Any], expert: Agent, own_fraction: float
) -> None:
    """Step all sub-environments and store the actions of the expert."""
    observations, starts = rollout_start(model)
    tensors = obs_as_tensor(observations, model.device)
    own, values, _ = model.policy(tensors)
    advice = expert.act(core, observations)
    is_own = np.array([rng.random() < own_fraction for rng in model.generators])
    env = model.get_env()
    assert env is not None
    is_own = is_own.reshape(-1, *[1] * (advice.ndim - 1))
    following, rewards, dones, infos = env.step(np.where(is_own, own.cpu().numpy(), advice))
    for i in np.flatnonzero(dones):
        # As in SB3's rollouts: bootstrap the value of truncated episodes.
        if infos[i].get("TimeLimit.truncated") and "terminal_observation" in infos[i]:
            last = cast(Any, model.policy.obs_to_tensor(infos[i]["terminal_observation"])[0])
            rewards[i] += model.gamma * float(model.policy.predict_values(last))
    model.num_timesteps += model.n_envs * model.ranks.world
    unused = torch.zeros(model.n_envs, device=model.device)
    model.rollout_buffer.add(
        observations, advice.reshape(len(advice), -1), rewards, starts, values, unused
    )
    set_rollout_start(model, following, dones)


def _learn(model: DistributedPPO) -> float:
    """Make the passes over the rollout; return the mean cross-entropy with the expert."""
    policy, losses = model.policy, []
    policy.set_training_mode(True)
    for _ in range(model.n_epochs):
        for batch in model.rollout_buffer.get(model.batch_size):
            observations = cast(Any, batch.observations)
            actions = batch.actions.long().reshape(-1, *cast(Any, model.action_space).shape)
            values, log_prob, _ = policy.evaluate_actions(observations, actions)
            imitation = -log_prob.mean()
            loss = imitation + model.vf_coef * F.mse_loss(batch.returns, values.flatten())
            policy.optimizer.zero_grad()
            loss.backward()
            policy.optimizer.step()
            losses.append(imitation.item())
    return float(np.mean(losses))
