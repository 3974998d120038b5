"""Fact tracing: at what rank stands the document that states the asked fact?

Queries without a gold document (controls) are left out of every mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from msif_core.errors import InputError

MISSED = 0
"""Rank of a gold document that was not retrieved."""


@dataclass(frozen=True)
class FactTracing:
    """How well one method finds the gold documents.

    Attributes:
        ranks: per query, the rank of each of its gold documents from 1; `MISSED` where not retrieved.
        mrr: mean over queries of 1 / rank of the best gold document, 0 where all are missed.
        recall: k to the mean over queries of the share of gold documents within the first k.
        queries: number of queries with a gold document.
    """

    ranks: list[list[int]]
    mrr: float
    recall: dict[int, float]
    queries: int


def ranks_of_scores(
    scores: npt.ArrayLike, document_ids: Sequence[str], gold: Sequence[Sequence[str]]
) -> list[list[int]]:
    """Ranks of the gold documents where every document has a score [Q, D]; a tie counts against the gold."""
    table = np.asarray(scores)
    if table.shape != (len(gold), len(document_ids)):
        raise InputError(f"fact tracing: scores {table.shape} for {len(gold)} queries, {len(document_ids)} documents")
    column = {name: i for i, name in enumerate(document_ids)}
    return [
        [int((row >= row[column[name]]).sum()) if name in column else MISSED for name in names]
        for row, names in zip(table, gold, strict=True)
    ]


def ranks_of_rankings(rankings: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]) -> list[list[int]]:
    """Ranks of the gold documents in each query's list of retrieved documents, best first."""
    if len(rankings) != len(gold):
        raise InputError(f"fact tracing: {len(rankings)} rankings for {len(gold)} queries")
    places = [{name: i for i, name in reversed(list(enumerate(ranking, 1)))} for ranking in rankings]
    return [[place.get(name, MISSED) for name in names] for place, names in zip(places, gold, strict=True)]


def trace_facts(ranks: Sequence[Sequence[int]], ks: Sequence[int] = (1, 10, 100)) -> FactTracing:
    """Summarise the ranks of the gold documents.

    Raises:
        InputError: no query has a gold document.
    """
    known = [list(row) for row in ranks if row]
    if not known:
        raise InputError(
            "fact tracing: no query has gold_doc_ids; give some the ids of the documents that state their answer"
        )
    best = [min((rank for rank in row if rank != MISSED), default=None) for row in known]
    return FactTracing(
        ranks=[list(row) for row in ranks],
        mrr=float(np.mean([1 / rank if rank else 0.0 for rank in best])),
        recall={k: float(np.mean([np.mean([MISSED < r <= k for r in row]) for row in known])) for k in ks},
        queries=len(known),
    )
