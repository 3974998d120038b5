"""Answer a set of queries: candidates, exact re-rank, and the stored attribution."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from msif_core import corpus, index, scoring, storage
from msif_core.batching import Sequences
from msif_core.lexical import LexicalIndex
from msif_core.retrieval import Candidates, DocumentScores, by_document, duplicate_groups, percentiles

if TYPE_CHECKING:
    from msif_core.pipeline import Pipeline

OPPONENT_SHARE = 0.25
"""Opponents shown, as a share of the proponents."""


@dataclass
class Generation:
    """The published index, opened for one answer: a publish or a refit meanwhile does not touch it."""

    pipeline: Pipeline
    manifest: dict[str, Any]
    index: index.Index
    lexical: LexicalIndex
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
            LexicalIndex.load(root / manifest["lexical"]),
            root / manifest["corpora"][pipeline.target],
        )

    def sequences_of(self, documents: list[str]) -> Sequences:
        """All sequences of the named documents."""
        return corpus.sequences_of_documents(self.corpus_folder, documents)


def answer(pipeline: Pipeline, queries: corpus.Queries, top_k: int) -> Path:
    """Attribute `queries` and store the answer; returns the run's folder."""
    started = time.perf_counter()
    generation = Generation.open(pipeline)
    pipeline = generation.pipeline
    chain = pipeline.chain()
    candidates = find_candidates(pipeline, generation, queries)
    sampled = corpus.sample_documents(generation.corpus_folder, pipeline.config.retrieval.random_sample)
    names = sorted({name for c in candidates for name in c.sources} | set(sampled))
    sequences = generation.sequences_of(names)
    scores = pipeline.scores(queries.sequences, sequences)
    finite = np.isfinite(scores).all(axis=0)  # the others are in quarantine
    sequences, scores = sequences.take(np.flatnonzero(finite)), scores[:, finite]
    ranked = by_document(scores, sequences.document_ids, sequences.sequence_ids)
    sampled = sorted(set(sampled) & set(ranked.documents))

    run_id = pipeline.workspace.new_run()
    folder = pipeline.workspace.attributions / run_id
    shown = Shown.choose(queries, candidates, ranked, top_k)
    write_table(folder / "influences.parquet", influence_rows(run_id, shown, ranked, candidates, sampled, generation))
    write_table(folder / "queries.parquet", query_rows(pipeline, run_id, queries))
    write_table(folder / "samples.parquet", sample_rows(run_id, queries, ranked, sampled))
    layers, tokens = contribution_rows(pipeline, run_id, queries, shown, sequences, scores)
    write_table(folder / "layers.parquet", layers)
    write_table(folder / "tokens.parquet", tokens)
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
            "levels": {name: chain.levels(name) for name in sorted(set(layers["map"]))},
            "settings": pipeline.config.model_dump(mode="json"),
            "n_queries": len(queries),
            "n_rescored": len(sequences),
        },
    )
    return folder


def find_candidates(pipeline: Pipeline, generation: Generation, queries: corpus.Queries) -> list[Candidates]:
    """Candidates of each query: the gradient index from both ends, and BM25, as configured."""
    settings = pipeline.config.retrieval
    count = int(
        np.clip(
            settings.rerank_fraction * generation.manifest["n_sequences"],
            settings.rerank_min,
            settings.rerank_max,
        )
    )
    found = [Candidates() for _ in range(len(queries))]
    if settings.candidates in ("gradient", "both"):
        psi = pipeline.query_sketches(queries.sequences)
        for side, k in ((psi, count), (-psi, max(1, int(count * OPPONENT_SHARE)))):
            _, ids = generation.index.search(side, k)
            for candidate, row in zip(found, ids, strict=True):
                candidate.add(corpus.documents_of_sequences(generation.corpus_folder, row), "gradient")
    if settings.candidates in ("bm25", "both"):
        texts = [
            f"{prompt} {completion}" for prompt, completion in zip(queries.prompts, queries.completions, strict=True)
        ]
        for candidate, documents in zip(found, generation.lexical.search(texts, count), strict=True):
            candidate.add(documents, "bm25")
    return found


