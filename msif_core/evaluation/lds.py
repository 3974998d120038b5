"""Linear datamodeling score: do summed scores predict what retraining on a subset does to a query's loss?

Per query, the Spearman correlation over subsets between the sum of the scores of the subset's documents and minus
the retrained loss (Park et al. 2023, arXiv 2303.14186). The sign is kept: a method that is wrong way round is below 0.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from msif_core.errors import InputError

FloatArray = npt.NDArray[np.float64]
DRAWS = 2000
"""Bootstrap draws."""


def ranks(values: npt.ArrayLike) -> FloatArray:
    """Ranks along the first axis, ties at their mean rank: [M, Q] to [M, Q]."""
    table = np.asarray(values, dtype=np.float64)
    out = np.empty_like(table)
    for column in range(table.shape[1]):
        _, inverse, counts = np.unique(table[:, column], return_inverse=True, return_counts=True)
        out[:, column] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return out


def spearman(first: npt.ArrayLike, second: npt.ArrayLike) -> FloatArray:
    """Rank correlation of each column of [M, Q] with the same column of the other: [Q]; 0 where one is constant."""
    x, y = ranks(first), ranks(second)
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    norm = np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=0))
    return np.divide((x * y).sum(axis=0), norm, out=np.zeros(x.shape[1]), where=norm > 0)


def datamodeling(scores: npt.ArrayLike, masks: npt.ArrayLike, losses: npt.ArrayLike) -> FloatArray:
    """The score of each query: [Q].

    Args:
        scores: influence of each document of the pool on each query [Q, N]; higher means lower loss.
        masks: which documents each subset held, bool [M, N].
        losses: the queries' losses after training on each subset [M, Q].

    Raises:
        InputError: the shapes do not fit, or a score is not a number.
    """
    table, inside, found = np.asarray(scores, np.float64), np.asarray(masks, np.float64), np.asarray(losses, np.float64)
    if table.ndim != 2 or inside.shape[1:] != table.shape[1:] or found.shape != (len(inside), len(table)):
        raise InputError(
            f"LDS: scores {table.shape}, masks {inside.shape} and losses {found.shape} do not fit; "
            "expected [Q, N], [M, N] and [M, Q]"
        )
    if not np.isfinite(table).all():
        raise InputError("LDS: a score is not a finite number")
    return spearman(inside @ table.T, -found)


def mean_and_error(values: npt.ArrayLike, seed: int = 0) -> tuple[float, float]:
    """Mean over queries and its bootstrap standard error (queries drawn with replacement)."""
    found = np.asarray(values, np.float64)
    drawn = np.random.default_rng(seed).integers(len(found), size=(DRAWS, len(found)))
    return float(found.mean()), float(found[drawn].mean(axis=1).std(ddof=1))


def paired_difference(first: npt.ArrayLike, second: npt.ArrayLike, seed: int = 0) -> tuple[float, float]:
    """Mean of first minus second over the same queries, and its bootstrap standard error."""
    return mean_and_error(np.asarray(first, np.float64) - np.asarray(second, np.float64), seed)


def noise_ceiling(first: npt.ArrayLike, second: npt.ArrayLike, repeated: float = 0.0) -> tuple[float, float]:
    """The score that a perfect predictor of the mean over seeds would have, and its standard error.

    With r the agreement between two seeds' losses [R, Q] of the same subsets, averaged over queries, it is sqrt(r)
    against one seed's losses, and sqrt(2r / (1 + r)) against the two seeds' mean (Spearman and Brown). Where a share
    `repeated` of all subsets has two seeds' mean, and the others have one seed's losses, it is nearly the mean of both,
    weighted by their shares (tests/test_lds.py has a simulation).
    """
    agreement, error = mean_and_error(spearman(first, second))
    r = max(agreement, 0.0)
    of_one, of_two = r**0.5, (2 * r / (1 + r)) ** 0.5
    ceiling = (1 - repeated) * of_one + repeated * of_two
    slope = (1 - repeated) / (2 * of_one) + repeated / (of_two * (1 + r) ** 2) if r else 1.0
    return ceiling, error * slope
