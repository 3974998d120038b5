"""Answer a set of queries: candidates, exact re-rank, and the stored attribution."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from msif_core import corpus, index, scoring, storage
from msif_core.answer_tables import Tables
from msif_core.batching import Sequences
from msif_core.contributions import add_contributions
from msif_core.dealing import canonical_json
from msif_core.errors import InputError
from msif_core.lexical import LexicalIndex
from msif_core.queries import Queries
from msif_core.retrieval import Candidates, DocumentScores, by_document, duplicate_groups, percentiles

if TYPE_CHECKING:
    from msif_core.pipeline import Pipeline

OPPONENT_SHARE = 0.25
"""Opponents shown, as a share of the proponents."""


TOGETHER = 128
"""Queries in a group at most: their scores are a matrix of queries by all the candidates that they have together."""


@dataclass
class Generation:
    """The published index, opened for one answer: a publish or a refit meanwhile does not touch it."""

    pipeline: Pipeline
    manifest: dict[str, Any]
    index: index.Index
    corpus_folder: Path
    """Manifest of the version of the corpus that the index was built from."""

    @classmethod
    def open(cls, pipeline: Pipeline) -> Generation:
        """Open the published generation.

        Raises:
            InputError: nothing is published, or it was built from other models or settings.
        """
        manifest = storage.read_json(pipeline.workspace.current_generation() / "manifest.json")
        pipeline.check_generation(manifest)
        root = pipeline.workspace.root
        return cls(
            pipeline.holding(manifest["factors"]),
            manifest,
            index.Index([root / path for path in manifest["codes"]], pipeline.config.index),
            root / manifest["corpora"][pipeline.target],
        )

    @cached_property
    def lexical(self) -> LexicalIndex:
        """The BM25 index over the documents' words.

        Raises:
            InputError: the generation was built without.
        """
        if self.manifest["lexical"] is None:
            raise InputError(
                f"generation {self.manifest['generation']} has no BM25 index, as it was built with "
                "retrieval.candidates: gradient; ask with that, or change it and run `msif run CONFIG`"
            )
        return LexicalIndex.load(self.pipeline.workspace.root / self.manifest["lexical"])


@dataclass
class Answered:
    """Some of the queries with their candidates' exact scores."""

    queries: Queries
    candidates: list[Candidates]
    sequences: Sequences
    ranked: DocumentScores
    sampled: list[int]
    shown: list[list[int]]


def answer(pipeline: Pipeline, queries: Queries, top_k: int) -> Path:
    """Attribute `queries` and store the answer; returns the run's folder.

    Raises:
        InputError: nothing is published, or a query's gradient is not finite.
    """
    started = time.perf_counter()
    generation = Generation.open(pipeline)
    pipeline = generation.pipeline
    chain = pipeline.chain()
    sampled = corpus.sample_documents(generation.corpus_folder, pipeline.config.retrieval.random_sample)
    run_id = pipeline.workspace.new_run()
    folder = pipeline.workspace.attributions / run_id
    done = rescored = 0
    with Tables(folder, run_id) as tables:
        add_queries(tables, pipeline, queries)
        for group in groups(pipeline, queries):
            part = answer_group(pipeline, generation, group, sampled, top_k)
            add_influences(tables, part, generation.corpus_folder)
            add_samples(tables, part)
            for q, columns in enumerate(part.shown):
                best = part.sequences.take([int(part.ranked.best_row[q, c]) for c in columns])
                add_contributions(tables, pipeline, group.take([q]), best)
            done, rescored = done + len(group), rescored + len(group) * len(part.sequences)
            pipeline.progress("answer", done, len(queries))
    storage.write_json(
        folder / "manifest.json",
        {
            "run_id": run_id,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - started, 2),
            "generation": generation.manifest["generation"],
            "corpus": generation.manifest["corpora"][pipeline.target],
            "recall": generation.manifest["recall"],
            "factors": generation.manifest["factors"],
            "levels": {m.name: chain.levels(m.name) for m in pipeline.maps(pipeline.target)},
            "settings": pipeline.config.model_dump(mode="json"),
            "n_queries": len(queries),
            "n_rescored": round(rescored / len(queries)),
        },
    )
    return folder


def groups(pipeline: Pipeline, queries: Queries) -> Iterator[Queries]:
    """The queries, as many at a time as have gradients that fit into `curvature.memory_budget_gb`, at most `TOGETHER`.

    Each group scores its own candidates: with all queries at once, a model too large for the budget would take a pass
    over everybody's candidates for each block of queries and maps.
    """
    count = scoring.queries_within(pipeline.maps(pipeline.last), pipeline.config.curvature.memory_budget_gb)
    count = min(count, TOGETHER)
    for start in range(0, len(queries), count):
        yield queries.take(range(start, min(start + count, len(queries))))


