"""Presets of annotators: `--config NAME` or `--config FILE.yaml` gives options of `annotate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from sam_gym.utils.cli import option
from sam_gym.utils.configs import read_yaml, take_configs
from sam_gym.utils.registry import load_entry_point, unknown_name

#: Presets in the package, by name.
CONFIGS = {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.yaml"))}
#: Option that selects a way to annotate -> its options; without one of them, an agent clicks.
MODES = {
    "video": "agents.annotation.video:AnnotateVideoConfig",
    "everything": "agents.annotation.everything:AnnotateEverythingConfig",
    "semantic": "agents.annotation.semantic:AnnotateSemanticConfig",
}
_CLICKS = "agents.annotation.clicks:AnnotateConfig"


def with_presets(args: Sequence[str]) -> list[str]:
    """Return a command line with the options of its configs first, so that later ones win.

    A config has options by name, and `everything: true` or `semantic: true` for these ways.

    Raises:
        ValueError, FileNotFoundError: a config does not exist, or has an unknown option.
    """
    rest, paths = take_configs(args, CONFIGS)
    contents = {str(path): read_yaml(path) for path in paths}
    given = [word for content in contents.values() for word in _words(content)]
    named = {word.partition("=")[0] for word in (*given, *rest)}
    modes = [name for name in MODES if option(name) in named]
    kind: Any = load_entry_point(MODES[modes[0]] if modes else _CLICKS)
    valid = {*_options(kind), *modes}
    for path, content in contents.items():
        for name in content:
            if name not in valid:
                raise ValueError(f"{path}: {unknown_name('option', name, valid)}")
    return given + rest


def _words(content: dict[str, Any]) -> Iterator[str]:
    """Yield the command line of options by name."""
    for name, value in content.items():
        if isinstance(value, bool):
            yield option(name) if value else f"--no-{option(name)[2:]}"
        else:
            yield option(name)
            yield from map(str, value if isinstance(value, list) else [value])


def _options(kind: Any) -> Iterator[str]:
    """Yield the names of the fields of a dataclass, and of those in it."""
    for own in fields(kind):
        default = _default(own)
        if is_dataclass(default):
            yield from _options(default)
        else:
            yield own.name


def _default(own: Field[Any]) -> Any:
    return None if own.default_factory is MISSING else own.default_factory()
