"""Configuration of a training run: flags, and YAML files that set their defaults."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass, replace
from functools import partial
from inspect import getdoc
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from agents.policies.implicit import SPATIAL, check_head
from agents.tasks import names_by_environment, task_of
from sam_gym.envs.base_core import EnvConfig
from sam_gym.envs.click import SamSegConfig
from sam_gym.utils import cli
from sam_gym.utils.registry import unknown_name
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

#: Configs in the package, by name, as `--config` takes them.
CONFIGS = {
    path.stem: path for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
}
#: Seed of the evaluation episodes during training.
VALIDATION_SEED = 1
#: Former field name -> present one; YAML files, results and checkpoints may hold either.
FORMER_NAMES = {"settings": "env_config", "views": "policy_plots"}
EXAMPLES = """\
examples:
  python -m agents.train_ppo
  python -m agents.train_ppo --policy explicit --out runs/explicit
  python -m agents.train_ppo --dataset coco --data PATH/coco --categories person
  python -m agents.train_ppo --config alignsam --config few_clicks --seed 1
  python -m agents.train_ppo --env SamEverything-v0 --config everything
  python -m agents.train_ppo --out runs/ppo --resume
  torchrun --nproc_per_node=2 -m agents.train_ppo --num-envs 128
"""


def policy_help() -> str:
    """Return the help text of `--policy`: the policies of each environment."""
    return f"Policy name: {names_by_environment(lambda task: task.policies)}."


@dataclass(kw_only=True)
class RunOptions:
    """Environment, policy, output folder and length of the run."""

    env: str = "SamSeg-v0"
    """Environment id; it decides which environment options there are."""
    policy: Annotated[str, tyro.conf.arg(help=policy_help())] = "implicit"
    out: str | None = None
    """Folder for everything that the run writes (None: runs/ENV-POLICY-SEED)."""
    overwrite: bool = False
    """Replace the run in `out`. Without --overwrite, a finished run in `out` is an error."""
    resume: bool = False
    """Resume from the newest checkpoint in `out`, bit-exact on a CPU, or start if there is none.
    The other options must be the same. Without --resume, an `out` with checkpoints is an error."""
    seed: Seed = 0
    """Seed of the environment, the policy and PPO."""
    total_timesteps: Count = 50_000
    """Environment steps to train for, divided evenly among the domains of a stream."""
    num_envs: Count = 64
    """Number of sub-environments, over all processes."""
    categories: str | None = None
    """Comma-separated categories: the only objects in scenes, the targets in coco."""
    train_images: Count = 2048
    """Number of different procedural images to train on; each is encoded once."""


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
    """Let the policy choose locations only; a recalibration module, trained on the targets, labels
    the clicks (AlignSAM's semantic recalibration)."""
    recalibration_updates: Count | None = None
    """Updates of the recalibration module per environment step (None: 5 for the explicit policy,
    else 1)."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Precision of the policy's features; --dtype sets that of the backbone."""
    gradient_checkpointing: bool = False
    """Compute features twice in an update to save memory."""


@dataclass(kw_only=True)
class EvaluationOptions:
    """Evaluations, pictures and films."""

    held_out: str | None = None
    """Split of the final evaluation (None: the held-out split of the dataset)."""
    final_episodes: Count = 256
    """Episodes of the final evaluation, for the agent and for each baseline. With a stream, also
    those of the evaluation after each domain, divided evenly among the domains."""
    eval_every: Count = 10_000
    """Environment steps between evaluations on the validation split."""
    eval_episodes: Count = 128
    """Episodes of each evaluation on the validation split during training."""
    policy_plots: Annotated[bool, tyro.conf.arg(aliases=("--views",))] = False
    """At each evaluation on the validation split, draw the features and action probabilities of the
    policy, into `out`/policy_plots."""
    video_every: Natural = 2_000
    """Record a held-out episode into `out`/videos every this many training episodes (0: never)."""


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


#: Group of options in `--help` -> its fields, the most used first; the environment's come second.
_GROUPS: dict[str, type] = {
    "run": RunOptions,
    "PPO": PPOOptions,
    "policy": PolicyOptions,
    "evaluation": EvaluationOptions,
    "tracking": TrackingOptions,
}


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
        if updates is not None and not self.recalibrate:
            raise ValueError("--recalibration-updates takes effect with --recalibrate only.")
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


def env_of(args: Sequence[str]) -> str | None:
    """Return the environment id that `--env` gives; it decides which other options there are."""
    parts = [part for arg in args for part in _split_option(arg, "--env")]
    given = [value for option, value in pairwise(parts) if option == "--env"]
    return given[-1] if given else None


def read_config(args: Sequence[str] | None = None) -> TrainPPOConfig:
    """Return the config of the command line.

    `--config NAME` (of `CONFIGS`) or `--config FILE.yaml` sets defaults, which flags override. It
    may be repeated, for example for the agent and for the environment; later ones win.

    Raises:
        ValueError, FileNotFoundError: a config does not exist, or holds an unknown option.
    """
    given = sys.argv[1:] if args is None else args
    rest = [part for arg in given for part in _split_option(arg, "--config")]
    contents: list[tuple[str, dict[str, Any]]] = []
    while "--config" in rest:
        at = rest.index("--config")
        if at + 1 >= len(rest):
            raise ValueError("--config needs a name or the path of a YAML file.")
        path = _config_path(rest[at + 1])
        del rest[at : at + 2]
        content = _read_yaml(path)
        if any(isinstance(value, dict) and "n_timesteps" in value for value in content.values()):
            raise ValueError(
                f"{path}: a file of RL Zoo, with options by environment. Pass it to rl_zoo3.train "
                "(--conf-file), or write this command's options (--help) at the top level."
            )
        contents.append((str(path), with_present_names(content, str(path))))
    default = TrainPPOConfig()
    envs = [str(content["env"]) for _, content in contents if "env" in content]
    env = env_of(rest) or (envs[-1] if envs else default.env)
    task = task_of(env)
    env_config = task.config_class(obs="handle")
    default = replace(default, env=env, env_config=env_config, policy=task.policies[0])
    for name, content in contents:
        default = _updated(default, content, name)
    return _parsed(rest, default)


def _parsed(args: Sequence[str], default: TrainPPOConfig) -> TrainPPOConfig:
    """Return the default with the flags applied; `--help` shows options in groups."""
    parts: dict[str, Any] = {
        name: kind(**{own.name: getattr(default, own.name) for own in fields(kind)})
        for name, kind in _GROUPS.items()
    }
    # The environment's options come second.
    parts = {"run": parts["run"], "environment": default.env_config} | parts
    shown: list[Any] = [
        (
            name,
            Annotated[type(part), tyro.conf.OmitArgPrefixes],
            field(default_factory=partial(replace, part)),
        )
        for name, part in parts.items()
    ]
    kind: Any = make_dataclass("TrainPPO", shown)
    try:
        description = f"{getdoc(TrainPPOConfig)} Names: {', '.join(CONFIGS)}."
        parsed = cli.parse(kind, "python -m agents.train_ppo", args, description=description)
    except SystemExit as end:
        if not end.code:  # --help
            print(EXAMPLES)
        raise
    values = {
        f.name: getattr(getattr(parsed, n), f.name) for n in _GROUPS for f in fields(_GROUPS[n])
    }
    if parsed.environment.obs != "handle":
        raise ValueError("--obs: training observes handles. Leave it out.")
    return TrainPPOConfig(**values, env_config=parsed.environment)


def _split_option(argument: str, option: str) -> list[str]:
    """An argument, and `OPTION=VALUE` in two."""
    return argument.split("=", 1) if argument.startswith(f"{option}=") else [argument]


def _config_path(name: str) -> Path:
    """Path of a config that is in the package, or of a file."""
    if name in CONFIGS:
        return CONFIGS[name]
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        raise FileNotFoundError(f"{path}: no such config file.")
    raise unknown_name("config", name, [*CONFIGS, "PATH/FILE.yaml"])


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number, as YAML 1.2 does, and refuses names that are given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{twice[0]} is given twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a readable YAML file ({reason}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected 'name: value' lines, got {type(content).__name__}.")
    return {str(name): value for name, value in content.items()}


def _updated(config: Any, content: dict[str, Any], path: str) -> Any:
    """A dataclass with values of a YAML file; names of nested dataclasses may stand at the top."""
    valid = {f.name for f in fields(config)}
    nested = [f.name for f in fields(config) if is_dataclass(getattr(config, f.name))]
    changes: dict[str, Any] = {}
    for name, value in content.items():
        if name in nested and isinstance(value, dict):
            changes[name] = _updated(changes.get(name, getattr(config, name)), value, path)
        elif name in valid:
            changes[name] = value
        else:
            home = [n for n in nested if name in {f.name for f in fields(getattr(config, n))}]
            if not home:
                inner = {f.name for n in nested for f in fields(getattr(config, n))}
                raise ValueError(f"{path}: {unknown_name('option', name, valid | inner)}")
            base = changes.get(home[0], getattr(config, home[0]))
            changes[home[0]] = _updated(base, {name: value}, path)
    updated = replace(config, **changes)
    try:
        check_settings(updated)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return updated
