"""Read the config of a training run: flags, and YAML files that set their defaults."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass, replace
from functools import partial
from inspect import getdoc
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

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
from sam_gym.utils.registry import unknown_name
from sam_gym.utils.settings import check_settings

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
    return f"Policy name: {names_by_environment(lambda task: task.policies)}."


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
