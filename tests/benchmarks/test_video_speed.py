"""`video_speed`: equal masks of both sides, bounded memory, and what is refused."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.run import main
from benchmarks.video_speed import benchmark, sides
from benchmarks.video_speed.peer import Shape
from benchmarks.video_speed.sides import SHAPES

NANO = Shape(
    64,
    128,
    2,
    32,
    {
        "embed_dim": 8,
        "stages": (1, 2, 2, 1),
        "window_spec": (8, 4, 6, 3),
        "global_att_blocks": (4,),
    },
)
SMALL = ("--device", "cpu", "--frames", "4", "--repeats", "1")


@pytest.fixture(autouse=True)
def nano(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "small", NANO)


def run(out: Path, *more: str) -> dict[str, Any]:
    return main(["video_speed", *SMALL, "--out", str(out), *more])


def test_both_sides_find_the_same_masks(tmp_path: Path) -> None:
    pytest.importorskip("sam2", reason="the package sam2 is not installed")
    results = run(tmp_path, "--cases", "1x4", "2x3", "--memory-frames", "0")
    assert results["peer"] and results["memory"] is None
    assert [(row["videos"], row["objects"]) for row in results["rows"]] == [(1, 4), (2, 3)]
    for row in results["rows"]:
        assert row["mask_iou"] > 0.999 and 0.02 < row["mask_area"] < 0.98
        assert row["ratio"] == pytest.approx(row["sam2_tracking"] / row["ours_tracking"])
        count = row["videos"] * row["objects"] * 3
        assert row["ours_ms"] == pytest.approx(1000 * row["ours_tracking"] / count)
    table = list(csv.DictReader((tmp_path / "cases.csv").open()))
    assert [row["objects"] for row in table] == ["4", "3"]
    assert "IoU of masks" in (tmp_path / "report.html").read_text()


def test_all_videos_of_a_frame_come_together(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tracker = sides.random_tracker(NANO, torch.device("cpu"))
    folders = sides.write_videos(tmp_path, 2, 3, 64)
    rng = np.random.default_rng(0)
    prompts = [sides.draw_prompts(rng, 3, 64) for _ in folders]
    frames = list(sides.track_ours(tracker, folders, prompts))
    assert len(frames) == 3 and all(len(frame) == 2 for frame in frames)
    assert frames[0][0].shape == (3, 64, 64)


def test_without_the_peer_only_ours_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "has_peer", lambda: False)
    results = run(tmp_path, "--cases", "1x2", "--memory-frames", "0")
    assert "sam2 is not installed" in capsys.readouterr().out
    (row,) = results["rows"]
    assert not results["peer"] and row["ours_ms"] > 0 and "ratio" not in row


def test_memory_is_measured_in_a_long_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = benchmark.VideoSpeedConfig(device="cpu", memory_frames=40, memory_objects=2)
    benchmark.measure_memory(json.dumps(benchmark.plain(benchmark.asdict(config))))
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert measured["frames"][0] == 4 and measured["frames"][-1] == 40
    assert len(measured["mib"]) == 10 and measured["mib"][0] > 50
    assert measured["growth_mib"] == measured["mib"][-1] - measured["mib"][0]
    assert abs(measured["growth_mib"]) < 30
    monkeypatch.setattr(benchmark, "_memory", lambda _: measured)
    monkeypatch.setattr(benchmark, "has_peer", lambda: False)
    results = run(tmp_path, "--cases", "1x1")
    assert results["memory"] == measured
    assert "growth of memory to frame 40" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "option, message",
    [
        (("--cases", "8"), "'8' is no case; write VIDEOSxOBJECTS"),
        (("--cases", "0x4"), "'0x4' is no case"),
        (("--frames", "2"), "--frames must be at least 3"),
        (("--memory-frames", "5"), "--memory-frames must be 0 or at least 20"),
        (("--repeats", "0"), "--repeats must be at least 1"),
    ],
)
def test_options_that_cannot_work_are_refused(
    tmp_path: Path, option: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *option)
