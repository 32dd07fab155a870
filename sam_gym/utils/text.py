"""Text that is safe to print and to draw."""

from __future__ import annotations


def printable(text: str) -> str:
    """Escape what terminals and fonts cannot show: control characters, bytes that are no UTF-8.

    Names of files may hold them.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
