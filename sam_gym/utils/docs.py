"""Refresh the generated tables in README and docs: `python -m sam_gym.utils.docs`.

A table lies between `<!-- NAME -->` and `<!-- /NAME -->`, where NAME is a key of `TABLES`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sam_gym.backbones.spec import backbone_table
from sam_gym.data import dataset_table, video_dataset_table
from sam_gym.utils.files import write_atomic

#: Name in the markers -> function that renders the table.
TABLES: dict[str, Callable[[], str]] = {
    "backbones": backbone_table,
    "datasets": dataset_table,
    "video datasets": video_dataset_table,
}


def refreshed(text: str) -> str:
    """Return a Markdown text with its generated tables brought up to date.

    Raises:
        ValueError: a table has no end marker.
    """
    for name, render in TABLES.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, marker, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if marker and not closed:
            raise ValueError(f"The table that begins with {start!r} has no end marker {end!r}.")
        if marker:
            text = f"{before}{start}{render()}\n{end}{after}"
    return text


def main(root: Path) -> None:
    """Rewrite README and docs of a repository where tables are out of date; print the paths."""
    for path in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        text = path.read_text()
        if (current := refreshed(text)) != text:
            print(write_atomic(path, current))


if __name__ == "__main__":
    main(Path.cwd())
