"""Methods side by side on queries with known source documents: fact tracing, and the tail-patch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from msif_core import corpus, storage
from msif_core.evaluation.facts import ranks_of_rankings, ranks_of_scores, trace_facts
from msif_core.evaluation.tail_patch import tail_patch
from msif_core.lexical import LexicalIndex
from msif_core.pipeline import Pipeline
from msif_core.retrieval import FloatArray, by_document

TOP = 10
SEED = 0


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
    and random documents. Written to `evaluations/comparison.json` and returned.
    """
    queries = pipeline.held_out()
    assert queries is not None, "the comparison needs held-out queries in the configuration"
    documents, influence, dot = exact_document_scores(pipeline)
    texts = [f"{p} {c}" for p, c in zip(queries.prompts, queries.completions, strict=True)]
    lexical = LexicalIndex.load(pipeline.build_lexical()).search(texts, len(documents))
    gold = [list(metadata.get("gold_doc_ids", [])) for metadata in queries.metadata]

    ranks = {
        "multi-stage influence": ranks_of_scores(influence, documents, gold),
        "gradient dot product": ranks_of_scores(dot, documents, gold),
        "BM25": ranks_of_rankings(lexical, gold),
    }
    random = np.random.default_rng(SEED)
    best = {
        "multi-stage influence": [[documents[i] for i in np.argsort(-row)[:TOP]] for row in influence],
        "gradient dot product": [[documents[i] for i in np.argsort(-row)[:TOP]] for row in dot],
        "BM25": [row[:TOP] for row in lexical],
        "random": [[documents[i] for i in random.choice(len(documents), TOP, replace=False)] for _ in gold],
    }
    folder = pipeline.workspace.corpus(pipeline.target)
    retrieved = {m: [corpus.sequences_of_documents(folder, names) for names in rows] for m, rows in best.items()}
    last = pipeline.config.stages[-1]
    changes = tail_patch(
        pipeline.model(last.name), queries.sequences, retrieved, learning_rate,
        pipeline.batch_tokens, last.task, progress,
    )  # fmt: skip
    rows = []
    for method, change in changes.items():
        traced = trace_facts(ranks[method]) if method in ranks else None
        below_random = change - changes["random"]
        rows.append(
            {
                "method": method,
                "mrr": traced.mrr if traced else None,
                "recall_at_10": traced.recall[10] if traced else None,
                "loss_change": float(np.nanmean(change)),
                "loss_change_error": float(np.nanstd(change) / np.sqrt(len(change))),
                "against_random": float(np.nanmean(below_random)),
                "against_random_error": float(np.nanstd(below_random) / np.sqrt(len(change))),
            }
        )
    result = {
        "queries": len(queries),
        "learning_rate": learning_rate,
        "methods": rows,
        "ranks": {method: dict(zip(queries.ids, found, strict=True)) for method, found in ranks.items()},
    }
    storage.write_json(pipeline.workspace.evaluations / "comparison.json", result)
    return result
