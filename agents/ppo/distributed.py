"""PPO over the processes of one job, each with its share of the environments.

Start a job with `torchrun --nproc_per_node=N -m agents.train_ppo ...`. Each of its processes, the
*ranks*, steps its own sub-environments. Gradients are averaged, so all ranks hold the same policy.
A single process runs the same code.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.utils import explained_variance
from stable_baselines3.common.vec_env import VecEnv

from agents.policies.base import POLICIES, SamPolicy
from agents.policies.spaces import space_to_json
from agents.ppo.rng import PerEnvCategorical, PerEnvRolloutBuffer, env_generators
from sam_gym.utils.process_group import ALONE, ProcessGroup

T = TypeVar("T")


def share_gradients(optimizer: torch.optim.Optimizer, ranks: ProcessGroup, max_norm: float) -> None:
    """Average gradients over all ranks before each step of an optimizer, then clip their norm.

    SB3 would clip on each rank before the gradients of the others are known.

    Args:
        optimizer: of parameters that have gradients on all ranks or on none.
        ranks: the processes, with minibatches of equal size.
        max_norm: bound on the L2 norm of all gradients.
    """

    def before_step(*_: Any) -> None:
        everything = (p for group in optimizer.param_groups for p in group["params"])
        parameters = [parameter for parameter in everything if parameter.grad is not None]
        gradients = [parameter.grad for parameter in parameters]
        if ranks.world > 1:
            mean = ranks.sum(torch.cat([gradient.flatten() for gradient in gradients]))
            mean /= ranks.world
            parts = mean.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    optimizer.register_step_pre_hook(before_step)


class CountAllProcesses(BaseCallback):
    """Counts the environment steps of all ranks in `num_timesteps`."""

    def __init__(self, ranks: ProcessGroup) -> None:
        super().__init__()
        self.ranks = ranks

    def _on_step(self) -> bool:
        self.model.num_timesteps += (self.ranks.world - 1) * self.training_env.num_envs
        return True


def describe_policy(model: PPO) -> None:
    """Set the attributes of a model by which `agents.policies.saved` loads its policy again.

    stable-baselines3 saves all attributes of a model.
    """
    own: Any = model
    #: Name in `POLICIES`; None if it has none.
    own.policy_name = POLICIES.name_of(type(model.policy))
    #: Its spaces in JSON: SB3 pickles them.
    own.policy_spaces = {
        "observation": space_to_json(model.observation_space),
        "action": space_to_json(model.action_space),
    }
    #: Digests of the frozen models that it was trained on; None if it does not say.
    own.policy_weights = (
        model.policy.frozen_weights() if isinstance(model.policy, SamPolicy) else None
    )


class DistributedPPO(PPO):
    """PPO with random numbers per sub-environment, over one or several ranks.

    N ranks learn the same as one process with all sub-environments, up to rounding. Train it with
    the callback `CountAllProcesses`. Its saved models load as a plain `PPO`.

    Args:
        policy: as `PPO` takes it, with a categorical distribution of actions.
        env: the sub-environments of this rank.
        batch_size: minibatch size over all ranks.
        max_grad_norm: bound on the norm of the averaged gradients.
        seed: of the job; sub-environment `i`, counted over all ranks, gets `seed + i`.
        ranks: the processes of the job.
        **kwargs: as `PPO` takes them; advantages are always normalised.

    Raises:
        ValueError: a minibatch cannot hold equally many samples of each sub-environment.
    """

    def __init__(
        self,
        policy: Any,
        env: VecEnv,
        *,
        batch_size: int,
        max_grad_norm: float = 0.5,
        seed: int = 0,
        ranks: ProcessGroup = ALONE,
        **kwargs: Any,
    ) -> None:
        num_envs = env.num_envs * ranks.world
        if batch_size <= 0 or batch_size % num_envs:
            raise ValueError(
                f"batch_size must be a multiple of num_envs, so that a minibatch holds equally "
                f"many samples of each environment: got {batch_size} with {num_envs} environments."
            )
        self.ranks = ranks
        self.first_env = ranks.rank * env.num_envs
        self.generators = env_generators(seed, range(self.first_env, self.first_env + env.num_envs))
        self._episodes: list[tuple[int, int, dict[str, Any]]] = []
        super().__init__(
            policy,
            env,
            batch_size=batch_size // ranks.world,
            # The buffer normalises and the optimizer clips, over all ranks.
            normalize_advantage=False,
            max_grad_norm=float("inf"),
            rollout_buffer_class=PerEnvRolloutBuffer,
            rollout_buffer_kwargs={"generators": self.generators, "total": ranks.sum},
            seed=seed,
            **kwargs,
        )
        env.seed(seed + self.first_env)
        choices = cast(CategoricalDistribution, self.policy.action_dist).action_dim
        self.policy.action_dist = PerEnvCategorical(choices, self.generators)
        share_gradients(self.policy.optimizer, ranks, max_grad_norm)
        describe_policy(self)

    def _excluded_save_params(self) -> list[str]:
        own = ["ranks", "first_env", "generators", "_episodes"]
        set_here = ["normalize_advantage", "max_grad_norm"]
        buffer = ["rollout_buffer_class", "rollout_buffer_kwargs"]
        return super()._excluded_save_params() + own + set_here + buffer

    def _update_info_buffer(
        self, infos: list[dict[str, Any]], dones: np.ndarray | None = None
    ) -> None:
        self._episodes += [
            (self.num_timesteps, self.first_env + i, info["episode"])
            for i, info in enumerate(infos)
            if "episode" in info
        ]

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
        continues = super().collect_rollouts(*args, **kwargs)
        assert self.ep_info_buffer is not None
        self.ep_info_buffer.extend(self.ranks.merge(self._episodes))
        self._episodes = []
        return continues

    def train(self) -> None:
        super().train()
        if self.ranks.world > 1:
            self._average_logged()

    def _average_logged(self) -> None:
        """Average the values that an update logs over all ranks."""
        logged = self.logger.name_to_value
        # Counts of updates are integers and the same everywhere.
        trained = (name for name in logged if name.startswith("train/"))
        names = sorted(name for name in trained if not isinstance(logged[name], int))
        means = np.mean(self.ranks.gather([float(logged[name]) for name in names]), axis=0)
        logged.update(zip(names, means.tolist(), strict=True))
        buffer = self.rollout_buffer
        values, returns = (
            np.concatenate(self.ranks.gather(own.flatten()))
            for own in (buffer.values, buffer.returns)
        )
        logged["train/explained_variance"] = explained_variance(values, returns)


def recorded(main: Callable[[], T]) -> Callable[[], T]:
    """Return the command with its errors recorded for torchrun, if torchrun started it."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return main
    from torch.distributed.elastic.multiprocessing.errors import record

    return cast(Callable[[], T], record(main))
