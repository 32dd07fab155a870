"""The continual benchmark: what it compares, writes, refuses and goes on with."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from segment_anything.modeling import Sam

from adaptation.strategy import Strategy
from benchmarks.continual.benchmark import _slug, jobs_of, spread
from benchmarks.continual.config import BEYOND, PAPER, ContinualBenchmarkConfig, with_defaults
from benchmarks.continual.report import _shown
from benchmarks.run import main

NUMBERS = ("last_iou", "avg_iou", "ff_iou", "last_biou", "avg_biou", "ff_biou", "forward_iou")


@pytest.fixture
def arguments(
    build_tiny: Callable[[], Sam], tiny_checkpoint: str, add_backbone: Callable[..., None]
) -> list[str]:
    """A run of a few steps on two domains, one of them thin."""
    add_backbone("tiny", build=build_tiny)
    return [
        *("continual", "--backbone", "tiny", "--checkpoint", tiny_checkpoint, "--device", "cpu"),
        *("--domains", "cells,vessels", "--steps", "2", "--batch-size", "2", "--views", "1"),
        *("--max-images", "2", "--objects-per-image", "2", "--selector-steps", "2"),
    ]


def test_long_orders_have_folders_of_their_own() -> None:
    assert (_slug(None), _slug("random:3"), _slug("a,b")) == ("given", "random-3", "a_b")
    long = ",".join(["domain"] * 20)
    assert _slug(long + ",a,b") != _slug(long + ",b,a")


def test_numbers_that_round_to_zero_have_no_sign() -> None:
    assert _shown({"mean": -0.04, "std": 0.0}) == "0.0"
    assert _shown({"mean": -0.06, "std": 0.5}) == "-0.1 ± 0.5"


def test_the_benchmark_writes_its_report(arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    methods = ["zero_shot", "joint", "naive", "moda"]
    results = main([*arguments, "--methods", *methods, "--seeds", "2", "--out", str(out)])
    saved = json.loads((out / "results.json").read_text())
    assert saved["benchmark"] == "continual" and saved["setting"] == "quick"
    assert list(saved["methods"]) == methods == list(results["methods"])
    for name, own in saved["methods"].items():
        assert own["runs"] == 2 and own["bytes_per_domain"] >= 0
        staged = name not in ("zero_shot", "joint")
        for number in NUMBERS:
            if staged or number.startswith("last"):
                assert set(own[number]) == {"mean", "std"}
                assert np.isfinite(list(own[number].values())).all()
            else:
                assert own[number] is None
        runs = saved["by_run"][name]
        lasts = [np.mean(run["scores"]["box"]["iou"][-1]) for run in runs]
        assert own["last_iou"]["mean"] == pytest.approx(np.mean(lasts), abs=1e-3)
        assert own["last_iou"]["std"] == pytest.approx(np.std(lasts, ddof=1), abs=1e-3)
        assert [run["seed"] for run in runs] == [0, 1]
    assert saved["methods"]["moda"]["selector_accuracy"]["mean"] <= 100
    groups = {domain["name"]: domain["thin"] for domain in saved["domains"]}
    assert groups == {"cells": False, "vessels": True}
    assert all(0 < d["ceiling"] <= 100 and d["objects"] > 0 for d in saved["domains"])
    run = saved["by_run"]["naive"][0]["scores"]["box"]["iou"][-1]
    assert saved["methods"]["naive"]["last_iou_thin"] != saved["methods"]["naive"]["last_iou"]
    assert np.isfinite(run).all()
    with open(next(out.glob("*.csv")), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == methods
    assert float(rows[2]["last_iou"]) == saved["methods"]["naive"]["last_iou"]["mean"]
    assert (out / "report.html").stat().st_size > 10_000
    assert {f.name for f in out.glob("matrix_*.png")} == {f"matrix_{m}.png" for m in methods}
    assert (out / "runs" / "given" / "moda-decoder-1" / "adapter.safetensors").is_file()

    again = main([*arguments, "--methods", *methods, "--seeds", "2", "--out", str(out), "--resume"])
    assert without_times(again) == without_times(results)


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    text = json.loads(json.dumps(results))
    text.pop("settings")
    for own in text["methods"].values():
        own.pop("seconds")
    for runs in text["by_run"].values():
        for run in runs:
            run.pop("seconds")
    return text


def test_an_interrupted_benchmark_goes_on(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = ["--methods", "naive", "er"]
    whole = main([*arguments, *methods, "--out", str(tmp_path / "whole")])
    taken = 0

    def count(self: Strategy, step: int) -> None:
        nonlocal taken
        taken += 1
        if taken == 7:  # in the second domain of the second method
            raise KeyboardInterrupt

    out = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(Strategy, "after_step", count)
        with pytest.raises(KeyboardInterrupt):
            main([*arguments, *methods, "--out", str(out)])
    assert not (out / "results.json").exists()
    with pytest.raises(FileExistsError, match="holds an unfinished run. Pass --resume"):
        main([*arguments, *methods, "--out", str(out)])
    parts = main([*arguments, *methods, "--out", str(out), "--resume"])
    assert without_times(parts) == without_times(whole)
    # Finished results are replaced as a whole, and on request only.
    with pytest.raises(FileExistsError, match="parts holds a finished run"):
        main([*arguments, "--methods", "naive", "--out", str(out)])
    assert json.loads((out / "results.json").read_text())["methods"].keys() == {"naive", "er"}
    again = main([*arguments, "--methods", "naive", "--out", str(out), "--overwrite"])
    assert again["methods"]["naive"] | {"seconds": None} == (
        whole["methods"]["naive"] | {"seconds": None}
    )
    assert not (out / "matrix_er.png").exists()


def test_targets_are_runs_of_their_own() -> None:
    config = ContinualBenchmarkConfig(methods=("naive", "l2p", "zero_shot"), tune=("decoder", "hq"))
    assert jobs_of(with_defaults(config)) == {
        "naive+decoder": ("naive", "decoder"),
        "l2p": ("l2p", "prompts"),
        "zero_shot": ("zero_shot", "decoder"),
        "naive+hq": ("naive", "hq"),
    }


def test_every_order_runs_with_every_seed(arguments: list[str], tmp_path: Path) -> None:
    orders, out = ["cells,vessels", "vessels,cells"], str(tmp_path / "out")
    some = ["--methods", "zero_shot", "--seeds", "2", "--orders", *orders, "--out", out]
    runs = main([*arguments, *some])["by_run"]["zero_shot"]
    assert [(",".join(run["domains"]), run["seed"]) for run in runs] == [
        (order, seed) for order in orders for seed in (0, 1)
    ]


def test_the_quick_and_the_full_setting() -> None:
    quick, full = (
        with_defaults(ContinualBenchmarkConfig()),
        with_defaults(ContinualBenchmarkConfig(full=True)),
    )
    assert quick.methods == PAPER and quick.seeds == 1 and quick.train.prompts == ("box",)
    assert full.methods == (*PAPER, *BEYOND) and full.seeds == 5
    assert set(BEYOND) >= {"samcl", "regcl"} and not set(BEYOND) & {"saom_v1", "saom_v2", "panosam"}
    assert full.train.prompts == ("box", "click", "clicks5")


def test_spread() -> None:
    assert spread([1.0, 2.0, 4.0]) == {"mean": 2.333, "std": 1.528}
    assert spread([3.0]) == {"mean": 3.0, "std": 0.0}
    assert spread([None, None]) is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--methods", "mda"], "Did you mean 'moda'"),
        (["--tune", "decodr"], "Did you mean 'decoder'"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--orders", "cells"], "order lacks vessels"),
        (["--domains", "cels"], "Did you mean 'cells'"),
        (["--backbone", "tini"], "Did you mean"),
    ],
)
def test_wrong_values_are_named(
    arguments: list[str], wrong: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        main([*arguments, *wrong, "--out", str(tmp_path / "out")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_domain_without_images_is_named(arguments: list[str], tmp_path: Path) -> None:
    root = tmp_path / "empty"
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    (root / "splits.json").write_text('{"train": [], "val": [], "test": []}')
    place = arguments.index("--domains")
    rest = arguments[:place] + arguments[place + 2 :]
    with pytest.raises((ValueError, FileNotFoundError), match="empty") as caught:
        main([*rest, "--data", str(root), "--out", str(tmp_path / "out")])
    assert "\n" not in str(caught.value)
