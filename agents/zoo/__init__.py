"""RL Zoo on sam-gym: `--gym-packages agents.zoo --conf-file agents.zoo`.

The environments of `ppo.yml` are registered, and PPO is tuned (`-optimize`) over ranges for short
episodes. docs/guides/tuning.md has the commands.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from stable_baselines3 import PPO

import sam_gym  # noqa: F401  (registers the environments)
from agents.ppo.callbacks import PinRolloutsCallback
from agents.ppo.distributed import describe_policy
from sam_gym.utils.configs import read_yaml

try:
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
    from rl_zoo3.utils import SimpleLinearSchedule
except ImportError as error:
    raise ImportError(f"RL Zoo is not installed: pip install 'sam-gym[zoo]' ({error}).") from error

if TYPE_CHECKING:
    import optuna

#: Environment id -> hyperparameters, as RL Zoo reads them of a package.
hyperparams = read_yaml(Path(__file__).parent / "ppo.yml")


class ZooCallback(PinRolloutsCallback):
    """Lets a model of RL Zoo learn from handles, and be loaded by sam-gym's commands."""

    def _init_callback(self) -> None:
        super()._init_callback()
        describe_policy(cast(PPO, self.model))


def sample_ppo(trial: optuna.Trial, *_: Any) -> dict[str, Any]:
    """Sample the hyperparameters of a trial.

    RL Zoo's own samples have discount factors for long episodes, and replace `policy_kwargs`.
    """
    params = {
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 3e-3, log=True),
        "n_steps_pow": trial.suggest_int("n_steps_pow", 5, 8),
        "batch_size_pow": trial.suggest_int("batch_size_pow", 5, 8),
        "n_epochs": trial.suggest_int("n_epochs", 2, 10),
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.01, 0.5, log=True),
        "one_minus_gae_lambda": trial.suggest_float("one_minus_gae_lambda", 0.01, 0.5, log=True),
        "ent_coef": trial.suggest_float("ent_coef", 1e-4, 0.03, log=True),
        "clip_range": trial.suggest_float("clip_range", 0.1, 0.3),
        "max_grad_norm": trial.suggest_float("max_grad_norm", 0.3, 2.0),
    }
    return convert_ppo(params) | {"learning_rate": SimpleLinearSchedule(params["learning_rate"])}


def convert_ppo(params: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a trial as hyperparameters of `ppo.yml`, for `--trial-id`."""
    own: dict[str, Any] = {"learning_rate": f"lin_{params['learning_rate']}"}
    for name, value in params.items():
        if name.startswith("one_minus_"):
            own[name.removeprefix("one_minus_")] = 1 - value
        elif name.endswith("_pow"):
            own[name.removesuffix("_pow")] = 2**value
        elif name not in own:
            own[name] = value
    return own


HYPERPARAMS_SAMPLER["ppo"] = sample_ppo
HYPERPARAMS_CONVERTER["ppo"] = convert_ppo
