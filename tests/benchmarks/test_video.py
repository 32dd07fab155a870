"""`video` end to end: its tables agree with each other, and with the tracker's own masks."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.run import main
from sam_gym.backbones import Backbone, load_backbone
from sam_gym.backbones.video.evaluation import true_boxes
from sam_gym.data import make_video_dataset
from sam_gym.metrics.masks import iou
from sam_gym.simulation.interactive import Target, segment_boxes

SMALL = ("--dataset-kwargs", "size", "64", "frames", "6")


def run(tiny_video: str, out: Path, *more: str) -> dict[str, Any]:
    base = ["--backbone", tiny_video, "--device", "cpu", "--image-backbone", tiny_video]
    return main(["video", *base, "--videos", "2", "--out", str(out), *more])


def test_tables_and_page(tiny_video: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    results = run(tiny_video, out, *SMALL, "--seeds", "2", "--pictures", "2")
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    rows = list(csv.DictReader((out / "objects.csv").open()))
    shown = {(row["method"], row["prompt"]) for row in results["rows"]}
    assert shown == {
        *(("tracker", kind) for kind in ("mask", "box", "point")),
        ("mask copied", "mask"),
        ("previous mask and box", "mask"),
        ("true box in every frame", "true boxes"),
    }
    for row in results["rows"]:
        own = [r for r in rows if (r["method"], r["prompt"]) == (row["method"], row["prompt"])]
        assert len(own) == row["objects"] and row["ms_per_frame"] > 0
        for name in ("J&F", "J", "F", "J decay"):
            means = [
                np.mean([float(r[name]) for r in own if r["seed"] == str(seed)]) for seed in (0, 1)
            ]
            assert row[name] == pytest.approx(np.mean(means), abs=1e-5)
            assert row[f"{name} std"] == pytest.approx(np.std(means, ddof=1), abs=1e-5)
    by_method = {
        (row["method"], row["prompt"]): [
            float(r["J&F"])
            for r in rows
            if (r["method"], r["prompt"]) == (row["method"], row["prompt"])
        ]
        for row in results["rows"]
    }
    for kind, gains in results["gains"].items():
        for (name, _), values in by_method.items():
            if name != "tracker":
                expected = np.mean(by_method["tracker", kind]) - np.mean(values)
                assert gains[name]["J&F"] == pytest.approx(expected, abs=1e-5)
                assert gains[name]["low"] <= gains[name]["high"]
    page = (out / "report.html").read_text()
    assert page.count("data:image/gif;base64,") == 2
    overlays = list(out.glob("overlay-*.gif"))
    assert len(overlays) == 2
    with Image.open(overlays[0]) as picture:
        assert getattr(picture, "n_frames", 1) == 6
    with pytest.raises(FileExistsError):
        run(tiny_video, out, *SMALL)


def test_copied_masks_score_as_computed_by_hand(tiny_video: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--seeds", "1", "--pictures", "0", "--prompts", "point", "--seed", "5")
    run(tiny_video, out, *SMALL, *options)
    rows = [
        row
        for row in csv.DictReader((out / "objects.csv").open())
        if row["method"] == "mask copied"
    ]
    clips = make_video_dataset("clips", "test", length=2, size=64, frames=6, seed=5)
    expected = []
    for number in range(2):
        video = clips[number]
        truth = np.stack([video.annotation(frame).masks for frame in range(6)], axis=1)
        for own in truth:
            seen = int(own.any(axis=(1, 2)).argmax())
            copies = [own[seen] if frame >= seen else np.zeros_like(own[0]) for frame in range(6)]
            expected.append(np.mean([iou(copies[k], own[k]) for k in range(1, 5)]))
    assert [float(row["J"]) for row in rows] == pytest.approx(expected, abs=1e-5)


def test_true_boxes_are_those_of_single_images(tiny_video: str) -> None:
    backbone: Backbone = load_backbone(tiny_video, device="cpu")
    video = make_video_dataset("clips", "test", length=1, size=64, frames=4)[0]
    for frame, masks in true_boxes(backbone, video):
        truth = video.annotation(frame).masks
        for own, target in zip(masks, truth, strict=True):
            if not target.any():
                assert not own.any()
                continue
            (expected,) = segment_boxes(backbone, [Target(video.image(frame), target, None)])
            assert iou(own, expected) > 0.99


def test_davis_and_wrong_options(tiny_video: str, tmp_path: Path) -> None:
    root = tmp_path / "davis"
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "Annotations"):
        (root / folder / "dog").mkdir(parents=True)
    for frame in range(4):
        ids = np.zeros((40, 60), np.uint8)
        ids[10:30, 5 + frame : 25 + frame] = 1
        ids[20:38, 40:55] = 2
        Image.fromarray(ids).save(root / f"Annotations/dog/{frame:05d}.png")
        image = rng.integers(0, 256, (40, 60, 3), np.uint8)
        Image.fromarray(image).save(root / f"JPEGImages/dog/{frame:05d}.jpg")
    data = ("--dataset", "davis", "--data", str(root))
    options = (*data, "--split", "all", "--no-baselines", "--prompts", "mask", "--pictures", "0")
    results = run(tiny_video, tmp_path / "out", *options)
    (row,) = results["rows"]
    assert (row["objects"], row["seeds"]) == (2, 1) and "J std" not in row
    assert "gains" not in results
    for more, message in (
        ((*data, "--split", "val"), "may be training images"),
        ((*SMALL, "seed", "3"), "--dataset-kwargs seed"),
        ((*SMALL, "--seeds", "0"), "--seeds"),
        ((*SMALL, "--backbone", "micro-v0"), "has no video memory"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tiny_video, tmp_path / "other", *more)
