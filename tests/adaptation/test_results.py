"""Results of a method on a stream."""

import pytest

from adaptation.results import RunResult


@pytest.mark.parametrize(
    ("trainable", "stages", "name"),
    [(0, 1, "pretrained"), (7, 1, "all domains at once"), (7, 2, None)],
)
def test_only_stage(trainable: int, stages: int, name: str | None) -> None:
    scores = {"box": {"iou": [[1.0, 2.0]] * stages}}
    result = RunResult("method", "decoder", ("a", "b"), scores=scores, trainable=trainable)
    assert result.only_stage == name
