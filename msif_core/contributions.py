"""What an exact score is made of: maps, tokens of the document, tokens of the query."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from msif_core import scoring
from msif_core.answer_tables import Tables
from msif_core.batching import Sequences
from msif_core.queries import Queries
from msif_core.retrieval import FloatArray
from msif_core.tokenizers import token_texts

if TYPE_CHECKING:
    from msif_core.pipeline import Pipeline


def add_contributions(tables: Tables, pipeline: Pipeline, query: Queries, documents: Sequences) -> None:
    """Rows of layers.parquet and tokens.parquet of one query: `documents` are the strongest sequences that it shows.

    Each split (maps; tokens of side "document"; tokens of the query's sides together) adds up to the score of
    that sequence.
    """
    if not len(documents):
        return
    target, chain, query_id = pipeline.config.stage(pipeline.target), pipeline.chain(), query.ids[0]
    by_token = [np.zeros(len(ids), np.float32) for ids in documents.input_ids]
    by_map: list[dict[str, float]] = [{} for _ in documents.input_ids]
    for _, gradients in pipeline.query_gradients(query):
        filtered = chain.filter_all(gradients, rotated=True)
        if not filtered:
            continue
        model, maps = pipeline.model(target.name), pipeline.maps(target.name)
        found = scoring.contributions(model, maps, filtered, documents, pipeline.batch_tokens, task=target.task)
        for split, values, more, part in zip(by_map, by_token, *found, strict=True):
            split.update(more)
            values += part
    tokenizer = pipeline.tokenizer(target.name)
    words = [token_texts(tokenizer, ids.tolist()) for ids in documents.input_ids]
    for name, split, texts, values in zip(documents.document_ids, by_map, words, by_token, strict=True):
        tables.add("layers", ((query_id, name, map_name, value) for map_name, value in sorted(split.items())))
        tables.add("tokens", token_rows(query_id, name, texts, values, "document"))
    for name, side, texts, values in query_side(pipeline, query, documents):
        tables.add("tokens", token_rows(query_id, name, texts, values, side))


def query_side(
    pipeline: Pipeline, query: Queries, documents: Sequences
) -> Iterator[tuple[str, str, list[str], FloatArray]]:
    """(document, side, words, parts of its score): of sides query and contrast by token, of a set by member."""
    tokenizer = pipeline.tokenizer(pipeline.last)
    words = [token_texts(tokenizer, ids.tolist()) for ids in query.sequences.input_ids]
    weights = [query.measurements[0][row] for row in range(len(query.sequences))]
    parts = query_tokens(pipeline, query.sequences, documents)
    for i, name in enumerate(documents.document_ids):
        own = [weight * part[i] for weight, part in zip(weights, parts, strict=True)]
        if query.members[0]:
            totals = dict.fromkeys(query.members[0], 0.0)
            for member, values in zip(query.sequences.document_ids, own, strict=True):
                totals[member] += float(values.sum())
            yield name, "member", list(totals), np.asarray(list(totals.values()), np.float32)
        else:
            for weight, texts, values in zip(weights, words, own, strict=True):
                yield name, "query" if weight > 0 else "contrast", texts, values


def query_tokens(pipeline: Pipeline, asked: Sequences, documents: Sequences) -> list[FloatArray]:
    """Scores of the documents over the tokens of each sequence asked, float32 [D, T].

    Some documents' and some maps' gradients are held at a time, within `curvature.memory_budget_gb`.
    """
    target, last, chain = pipeline.config.stage(pipeline.target), pipeline.config.stages[-1], pipeline.chain()
    budget = pipeline.config.curvature.memory_budget_gb
    found: list[FloatArray] = [np.zeros((len(documents), len(ids)), np.float32) for ids in asked.input_ids]
    for rows, group in scoring.query_groups(pipeline.maps(target.name), len(documents), budget):
        some = documents.take(range(len(documents))[rows])
        gradients = scoring.query_gradients(
            pipeline.model(target.name),
            group,
            some,
            pipeline.batch_tokens,
            task=target.task,
            factors=pipeline.factors(target.name),
        )
        back = {n: V for n, v in gradients.items() if (V := chain.filter_back(n, v, rotated=True)) is not None}
        if not back:
            continue
        parts = scoring.query_contributions(
            pipeline.model(last.name), pipeline.maps(last.name), back, asked, pipeline.batch_tokens, task=last.task
        )
        for values, part in zip(found, parts, strict=True):
            values[rows] += part
    return found


def token_rows(
    query_id: str, document_id: str, texts: list[str], values: FloatArray, side: str
) -> Iterator[tuple[Any, ...]]:
    """Rows of tokens.parquet for one sequence."""
    for position, (text, value) in enumerate(zip(texts, values, strict=True)):
        yield query_id, document_id, position, text, float(value), side
