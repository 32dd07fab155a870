"""Tune PPO's hyperparameters with Optuna, on validation images (pip install optuna).

python examples/tune_agent.py
"""

from __future__ import annotations

from pathlib import Path

import optuna
import tyro

from agents.ppo.config import TrainPPOConfig
from agents.ppo.run import train


def main(
    trials: int = 20,
    total_timesteps: int = 10_000,
    num_envs: int = 64,
    episodes: int = 128,
    out: Path = Path("runs/tuning"),
) -> None:
    """Train one agent per trial; maximise its mean IoU on the validation split.

    Args:
        trials: Number of agents to train. An interrupted study continues with the next one.
        total_timesteps: Environment steps of each.
        num_envs: Number of sub-environments.
        episodes: Validation episodes per agent.
        out: Folder of the study and of the runs.
    """

    def objective(trial: optuna.Trial) -> float:
        config = TrainPPOConfig(
            env="SamSeg-v0",
            learning_rate=trial.suggest_float("learning_rate", 1e-4, 3e-3, log=True),
            n_steps=2 ** trial.suggest_int("n_steps_pow", 3, 6),
            batch_size=num_envs * 2 ** trial.suggest_int("batch_pow", 1, 3),
            n_epochs=trial.suggest_int("n_epochs", 2, 8),
            gamma=1 - trial.suggest_float("one_minus_gamma", 0.01, 0.5, log=True),
            ent_coef=trial.suggest_float("ent_coef", 1e-4, 0.03, log=True),
            total_timesteps=total_timesteps,
            num_envs=num_envs,
            eval_every=total_timesteps,
            eval_episodes=episodes,
            final_episodes=1,  # those are for the report of the best agent
            video_every=0,
            pictures=False,
            out=str(out / f"trial-{trial.number}"),
            overwrite=True,
        )
        _, iou = train(config)["eval_curve"][-1]
        return float(iou)

    out.mkdir(parents=True, exist_ok=True)
    journal = optuna.storages.journal.JournalFileBackend(str(out / "study.log"))
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(journal),
        study_name="SamSeg-v0",
        load_if_exists=True,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=0),
    )
    study.optimize(objective, trials)
    best = study.best_trial
    print(f"best: trial {best.number}, mean IoU {best.value:.2f}, {best.params}")


if __name__ == "__main__":
    tyro.cli(main)
