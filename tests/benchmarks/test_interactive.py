"""`interactive` end to end, its numbers on known curves, and grabCut on easy and hard images."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from benchmarks.interactive import clicking
from benchmarks.interactive.benchmark import curve_numbers
from benchmarks.interactive.grabcut import GrabCut
from benchmarks.run import main
from sam_gym.backbones import Backbone
from sam_gym.metrics.masks import iou
from sam_gym.simulation.clicks import Click, error_click
from sam_gym.simulation.interactive import Session, Target

NUMBERS = {"miou_at_k", "noc85", "noc90", "nof90", "n", "ms_per_click"}


def arguments(checkpoint: str, out: Path, *more: str) -> list[str]:
    base = ["interactive", "--checkpoint", checkpoint, "--device", "cpu", "--out", str(out)]
    return [*base, "--clicks", "3", "--pictures", "2", *more]


def folder(root: Path) -> list[str]:
    return ["--dataset", "folder", "--data", str(root)]


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "objects.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_writes_numbers_table_and_page(micro_checkpoint: str, discs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--baseline-clicks", "2", "--baseline-objects", "2"]
    returned = main(arguments(micro_checkpoint, out, *folder(discs), *options))

    results = json.loads((out / "results.json").read_text())
    assert results == json.loads(json.dumps(returned))
    assert NUMBERS <= results.keys()
    assert (results["backbone"], results["dataset"], results["clicks"]) == ("micro", "discs", 3)
    assert results["n"] == 3 and len(results["miou_at_k"]) == 3
    assert all(0 <= value <= 1 for value in results["miou_at_k"])
    assert results["settings"]["seed"] == 0
    grabcut = results["grabcut"]
    for numbers in (grabcut, grabcut["backbone_on_same_objects"]):
        assert NUMBERS <= numbers.keys()
        assert numbers["n"] == 2 and len(numbers["miou_at_k"]) == 2

    rows = rows_of(out)
    assert [row["source"] for row in rows] == ["discs/0", "discs/1", "discs/2"]
    for k in (1, 2, 3):
        column = [float(row[f"iou@{k}"]) for row in rows]
        assert np.mean(column) == pytest.approx(results["miou_at_k"][k - 1], abs=1e-5)
    boxed = [float(row["box_iou"]) for row in rows]
    assert np.mean(boxed) == pytest.approx(results["miou_box"], abs=1e-5)
    assert np.mean([int(row["noc90"]) for row in rows]) == results["noc90"]
    assert sorted(row["grabcut_iou@2"] == "" for row in rows) == [False, False, True]
    assert rows[0]["clicks"].startswith("+(64 48)")

    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1  # the curve
    assert page.count("data:image/jpeg;base64,") == 2
    assert "http" not in page
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    pictures = list((out / "pictures").iterdir())
    assert len(pictures) == 2 and all(cv2.imread(str(p)) is not None for p in pictures)


def test_perfect_masks_need_one_click(
    micro_checkpoint: str, discs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def perfect(
        backbone: Backbone, targets: Sequence[Target], num_clicks: int, zoom: bool
    ) -> list[Session]:
        assert zoom
        sessions = []
        for target in targets:
            click = error_click(target.mask, np.zeros_like(target.mask))
            assert click is not None
            sessions.append(Session([click], [1.0] * num_clicks, target.mask, 0.002))
        return sessions

    monkeypatch.setattr(clicking, "click_out", perfect)
    results = main(arguments(micro_checkpoint, tmp_path / "out", *folder(discs), "--zoom"))
    assert results["miou_at_k"] == [1.0, 1.0, 1.0]
    assert (results["noc85"], results["noc90"], results["nof90"]) == (1.0, 1.0, 0)
    assert results["ms_per_click"] == pytest.approx(2.0)
    # grabCut had one click to go by, but its curve is as long as ours.
    assert len(results["grabcut"]["miou_at_k"]) == 3
    assert results["grabcut"]["miou_at_k"][2] > 0.9


def test_curve_numbers_by_hand() -> None:
    ious = np.array([[0.5, 0.86, 0.95], [0.9, 0.8, 0.7], [0.1, 0.2, 0.3]])
    numbers = curve_numbers(ious, [0.001, 0.002, 0.003])
    assert numbers["miou_at_k"] == pytest.approx([0.5, 0.62, 0.65])
    assert numbers["noc85"] == pytest.approx((2 + 1 + 3) / 3)
    assert numbers["noc90"] == pytest.approx((3 + 1 + 3) / 3)
    assert numbers["nof90"] == 1
    assert numbers["ms_per_click"] == pytest.approx(2.0)


def test_coco_by_category_without_baseline(
    micro_checkpoint: str, coco_discs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    data = ["--dataset", "coco", "--data", str(coco_discs), "--categories", "right"]
    results = main(arguments(micro_checkpoint, out, *data, "--no-baseline"))
    assert results["split"] == "val" and results["grabcut"] is None
    (row,) = rows_of(out)
    assert row["category"] == "right" and row["clicks"].startswith("+(")
    assert "grabcut_iou@1" not in row


def test_subsets_are_seeded(micro_checkpoint: str, tmp_path: Path) -> None:
    def sources(seed: int) -> list[tuple[str, str]]:
        out = tmp_path / f"out{seed}"
        options = ["--max-images", "2", "--max-objects", "3", "--no-baseline", "--pictures", "0"]
        options.append("--overwrite")
        main(arguments(micro_checkpoint, out, *options, "--clicks", "1", "--seed", str(seed)))
        return [(row["source"], row["instance"]) for row in rows_of(out)]

    first = sources(1)
    assert len(set(first)) == 3
    assert all(source.startswith("scenes/test/") for source, _ in first)
    assert first == sources(1) != sources(2)


def test_broken_image_stops_before_work(micro_checkpoint: str, discs: Path, tmp_path: Path) -> None:
    broken = discs / "images" / "2.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"2\.png"):
        main(arguments(micro_checkpoint, tmp_path / "out", *folder(discs)))
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture
def disc(discs: Path) -> tuple[np.ndarray, np.ndarray]:
    image = cv2.imread(str(discs / "images" / "0.png"))
    mask = cv2.imread(str(discs / "masks" / "0.png"), cv2.IMREAD_GRAYSCALE)
    assert image is not None and mask is not None
    return image[..., ::-1], mask == 255


def test_grabcut_cuts_out_what_colour_separates(disc: Any) -> None:
    image, mask = disc
    click = error_click(mask, np.zeros_like(mask))
    assert click is not None
    grabcut = GrabCut(image)
    first = grabcut.cut([click])
    assert first.shape == mask.shape and first.dtype == bool
    assert iou(first, mask) > 0.95
    assert iou(grabcut.cut([click, Click(2, 2, False)]), mask) > 0.95
    assert np.array_equal(GrabCut(image).cut([click]), first)


def test_grabcut_works_on_small_copies_of_large_images(disc: Any) -> None:
    image, mask = (cv2.resize(np.uint8(a), None, fx=6, fy=6) for a in disc)  # type: ignore[call-overload]
    height, width = mask.shape
    cut = GrabCut(image).cut([Click(width // 2, height // 2, True)])
    assert cut.shape == mask.shape
    assert iou(cut, mask > 0) > 0.9


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (2, 50), (20, 20)])
@pytest.mark.parametrize(
    "signs", [[True], [False], [False, True], [True] * 3, [True, False, False, True]]
)
@pytest.mark.parametrize("flat", [True, False])
def test_grabcut_survives_odd_prompts(size: tuple[int, int], signs: list[bool], flat: bool) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 1 if flat else 256, (*size, 3)).astype(np.uint8)
    grabcut = GrabCut(image)
    clicks: list[Click] = []
    for sign in signs:
        clicks.append(Click(int(rng.integers(size[1])), int(rng.integers(size[0])), sign))
        mask = grabcut.cut(clicks)
        assert mask.shape == size
        assert mask.any() <= any(signs)
