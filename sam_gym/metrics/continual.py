"""Metrics of continual learning over a sequence of D domains.

All metrics take a matrix R of scores (higher is better) in order of learning: `R[t, i]` is the
score on domain `i` after stage `t`, in which domain `t` is learned.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def last(matrix: ArrayLike) -> float:
    """Return Last, the mean over all domains after the last stage, `mean_i R[D-1, i]`.

    Args:
        matrix: float (D, D), stages by domains.
    """
    return float(_checked(matrix)[-1].mean())


def average(matrix: ArrayLike) -> float:
    """Return Avg, the mean over stages of the mean over the domains learned so far,
    `mean_t mean_{i <= t} R[t, i]`.

    Args:
        matrix: float (D, D), stages by domains.
    """
    return float(np.mean([row[: t + 1].mean() for t, row in enumerate(_checked(matrix))]))


def forgetting(matrix: ArrayLike) -> float:
    """Return FF, the mean loss of a domain between its own stage and the end,
    `mean_{i < D-1} (R[i, i] - R[D-1, i])`; 0 for one domain, negative if scores improved.

    Args:
        matrix: float (D, D), stages by domains.
    """
    scores = _checked(matrix)
    return float((scores.diagonal() - scores[-1])[:-1].mean()) if len(scores) > 1 else 0.0


def forward_transfer(matrix: ArrayLike, zero_shot: ArrayLike) -> float:
    """Return FWT, the mean gain on a domain before it is learned,
    `mean_{i > 0} (R[i-1, i] - z[i])`; 0 for one domain.

    Args:
        matrix: float (D, D), stages by domains.
        zero_shot: float (D,), z: the score on each domain before training.
    """
    scores, before = _checked(matrix), np.asarray(zero_shot, np.float64)
    if before.shape != (len(scores),):
        raise ValueError(
            f"Expected one zero-shot score per domain ({len(scores)}), got shape {before.shape}."
        )
    return float((scores.diagonal(1) - before[1:]).mean()) if len(scores) > 1 else 0.0


def _checked(matrix: ArrayLike) -> np.ndarray:
    scores = np.asarray(matrix, np.float64)
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or not scores.size:
        raise ValueError(
            "Expected a square matrix with one row per stage and one column per domain, got shape "
            f"{scores.shape}. Evaluate all domains after each stage."
        )
    if not np.isfinite(scores).all():
        stage, domain = np.argwhere(~np.isfinite(scores))[0]
        raise ValueError(
            f"The score after stage {stage} on domain {domain} is {scores[stage, domain]}: every "
            "score must be finite."
        )
    return scores
