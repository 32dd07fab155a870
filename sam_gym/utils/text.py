"""Text that is safe to print and to draw."""

from __future__ import annotations

import re
from textwrap import shorten


def printable(text: str) -> str:
    """Escape what terminals and fonts cannot show: control characters, bytes that are no UTF-8.

    Names of files may hold them.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def reason_of(error: Exception) -> str:
    """Return type and message of a library's error in one line.

    Without torch's advice to load files in a way that can run code.
    """
    message = re.split("Weights only load failed|In PyTorch 2.6", str(error))[0]
    return ": ".join(filter(None, [type(error).__name__, shorten(message, 600)]))
