"""The options of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from agents.policies.implicit import MAX_SEARCH, SPATIAL, check_head
from sam_gym.envs.click import SamSegConfig
from sam_gym.envs.config import EnvConfig
from sam_gym.utils.fields import documented
from sam_gym.utils.settings import (
    Count,
    Fraction,
    Natural,
    NotNegative,
    Positive,
    Seed,
    check_settings,
    whole,
)

#: Seed of the evaluation episodes during training.
VALIDATION_SEED = 1
#: Former field name -> present one; YAML files, results and checkpoints may hold either.
FORMER_NAMES = {"settings": "env_config", "views": "policy_plots"}


@documented
@dataclass(kw_only=True)
class RunOptions:
    """Environment, policy, output folder and length of the run."""

    env: str = "SamSeg-v0"
    """Environment id. It determines the environment options."""
    policy: str = "implicit"
    """Policy name."""
    out: str | None = None
    """Folder for everything that the run writes (None: runs/ENV-POLICY-SEED)."""
    overwrite: bool = False
    """Replace the run in `out`. Without --overwrite, a finished run in `out` is an error."""
    resume: bool = False
    """Resume from the newest checkpoint in `out`, bit-exact on a CPU, or start if there is none.
    The other options must be the same. Without --resume, an `out` with checkpoints is an error."""
    seed: Seed = 0
    """Seed of the environment, the policy and PPO."""
    total_timesteps: Count = 10_000
    """Environment steps to train for, divided evenly among the domains of a stream."""
    num_envs: Count = 64
    """Number of sub-environments, over all processes."""
    categories: str | None = None
    """Comma-separated categories: the only objects in scenes, the targets in coco."""
    train_images: Count = 1024
    """Number of different procedural images to train on; each is encoded once."""


@documented
@dataclass(kw_only=True)
class PPOOptions:
    """Hyperparameters of PPO and of imitation."""

    learning_rate: Positive = 1e-3
    """Adam's learning rate; falls linearly to a tenth, once per domain of a stream."""
    n_steps: Count = 16
    """Steps per sub-environment and rollout."""
    batch_size: Annotated[int, whole(2)] = 256
    """Minibatch size, over all processes; a multiple of num_envs."""
    n_epochs: Count = 4
    """Passes over each rollout."""
    gamma: Fraction = 0.8
    """Discount factor. Low, since episodes are short and every click should pay off at once."""
    gae_lambda: Fraction = 0.95
    """Lambda of generalised advantage estimation."""
    clip_range: Positive = 0.2
    """PPO's clip range."""
    ent_coef: NotNegative = 0.004
    """Weight of the entropy bonus."""
    warm_start: Natural = 0
    """Number of steps, of total_timesteps, that imitate the oracle, which sees the ground truth."""


