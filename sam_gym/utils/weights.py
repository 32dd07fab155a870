"""Checks of weights that were read from files."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def check_finite(weights: Mapping[str, Tensor], source: object) -> None:
    """Raise `ValueError` if a weight is NaN or infinite.

    Args:
        weights: name -> tensor.
        source: where they come from, for the message.
    """
    wrong = [name for name, value in weights.items() if not value.isfinite().all()]
    if wrong:
        raise ValueError(
            f"{source}: {len(wrong)} of {len(weights)} weights are NaN or infinite (first: "
            f"{wrong[0]}), as after a training that diverged. Take an earlier checkpoint."
        )
