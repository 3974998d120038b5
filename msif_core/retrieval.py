"""From candidates to ranked documents: merge, exact scores, percentiles, near-duplicates."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
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

    def keep(self, documents: Container[str]) -> None:
        """Drop what is not among `documents`."""
        self.sources = {name: found for name, found in self.sources.items() if name in documents}

    def label(self, document: str) -> str:
        """gradient, bm25, both, or exact for a document that another query's retriever proposed."""
        found = self.sources.get(document, set())
        return "both" if len(found) == 2 else next(iter(found), "exact")


@dataclass(frozen=True)
class DocumentScores:
    """Exact scores of documents: float32 [Q, D], and for each its strongest sequence and that one's score.

    The strongest sequence is the one that speaks most in the document's own direction: the highest of a proponent,
    the lowest of an opponent.
    """

    documents: list[str]
    total: FloatArray
    best: FloatArray
    best_sequence: npt.NDArray[np.int64]
    best_row: npt.NDArray[np.int64]


def by_document(scores: FloatArray, document_ids: Sequence[str], sequence_ids: npt.NDArray[np.int64]) -> DocumentScores:
    """Sum sequence scores [Q, N] over each document, and keep each document's strongest sequence."""
    documents, inverse = np.unique(np.asarray(document_ids, dtype=object), return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    starts = np.searchsorted(inverse[order], np.arange(len(documents)))
    ordered = scores[:, order]
    total = np.add.reduceat(ordered, starts, axis=1) if len(documents) else ordered
    strongest_row = np.zeros_like(total, dtype=np.int64)
    for column, rows in enumerate(np.split(order, starts)[1:]):
        own = scores[:, rows] * np.where(total[:, column] < 0, -1, 1)[:, None]
        strongest_row[:, column] = rows[np.argmax(own, axis=1)]
    best = np.take_along_axis(scores, strongest_row, axis=1)
    return DocumentScores(
        [str(name) for name in documents], total.astype(np.float32), best, sequence_ids[strongest_row], strongest_row
    )


def percentiles(scores: FloatArray, sampled: npt.NDArray[np.int64]) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Share (0 to 100) of the randomly sampled documents that score below each document.

    Args:
        scores: float32 [Q, D].
        sampled: columns of the random documents. A document is not compared with itself.

    Returns:
        Percentiles [Q, D], NaN without a sample, and how many random documents each was compared with, [D].
    """
    others = np.full(scores.shape[1], len(sampled), dtype=np.int64)
    others[sampled] -= 1
    ranked = np.sort(scores[:, sampled], axis=1)
    below = np.stack([np.searchsorted(ranked[q], scores[q]) for q in range(len(scores))])
    with np.errstate(invalid="ignore"):
        return np.where(others > 0, 100.0 * below / np.maximum(others, 1), np.nan).astype(np.float32), others


def duplicate_groups(texts: Sequence[str], threshold: float = 0.7) -> list[int]:
    """Group near-duplicate texts: Jaccard similarity of their word 3-shingles at or above `threshold`.

    Returns the position of each text's first near-duplicate (its own position where it is the first, or has no words).
    """
    shingles = []
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        shingles.append({tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))} if words else set())
    groups = list(range(len(texts)))
    for i, mine in enumerate(shingles):
        for j in range(i):
            if mine and len(mine & shingles[j]) >= threshold * len(mine | shingles[j]):
                groups[i] = groups[j]
                break
    return groups
