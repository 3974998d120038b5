"""Methods side by side on queries with known source documents: fact tracing, and the tail-patch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from msif_core import corpus, storage
from msif_core.errors import InputError
from msif_core.evaluation.facts import ranks_of_rankings, ranks_of_scores, trace_facts
from msif_core.evaluation.tail_patch import FloatArray as Changes
from msif_core.evaluation.tail_patch import tail_patch
from msif_core.lexical import LexicalIndex
from msif_core.pipeline import Pipeline
from msif_core.queries import Queries, check_single
from msif_core.retrieval import FloatArray, by_document

TOP = 10
SEED = 0

SHOWN = 3
"""Ids in a message."""


def _silent(done: int, total: int) -> None:
    """The progress callback of those who want none."""


def exact_document_scores(pipeline: Pipeline) -> tuple[list[str], FloatArray, FloatArray]:
    """Documents, and the held-out queries' influence and gradient dot product [Q, D], over the recall shards."""
    sequences = [corpus.read_shard(pipeline.shards(pipeline.target)[s]) for s in pipeline.recall_shards()]
    scores = np.concatenate([np.load(pipeline.exact_shard(s)) for s in pipeline.recall_shards()], axis=2)
    names = [name for part in sequences for name in part.document_ids]
    ids = np.concatenate([part.sequence_ids for part in sequences])
    influence, dot = (by_document(part, names, ids) for part in scores)
    return influence.documents, influence.total, dot.total


def compare(pipeline: Pipeline, learning_rate: float, progress: Callable[[int, int], None] = _silent) -> dict[str, Any]:
    """Ranks of the gold documents, and the loss change after a step on each method's top ten.

    Methods: multi-stage influence (exact scores), the gradient dot product (exact, no curvature), BM25,
    and random documents. Written to `evaluations/comparison.json` and returned; without a tail-patch the loss changes
    are None, and `no_tail_patch` says why.

    Raises:
        InputError: there are no held-out queries, none has a gold document, one has another than the corpus
            holds, or is a contrast or a set.
    """
    queries = _asked(pipeline)
    documents, influence, dot = exact_document_scores(pipeline)
    texts = [f"{p} {c}" for p, c in zip(queries.prompts, queries.completions, strict=True)]
    lexical = LexicalIndex.load(pipeline.build_lexical()).search(texts, len(documents))
    gold = [list(metadata.get("gold_doc_ids", [])) for metadata in queries.metadata]

    ranks = {
        "multi-stage influence": ranks_of_scores(influence, documents, gold),
        "gradient dot product": ranks_of_scores(dot, documents, gold),
        "BM25": ranks_of_rankings(lexical, gold),
    }
    random, drawn = np.random.default_rng(SEED), min(TOP, len(documents))
    best = {
        "multi-stage influence": [[documents[i] for i in np.argsort(-row)[:TOP]] for row in influence],
        "gradient dot product": [[documents[i] for i in np.argsort(-row)[:TOP]] for row in dot],
        "BM25": [row[:TOP] for row in lexical],
        "random": [[documents[i] for i in random.choice(len(documents), drawn, replace=False)] for _ in gold],
    }
    left_out = _no_tail_patch(pipeline)
    changes = {method: np.full(len(queries), np.nan) for method in best}
    if left_out is None:
        changes = _tail_patch(pipeline, queries, best, learning_rate, progress)
    rows = []
    for method, change in changes.items():
        traced = trace_facts(ranks[method]) if method in ranks else None
        loss_change, below_random = _mean_and_error(change), _mean_and_error(change - changes["random"])
        rows.append(
            {
                "method": method,
                "mrr": traced.mrr if traced else None,
                "recall_at_10": traced.recall[10] if traced else None,
                "loss_change": loss_change[0],
                "loss_change_error": loss_change[1],
                "against_random": below_random[0],
                "against_random_error": below_random[1],
            }
        )
    result = {
        "queries": len(queries),
        "learning_rate": learning_rate,
        "no_tail_patch": left_out,
        "methods": rows,
        "ranks": {method: dict(zip(queries.ids, found, strict=True)) for method, found in ranks.items()},
    }
    storage.write_json(pipeline.workspace.evaluations / "comparison.json", result)
    return result


def _asked(pipeline: Pipeline) -> Queries:
    """The held-out queries, if they can be compared on."""
    queries, source = pipeline.held_out(), str(pipeline.config.queries)
    if queries is None:
        raise InputError(
            "the comparison needs held-out queries: set `queries` to a jsonl file, and index.recall_queries above 0"
        )
    check_single(queries, source, "the comparison")
    if not any(metadata.get("gold_doc_ids") for metadata in queries.metadata):
        raise InputError(
            f"{source}: no query has gold_doc_ids; give some the ids of the documents that state their answer"
        )
    _check_gold(pipeline, queries, source)
    return queries


def _check_gold(pipeline: Pipeline, queries: Queries, source: str) -> None:
    """Refuse gold documents that the corpus lacks, which no method could find."""
    asking = {
        name: query
        for query, metadata in zip(queries.ids, queries.metadata, strict=True)
        for name in metadata.get("gold_doc_ids", [])
    }
    known = corpus.rows_of_documents(pipeline.corpus_version(pipeline.target), list(asking), [])
    lacking = [name for name in asking if name not in known]
    if lacking:
        raise InputError(
            f"{source}, query {asking[lacking[0]]!r}: stage {pipeline.target!r} has no document of {len(lacking)} "
            f"gold_doc_ids, the first: {lacking[:SHOWN]}; correct the ids, or add the documents"
        )


def _no_tail_patch(pipeline: Pipeline) -> str | None:
    """Why the last stage's model cannot take a step on the attributed stage's documents; None if it can."""
    own, last = (pipeline.config.stage(name).task for name in (pipeline.target, pipeline.last))
    return None if own == last else f"the attributed stage is a {own}, the last one a {last}"


def _tail_patch(
    pipeline: Pipeline,
    queries: Queries,
    best: dict[str, list[list[str]]],
    learning_rate: float,
    progress: Callable[[int, int], None],
) -> dict[str, Changes]:
    """Loss changes [Q] after a step on each method's best documents, NaN where it has none."""
    folder = pipeline.workspace.corpus(pipeline.target)
    retrieved = {m: [corpus.sequences_of_documents(folder, names) for names in rows] for m, rows in best.items()}
    task = pipeline.config.stage(pipeline.last).task
    return tail_patch(
        pipeline.model(pipeline.last),
        queries.sequences,
        retrieved,
        learning_rate,
        pipeline.batch_tokens,
        task,
        progress,
    )


def _mean_and_error(changes: Changes) -> tuple[float | None, float | None]:
    """Of the queries that have a change: no mean where none has, no error where one has."""
    found = changes[np.isfinite(changes)]
    mean = float(found.mean()) if len(found) else None
    return mean, float(found.std(ddof=1) / np.sqrt(len(found))) if len(found) > 1 else None
