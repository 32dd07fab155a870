"""What is learned, kept and forgotten over a sequence of domains.

All are of a matrix R of scores (higher is better) in order of learning: `R[t, i]` is the score on
domain `i` after stage `t`, at whose end domains 0 to `t` have been learned. There are as many
stages as domains, D.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def last(matrix: ArrayLike) -> float:
    """Last: the mean over all domains after the last stage, `mean_i R[D-1, i]`.

    Args:
        matrix: float (D, D), stages by domains.
    """
    return float(_checked(matrix)[-1].mean())


def average(matrix: ArrayLike) -> float:
    """Avg: the mean over stages of the mean over the domains learned so far,
    `mean_t mean_{i <= t} R[t, i]`.

    Args:
        matrix: float (D, D), stages by domains.
    """
    return float(np.mean([row[: t + 1].mean() for t, row in enumerate(_checked(matrix))]))


def forgetting(matrix: ArrayLike) -> float:
    """FF: what is lost of a domain between its own stage and the end,
    `mean_{i < D-1} (R[i, i] - R[D-1, i])`; 0 of one domain, negative if it got better.

    Args:
        matrix: float (D, D), stages by domains.
    """
    scores = _checked(matrix)
    return float((scores.diagonal() - scores[-1])[:-1].mean()) if len(scores) > 1 else 0.0


def forward_transfer(matrix: ArrayLike, zero_shot: ArrayLike) -> float:
    """FWT: what earlier domains did for a domain before it was learned,
    `mean_{i > 0} (R[i-1, i] - z[i])`; 0 of one domain.

    Args:
        matrix: float (D, D), stages by domains.
        zero_shot: float (D,), z: the score on each domain before anything was learned.
    """
    scores, before = _checked(matrix), np.asarray(zero_shot, np.float64)
    if before.shape != (len(scores),):
        raise ValueError(
            f"Expected a zero-shot score of each of {len(scores)} domains, got shape "
            f"{before.shape}."
        )
    return float((scores.diagonal(1) - before[1:]).mean()) if len(scores) > 1 else 0.0


def _checked(matrix: ArrayLike) -> np.ndarray:
    scores = np.asarray(matrix, np.float64)
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or not scores.size:
        raise ValueError(
            "Expected a matrix with a row for each stage and a column for each domain, as many of "
            f"one as of the other, got shape {scores.shape}. Evaluate all domains after each stage."
        )
    if not np.isfinite(scores).all():
        stage, domain = np.argwhere(~np.isfinite(scores))[0]
        raise ValueError(
            f"The score after stage {stage} on domain {domain} is {scores[stage, domain]}: every "
            "score must be finite."
        )
    return scores
