"""Write the results of a benchmark: results.json, a CSV table, pictures and one HTML page."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np

from sam_gym.utils.cli import print_table
from sam_gym.utils.files import make_folder, plain, write_atomic, write_csv, write_json
from sam_gym.utils.runs import refuse_finished, remove_files
from sam_gym.utils.text import counted

INK, BLUE, ORANGE = "#1d2733", "#1e78c8", "#e08a1e"


def output_folder(
    out: str, overwrite: bool, *, resume: bool = False, pictures: Sequence[str] = ()
) -> Path:
    """Create the folder for the results, before work starts.

    Args:
        out: its path.
        overwrite: replace finished results in it.
        resume: continue the run in it, finished or not.
        pictures: glob patterns of the pictures whose number and names depend on the options;
            those of replaced results are removed.

    Raises:
        ValueError: it cannot be created, or not be written to; or both options are given.
        FileExistsError: it holds finished results.
    """
    folder = Path(out).expanduser()
    if resume and overwrite:
        raise ValueError("--resume continues a run, --overwrite replaces it: pass one of them.")
    if not (resume or overwrite):
        refuse_finished(folder, "results.json")
    make_folder(out)
    if overwrite:
        remove_files(folder, ("results.json", "report.html", *pictures))
    return folder


def refuse_unfinished(out: Path, checkpoints: str) -> None:
    """Raise `FileExistsError` if the folder holds an unfinished run.

    Args:
        out: folder of the run.
        checkpoints: glob pattern of checkpoints in that folder.
    """
    if any(out.glob(checkpoints)):
        raise FileExistsError(
            f"{out} holds an unfinished run. Pass --resume to continue it, --overwrite to start "
            "over, or another --out."
        )


def mib(number: float | None) -> str:
    """Return a number of MiB as text."""
    return "unknown" if number is None else f"{number:.0f}"


def over_runs(runs: int, what: str = "") -> str:
    """Return a clause on what numbers are: of one run, or mean and deviation over several."""
    spread = ", mean and standard deviation" if runs > 1 else ""
    return f"{counted(runs, 'run')}{what}{spread}"


def formatted(
    rows: Sequence[Mapping[str, Any]], formats: Mapping[str, str]
) -> tuple[list[str], list[list[str]]]:
    """Return columns and cells of a table.

    Args:
        rows: numbers by name.
        formats: column -> format of its cells, for example "{seconds:.2f}".
    """
    return list(formats), [[cell.format(**row) for cell in formats.values()] for row in rows]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = ([cell.replace("|", r"\|") for cell in line] for line in (columns, *rows))
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join((head, "|---" * len(columns) + "|", *body))


def side_by_side(frames: Sequence[np.ndarray], gap: int = 8) -> np.ndarray:
    """Join frames uint8 (H, W_i, 3) of equal height horizontally, with a white gap in pixels."""
    space = np.full((frames[0].shape[0], gap, 3), 255, np.uint8)
    parts = [part for frame in frames for part in (space, frame)][1:]
    return np.concatenate(parts, axis=1)


def write_results(
    out: Path, results: Mapping[str, Any], csv_name: str, rows: Sequence[Mapping[str, Any]]
) -> list[Path]:
    """Write results.json and a CSV table, and return both paths."""
    return [write_json(out / "results.json", results), write_csv(out / csv_name, rows)]


class Page:
    """One self-contained HTML page, built from top to bottom and rendered by `report.html.j2`.

    The template escapes all text.

    Args:
        title: heading and window title.
        lead: one or two sentences on what was measured.
    """

    def __init__(self, title: str, lead: str) -> None:
        self.title, self.lead = title, lead
        self._blocks: list[dict[str, Any]] = []

    def heading(self, text: str) -> None:
        """Append a section heading."""
        self._blocks.append({"kind": "heading", "text": text})

    def text(self, text: str) -> None:
        """Append a paragraph."""
        self._blocks.append({"kind": "text", "text": text})

    def cards(self, numbers: Mapping[str, str]) -> None:
        """Append the headline numbers: name -> formatted value."""
        self._blocks.append({"kind": "cards", "numbers": dict(numbers)})

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], wrap: bool = False
    ) -> None:
        """Append a table; the first column is left-aligned, the others right-aligned.

        Args:
            columns: column names.
            rows: formatted cells.
            wrap: break long text in the last column over several lines.
        """
        self._blocks.append({"kind": "table", "columns": columns, "rows": rows, "wrap": wrap})

    def plot(self, path: Path, alt: str) -> None:
        """Append a PNG file."""
        self._picture(path.read_bytes(), "png", alt, "")

    def photograph(self, image: np.ndarray, caption: str) -> None:
        """Append uint8 (H, W, 3) RGB as JPEG, which keeps a page of photographs small."""
        coded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])[1]
        self._picture(coded.tobytes(), "jpeg", caption, caption)

    def animation(self, path: Path, caption: str) -> None:
        """Append a GIF file."""
        self._picture(path.read_bytes(), "gif", caption, caption)

    def _picture(self, content: bytes, format: str, alt: str, caption: str) -> None:
        data = f"data:image/{format};base64,{base64.b64encode(content).decode()}"
        self._blocks.append({"kind": "picture", "data": data, "alt": alt, "caption": caption})

    def settings(self, settings: Mapping[str, Any], files: Sequence[Path]) -> None:
        """Append the provenance: all options that are set, and links to the files of the run."""
        self.heading("Settings")
        self.table(("option", "value"), list(_options(plain(settings))), wrap=True)
        self._blocks.append({"kind": "files", "names": [file.name for file in files]})

    def write(self, path: Path) -> Path:
        """Render the page into a file."""
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("benchmarks"),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        template = environment.get_template("report.html.j2")
        text = template.render(title=self.title, lead=self.lead, blocks=self._blocks)
        return write_atomic(path, text)

    def finish(
        self,
        files: Sequence[Path],
        settings: Mapping[str, Any],
        heading: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
    ) -> None:
        """Append the settings, write report.html, and print a table and the path of the page.

        Args:
            files: files to link to; the page is written beside the first.
            settings: options of the run.
            heading, columns, rows: the printed table.
        """
        self.settings(settings, files)
        path = self.write(files[0].with_name("report.html"))
        print_table(heading, columns, rows)
        print(f"Report: {path}")


def _options(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield names and values of all options that are not None; group options as GROUP.NAME."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _options(value, f"{prefix}{name}.")
        elif value is not None:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            yield f"{prefix}{name}", shown
