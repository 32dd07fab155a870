"""Registries; an unknown name is an error that lists the valid names."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")

#: Environment variable: modules, separated by commas, that commands import before they start.
PLUGINS = "SAM_GYM_PLUGINS"
#: Names that an error lists; of more, it lists the nearest. Datasets may have thousands of classes.
_LISTED = 100
_NEAREST = 10


def unknown_name(kind: str, name: object, valid: Iterable[str]) -> ValueError:
    """Return the error for an unknown name, with valid names and the nearest match."""
    names = sorted(valid)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(names)
    if len(names) > _LISTED:
        nearest = difflib.get_close_matches(str(name), names, n=_NEAREST, cutoff=0.0)
        listed = f"{', '.join(nearest)}, and {len(names) - len(nearest):,} others"
    return ValueError(f"Unknown {kind} {name!r}.{hint} Valid names: {listed}.")


def check_choice(kind: str, value: object, valid: Iterable[object]) -> None:
    """Raise `unknown_name` unless `value` is one of the valid values."""
    names = list(valid)
    if value not in names:
        raise unknown_name(kind, value, map(str, names))


#: "module:attribute"; a name on the Hugging Face hub ("hf:OWNER/NAME") has a slash.
_ENTRY_POINT = re.compile(r"[^\W\d]\w*(\.\w+)*:[^\W\d]\w*(\.\w+)*")


def is_entry_point(name: object) -> bool:
    """Return whether a name has the form "module:attribute"."""
    return isinstance(name, str) and _ENTRY_POINT.fullmatch(name) is not None


def import_named(module: str) -> Any:
    """Import and return a module that a person has named.

    Raises:
        ValueError: there is no such module.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # of an import in the module
        raise ValueError(
            f"No module {module!r} is found. Run where it lies, or put its folder in PYTHONPATH."
        ) from error


def load_entry_point(entry_point: str) -> Any:
    """Import and return the object that "module:attribute" names.

    Raises:
        ValueError: there is no such module, or it has no such attribute.
    """
    module, _, attribute = entry_point.partition(":")
    found = import_named(module)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise unknown_name(f"attribute of {module!r}", attribute, _public(found))
        found = getattr(found, part)
    return found


def _public(found: Any) -> list[str]:
    return [name for name in dir(found) if not name.startswith("_")]


class Registry(Generic[T]):
    """Maps names to values; `get` of an unknown name raises `ValueError` naming the nearest one.

    Args:
        kind: what the values are, for messages.
        adopt: makes a value of what an entry point "module:attribute" names, which then is a name
            like any other, in worker processes too; raises `ValueError` if it is of another kind.
            Takes the object and the entry point. None: entry points are unknown names.
    """

    def __init__(self, kind: str, adopt: Callable[[Any, str], T] | None = None) -> None:
        self.kind, self._adopt = kind, adopt
        self._items: dict[str, T] = {}
        #: Values of entry points; listings leave them out.
        self._adopted: dict[str, T] = {}

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
        """Return the value of a name; that of an entry point is imported."""
        if name in self._items:
            return self._items[name]
        if self._adopt is None or not is_entry_point(name):
            raise unknown_name(self.kind, name, self._items)
        if name not in self._adopted:
            self._adopted[name] = self._adopt(load_entry_point(name), name)
        return self._adopted[name]

    def get_from_file(self, name: str) -> T:
        """Return the value of a name that a file holds: it may not import modules.

        Raises:
            ValueError: the name is unknown, or its module is not imported yet.
        """
        module = str(name).partition(":")[0]
        if name not in self._items and is_entry_point(name) and module not in sys.modules:
            raise ValueError(
                f"The {self.kind} {name!r} is code outside of the file, and a file may not import "
                f"it. Import {module!r} first (commands: set {PLUGINS}={module})."
            )
        return self.get(name)

    def name_of(self, item: object) -> str | None:
        """Return the name of a value, or None if it has none."""
        known = {**self._items, **self._adopted}
        return next((name for name, own in known.items() if own is item), None)

    def __contains__(self, name: object) -> bool:
        return name in self._items or (self._adopt is not None and is_entry_point(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._items))

    def values(self) -> tuple[T, ...]:
        return tuple(item for _, item in self.items())

    def items(self) -> tuple[tuple[str, T], ...]:
        return tuple(sorted(self._items.items()))