@dataclass
class Shown:
    """For each query, the columns of the ranked documents that the answer shows, best first."""

    query_ids: list[str]
    columns: list[list[int]]

    @classmethod
    def choose(cls, queries: corpus.Queries, candidates: list[Candidates], ranked: DocumentScores, top_k: int) -> Shown:
        """The top_k proponents of each query and the strongest opponents, candidates only."""
        column = {name: i for i, name in enumerate(ranked.documents)}
        chosen = []
        for q, candidate in enumerate(candidates):
            own = sorted(
                (column[name] for name in candidate.sources if name in column), key=lambda c: -ranked.total[q, c]
            )
            positive = [c for c in own if ranked.total[q, c] > 0][:top_k]
            negative = [c for c in reversed(own) if ranked.total[q, c] < 0][: max(1, int(top_k * OPPONENT_SHARE))]
            chosen.append(positive + negative)
        return cls(list(queries.ids), chosen)


def influence_rows(
    run_id: str,
    shown: Shown,
    ranked: DocumentScores,
    candidates: list[Candidates],
    sampled: list[str],
    generation: Generation,
) -> dict[str, list[Any]]:
    """Rows of influences.parquet."""
    column = {name: i for i, name in enumerate(ranked.documents)}
    sample = ranked.total[:, [column[name] for name in sampled]]
    percentile = percentiles(ranked.total, sample)
    names = sorted({ranked.documents[c] for columns in shown.columns for c in columns})
    texts = corpus.document_texts(generation.corpus_folder, names)
    rows: dict[str, list[Any]] = {key: [] for key in INFLUENCES.names}
    for q, (query_id, columns) in enumerate(zip(shown.query_ids, shown.columns, strict=True)):
        groups = duplicate_groups([texts[ranked.documents[c]] for c in columns])
        for sign, side in ((1, "proponent"), (-1, "opponent")):
            own = [(i, c) for i, c in enumerate(columns) if sign * ranked.total[q, c] > 0]
            for rank, (i, c) in enumerate(own, 1):
                values = (
                    run_id,
                    query_id,
                    ranked.documents[c],
                    int(ranked.best_sequence[q, c]),
                    rank,
                    float(ranked.total[q, c]),
                    float(ranked.best[q, c]),
                    float(percentile[q, c]),
                    side,
                    candidates[q].label(ranked.documents[c]),
                    groups[i],
                )
                for key, value in zip(INFLUENCES.names, values, strict=True):
                    rows[key].append(value)
    return rows


def query_rows(pipeline: Pipeline, run_id: str, queries: corpus.Queries) -> dict[str, list[Any]]:
    """Rows of queries.parquet; the loss is the summed negative log-likelihood at the last stage."""
    last = pipeline.config.stages[-1]
    losses = scoring.losses(pipeline.model(last.name), queries.sequences, pipeline.batch_tokens, task=last.task)
    return {
        "run_id": [run_id] * len(queries),
        "query_id": list(queries.ids),
        "prompt": list(queries.prompts),
        "completion": list(queries.completions),
        "loss": [float(x) for x in losses],
        "metadata": [json.dumps(m, sort_keys=True) for m in queries.metadata],
    }


def sample_rows(
    run_id: str, queries: corpus.Queries, ranked: DocumentScores, sampled: list[str]
) -> dict[str, list[Any]]:
    """Rows of samples.parquet: exact scores of the random documents behind the percentiles."""
    column = {name: i for i, name in enumerate(ranked.documents)}
    pairs = [(q, name) for q in range(len(queries)) for name in sampled]
    return {
        "run_id": [run_id] * len(pairs),
        "query_id": [queries.ids[q] for q, _ in pairs],
        "document_id": [name for _, name in pairs],
        "score": [float(ranked.total[q, column[name]]) for q, name in pairs],
    }


