"""Records as the model will see them, token by token: nothing is built, and no weights are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from msif_core import records
from msif_core.batching import IGNORED
from msif_core.encoding import Window, encode, encode_prompts
from msif_core.queries import contrast_of
from msif_core.stages import Stages
from msif_core.tokenizers import reads_as_nothing, special_tokens, token_texts


@dataclass(frozen=True)
class Token:
    """One token.

    Attributes:
        id: its number.
        text: what it reads as in its place. Of a character whose bytes are several tokens, the first has the
            character and the others nothing.
        target: whether it has a loss.
        special: whether it is a special one.
        rest: whether it is a part of the character that a token before it reads as.
    """

    id: int
    text: str
    target: bool
    special: bool
    rest: bool


@dataclass(frozen=True)
class Seen:
    """One window of a record; `kind` is document, query, contrast, or prompt (which the model is to answer).

    `label` is that of a classification.
    """

    record: str
    kind: str
    window: int
    windows: int
    tokens: list[Token]
    label: int | None = None


def seen_documents(stages: Stages, stage: str, count: int) -> list[Seen]:
    """The windows of a stage's first `count` records, in the order of its sources.

    Raises:
        InputError: a record is malformed, or cannot be encoded.
    """
    settings, corpus = stages.config.stage(stage), stages.config.corpus
    skipped = records.Skipped()
    found = list(islice(records.read_records(settings.documents, skipped, corpus.skip_bad_records), count))
    tokenizer = stages.tokenizer(stage)
    with stages.reading(stage):
        encoded = encode(found, tokenizer, stages.max_length(stage), settings.task, corpus.start)
    classified = settings.task == "classification"
    shown = [_seen(record, "document", own, tokenizer, classified) for record, own in zip(found, encoded, strict=True)]
    return [seen for windows in shown for seen in windows]


def seen_queries(stages: Stages, source: Path | Sequence[records.Record], count: int) -> list[Seen]:
    """The first `count` queries as the last stage's model will see them, each with its contrast after it.

    One that the model is to answer is shown as the prompt that it reads.

    Raises:
        InputError: a query is malformed, or cannot be encoded.
    """
    last, start = stages.config.stages[-1], stages.config.corpus.start
    tokenizer, length = stages.tokenizer(last.name), stages.query_length()
    shown: list[Seen] = []
    with stages.reading(last.name):
        for record in records.read_list(source, records.query_problem_of)[:count]:
            asked = [("contrast", contrast_of(record))] if record.get("contrast") is not None else []
            if records.lacks_completion(record):
                (prompt,) = encode_prompts([record], tokenizer, start)
                shown += _seen(record, "prompt", [(prompt, [IGNORED] * len(prompt))], tokenizer)
            else:
                asked = [("query", record), *asked]
            for kind, one in asked:
                (windows,) = encode([one], tokenizer, length, last.task, start, last_turn=True)
                shown += _seen(record, kind, windows, tokenizer, last.task == "classification")
    return shown


def _seen(
    record: records.Record, kind: str, windows: list[Window], tokenizer: Any, classified: bool = False
) -> Iterator[Seen]:
    special = set() if tokenizer is None else special_tokens(tokenizer)
    for number, (ids, labels) in enumerate(windows or [([], [])], 1):
        # The first label is that of a classification, or of a token that nothing predicts.
        targets = [bool(i) and label != IGNORED for i, label in enumerate(labels)]
        tokens = [
            Token(i, text, on, i in special, rest=not text and not reads_as_nothing(tokenizer, i))
            for i, text, on in zip(ids, token_texts(tokenizer, ids), targets, strict=True)
        ]
        label = labels[0] if classified else None
        yield Seen(str(record["id"]), kind, number, len(windows), tokens, label)
