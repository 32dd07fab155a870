"""Continual metrics against numbers worked out by hand and against their formulas in loops."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sam_gym.metrics import continual as continual_metrics
from sam_gym.utils import plots
from sam_gym.utils.plots import plot_matrix

#: After a, b and c (rows) on a, b and c (columns).
HAND = [[0.8, 0.1, 0.2], [0.5, 0.9, 0.3], [0.4, 0.6, 0.7]]


def test_by_hand() -> None:
    assert continual_metrics.last(HAND) == pytest.approx((0.4 + 0.6 + 0.7) / 3)
    means = (0.8, (0.5 + 0.9) / 2, (0.4 + 0.6 + 0.7) / 3)
    assert continual_metrics.average(HAND) == pytest.approx(sum(means) / 3)
    assert continual_metrics.forgetting(HAND) == pytest.approx(((0.8 - 0.4) + (0.9 - 0.6)) / 2)
    transfer = continual_metrics.forward_transfer(HAND, [0.9, 0.2, 0.1])
    assert transfer == pytest.approx(((0.1 - 0.2) + (0.3 - 0.1)) / 2)


def test_by_formula() -> None:
    rng = np.random.default_rng(0)
    scores, zero_shot = rng.random((7, 7)), rng.random(7)
    average = np.mean([np.mean([scores[t, i] for i in range(t + 1)]) for t in range(7)])
    assert continual_metrics.average(scores) == pytest.approx(average)
    lost = np.mean([scores[i, i] - scores[6, i] for i in range(6)])
    assert continual_metrics.forgetting(scores) == pytest.approx(lost)
    gained = np.mean([scores[i - 1, i] - zero_shot[i] for i in range(1, 7)])
    assert continual_metrics.forward_transfer(scores, zero_shot) == pytest.approx(gained)


def test_nothing_is_forgotten_of_one_domain() -> None:
    assert continual_metrics.last([[0.4]]) == continual_metrics.average([[0.4]]) == 0.4
    assert continual_metrics.forgetting([[0.4]]) == 0.0
    assert continual_metrics.forward_transfer([[0.4]], [0.1]) == 0.0


def test_what_is_no_such_matrix_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"one row per stage and one column per domain, got shape \(2, 3\)"
    ):
        continual_metrics.average(HAND[:2])
    with pytest.raises(ValueError, match=r"got shape \(0,\)"):
        continual_metrics.last([])
    with pytest.raises(ValueError, match="after stage 1 on domain 0 is nan"):
        continual_metrics.forgetting([[0.1, 0.2], [np.nan, 0.3]])
    with pytest.raises(ValueError, match=r"one zero-shot score per domain \(3\), got shape \(2,\)"):
        continual_metrics.forward_transfer(HAND, [0.1, 0.2])


def test_heat_map(tmp_path: Path) -> None:
    path = plot_matrix(tmp_path / "map.png", HAND, ["a", "b", "c"], "title")
    plot_matrix(path, HAND, ["$5_$7", "a\nb", "\udcff"], "$_{$", row=None)
    assert path.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="a name for each of 3 domains, got 2"):
        plot_matrix(tmp_path / "map.png", HAND, ["a", "b"], "title")


def test_the_only_row_of_a_map_is_not_after_learning_a_domain(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save_figure", lambda path, figure: drawn.append(figure) or path)
    names = ["a", "b", "c"]
    plot_matrix(tmp_path / "map.png", HAND, names, "title")
    plot_matrix(tmp_path / "map.png", HAND[:1], names, "title", row="pretrained")
    (each, *_), (only, *_) = (figure.axes for figure in drawn)
    rows = [[text.get_text() for text in axes.get_yticklabels()] for axes in (each, only)]
    assert rows == [names, ["pretrained"]]
    assert (each.get_ylabel(), only.get_ylabel()) == ("after learning", "")
    assert len(each.lines) == 1 and not only.lines
    assert {text.get_weight() for text in only.texts} == {"normal"}