@documented
@dataclass(kw_only=True)
class PolicyOptions:
    """Options of the policy."""

    know_category: bool = True
    """Learn an embedding of each training category. Without it, the implicit policy does not know
    its target; the explicit policy still sees CLIP's similarity map of the category's name."""
    clip: str = "clip_micro"
    """CLIP of the explicit policy: clip_micro, or a model of open_clip (ViT-B-16, ...)."""
    clip_pretrained: str | None = None
    """Weights of the CLIP: a tag of open_clip or a file (clip_micro brings its own)."""
    allow_unknown_words: bool = False
    """Accept words that clip_micro does not know. Their similarity maps carry no information."""
    temperature: Positive = 0.33
    """Temperature of the softmax that weights the maps of other categories in the explicit policy;
    a low temperature ignores them."""
    recalibrate: bool = False
    """Let the policy choose locations only; a target map, a module that learns to predict the
    target, labels the clicks (AlignSAM's semantic recalibration)."""
    search: Annotated[int, whole(0, MAX_SEARCH)] | None = None
    """Number of likeliest clicks that the trained agent decodes at each step, besides two at the
    largest errors of the mask. It plays the one whose mask agrees best with the target map, which
    predicts the target and guides the clicks that PPO tries (0: play the likeliest click, unguided;
    None: 2, or 0 with --recalibrate or --initial-mask semantic)."""
    recalibration_updates: Count | None = None
    """Updates of the target map per environment step, for --recalibrate and --search (None: 5 for
    the explicit policy, else 2)."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """Precision of the policy's features (auto: bf16-mixed on a CPU with matrix units for bfloat16,
    else 32-true); --dtype sets that of the backbone."""
    gradient_checkpointing: bool = False
    """Compute features twice in an update to save memory."""


@documented
@dataclass(kw_only=True)
class EvaluationOptions:
    """Evaluations, pictures and films."""

    held_out: str | None = None
    """Split of the final evaluation (None: the held-out split of the dataset)."""
    final_episodes: Count = 256
    """Episodes of the final evaluation, for the agent and for each baseline; one that decodes many
    times per step (confident) plays a quarter of them, at least 16. With a stream, also those of
    the evaluation after each domain, divided evenly among the domains."""
    eval_every: Count = 5_000
    """Environment steps between evaluations on the validation split."""
    eval_episodes: Count = 128
    """Episodes of each evaluation on the validation split during training."""
    policy_plots: Annotated[bool, tyro.conf.arg(aliases=("--views",))] = False
    """At each evaluation on the validation split, draw the features and action probabilities of the
    policy, into `out`/policy_plots."""
    video_every: Natural = 2_000
    """Record a held-out episode into `out`/videos every this many training episodes (0: never)."""
    pictures: bool = True
    """Draw learning_curve.png, iou_after_steps.png, episodes.gif and, with a stream, forgetting.png
    at the end. --no-pictures saves seconds; the numbers are in results.json."""


@documented
@dataclass(kw_only=True)
class TrackingOptions:
    """Checkpoints and experiment tracking."""

    checkpoint_every: Count = 5_000
    """Environment steps between checkpoints, rounded up to whole rollouts. The first one follows
    the first rollout."""
    mlflow: bool = False
    """Record the run in MLflow too (pip install 'sam-gym[mlflow]')."""
    mlflow_uri: str | None = None
    """URI of a server or a database (None: a local store in the folder mlflow beside `out`)."""
    mlflow_experiment: str = "sam-gym"
    """MLflow experiment of the run, created if it does not exist."""
    register_model: str | None = None
    """Register the finished policy under this name in MLflow's model registry."""


@documented
@dataclass(kw_only=True)
class TrainPPOConfig(RunOptions, PPOOptions, PolicyOptions, EvaluationOptions, TrackingOptions):
    """Train an agent with PPO and compare it with baselines on held-out data.

    Writes to `out`: policy.zip, results.json, learning_curve.png, iou_after_steps.png,
    episodes.gif, videos, TensorBoard logs, and checkpoints until the run is complete.

    --config NAME or --config FILE.yaml sets defaults and may be repeated.
    """

    env_config: EnvConfig = field(default_factory=lambda: SamSegConfig(obs="handle"))

    @property
    def folder(self) -> Path:
        """Folder of the run: `out`, or its default."""
        return Path(self.out or f"runs/{self.env}-{self.policy}-{self.seed}").expanduser()

    def validate(self) -> None:
        """Raise `ValueError` for values that cannot work, whatever the environment."""
        check_settings(self)
        name, updates = self.register_model, self.recalibration_updates
        if self.resume and self.overwrite:
            raise ValueError("--resume continues a run, --overwrite replaces it: pass one of them.")
        if not self.mlflow and (name or self.mlflow_uri):
            raise ValueError("--register-model and --mlflow-uri take effect with --mlflow only.")
        if name is not None and (not name.strip() or set(name) & set("/:")):
            raise ValueError(f"register_model must be a name without '/' and ':', got {name!r}.")
        if updates is not None and self.search == 0 and not self.recalibrate:
            raise ValueError(
                "--recalibration-updates takes effect with --recalibrate or --search only."
            )
        if self.warm_start > self.total_timesteps:
            raise ValueError(
                f"warm_start must be at most total_timesteps ({self.total_timesteps}), "
                f"got {self.warm_start}. Pass a smaller --warm-start."
            )


def with_present_names(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a stored config with its former field names replaced by the present ones.

    Args:
        content: a `TrainPPOConfig` as a dict, or some of its fields.
        where: the content's file, for the error message.

    Raises:
        ValueError: the config needs something that was removed.
    """
    renamed = {FORMER_NAMES.get(name, name): value for name, value in content.items()}
    check_head(renamed.pop("head", SPATIAL), where)
    return renamed


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested dicts by names with dots."""
    flattened: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flattened |= flat(value, f"{prefix}{name}.")
        else:
            flattened[prefix + name] = value
    return flattened
