"""Training on embeddings that are computed once, against encoding in every epoch."""

import json
from pathlib import Path

import pytest

from benchmarks.run import main

SMALL = ("--device", "cpu", "--images", "4", "--views", "2", "--batch-size", "2")


def test_both_sides_end_with_the_same_weights(tmp_path: Path) -> None:
    heads = ("--heads", "seed", "pyramid", "--backbone", "micro-v0")
    main(["epochs", *SMALL, *heads, "--max-steps", "2", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["tune"] for row in rows] == ["decoder", "hq", "head seed", "head pyramid"]
    for row in rows:
        assert row["steps"] == 2
        # In a semantic head, biases before BatchNorm have gradients of nothing but rounding, of
        # which Adam makes steps of full size.
        if not row["tune"].startswith("head"):
            assert row["largest_weight_difference"] < 1e-4
        assert row["bank_loss"] == pytest.approx(row["encoding_loss"], rel=1e-3)
        assert row["bank_seconds"] > 0 and row["encode_once_seconds"] > 0
    assert (tmp_path / "report.html").is_file() and (tmp_path / "epochs.csv").is_file()


def test_a_tuned_encoder_has_nothing_to_keep() -> None:
    with pytest.raises(ValueError, match="trains the encoder"):
        main(["epochs", *SMALL, "--tune", "lora"])
    with pytest.raises(SystemExit):
        main(["epochs", *SMALL, "--heads", "pyramyd"])
    with pytest.raises(ValueError, match="--tune is empty"):
        main(["epochs", *SMALL, "--tune"])
