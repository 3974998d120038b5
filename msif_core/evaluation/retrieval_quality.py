"""What retrieval finds of the exactly scored best, by source, and how close its estimate is to exact scores.

Pure functions of arrays. A source's scores are -inf where it does not find a sequence; of equal scores the first
counts as higher.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]
Row = dict[str, Any]

VERSION = 1
"""Raised when what is measured changes, so that a build measures again."""
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1)
BEST = 10
"""Sequences that recall looks for, and the fewest that are taken."""
STANDS_OUT = 99
"""Percentile of a query's exact scores from which positive influence stands out (from: duplicates of the best tie)."""
DECISIVE = 0.02
"""Share taken at which the gradient index is compared with chance, and `index.min_recall` decides."""
ERRORS = 3
"""Standard errors above chance that count as better than chance."""
FEW_QUERIES = 10
"""With fewer, a result no better than chance says little."""
HALF = 0.5
"""A recall below is weak; where only one above could be told from chance, one no better than chance says little."""


class Sought(NamedTuple):
    """What is to be found, each [Q, N]: the exact top ten, the influence that stands out, and the exact best."""

    top: Mask
    weight: npt.NDArray[np.float64]
    best: Mask


def measure(
    exact: Floats,
    documents: npt.NDArray[np.integer[Any]],
    gradient: Floats,
    words: Floats | None = None,
    shares: Sequence[float] = SHARES,
) -> Row:
    """What each source finds at each share, the estimate against exact scores, and a verdict in plain words.

    Args:
        exact: exact scores [Q, N]; those that are not finite belong to queries or sequences in quarantine.
        documents: number of each sequence's document [N].
        gradient: the gradient index's estimates [Q, N].
        words: BM25 scores of the sequences' documents [Q, N]; None without a BM25 index.
        shares: shares of the sequences that each source takes.

    Returns:
        `queries` and `sequences` that have exact scores; `found`, a row for each source and share (see `found_rows`);
        `standing_out`, the number of queries with influence that stands out; `estimate` (see `against_exact`);
        `verdict` (chance, unsure, weak or better) and `told`, what it means.
    """
    queries = np.isfinite(exact).any(axis=1)
    kept = np.isfinite(exact[queries]).all(axis=0)
    exact, gradient, *rest = (
        scores[queries][:, kept].astype(np.float64) for scores in (exact, gradient, words) if scores is not None
    )
    found, standing_out = [], 0
    if exact.size:
        sought = what_is_sought(exact)
        standing_out = int(sought.weight.any(axis=1).sum())
        found = list(found_rows(sought, documents[kept], gradient, rest[0] if rest else None, shares))
    verdict, told = judge(found, *exact.shape)
    return {
        "queries": exact.shape[0],
        "sequences": exact.shape[1],
        "found": found,
        "standing_out": standing_out,
        "estimate": against_exact(gradient, exact),
        "verdict": verdict,
        "told": told,
    }


def what_is_sought(exact: Floats) -> Sought:
    """What is to be found for each query, from its exact scores [Q, N], all finite, at least one."""
    bound = np.percentile(exact, STANDS_OUT, axis=1, keepdims=True)
    weight = np.where((exact >= bound) & (exact > 0), exact, 0.0).astype(np.float64)
    return Sought(ranks(exact) < BEST, weight, exact == exact.max(axis=1, keepdims=True))


def counts(sequences: int, shares: Sequence[float]) -> list[int]:
    """How many sequences the shares come to, at least ten; equal ones once, and not those that take all."""
    found = {max(BEST, round(share * sequences)) for share in shares}
    return sorted(count for count in found if count < sequences)


def found_rows(
    sought: Sought,
    documents: npt.NDArray[np.integer[Any]],
    gradient: Floats,
    words: Floats | None,
    shares: Sequence[float],
) -> Iterator[Row]:
    """What each source finds of what is sought, means over the queries with their standard errors.

    `gradient` and `bm25` alone take equally many sequences, those that they score highest. `both` is what an answer
    scores exactly when it takes so many sequences from the index and so many documents from BM25: all sequences of
    the documents that either brings.

    Yields:
        `source`; `share`, what each source is asked for, of all sequences; `taken`, how many are scored exactly in the
        mean; and, each with its `_error`: `recall` of the exact top ten, `weight`, the share found of the influence
        that stands out, and `best`, the share of the queries whose exact best sequence is found. None: no query has it.
    """
    _, first, own = np.unique(documents, return_index=True, return_inverse=True)
    place = ranks(gradient)
    word_place = None if words is None else ranks(words)
    word_document = None if words is None else ranks(words[:, first])
    for count in counts(gradient.shape[1], shares):
        taken = {"gradient": (place < count) & np.isfinite(gradient)}
        if words is not None and word_place is not None and word_document is not None:
            taken["bm25"] = (word_place < count) & np.isfinite(words)
            brought = (word_document < count) & np.isfinite(words[:, first])
            for row, mask in zip(brought, taken["gradient"], strict=True):
                row[own[mask]] = True
            taken["both"] = brought[:, own]
        for source, mask in taken.items():
            yield {"source": source, "share": count / gradient.shape[1], **_shares_found(mask, sought)}


