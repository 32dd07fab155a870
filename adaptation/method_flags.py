"""Command-line flags for the options of methods, generated from their dataclasses.

An option FIELD of METHOD has the flags `--METHOD-FIELD` and, where no other method has a field of
that name, `--FIELD`. Methods that inherit an option from one dataclass share the flag `--FIELD`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import field, fields, make_dataclass
from typing import Annotated, Any, get_type_hints

import tyro

import adaptation.strategies  # noqa: F401  (registers the methods)
from adaptation.combined import CombinedOptions
from adaptation.strategy import STRATEGIES
from sam_gym.utils.fields import field_docs


def method_flags(methods: Iterable[str]) -> type[Any]:
    """Make a dataclass, for tyro, of all options of some methods."""
    declared: dict[tuple[type[Any], str], list[str]] = {}
    for method in dict.fromkeys(part for name in methods for part in name.split("+")):
        options = STRATEGIES.get(method).Options
        for name in (each.name for each in fields(options)):
            owner = next(c for c in options.__mro__ if name in inspect.get_annotations(c))
            declared.setdefault((owner, name), []).append(method)
    names = [name for _, name in declared]
    flags = []
    for (owner, name), own in declared.items():
        shared = len(own) > 1
        short = [f"--{name.replace('_', '-')}"] if names.count(name) == 1 and not shared else []
        text = field_docs(owner).get(name, name) + (f" ({', '.join(own)})" if shared else "")
        kind: Any = get_type_hints(owner, include_extras=True)[name]
        flag = Annotated[kind, tyro.conf.arg(help=text, aliases=short)]
        (default,) = (each for each in fields(owner) if each.name == name)
        value = field(default=default.default, default_factory=default.default_factory)
        flags.append((name if shared else _prefixed(own[0], name), flag, value))
    return make_dataclass("MethodFlags", flags, frozen=True)


def options_from_flags(flags: Any, method: str) -> Any:
    """The `Options` of a method from an instance of `method_flags`."""
    if "+" in method:
        return CombinedOptions({n: options_from_flags(flags, n) for n in method.split("+")})
    options = STRATEGIES.get(method).Options
    given = vars(flags)
    return options(
        **{
            each.name: given.get(_prefixed(method, each.name), given.get(each.name))
            for each in fields(options)
        }
    )


def _prefixed(method: str, name: str) -> str:
    return f"{method}_{name}".replace("-", "_")
