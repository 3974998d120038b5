"""From candidates to ranked documents: merge, exact scores, percentiles, near-duplicates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


@dataclass
class Candidates:
    """Documents to re-rank for one query, each with the retrievers that proposed it."""

    sources: dict[str, set[str]] = field(default_factory=dict)

    def add(self, documents: Sequence[str], source: str) -> None:
        """Propose `documents` on behalf of `source` ("gradient" or "bm25")."""
        for document in documents:
            self.sources.setdefault(document, set()).add(source)

    def label(self, document: str) -> str:
        """gradient, bm25, both, or exact for a document that another query's retriever proposed."""
        found = self.sources.get(document, set())
        return "both" if len(found) == 2 else next(iter(found), "exact")


@dataclass(frozen=True)
class DocumentScores:
    """Exact scores of documents: float32 [Q, D], and for each the best sequence and its score."""

    documents: list[str]
    total: FloatArray
    best: FloatArray
    best_sequence: npt.NDArray[np.int64]


def by_document(scores: FloatArray, document_ids: Sequence[str], sequence_ids: npt.NDArray[np.int64]) -> DocumentScores:
    """Sum sequence scores [Q, N] over each document, and keep each document's best sequence."""
    documents, inverse = np.unique(np.asarray(document_ids, dtype=object), return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    starts = np.searchsorted(inverse[order], np.arange(len(documents)))
    ordered = scores[:, order]
    total = np.add.reduceat(ordered, starts, axis=1) if len(documents) else ordered
    best = np.maximum.reduceat(ordered, starts, axis=1) if len(documents) else ordered
    best_row = np.zeros_like(best, dtype=np.int64)
    for column, rows in enumerate(np.split(order, starts[1:])):
        best_row[:, column] = rows[np.argmax(scores[:, rows], axis=1)]
    return DocumentScores([str(name) for name in documents], total.astype(np.float32), best, sequence_ids[best_row])


def percentiles(scores: FloatArray, sample: FloatArray) -> FloatArray:
    """Share (0 to 100) of the random sample [Q, R] that scores below each of `scores` [Q, D]."""
    if sample.shape[1] == 0:
        return np.full_like(scores, np.nan)
    ranked = np.sort(sample, axis=1)
    below = [np.searchsorted(ranked[q], scores[q]) for q in range(len(scores))]
    return (100.0 * np.stack(below) / sample.shape[1]).astype(np.float32)


def duplicate_groups(texts: Sequence[str], threshold: float = 0.7) -> list[int]:
    """Group near-duplicate texts: Jaccard similarity of their word 3-shingles at or above `threshold`.

    Returns the position of each text's first near-duplicate (its own position where it is the first).
    """
    shingles = []
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        shingles.append({tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))})
    groups = list(range(len(texts)))
    for i, mine in enumerate(shingles):
        for j in range(i):
            if len(mine & shingles[j]) >= threshold * len(mine | shingles[j]):
                groups[i] = groups[j]
                break
    return groups
