"""Markdown in which names of others stay text: no HTML, no links, no ends of code."""

from __future__ import annotations

import html
import re
from itertools import groupby

#: Characters with a meaning in Markdown; between spaces, some have none.
_SPECIAL = re.compile(r"[\\`\[\]|]|(?<=\S)[*_~]|[*_~](?=\S)")


def text(value: object) -> str:
    """Return a value as one line of text, escaped."""
    return _SPECIAL.sub(r"\\\g<0>", html.escape(one_line(value), quote=False))


def code(value: object) -> str:
    """Return a value as a code span."""
    line = one_line(value)
    ticks = "`" * (_longest_run(line) + 1)
    pad = " " if line[:1] == "`" or line[-1:] == "`" else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def block(content: str, language: str = "") -> str:
    """Return lines as a code block."""
    ticks = "`" * max(3, _longest_run(content) + 1)
    return f"{ticks}{language}\n{content}\n{ticks}"


def one_line(value: object) -> str:
    """Return a value as text with single spaces, and without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def _longest_run(content: str) -> int:
    """Return the length of the longest run of backticks."""
    return max((len(list(run)) for char, run in groupby(content) if char == "`"), default=0)
