"""What the curves of agents show."""

from pathlib import Path
from typing import Any

import pytest

from agents import curves


def test_curves_are_of_one_length(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[Any] = []
    save = curves.save_figure
    monkeypatch.setattr(curves, "save_figure", lambda p, f: drawn.append(f) or save(p, f))
    path = tmp_path / "curves.png"
    own = {"agent": [0.1, 0.4, 0.5], "oracle": [0.6, 0.8], "grid": [0.9]}
    assert curves.plot_iou_after_steps(path, own) == path
    assert path.read_bytes()[:4] == b"\x89PNG"
    (axes,) = drawn[0].axes
    lines = {tuple(map(float, line.get_ydata())) for line in axes.lines}
    assert lines == {(0.1, 0.4, 0.5), (0.6, 0.8, 0.8), (0.9, 0.9)}
    assert list(axes.lines[0].get_xdata()) == [1, 2, 3]
    names = {text.get_text(): text.xy[1] for text in axes.texts}
    assert names == {"agent": 0.5, "oracle": 0.8, "grid": 0.9}