def answer_group(
    pipeline: Pipeline, generation: Generation, queries: Queries, sampled: list[str], top_k: int
) -> Answered:
    """Candidates of some queries and their exact scores, those of the random documents with them."""
    candidates = find_candidates(pipeline, generation, queries)
    names = sorted({name for c in candidates for name in c.sources} | set(sampled))
    sequences = corpus.sequences_of_documents(generation.corpus_folder, names)
    scores = pipeline.scores(queries, sequences)
    check_finite(queries, scores)
    ranked = by_document(scores, sequences.document_ids, sequences.sequence_ids)
    # A document that the build set aside (a gradient that is not finite) may still be found by its words.
    finite = {ranked.documents[c]: int(c) for c in np.flatnonzero(np.isfinite(ranked.total).all(axis=0))}
    for candidate in candidates:
        candidate.keep(finite.keys())
    shown = [shown_columns(ranked.total[q], finite, candidate, top_k) for q, candidate in enumerate(candidates)]
    own_sample = [finite[name] for name in sampled if name in finite]
    return Answered(queries, candidates, sequences, ranked, own_sample, shown)


def check_finite(queries: Queries, scores: np.ndarray) -> None:
    """Refuse a query that has no finite score with any document: its own gradient is not finite."""
    bad = np.flatnonzero(~np.isfinite(scores).any(axis=1))
    if len(bad) and scores.shape[1]:
        raise InputError(
            f"query {queries.ids[bad[0]]!r}: its gradient is not finite; leave it out, or set compute.dtype to float32"
        )


def find_candidates(pipeline: Pipeline, generation: Generation, queries: Queries) -> list[Candidates]:
    """Candidates of each query: the gradient index from both ends, and BM25, as configured."""
    settings = pipeline.config.retrieval
    count = settings.taken(generation.manifest["n_sequences"])
    found = [Candidates() for _ in range(len(queries))]
    if settings.candidates in ("gradient", "both"):
        psi = pipeline.query_sketches(queries)
        for side, k in ((psi, count), (-psi, max(1, int(count * OPPONENT_SHARE)))):
            _, ids = generation.index.search(side, k)
            for candidate, row in zip(found, ids, strict=True):
                candidate.add(corpus.documents_of_sequences(generation.corpus_folder, row), "gradient")
    if settings.candidates in ("bm25", "both"):
        for candidate, documents in zip(found, generation.lexical.search(queries.texts, count), strict=True):
            candidate.add(documents, "bm25")
    return found


def shown_columns(scores: np.ndarray, columns: dict[str, int], candidate: Candidates, top_k: int) -> list[int]:
    """Columns of one query's top_k proponents and strongest opponents, candidates only, the strongest first."""
    own = sorted((columns[name] for name in candidate.sources), key=lambda c: -scores[c])
    positive = [c for c in own if scores[c] > 0][:top_k]
    negative = [c for c in reversed(own) if scores[c] < 0][: max(1, int(top_k * OPPONENT_SHARE))]
    return positive + negative


def add_influences(tables: Tables, part: Answered, corpus_folder: Path) -> None:
    """Rows of influences.parquet."""
    ranked = part.ranked
    percentile, others = percentiles(ranked.total, np.asarray(part.sampled, dtype=np.int64))
    names = sorted({ranked.documents[c] for columns in part.shown for c in columns})
    texts = corpus.rows_of_documents(corpus_folder, names, ["text"])
    for q, columns in enumerate(part.shown):
        groups = duplicate_groups([texts[ranked.documents[c]]["text"] for c in columns])
        for sign, side in ((1, "proponent"), (-1, "opponent")):
            own = [(i, c) for i, c in enumerate(columns) if sign * ranked.total[q, c] > 0]
            tables.add(
                "influences",
                (
                    (
                        part.queries.ids[q],
                        ranked.documents[c],
                        int(ranked.best_sequence[q, c]),
                        rank,
                        float(ranked.total[q, c]),
                        float(ranked.best[q, c]),
                        float(percentile[q, c]),
                        side,
                        part.candidates[q].label(ranked.documents[c]),
                        groups[i],
                        int(others[c]),
                    )
                    for rank, (i, c) in enumerate(own, 1)
                ),
            )


def add_queries(tables: Tables, pipeline: Pipeline, queries: Queries) -> None:
    """Rows of queries.parquet; the loss is the measurement: summed negative log-likelihood at the last stage."""
    last = pipeline.config.stages[-1]
    losses = scoring.losses(pipeline.model(last.name), queries.sequences, pipeline.batch_tokens, task=last.task)
    tables.add(
        "queries",
        (
            (
                queries.ids[q],
                queries.prompts[q],
                queries.completions[q],
                sum(weight * losses[row] for row, weight in measurement.items()),
                canonical_json(queries.metadata[q]),
                queries.generated[q],
                queries.contrasts[q],
                queries.members[q],
            )
            for q, measurement in enumerate(queries.measurements)
        ),
    )


def add_samples(tables: Tables, part: Answered) -> None:
    """Rows of samples.parquet and candidates.parquet: exact scores of random documents, and of what was retrieved."""
    names, column = part.ranked.documents, {name: c for c, name in enumerate(part.ranked.documents)}
    for q, query_id in enumerate(part.queries.ids):
        scores, found = part.ranked.total[q], part.candidates[q]
        tables.add("samples", ((query_id, names[c], float(scores[c])) for c in part.sampled))
        tables.add(
            "candidates", ((query_id, n, float(scores[column[n]]), found.label(n)) for n in sorted(found.sources))
        )
