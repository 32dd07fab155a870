"""The benchmark of everything mode: what it compares, writes, refuses and goes on with."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from segment_anything.modeling import Sam

from benchmarks.everything.measuring import BUDGETS, WITHIN
from benchmarks.run import main
from sam_gym.data.synthetic.rooms.dataset import Rooms

pytestmark = pytest.mark.filterwarnings("ignore:.*fill half of no cell")


@pytest.fixture
def arguments(
    build_tiny: Callable[[], Sam], tiny_checkpoint: str, add_backbone: Callable[..., None]
) -> list[str]:
    """A run of two steps on few rooms."""
    add_backbone("tiny", build=build_tiny)
    return [
        *("everything", "--backbone", "tiny", "--checkpoint", tiny_checkpoint, "--device", "cpu"),
        *("--steps", "2", "--batch-size", "2", "--views", "1", "--train-images", "2"),
        *("--val-images", "1", "--test-images", "2", "--grid", "6", "6"),
    ]


def test_the_benchmark_writes_its_report(arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    results = main([*arguments, "--seeds", "2", "--out", str(out)])
    saved = json.loads((out / "results.json").read_text())
    assert saved["benchmark"] == "everything" and saved["prompts"] == 36
    assert list(saved["models"]) == ["zero_shot", "merged", "saom_v1"] == list(results["models"])
    for name, own in saved["models"].items():
        for key in ("miou", "macc", "ar100", "ar1000", "pq", "found", "part_share"):
            assert 0 <= own[key] <= 100, (name, key)
        assert own["masks_per_object"] >= 0
        assert name == "merged" or own["seconds_per_image"] > 0
        runs = saved["by_run"]["test"][name]
        assert own["runs"] == len(runs) == (2 if name == "saom_v1" else 1)
        assert own["miou"] == pytest.approx(np.mean([run["miou"] for run in runs]), abs=1e-3)
        assert ("released_miou" in own) == (name != "merged")
    assert saved["models"]["saom_v1"]["std"]["miou"] == pytest.approx(
        np.std([run["miou"] for run in saved["by_run"]["test"]["saom_v1"]], ddof=1), abs=1e-3
    )
    assert saved["models"]["saom_v1"]["training_seconds"] > 0
    assert "class_accuracy" in saved["models"]["saom_v1"]
    with (out / "models.csv").open() as file:
        assert [row["model"] for row in csv.DictReader(file)] == list(saved["models"])
    assert (out / "masks.png").is_file() and (out / "masks_per_object.png").is_file()
    for curve, own in zip(
        saved["curves"]["test"]["saom_v1"], saved["by_run"]["test"]["saom_v1"], strict=True
    ):
        (at_one,) = (point for point in curve if point["budget"] == 1)
        for key in WITHIN:
            assert own[f"one_{key}"] == at_one[key] and f"same_{key}" in own
        assert [point["budget"] for point in curve] == list(BUDGETS)
        for point in curve:
            assert 0 <= point["miou"] <= 100 and point["masks_per_object"] >= 0
    page = (out / "report.html").read_text()
    assert "whole objects" in page and "released" in page


def test_a_finished_fine_tuning_is_not_repeated(arguments: list[str], tmp_path: Path) -> None:
    first = main([*arguments, "--out", str(tmp_path)])
    again = main([*arguments, "--resume", "--out", str(tmp_path)])
    for name, own in first["models"].items():
        for key in ("miou", "macc", "ar100", "masks_per_object"):
            assert own[key] == again["models"][name][key]
    with pytest.raises(FileExistsError, match="holds a finished run .results.json.*--overwrite"):
        main([*arguments, "--out", str(tmp_path)])
    (tmp_path / "results.json").unlink()
    with pytest.raises(FileExistsError, match="holds an unfinished run. Pass --resume"):
        main([*arguments, "--out", str(tmp_path)])


def test_files_are_read_and_photographs_are_measured(
    arguments: list[str], coco_discs: Path, tmp_path: Path, write_entities: Callable[..., None]
) -> None:
    rooms = Rooms("train", length=6, size=64)
    data = [rooms[index] for index in range(6)]
    # Images of several shapes.
    data[4] = replace(data[4], image=data[4].image[:40], masks=data[4].masks[:, :40])
    write_entities(tmp_path / "rooms", rooms.categories, train=data[:3], val=data[3:])
    more = ["--dataset", "entities", "--data", str(tmp_path / "rooms"), "--test-images", "2"]
    more += ["--transfer", str(coco_discs), "--transfer-limit", "1"]
    results = main([*arguments, *more, "--out", str(tmp_path / "out")])
    # The file has no test list: those of val on which no operating point is chosen.
    assert results["images"] == {"val": 1, "test": 2, "transfer": 1}
    assert list(results["transfer"]["transfer"]) == ["zero_shot", "merged", "saom_v1"]
    assert "photographs" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(ValueError, match="no image shows an object but those of val"):
        main([*arguments, *more, "--val-images", "3", "--out", str(tmp_path / "other")])


def test_training_images_are_not_measured(
    arguments: list[str], squares: Path, tmp_path: Path
) -> None:
    more = [*arguments, "--data", str(squares), "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="12 of 12 images of split 'val' are training images"):
        main([*more, "--dataset", "folder"])
    own = ["--dataset-kwargs", "annotations", str(squares / "all.json"), "split_seed", "1"]
    transfer = ["--transfer", str(squares), "--transfer-annotations", str(squares / "all.json")]
    with pytest.raises(ValueError, match="--transfer .*squares: 7 of its images are training"):
        main([*more, "--dataset", "coco", *own, *transfer])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--methods", "saom_v3"], "Did you mean 'saom_v"),
        (["--methods", "moda"], "'moda' does not train everything mode; take saom_v1"),
        (["--methods", "saom_v1", "saom_v1"], "names 'saom_v1' twice"),
        (["--transfer-annotations", "a.json"], "needs --transfer"),
        (["--tune", "decodr"], "Did you mean 'decoder'"),
        (["--dataset", "romms"], "Did you mean 'rooms'"),
        (["--grid", "0", "6"], "--grid must be at least 1"),
        (["--test-images", "0"], "--test-images must be at least 1"),
        (["--dataset", "coco"], "reads files: pass its folder"),
    ],
)
def test_wrong_values_are_named(
    arguments: list[str], wrong: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        main([*arguments, *wrong, "--out", str(tmp_path / "out")])
