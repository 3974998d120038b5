"""How much of the exact top k a cheaper retrieval finds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from msif_core.errors import InputError


def recall_at_k(
    exact: npt.ArrayLike, ids: npt.ArrayLike, retrieved: npt.ArrayLike, k: int, *, per_query: bool = False
) -> float | npt.NDArray[np.float64]:
    """Share of each query's k exactly best entries that were retrieved, averaged over the queries.

    Args:
        exact: exact scores [Q, N].
        ids: the N entries' ids.
        retrieved: ids retrieved for each query [Q, n]; -1 is an empty place.
        k: how many of the best are looked for; all of them where there are fewer.
        per_query: give the Q shares instead of their mean.

    Raises:
        InputError: the shapes do not fit, or a score is not a number.
    """
    scores, names, found = np.asarray(exact), np.asarray(ids), np.asarray(retrieved)
    if scores.ndim != 2 or names.shape != scores.shape[1:] or len(found) != len(scores):
        raise InputError(
            f"recall: exact scores {scores.shape}, ids {names.shape} and retrieved {found.shape} do not fit; "
            "expected [Q, N], [N] and [Q, n]"
        )
    if not scores.size or k < 1:
        raise InputError(f"recall: nothing to compare ({scores.shape} scores, k = {k})")
    if np.isnan(scores).any():
        raise InputError("recall: an exact score is not a number")
    k = min(k, scores.shape[1])
    best = names[np.argsort(-scores, axis=1, kind="stable")[:, :k]]
    shares = np.array([np.isin(row, hits).mean() for row, hits in zip(best, found, strict=True)])
    return shares if per_query else float(shares.mean())
