"""Read the config of a training run: flags, and YAML files that set their defaults."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import tyro

from agents.ppo.config import (
    EvaluationOptions,
    PolicyOptions,
    PPOOptions,
    RunOptions,
    TrackingOptions,
    TrainPPOConfig,
    with_present_names,
)
from agents.tasks import names_by_environment, task_of
from sam_gym.utils import cli
from sam_gym.utils.configs import read_yaml, split_option, take_configs, updated
from sam_gym.utils.fields import text_of

#: Configs in the package, by name, as `--config` takes them.
CONFIGS = {
    path.stem: path for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
}
EXAMPLES = """\
examples:
  python -m agents.train_ppo
  python -m agents.train_ppo --policy explicit --out runs/explicit
  python -m agents.train_ppo --dataset coco --data PATH/coco --categories person
  python -m agents.train_ppo --config alignsam --config few_clicks --seed 1
  python -m agents.train_ppo --env SamEverything-v0 --config everything
  python -m agents.train_ppo --env SamVideo-v0 --config video_memory
  python -m agents.train_ppo --out runs/ppo --resume
  torchrun --nproc_per_node=2 -m agents.train_ppo --num-envs 128
"""


#: Group of options in `--help` -> its fields, the most used first; the environment's come second.
_GROUPS: dict[str, type] = {
    "run": RunOptions,
    "PPO": PPOOptions,
    "policy": PolicyOptions,
    "evaluation": EvaluationOptions,
    "tracking": TrackingOptions,
}


def policy_help() -> str:
    """Return the help text of `--policy`: the policies of each environment."""
    return f"Policy name: {names_by_environment(lambda task: task.policies)}; or module:Class."


def env_of(args: Sequence[str]) -> str | None:
    """Return the environment id that `--env` gives; it decides which other options there are."""
    parts = [part for arg in args for part in split_option(arg, "--env")]
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
    rest, paths = take_configs(given, CONFIGS)
    contents: list[tuple[str, dict[str, Any]]] = []
    for path in paths:
        content = read_yaml(path)
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
        default = updated(default, content, name)
    return _parsed(rest, default)


def _parsed(args: Sequence[str], default: TrainPPOConfig) -> TrainPPOConfig:
    """Return the default with the flags applied; `--help` shows options in groups."""
    # Tasks know the policies.
    policy = (("policy", Annotated[str, tyro.conf.arg(help=policy_help())], default.policy),)
    run_options = make_dataclass("RunOptions", policy, bases=(RunOptions,), kw_only=True)
    run_options.__doc__ = RunOptions.__doc__
    kinds = _GROUPS | {"run": run_options}
    parts: dict[str, Any] = {
        name: kind(**{own.name: getattr(default, own.name) for own in fields(kind)})
        for name, kind in kinds.items()
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
        description = f"{text_of(TrainPPOConfig)} Names: {', '.join(CONFIGS)}."
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
