"""Registries; an unknown name is an error that lists the valid names."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


def unknown_name(kind: str, name: object, valid: Iterable[str]) -> ValueError:
    """Return the error for an unknown name, with valid names and the nearest match."""
    names = sorted(valid)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"Unknown {kind} {name!r}.{hint} Valid names: {', '.join(names)}.")


def check_choice(kind: str, value: object, valid: Iterable[object]) -> None:
    """Raise `unknown_name` unless `value` is one of the valid values."""
    names = list(valid)
    if value not in names:
        raise unknown_name(kind, value, map(str, names))


def load_entry_point(entry_point: str) -> Any:
    """Import and return the object that "module:attribute" names."""
    module, _, attribute = entry_point.partition(":")
    return getattr(importlib.import_module(module), attribute)


class Registry(Generic[T]):
    """Maps names to values; `get` of an unknown name raises `ValueError` naming the nearest one."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def add(self, name: str, item: T) -> T:
        """Add `item` under `name`; a name can be taken only once."""
        if name in self._items:
            raise ValueError(f"{self.kind} {name!r} is registered already.")
        self._items[name] = item
        return item

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of `add`."""
        return lambda item: self.add(name, item)

    def get(self, name: str) -> T:
        if name not in self._items:
            raise unknown_name(self.kind, name, self._items)
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._items))

    def values(self) -> tuple[T, ...]:
        return tuple(item for _, item in self.items())

    def items(self) -> tuple[tuple[str, T], ...]:
        return tuple(sorted(self._items.items()))
