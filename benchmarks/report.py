"""What a benchmark leaves behind: results.json, CSV tables, pictures and one HTML page."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from sam_gym.utils.files import plain, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.progress import Progress

INK, MUTED, BLUE, ORANGE = "#1d2733", "#68727e", "#1e78c8", "#e08a1e"

_CSS = """
:root { color-scheme: light; }
body { margin: 0; background: #f6f7f9; color: #1d2733;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 1.2rem; margin: 40px 0 8px; }
p { margin: 8px 0 16px; max-width: 76ch; }
p.lead { color: #4a5561; font-size: 1.06rem; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 24px 0; }
.card { background: #fff; border: 1px solid #e2e6ea; border-radius: 10px; padding: 12px 18px; }
.card b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.card span { color: #68727e; font-size: .85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; background: #fff; border: 1px solid #e2e6ea; font-size: .92rem; }
th, td { padding: 6px 14px; text-align: right; white-space: nowrap;
         font-variant-numeric: tabular-nums; border-bottom: 1px solid #eef0f3; }
th { color: #68727e; font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
.long td:last-child { white-space: normal; overflow-wrap: anywhere; }
figure { margin: 16px 0 24px; }
figure img { max-width: 100%; border-radius: 8px; border: 1px solid #e2e6ea; background: #fff; }
figcaption { color: #68727e; font-size: .9rem; margin-top: 4px; }
footer { margin-top: 48px; color: #68727e; font-size: .85rem; }
code { font-size: .9em; }
"""


def output_folder(out: str) -> Path:
    """Make the folder for the results, before work starts; raises `ValueError` if it cannot be."""
    folder = Path(out).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be made a folder ({error.strerror}).") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out {out}: the folder cannot be written to.")
    return folder


def refuse_unfinished(out: Path, checkpoints: str, resume: bool) -> None:
    """Raise `ValueError` rather than write over an earlier run that did not finish.

    Args:
        out: folder of the run.
        checkpoints: pattern of what fine-tunings leave in it.
        resume: whether they are gone on with.
    """
    if not resume and any(out.glob(checkpoints)) and not (out / "results.json").is_file():
        raise ValueError(
            f"{out} holds an unfinished run. Pass --resume to go on with it, or another --out."
        )


def progress_bar() -> Progress:
    """A bar with the count and the remaining time, on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a small table; the first column is aligned left, the others right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def new_plot(width: float = 9.0, height: float = 4.2) -> tuple[Figure, Axes]:
    """A matplotlib figure in the style of the page; no window system is involved."""
    figure, (axes,) = new_panels(1, width, height)
    return figure, axes


def new_panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Like `new_plot`, with several axes side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False, gridspec_kw={"wspace": 0.08})[0])
    for axes in panels:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.tick_params(colors=MUTED)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    return figure, panels


def side_by_side(frames: Sequence[np.ndarray], gap: int = 8) -> np.ndarray:
    """Frames uint8 (H, W, 3) of one height in a row, with a white gap between them."""
    space = np.full((frames[0].shape[0], gap, 3), 255, np.uint8)
    parts = [part for frame in frames for part in (space, frame)][1:]
    return np.concatenate(parts, axis=1)


class Page:
    """One self-contained HTML page, built from top to bottom. All text is escaped.

    Args:
        title: heading and window title.
        lead: what was measured, in one or two sentences.
    """

    def __init__(self, title: str, lead: str) -> None:
        self.title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="lead">{html.escape(lead)}</p>']

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def cards(self, numbers: Mapping[str, str]) -> None:
        """The numbers to read first: name -> formatted value."""
        cards = (
            f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>'
            for name, value in numbers.items()
        )
        self._parts.append(f'<div class="cards">{"".join(cards)}</div>')

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], long: bool = False
    ) -> None:
        """A table; the first column is aligned left, the others right.

        Args:
            columns: their names.
            rows: formatted cells.
            long: the last column may take several lines.
        """
        kind = ' class="long"' if long else ""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows
        )
        self._parts.append(
            f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead>\n'
            f"<tbody>{body}</tbody></table></div>"
        )

    def plot(self, path: Path, alt: str) -> None:
        """Embed a PNG file."""
        self._figure(path.read_bytes(), "png", alt, "")

    def photograph(self, image: np.ndarray, caption: str) -> None:
        """Embed uint8 (H, W, 3) RGB as JPEG, which keeps a page of photographs small."""
        coded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])[1]
        self._figure(coded.tobytes(), "jpeg", caption, caption)

    def _figure(self, content: bytes, kind: str, alt: str, caption: str) -> None:
        data = base64.b64encode(content).decode()
        below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        self._parts.append(
            f'<figure><img alt="{html.escape(alt)}" src="data:image/{kind};base64,{data}">'
            f"{below}</figure>"
        )

    def settings(self, settings: Mapping[str, Any], files: Sequence[Path]) -> None:
        """How to repeat the run, and the files beside the page."""
        self.heading("Settings")
        self.table(("option", "value"), list(_options(plain(settings))), long=True)
        links = ", ".join(
            f'<a href="{html.escape(file.name)}">{html.escape(file.name)}</a>' for file in files
        )
        self._parts.append(f"<footer>All numbers: {links}.</footer>")

    def write(self, path: Path) -> Path:
        body = "\n".join(self._parts)
        return write_atomic(
            path,
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(self.title)}</title>\n<style>{_CSS}</style>\n</head>\n"
            f"<body><main>\n{body}\n</main></body>\n</html>\n",
        )


def _options(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of all settings that are set, those of a group behind its name."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _options(value, f"{prefix}{name}.")
        elif value is not None:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            yield f"{prefix}{name}", shown
