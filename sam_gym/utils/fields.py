"""Docstrings of dataclasses that list the fields, so that `help(SamSegConfig)` explains them."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import MISSING, Field, fields
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

C = TypeVar("C", bound=type)


def documented(cls: C) -> C:
    """Add the fields to the docstring of a dataclass (class decorator, above `@dataclass`).

    The description of a field is the docstring below it, which only source code has, or the `help`
    of its `tyro.conf.arg`. It is looked up when somebody asks for the class's docstring.
    """
    cls.__doc__ = _Docstring(cls.__doc__ or "")  # type: ignore[assignment]
    return cls


def text_of(cls: type) -> str:
    """Return the docstring of a dataclass without the fields, for the `--help` of a command."""
    doc = vars(cls)["__doc__"]
    return inspect.cleandoc(doc.text if isinstance(doc, _Docstring) else doc)


def field_docs(cls: type) -> dict[str, str]:
    """Return the description of each field of a dataclass that has one, on one line."""
    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if "__dataclass_fields__" in vars(owner):
            docs |= _in_source(owner)
    for name, hint in get_type_hints(cls, include_extras=True).items():
        parts = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        for part in parts:
            if isinstance(getattr(part, "help", None), str):
                docs[name] = part.help
    return {name: " ".join(doc.split()) for name, doc in docs.items()}


@lru_cache(maxsize=256)  # to parse a module takes longer than the rest of a command line
def _in_source(cls: type) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # made at run time
        return {}
    body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
    return {
        item.target.id: str(below.value.value)
        for item, below in pairwise(body)
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }


class _Docstring:
    """The docstring of a class: its text, then its fields."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __get__(self, instance: Any, owner: type) -> str:
        docs = field_docs(owner)
        lines = [_described(own, docs[own.name]) for own in fields(owner) if own.name in docs]
        return "\n\n".join([inspect.cleandoc(self.text), "\n".join(["Attributes:", *lines])])


def _described(own: Field[Any], doc: str) -> str:
    default = "" if own.default is MISSING else f" (default {own.default!r})"
    return textwrap.fill(
        f"{own.name}{default}: {doc}",
        width=96,
        initial_indent="    ",
        subsequent_indent=" " * 8,
        break_on_hyphens=False,
    )