def _shares_found(mask: Mask, sought: Sought) -> Row:
    """Means over the queries of what `mask` [Q, N] holds of what is sought."""
    weight, all_weight = (sought.weight * mask).sum(axis=1), sought.weight.sum(axis=1)
    values = {
        "recall": (sought.top & mask).sum(axis=1) / sought.top.sum(axis=1),
        "weight": (weight / np.where(all_weight > 0, all_weight, 1))[all_weight > 0],
        "best": (sought.best & mask).any(axis=1).astype(np.float64),
    }
    row: Row = {"taken": float(mask.sum(axis=1).mean())}
    for name, found in values.items():
        row[name] = float(found.mean()) if len(found) else None
        row[f"{name}_error"] = float(found.std(ddof=1) / np.sqrt(len(found))) if len(found) > 1 else None
    return row


def ranks(scores: Floats) -> npt.NDArray[np.int64]:
    """Each entry's place in its row [Q, N], the highest score first, 0 upwards."""
    order = np.argsort(-scores, axis=1, kind="stable")
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.arange(scores.shape[1])[None, :], axis=1)
    return places


def against_exact(estimate: Floats, exact: Floats) -> dict[str, list[float]] | None:
    """Quartiles over the queries of how estimates [Q, N] go with exact scores [Q, N]; None where no query can tell.

    Returns:
        `correlation`; `slope` of the estimate over the exact score; and `noise`, the spread of what the line leaves
        over, in spreads of the exact scores. Each is [lower quartile, median, upper quartile]. Sequences without an
        estimate and queries whose exact scores are all alike are left out.
    """
    rows = []
    for guess, true in zip(estimate, exact, strict=True):
        there = np.isfinite(guess)
        spread = float(true[there].std()) if there.any() else 0.0
        if spread > 0:
            guess, true = guess[there] - guess[there].mean(), true[there] - true[there].mean()
            slope = float(guess @ true / (true @ true))
            correlation = slope * spread / float(guess.std()) if guess.any() else 0.0
            rows.append((correlation, slope, float((guess - slope * true).std()) / spread))
    if not rows:
        return None
    quartiles = np.percentile(np.array(rows), [25, 50, 75], axis=0)
    return dict(zip(("correlation", "slope", "noise"), quartiles.T.tolist(), strict=True))


def decisive(found: Sequence[Row], source: str = "gradient") -> Row | None:
    """The row of `source` at 2%, or at the next share that there is; None where so few sequences are all taken."""
    rounded = DECISIVE - 1e-3  # a share is of whole sequences
    return next((row for row in found if row["source"] == source and row["share"] >= rounded), None)


def judge(found: Sequence[Row], queries: int, sequences: int) -> tuple[str, str]:
    """Whether the gradient index is better than chance, and what that means in plain words.

    A set drawn by chance holds its own share of the exact top ten, in the mean. The index is better where it finds
    three standard errors more; the larger one counts of what chance would have and what the queries show.
    """
    row = decisive(found)
    if row is None:
        return "unsure", f"With {sequences:,} sequences scored exactly, nothing can be said of the gradient index."
    chance, others = row["share"], (sequences - BEST) / (sequences - 1)
    error = float(np.sqrt(chance * (1 - chance) * others / (BEST * queries)))
    place = f"in the best {row['taken']:,.0f} of {sequences:,} sequences"
    numbers = (
        f"{row['recall']:.0%} of the exact top ten, and the exact best of {row['best']:.0%} of the queries, {place}; "
        f"chance {chance:.0%}"
    )
    words = decisive(found, "bm25")
    if row["recall"] > chance + ERRORS * max(error, row["recall_error"] or 0.0):
        less = words is not None and words["recall"] > row["recall"]
        beside = f"; words alone find more: {words['recall']:.0%}" if words is not None and less else ""
        told = "The gradient index finds more of the strongest documents than chance"
        if row["recall"] < HALF:
            return "weak", f"{told}, but misses most of them: it finds {numbers}{beside}."
        return "better", f"{told}: {numbers}{beside}."
    if queries < FEW_QUERIES or chance + ERRORS * error > HALF:
        some = f"{queries:,} held-out {'query' if queries == 1 else 'queries'} over {sequences:,} sequences"
        return "unsure", f"{some} are too few to tell the gradient index from chance: it finds {numbers}."
    mend = "candidates come from words alone, in effect"
    if words is None:
        mend = "candidates are drawn by chance, in effect; set retrieval.candidates to both, for candidates by words"
    told = "The gradient index finds no more of the strongest documents than chance would on this model"
    return "chance", f"{told} ({numbers}): {mend}."
