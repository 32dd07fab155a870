"""Everything mode against segment_anything's mask generator: a tiny run, and what is refused."""

import csv
import json
from pathlib import Path

import pytest

from benchmarks import generator
from benchmarks.run import main

SMALL = ("--device", "cpu", "--images", "1")


def test_both_sides_find_the_same_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grids = ("--grids", "4x4", "8x3")
    main(["generator", *SMALL, "--no-memory", *grids, "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["grid"] for row in results["rows"]] == ["4x4", "8x3"]
    for row in results["rows"]:
        assert row["ours_masks"] == row["reference_masks"] > 0 and row["found"] == 1.0
        assert row["ratio"] == pytest.approx(row["reference_seconds"] / row["ours_seconds"])
        assert results["speedup"][row["grid"]] == pytest.approx(row["ratio"], abs=1e-3)
        assert "ours_peak_mib" not in row
    assert results["memory_growth"] is None
    assert results["settings"]["pred_iou_thresh"] == 0.6
    table = list(csv.DictReader((tmp_path / "grids.csv").open()))
    assert [row["grid"] for row in table] == ["4x4", "8x3"]
    assert (tmp_path / "report.html").is_file() and "8x3" in capsys.readouterr().out


def test_memory_is_that_of_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = generator._peak_memory(generator.GeneratorBenchmarkConfig(device="cpu"), "2x2", "ours")
    assert alone is not None and alone > 50
    peaks = iter([100.0, 150.0, 90.0, 300.0])
    monkeypatch.setattr(generator, "_peak_memory", lambda *_: next(peaks))
    results = main(["generator", *SMALL, "--grids", "2x2", "3x2", "--out", str(tmp_path)])
    assert results["memory_growth"] == {"ours": 0.9, "reference": 2.0}
    assert "300" in (tmp_path / "report.html").read_text()


def test_crops_and_small_regions(tmp_path: Path) -> None:
    further = ("--crop-n-layers", "1", "--min-mask-region-area", "30", "--no-memory")
    results = main(
        ["generator", *SMALL, *further, "--grids", "3x3", "--random-weights", "--pred-iou-thresh",
         "0", "--stability-score-thresh", "0", "--out", str(tmp_path)]
    )  # fmt: skip
    (row,) = results["rows"]
    assert row["found"] == 1.0 and row["ours_masks"] == row["reference_masks"]


@pytest.mark.parametrize(
    "option, message",
    [
        (("--grids", "32"), "'32' is not a grid; write COLUMNSxROWS"),
        (("--grids", "0x4"), "grid must be at least 1, got 0"),
        (("--backbone", "hq_vit_b"), "does not support this backbone"),
        (("--repeats", "0"), "--repeats must be at least 1"),
        (("--pred-iou-thresh", "3"), "--pred-iou-thresh must be from 0 to 1"),
    ],
)
def test_options_that_cannot_work_are_refused(
    tmp_path: Path, option: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        main(["generator", *SMALL, *option, "--out", str(tmp_path)])
