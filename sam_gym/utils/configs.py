"""Configs of runs: YAML files whose values are defaults of a command's options."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sam_gym.utils.registry import unknown_name
from sam_gym.utils.settings import check_settings

C = TypeVar("C")


def split_option(argument: str, option: str) -> list[str]:
    """Return an argument, and `OPTION=VALUE` in two."""
    return argument.split("=", 1) if argument.startswith(f"{option}=") else [argument]


def take_configs(args: Sequence[str], configs: Mapping[str, Path]) -> tuple[list[str], list[Path]]:
    """Take `--config NAME` and `--config FILE` out of a command line.

    Args:
        args: the command line.
        configs: configs by name.

    Returns:
        The rest of the command line, and the paths of the configs in order.

    Raises:
        ValueError, FileNotFoundError: an option has no value, or a config does not exist.
    """
    rest = [part for arg in args for part in split_option(arg, "--config")]
    paths = []
    while "--config" in rest:
        at = rest.index("--config")
        if at + 1 >= len(rest):
            raise ValueError("--config needs a name or the path of a YAML file.")
        paths.append(config_path(rest[at + 1], configs))
        del rest[at : at + 2]
    return rest, paths


def config_path(name: str, configs: Mapping[str, Path]) -> Path:
    """Return the path of a config by its name, or of a file.

    Raises:
        FileNotFoundError: a YAML file does not exist.
        ValueError: the name is unknown.
    """
    if name in configs:
        return configs[name]
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        raise FileNotFoundError(f"{path}: no such config file.")
    raise unknown_name("config", name, [*configs, "PATH/FILE.yaml"])


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


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of names and values; raises `ValueError` if it is anything else."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a readable YAML file ({reason}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected 'name: value' lines, got {type(content).__name__}.")
    return {str(name): value for name, value in content.items()}


def updated(config: C, content: Mapping[str, Any], path: str) -> C:
    """Return a dataclass with values of a YAML file.

    Args:
        config: a frozen dataclass, which may hold others.
        content: values by name; names of nested dataclasses may stand at the top.
        path: of the file, for messages.

    Raises:
        ValueError: an option is unknown, or a value impossible.
    """
    own: Any = config
    valid = {f.name for f in fields(own)}
    nested = [name for name in valid if is_dataclass(getattr(config, name))]
    changes: dict[str, Any] = {}
    for name, value in content.items():
        if name in nested and isinstance(value, dict):
            changes[name] = updated(changes.get(name, getattr(config, name)), value, path)
        elif name in valid:
            is_list = isinstance(value, list) and isinstance(getattr(config, name), tuple)
            changes[name] = tuple(value) if is_list else value
        else:
            home = [n for n in nested if name in {f.name for f in fields(getattr(config, n))}]
            if not home:
                inner = {f.name for n in nested for f in fields(getattr(config, n))}
                raise ValueError(f"{path}: {unknown_name('option', name, valid | inner)}")
            base = changes.get(home[0], getattr(config, home[0]))
            changes[home[0]] = updated(base, {name: value}, path)
    result: C = replace(own, **changes)
    try:
        check_settings(result)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return result
