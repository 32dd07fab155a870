"""Results on disk: plain, finite, whole."""

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from benchmarks import report
from benchmarks.continual.report import _COLUMNS, _cells, _shown_columns
from benchmarks.everything.report import _headlines as everything_headlines
from sam_gym.utils.files import write_atomic, write_csv, write_json
from sam_gym.utils.plots import new_plot, save_figure


def test_numpy_becomes_plain(tmp_path: Path) -> None:
    results = {
        "a": np.float32(0.5),
        "b": np.arange(3),
        "c": (np.bool_(True), None, "x"),
        "d": tmp_path,
        "e": {"f": np.int64(7)},
    }
    path = write_json(tmp_path / "results.json", results)
    expected = {"a": 0.5, "b": [0, 1, 2], "c": [True, None, "x"], "d": str(tmp_path), "e": {"f": 7}}
    assert json.loads(path.read_text()) == expected


@pytest.mark.parametrize("value", [float("nan"), np.float32("inf"), np.array([0.0, np.nan])])
def test_what_is_not_finite_is_refused_with_its_place(tmp_path: Path, value: object) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(ValueError, match=r"outer: inner: .*must be finite"):
        write_json(path, {"outer": {"inner": value}})
    assert not list(tmp_path.iterdir())


def test_what_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="object"):
        write_json(tmp_path / "results.json", {"a": object()})


def test_writing_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for content in ("old", "new"):
        write_atomic(path, content)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_csv(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"a": np.float64(1 / 3), "b": 'x, "y"'}, {"a": None, "b": 2}]
    with write_csv(tmp_path / "a.csv", rows).open(newline="") as file:
        assert list(csv.reader(file)) == [["a", "b"], ["0.333333", 'x, "y"'], ["", "2"]]


def test_page_escapes_and_embeds(tmp_path: Path) -> None:
    figure, axes = new_plot()
    axes.plot([0, 1])
    plot = save_figure(tmp_path / "plot.png", figure)
    assert plot.read_bytes().startswith(b"\x89PNG")
    page = report.Page("<script>", "a & b")
    page.cards({"<n>": "1"})
    page.table(("a", "<b>"), [("1", "<2>")])
    page.plot(plot, "plot")
    page.photograph(np.zeros((4, 6, 3), np.uint8), "<caption>")
    page.settings({"x": 1, "left_out": None, "y": {"z": (2, 3), "left_out": None}}, [plot])
    text = page.write(tmp_path / "page.html").read_text()
    for raw in ("<script>", "<n>", "<th><b>", "<2>", "<caption>", "left_out"):
        assert raw not in text
    for row in ("<td>x</td><td>1</td>", "<td>y.z</td><td>2, 3</td>"):
        assert row in text
    assert text.count("data:image/png;base64,") == 1
    assert text.count("data:image/jpeg;base64,") == 1


def test_hostile_text_stays_inert(tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>\"' {{ 7 * 7 }}"
    page = report.Page(hostile, hostile)
    page.heading(hostile)
    page.text(hostile)
    page.cards({hostile: hostile})
    page.table([hostile], [[hostile]])
    page.photograph(np.zeros((4, 6, 3), np.uint8), hostile)
    page.settings({hostile: hostile}, [tmp_path / hostile.replace("/", "")])

    opened: list[tuple[str, tuple[str, ...]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            opened.append((tag, tuple(name for name, _ in attrs)))

    text = page.write(tmp_path / "page.html").read_text()
    Reader().feed(text)
    assert [own for own in opened if own[0] == "img"] == [("img", ("alt", "src"))]
    assert [own for own in opened if own[0] == "a"] == [("a", ("href",))]
    assert text.count("{{ 7 * 7 }}") >= 10 and "49" not in text.split("</style>")[1][:200]


def test_finish_writes_the_page_and_prints_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = report.write_results(tmp_path, {"a": 1}, "a.csv", [{"a": 1}])
    page = report.Page("Title", "Lead.")
    page.finish(files, {"seed": 3}, "numbers", ["name", "value"], [["a", "1"]])
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "a.csv", "report.html"}
    text = (tmp_path / "report.html").read_text()
    assert 'href="results.json"' in text and "<td>seed</td><td>3</td>" in text
    printed = capsys.readouterr().out
    assert "numbers" in printed and "report.html" in printed


def test_side_by_side() -> None:
    frames = [np.zeros((3, width, 3), np.uint8) for width in (4, 5)]
    row = report.side_by_side(frames, gap=2)
    assert row.shape == (3, 11, 3)
    assert (row[:, 4:6] == 255).all() and not row[:, :4].any() and not row[:, 6:].any()


def test_runs_have_their_noun() -> None:
    assert report.over_runs(1, " of each method") == "1 run of each method"
    assert report.over_runs(3) == "3 runs, mean and standard deviation"


def test_the_widest_table_fits_a_window_of_1400_pixels() -> None:
    """Cells of numbers do not wrap; headings and names do, at spaces."""
    shown = {key: {"mean": 45.3, "std": 2.1} for key in _COLUMNS}
    methods = {"samcl+lora_decoder": shown | {"tune": "lora_decoder", "seconds": shown["last_iou"]}}
    methods["samcl+lora_decoder"] |= {"trainable_parameters": 4_058_340, "bytes_per_domain": 10**8}
    summary = {"methods": methods}
    columns = ["method", *_shown_columns(summary).values(), "parameters", "KB a domain", "train s"]
    assert len(columns) == 14
    (cells,) = _cells(summary)
    template = (Path(report.__file__).parent / "templates" / "report.html.j2").read_text()
    padding = int(template.partition("th, td { padding: 6px ")[2].partition("px")[0])
    assert "max-width: calc(100vw - 48px)" in template
    width = 0.0
    for name, cell in zip(columns, cells, strict=True):
        words = name.split() + (cell.split() if name == "method" else [cell])
        width += 7.8 * max(map(len, words)) + 2 * padding
    assert width < 1400 - 48


def test_a_worse_model_gains_nothing() -> None:
    cards = everything_headlines({"zero_shot": {"miou": 50.0}, "saom_v1": {"miou": 29.0}})
    assert cards["change of mIoU by saom_v1"] == "-42%"
    assert not any("gain" in name for name in cards)
