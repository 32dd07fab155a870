"""Check settings against the annotations of a dataclass or a function: types, ranges, finiteness.

    batch_size: Count = 16
    grid: Annotated[int, whole(2, 64)] = 16
    iou_target: Annotated[float, real(above=0, high=1)] | None = None

Ranges are tyro's constructor specifications, so `--help` shows them.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import os
import typing
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, is_dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
)

import numpy as np
from tyro.constructors import PrimitiveConstructorSpec

from sam_gym.utils.registry import unknown_name

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Range(PrimitiveConstructorSpec[Any]):
    """A range of numbers: metadata of `Annotated`, made by `whole` and `real`."""

    text: str = ""
    """The range in messages."""


def whole(low: int, high: int | None = None) -> Range:
    """Return the range of an int, bounds included."""
    return _range(int, low, high)


def real(
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> Range:
    """Return the range of a finite float: `low` and `high` belong to it, the others do not."""
    return _range(float, low, high, above, below)


def _range(kind: Any, low: Any, high: Any = None, above: Any = None, below: Any = None) -> Range:
    bounds = [
        (low, ">=", operator.ge, f"at least {low}"),
        (above, ">", operator.gt, "positive" if above == 0 else f"above {above}"),
        (high, "<=", operator.le, f"at most {high}"),
        (below, "<", operator.lt, f"below {below}"),
    ]
    bounds = [own for own in bounds if own[0] is not None]
    both = low is not None and high is not None
    return Range(
        nargs=1,
        metavar=kind.__name__.upper() + ",".join(f"{sign}{bound}" for bound, sign, _, _ in bounds),
        instance_from_str=lambda args: kind(args[0]),
        is_instance=lambda value: (
            _fits(value, kind) and all(within(value, bound) for bound, _, within, _ in bounds)
        ),
        str_from_instance=lambda value: [str(value)],
        text=f"from {low} to {high}" if both else " and ".join(own[3] for own in bounds),
    )


Count = Annotated[int, whole(1)]
Natural = Annotated[int, whole(0)]
Seed = Annotated[int, whole(0, 2**32 - 1)]
Positive = Annotated[float, real(above=0)]
NotNegative = Annotated[float, real(0)]
Fraction = Annotated[float, real(0, 1)]


def check_settings(config: Any, spell: Callable[[str], str] = str) -> None:
    """Check the fields of a dataclass, and of dataclasses in it.

    Args:
        config: an instance of a dataclass.
        spell: a field's name -> how messages call it.

    Raises:
        ValueError: a value has another type than its field, is out of range, NaN or infinite.
    """
    for name, hint in _hints(cast(Any, type(config))).items():
        if hasattr(config, name):
            _check(spell(name), hint, getattr(config, name), spell)


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Check arguments that a function or a class will be called with, as `check_settings` does.

    Paths pass as text, sets and arrays as lists.
    """
    try:
        takes = cast(Any, function).__init__ if isinstance(function, type) else function
        hints = _hints(takes)
    except NameError:  # hints of somebody else, for type checkers only
        return
    for name, value in arguments.items():
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        elif isinstance(value, Set | np.ndarray):
            value = list(value)
        if name in hints:
            _check(name, hints[name], value, str)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Check the arguments of each call, as `check_settings` does (decorator)."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        hints = _hints(function)
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if name in hints and signature.parameters[name].kind not in (
                inspect.Parameter.VAR_POSITIONAL,
                inspect.Parameter.VAR_KEYWORD,
            ):
                _check(name, hints[name], value, str)
        return function(*args, **kwargs)

    return call


_NAMES = {
    bool: "True or False",
    Callable: "a function",
    dict: "a dict",
    float: "a finite number",
    int: "a whole number",
    list: "a list",
    tuple: "a list",
    Sequence: "a list",
    str: "text",
    NoneType: "None",
}


@functools.cache
def _hints(owner: Any) -> dict[str, Any]:
    return typing.get_type_hints(owner, include_extras=True)


def _check(name: str, hint: Any, value: Any, spell: Callable[[str], str]) -> None:
    if is_dataclass(value) and not isinstance(value, type):
        check_settings(value, spell)
    if _fits(value, hint):
        return
    members = _members(hint)
    for member in members:
        kinds = _kinds(member, value) or ()
        for kind, item in zip(kinds, value if kinds else (), strict=True):
            _check(name, kind, item, spell)
        if get_origin(member) is Literal and isinstance(value, str):
            raise unknown_name(name, value, get_args(member))
        if get_origin(member) is Annotated and _fits(value, get_args(member)[0]):
            raise ValueError(f"{name} must be {_ranges(member)[0].text}, got {value!r}.")
    raise ValueError(f"{name} must be {' or '.join(map(_text, members))}, got {value!r}.")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; values of dicts, and types of objects, are not checked."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return all(own.is_instance(value) for own in _ranges(hint)) and _fits(value, args[0])
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in args)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in args)
    if origin in (tuple, list, Sequence):
        kinds = _kinds(hint, value)
        return kinds is not None and all(map(_fits, value, kinds))
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(_fits(key, args[0]) for key in value)
    if origin is Callable:
        return callable(value)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if hint is bool:
        return isinstance(value, (bool, np.bool_))
    if hint in (str, NoneType) or is_dataclass(hint):
        return isinstance(value, hint)
    return True


def _members(hint: Any) -> tuple[Any, ...]:
    """Members of a union, or the type itself."""
    if get_origin(hint) is Annotated and not _ranges(hint):
        return _members(get_args(hint)[0])
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _kinds(hint: Any, value: Any) -> Sequence[Any] | None:
    """Types of the items of a list or tuple, or None if the value has another type or length."""
    origin, kinds = get_origin(hint), get_args(hint)
    if origin not in (tuple, list, Sequence) or not isinstance(value, (list, tuple)):
        return None
    if origin is not tuple or Ellipsis in kinds:
        return kinds[:1] * len(value)
    return kinds if len(kinds) == len(value) else None


def _ranges(hint: Any) -> list[Range]:
    return [own for own in get_args(hint)[1:] if isinstance(own, Range)]


def _text(hint: Any) -> str:
    """A type in messages."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _text(args[0])
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is tuple and Ellipsis not in args:
        return f"{len(args)} values"
    return _NAMES.get(origin or hint) or (origin or hint).__name__
