"""A warm start: before it explores, a policy learns what an expert would do in its place.

DAgger (Ross et al. 2011, "A Reduction of Imitation Learning and Structured Prediction to No-Regret
Online Learning"): first the expert plays, then more and more the policy itself, and in every state
the expert says what it would have done.
"""

from __future__ import annotations

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


def imitate(model: DistributedPPO, core: BaseCore[Any, Any], expert: Agent, steps: int) -> None:
    """Teach the policy of a model that has not begun to learn; its environments end mid-episode.

    Args:
        model: with the environments of `core`; its rollouts, minibatches, epochs and first learning
            rate are those of PPO.
        core: the slots of this rank.
        expert: who is imitated; it may see the ground truth.
        steps: environment steps over all ranks, rounded up to whole rollouts. They count as the
            model's own.
    """
    env, buffer, slots = model.get_env(), model.rollout_buffer, model.n_envs * model.ranks.world
    assert env is not None
    rounds = -(-steps // (model.n_steps * slots))
    set_rollout_start(model, env.reset(), np.ones(model.n_envs, bool))
    hide = not model.ranks.is_first
    for number in track(range(rounds), "imitating the expert", disable=hide):
        core.store.pin_new_epoch()
        model.policy.set_training_mode(False)
        buffer.reset()
        for _ in range(model.n_steps):
            _play(model, core, expert, share_of_own=number / rounds)
        observations, starts = rollout_start(model)
        with torch.no_grad():
            last = model.policy.predict_values(obs_as_tensor(observations, model.device))
        buffer.compute_returns_and_advantage(last, starts)
        loss = model.ranks.sum(torch.tensor(_learn(model), dtype=torch.float64))
        model.logger.record("imitation/loss", float(loss) / model.ranks.world)
        model.logger.dump(model.num_timesteps)


@torch.no_grad()
def _play(
    model: DistributedPPO, core: BaseCore[Any, Any], expert: Agent, share_of_own: float
) -> None:
    """One step of all slots; what is remembered is the action of the expert."""
    observations, starts = rollout_start(model)
    tensors = obs_as_tensor(observations, model.device)
    own, values, _ = model.policy(tensors)
    advice = expert.act(core, observations)
    is_own = np.array([rng.random() < share_of_own for rng in model.generators])
    env = model.get_env()
    assert env is not None
    following, rewards, dones, infos = env.step(np.where(is_own, own.cpu().numpy(), advice))
    for slot in np.flatnonzero(dones):
        # As in SB3's rollouts: an episode that was cut short would have gone on.
        if infos[slot].get("TimeLimit.truncated") and "terminal_observation" in infos[slot]:
            last = cast(Any, model.policy.obs_to_tensor(infos[slot]["terminal_observation"])[0])
            rewards[slot] += model.gamma * float(model.policy.predict_values(last))
    model.num_timesteps += model.n_envs * model.ranks.world
    unused = torch.zeros(model.n_envs, device=model.device)
    model.rollout_buffer.add(observations, advice[:, None], rewards, starts, values, unused)
    set_rollout_start(model, following, dones)


def _learn(model: DistributedPPO) -> float:
    """Several passes over the rollout; returns the mean cross-entropy with the expert."""
    policy, losses = model.policy, []
    policy.set_training_mode(True)
    for _ in range(model.n_epochs):
        for batch in model.rollout_buffer.get(model.batch_size):
            observations = cast(Any, batch.observations)
            values, log_prob, _ = policy.evaluate_actions(
                observations, batch.actions.long().flatten()
            )
            imitation = -log_prob.mean()
            loss = imitation + model.vf_coef * F.mse_loss(batch.returns, values.flatten())
            policy.optimizer.zero_grad()
            loss.backward()
            policy.optimizer.step()
            losses.append(imitation.item())
    return float(np.mean(losses))