def contribution_rows(
    pipeline: Pipeline,
    run_id: str,
    queries: corpus.Queries,
    shown: Shown,
    sequences: Sequences,
    scores: np.ndarray,
) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Rows of layers.parquet and tokens.parquet, for the shown documents' best sequences."""
    tokenizer = pipeline.tokenizer(pipeline.target)
    documents = sorted(set(sequences.document_ids))
    rows_of: dict[str, list[int]] = {}
    for row, name in enumerate(sequences.document_ids):
        rows_of.setdefault(name, []).append(row)
    names = [[documents[c] for c in columns] for columns in shown.columns]
    best = [
        [max(rows_of[name], key=lambda row: float(scores[q, row])) for name in found] for q, found in enumerate(names)
    ]
    layers: dict[str, list[Any]] = {key: [] for key in LAYERS.names}
    by_token = [[np.zeros(len(sequences.input_ids[row]), np.float32) for row in rows] for rows in best]
    target, chain = pipeline.config.stage(pipeline.target), pipeline.chain()
    for rows, gradients in pipeline.query_gradients(queries.sequences):
        filtered = chain.filter_all(gradients)
        for i, q in enumerate(range(*rows.indices(len(queries)))):
            by_map, parts = scoring.contributions(
                pipeline.model(target.name),
                pipeline.maps(target.name),
                {name: v[i : i + 1] for name, v in filtered.items()},
                sequences.take(np.asarray(best[q])),
                pipeline.batch_tokens,
                task=target.task,
            )
            for k, name in enumerate(names[q]):
                by_token[q][k] += parts[k]
                for map_name, value in by_map[k].items():
                    _append(layers, (run_id, shown.query_ids[q], name, map_name, value))
    tokens: dict[str, list[Any]] = {key: [] for key in TOKENS.names}
    for q, found in enumerate(names):
        for k, name in enumerate(found):
            ids = sequences.input_ids[best[q][k]]
            for position, (token_id, part) in enumerate(zip(ids, by_token[q][k], strict=True)):
                text = tokenizer.decode([int(token_id)]) if tokenizer is not None else str(int(token_id))
                _append(tokens, (run_id, shown.query_ids[q], name, position, text, float(part), "document"))
    return layers, tokens


def _append(columns: dict[str, list[Any]], row: tuple[Any, ...]) -> None:
    for column, cell in zip(columns.values(), row, strict=True):
        column.append(cell)


def write_table(path: Path, rows: dict[str, list[Any]]) -> None:
    """Write `rows` under the schema of that file, atomically."""
    table = pa.table(rows, schema=SCHEMAS[path.name])
    with storage.atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


INFLUENCES = pa.schema([
    ("run_id", pa.string()), ("query_id", pa.string()), ("document_id", pa.string()),
    ("sequence_id", pa.int64()), ("rank", pa.int32()), ("score", pa.float32()), ("best_score", pa.float32()),
    ("percentile", pa.float32()), ("side", pa.string()), ("candidate_source", pa.string()),
    ("duplicate_group", pa.int32()),
])  # fmt: skip
LAYERS = pa.schema([
    ("run_id", pa.string()), ("query_id", pa.string()), ("document_id", pa.string()), ("map", pa.string()),
    ("score", pa.float32()),
])  # fmt: skip
TOKENS = pa.schema([
    ("run_id", pa.string()), ("query_id", pa.string()), ("document_id", pa.string()), ("position", pa.int32()),
    ("token", pa.string()), ("score", pa.float32()), ("side", pa.string()),
])  # fmt: skip
SAMPLES = pa.schema([
    ("run_id", pa.string()), ("query_id", pa.string()), ("document_id", pa.string()), ("score", pa.float32()),
])  # fmt: skip
QUERIES = pa.schema([
    ("run_id", pa.string()), ("query_id", pa.string()), ("prompt", pa.string()), ("completion", pa.string()),
    ("loss", pa.float32()), ("metadata", pa.string()),
])  # fmt: skip
SCHEMAS = {
    "influences.parquet": INFLUENCES, "layers.parquet": LAYERS, "tokens.parquet": TOKENS,
    "samples.parquet": SAMPLES, "queries.parquet": QUERIES,
}  # fmt: skip
