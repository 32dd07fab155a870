"""Settings of a training run: flags, and YAML files for what belongs together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tyro
import yaml
from gymnasium.envs.registration import load_env_creator

from sam_gym import ENVIRONMENTS
from sam_gym.envs.base_core import EnvConfig
from sam_gym.envs.click import ClickConfig, SamSegConfig
from sam_gym.envs.everything import EverythingConfig
from sam_gym.utils.registry import unknown_name

#: Configs in the package, by name, as `--config` takes them.
CONFIGS = {
    path.stem: path for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
}

#: Class of settings -> the policies that play such environments; the first one is the default.
PLAYERS: dict[type[EnvConfig], tuple[str, ...]] = {
    ClickConfig: ("implicit", "explicit"),
    EverythingConfig: ("everything",),
}


@dataclass
class Config:
    """Train an agent with PPO and compare it with baselines on held-out data.

    Writes to `out`: policy.zip, results.json, learning_curve.png, iou_after_steps.png,
    episodes.gif, videos, TensorBoard logs, and checkpoints until it is done.

    --config NAME or FILE.yaml sets defaults, and may be repeated. Names: explicit, alignsam,
    alignsam_explicit, everything (agents); few_clicks, instance (environments).
    """

    env: str = "SamSeg-v0"
    """Environment id."""
    policy: str = "implicit"
    """Policy name: implicit (knows a category by its number) or explicit (told in words); of
    SamEverything: everything. The default is the first that plays --env."""
    know_category: bool = True
    """Let the policy know the categories of its training by number (implicit), or its words by
    themselves, beside their maps (explicit)."""
    clip: str = "clip_micro"
    """CLIP of the explicit policy: clip_micro, or a model of open_clip (ViT-B-16, ...)."""
    clip_pretrained: str | None = None
    """Its weights: a tag of open_clip or a file (clip_micro brings its own)."""
    allow_unknown_words: bool = False
    """Take words that clip_micro does not know, to try out a training; their maps mean nothing."""
    temperature: float = 0.33
    """The lower, the less the explicit policy sees of words that are not asked for."""
    head: str = "spatial"
    """Action head: spatial (logits read off the feature map) or flat (one linear layer)."""
    recalibrate: bool = False
    """The policy chooses places only; a module that learns from the targets labels the clicks
    (AlignSAM's semantic recalibration)."""
    recalibration_updates: int | None = None
    """Its updates per environment step (default: 1, for the explicit policy 5)."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Precision of the policy's features; that of the backbone is --dtype."""
    gradient_checkpointing: bool = False
    """Less memory in an update, for features that are computed twice."""
    warm_start: int = 0
    """First steps, of total_timesteps, that go to imitating the oracle, who sees the truth."""
    out: str = "runs/ppo"
    """Folder for everything that the run writes."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`, with the same settings, as if the run had never
    stopped. Without it, an `out` that holds an unfinished run is an error."""
    seed: int = 0
    """Seed of the environment, the policy and PPO."""
    total_timesteps: int = 50_000
    """Environment steps to train for, shared evenly by the domains of a stream."""
    num_envs: int = 64
    """Environments side by side, over all processes."""
    train_images: int = 2048
    """How many different scenes or rooms are trained on; each is encoded once."""
    categories: str | None = None
    """Comma-separated categories: the only things in scenes, the things to segment of coco."""
    held_out: str | None = None
    """Split to report on (default: val for coco, test for all others)."""
    n_steps: int = 16
    """Steps per environment and rollout."""
    batch_size: int = 256
    """Minibatch size, over all processes; a multiple of num_envs."""
    n_epochs: int = 4
    """Passes over each rollout."""
    learning_rate: float = 1e-3
    """Adam's learning rate; falls linearly to a tenth, in each domain of a stream anew."""
    gamma: float = 0.8
    """Discount; an episode is short and a click should pay at once."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    clip_range: float = 0.2
    """PPO's clip range."""
    ent_coef: float = 0.004
    """Weight of the entropy bonus."""
    eval_every: int = 10_000
    """Environment steps between evaluations on validation data."""
    eval_episodes: int = 128
    """Episodes of each of those evaluations."""
    views: bool = False
    """Draw what the policy sees at each of those evaluations, into `out`/views."""
    video_every: int = 2_000
    """Finished training episodes between films of the policy in a held-out episode, into
    `out`/videos; 0 for none."""
    final_episodes: int = 256
    """Episodes of the final evaluation of the agent and of every baseline, and of that after each
    domain of a stream; the domains share them evenly."""
    checkpoint_every: int = 5_000
    """Environment steps between checkpoints, rounded up to whole rollouts."""
    mlflow: bool = False
    """Record the run in MLflow too (pip install 'sam-gym[mlflow]')."""
    mlflow_uri: str | None = None
    """Of a server or a database (default: a local store in the folder mlflow beside `out`)."""
    mlflow_experiment: str = "sam-gym"
    """Experiment that the run belongs to; made if there is none."""
    register_model: str | None = None
    """Name under which MLflow's model registry gets the finished policy."""
    settings: Annotated[EnvConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: SamSegConfig(obs="handle")
    )


def settings_class(env_id: str) -> type[EnvConfig]:
    """Class of the settings that a registered environment takes.

    Raises:
        ValueError: there is no such environment.
    """
    if env_id not in ENVIRONMENTS:
        raise unknown_name("environment", env_id, ENVIRONMENTS)
    scalar, _ = ENVIRONMENTS[env_id]
    return cast(Any, load_env_creator(scalar)).config_class


def players_of(kind: type[EnvConfig]) -> tuple[str, ...]:
    """Names of the policies that play environments with such settings, the default first."""
    return next(names for base, names in PLAYERS.items() if issubclass(kind, base))


def check_plays(policy: str, env_id: str) -> None:
    """Raise `ValueError` for a policy that is made for other environments.

    Args:
        policy: its name.
        env_id: the environment that it is to play.
    """
    own = players_of(settings_class(env_id))
    if policy not in own and any(policy in names for names in PLAYERS.values()):
        raise ValueError(
            f"The policy {policy!r} does not play {env_id}; what does: {', '.join(own)}. Leave "
            "--policy out, or pass another --env."
        )


def env_of(args: Sequence[str]) -> str | None:
    """Environment id that `--env` gives, which says what other options there are."""
    parts = [part for arg in args for part in _split_option(arg, "--env")]
    given = [value for option, value in pairwise(parts) if option == "--env"]
    return given[-1] if given else None


def read_config(args: Sequence[str] | None = None) -> Config:
    """The config of the command line.

    `--config NAME` (of `CONFIGS`) or `--config FILE.yaml` sets defaults, which flags override. It
    may be repeated, for example for the agent and for the environment; later ones win.

    Raises:
        ValueError, FileNotFoundError: a config is not there, or says what there is no setting for.
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
        content = yaml.safe_load(path.read_text()) or {}
        if not isinstance(content, dict):
            raise ValueError(f"{path}: expected 'name: value' lines, got {type(content).__name__}.")
        contents.append((str(path), content))
    default = Config()
    envs = [str(content["env"]) for _, content in contents if "env" in content]
    env = env_of(rest) or (envs[-1] if envs else default.env)
    kind = settings_class(env)
    default = replace(default, settings=kind(obs="handle"), policy=players_of(kind)[0])
    for name, content in contents:
        default = _updated(default, content, name)
    return tyro.cli(Config, args=rest, default=default)


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


def _updated(config: Any, content: dict[str, Any], path: str) -> Any:
    """A dataclass with values of a YAML file; names of nested dataclasses may stand at the top."""
    valid = {f.name for f in fields(config)}
    nested = [f.name for f in fields(config) if is_dataclass(getattr(config, f.name))]
    changes: dict[str, Any] = {}
    for name, value in content.items():
        if name in nested and isinstance(value, dict):
            changes[name] = _updated(changes.get(name, getattr(config, name)), value, path)
        elif name in valid:
            changes[name] = _checked(name, getattr(config, name), value, path)
        else:
            home = [n for n in nested if name in {f.name for f in fields(getattr(config, n))}]
            if not home:
                inner = {f.name for n in nested for f in fields(getattr(config, n))}
                raise ValueError(f"{path}: {unknown_name('setting', name, valid | inner)}")
            base = changes.get(home[0], getattr(config, home[0]))
            changes[home[0]] = _updated(base, {name: value}, path)
    return replace(config, **changes)


def _checked(name: str, default: Any, value: Any, path: str) -> Any:
    """A value of a YAML file, of the type of the default; YAML takes 1e-4 for a text."""
    if isinstance(default, float) and isinstance(value, (int, str)) and value is not True:
        with suppress(ValueError):
            value = float(value)
    if default is not None and value is not None and type(value) is not type(default):
        kind = type(default).__name__
        raise ValueError(f"{path}: {name} must be of type {kind}, got {value!r}.")
    return value
