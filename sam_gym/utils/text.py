"""Text that is safe to print and to draw."""

from __future__ import annotations

import re
from collections.abc import Sequence
from textwrap import shorten

#: Characters that some file system refuses in a file name.
_UNSAFE = re.compile(r'[<>:"\\|?*]')
#: Maximum length of `safe_name` in bytes: leaves room for a digest and a suffix.
_MAX_NAME = 200


def printable(text: str) -> str:
    """Escape what terminals and fonts cannot show: control characters, bytes that are no UTF-8.

    Names of files may hold them.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def listed(names: Sequence[str]) -> str:
    """Return "a", "a and b", or "a, b and c"."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, for example "1 run" or "2,000 runs"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def reason_of(error: Exception) -> str:
    """Return type and message of a library's error in one line.

    Without torch's advice to load files in a way that can run code.
    """
    message = re.split("Weights only load failed|In PyTorch 2.6", str(error))[0]
    return ": ".join(filter(None, [type(error).__name__, shorten(message, 600)]))


def safe_name(label: str) -> str:
    """Return a label as a file name that every file system takes; slashes become "__"."""
    name = "".join(c if c.isprintable() else "_" for c in label.replace("/", "__"))
    return _UNSAFE.sub("_", name).encode()[:_MAX_NAME].decode(errors="ignore")
