"""A page of all messages of exceptions and warnings: a search for one leads to its remedy."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGES = ("sam_gym", "agents", "adaptation", "benchmarks")
#: Stands for the values in a message.
ANYTHING = "…"


class Message(NamedTuple):
    """A message: the module and the exception that it belongs to, and its text."""

    module: str
    kind: str
    text: str

    def matches(self, printed: str) -> bool:
        """Return whether a printed text is this message; it may have "…" for values, too."""
        wanted, found = (" ".join(text.split()) for text in (self.text, printed))
        parts = wanted.split(ANYTHING)
        if sum(len(part.strip()) for part in parts) < 12:  # would match almost anything
            return False
        pattern = ".*?".join(map(re.escape, parts))
        return re.fullmatch(pattern, found, re.DOTALL) is not None


def messages() -> list[Message]:
    """Return all messages of exceptions and warnings, by module."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found += _messages_of(module, ast.parse(path.read_text()))
    return found


def _messages_of(module: str, tree: ast.AST) -> Iterator[Message]:
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not call.args:
            continue
        kind = ast.unparse(call.func).rpartition(".")[2]
        if call in raised or kind.endswith("Error") or kind == "warn":
            text = _text(call.args[0])
            if len(text.replace(ANYTHING, "").split()) > 2:
                yield Message(module, "warning" if kind == "warn" else kind, text)


def _text(node: ast.AST) -> str:
    """Return the text of a string expression, with "…" for what is computed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return re.sub(f"{ANYTHING}+", ANYTHING, "".join(map(_text, node.values)))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return ANYTHING


def messages_page() -> str:
    """Return the page as Markdown."""
    rows = [
        "---\nsearch:\n  boost: 2\n---\n",
        "# All error messages",
        "",
        f"From the source, with {ANYTHING} for values. Each says what to do; search this page for",
        "a part of your message. [Troubleshooting](troubleshooting.md) explains the frequent ones.",
    ]
    module = ""
    for message in messages():
        if message.module != module:
            module = message.module
            rows += ["", f"## {module}", ""]
        text = " ".join(message.text.split())
        fence = "``" if "`" in text else "`"
        rows.append(f"- {message.kind}: {fence}{text}{fence}")
    return "\n".join(rows) + "\n"
