"""Queries: what is asked, and the measurement that is explained, a weighted sum of sequences' losses.

A query's own sequence has weight 1. A contrast adds the other completion's sequence with weight -1. A set adds
one more query, the mean of its members.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from msif_core import chats, corpus, records, storage
from msif_core.batching import IGNORED, Sequences
from msif_core.encoding import encode_prompts
from msif_core.errors import InputError
from msif_core.records import Record

Complete = Callable[[list[list[int]]], list[list[int]]]
"""The model's own continuations of prompts, in tokens."""

Measurement = Mapping[int, float]
"""Rows of sequences to the weights of their losses."""


@dataclass(frozen=True)
class Queries:
    """Queries column by column, and the sequences that their measurements weigh.

    Attributes:
        sequences: one of each record in their order, then those of the contrasts; `document_ids` are the queries'.
        contrasts: the completion that the query's own is compared with, None without one.
        generated: whether the model gave the completion.
        members: of a set, the ids of its queries; empty for a query of its own.
        texts: all the words of a query, for a lexical search.
    """

    ids: list[str]
    prompts: list[str]
    completions: list[str]
    sequences: Sequences
    metadata: list[dict[str, Any]]
    measurements: list[Measurement]
    contrasts: list[str | None]
    generated: list[bool]
    members: list[list[str]]
    texts: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def fingerprint(self) -> str:
        """Of what is measured: the sequences and their weights."""
        return storage.fingerprint(self.sequences.fingerprints, self.measurements)

    def take(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> Queries:
        """The queries at `rows`, with the sequences that they need."""
        kept = [int(row) for row in rows]
        used = sorted({sequence for row in kept for sequence in self.measurements[row]})
        place = {sequence: i for i, sequence in enumerate(used)}
        return Queries(
            [self.ids[r] for r in kept], [self.prompts[r] for r in kept], [self.completions[r] for r in kept],
            self.sequences.take(used), [self.metadata[r] for r in kept],
            [{place[s]: w for s, w in self.measurements[r].items()} for r in kept],
            [self.contrasts[r] for r in kept], [self.generated[r] for r in kept],
            [self.members[r] for r in kept], [self.texts[r] for r in kept],
        )  # fmt: skip


UNCUT = 1 << 40
"""Tokens in a window that no query fills."""


def load_queries(
    source: Path | Sequence[Record],
    tokenizer: Any,
    max_length: int,
    task: str,
    complete: Complete | None = None,
    cut: bool = False,
    start: str = "auto",
) -> Queries:
    """Queries of a jsonl file or of a list of records, in their order, and after them the sets that they name.

    A prompt without a completion, or a chat that ends with another's turn, is answered by `complete`, and that answer
    is explained; of a chat with its answer, the assistant's last turn. With `cut` a prompt and completion that do not
    fit a window are cut as training cuts its records. `start` is `corpus.start`.

    Raises:
        InputError: a record is malformed, there is none, or one takes more than a window.
    """
    found = records.read_list(source, records.query_problem_of)
    if not found:
        raise InputError(f"{source}: no query in it")
    generated = [records.lacks_completion(record) for record in found]
    found = _completed(found, generated, tokenizer, max_length, complete, start)
    compared = [row for row, record in enumerate(found) if record.get("contrast") is not None]
    both = found + [contrast_of(found[row]) for row in compared]
    sequences = _one_window_each(both, tokenizer, max_length, task, cut or task == "classification", start)
    measurements: list[Measurement] = [{row: 1.0} for row in range(len(found))]
    for i, row in enumerate(compared):
        measurements[row] = {row: 1.0, len(found) + i: -1.0}
    sets = _sets(found)
    for rows in sets.values():
        measurements.append({s: w / len(rows) for row in rows for s, w in measurements[row].items()})
    ids, nothing = [str(r["id"]) for r in found], [""] * len(sets)
    parts = [records.parts_of(r) for r in found]
    texts = [" ".join([*both, str(r.get("contrast") or "")]) for both, r in zip(parts, found, strict=True)]
    return Queries(
        ids + list(sets),
        [prompt for prompt, _ in parts] + nothing,
        [completion for _, completion in parts] + nothing,
        sequences,
        [records.metadata_of(r, records.QUERY_FIELDS) for r in found] + [{} for _ in sets],
        measurements,
        [str(r["contrast"]) if r.get("contrast") is not None else None for r in found] + [None for _ in sets],
        generated + [False for _ in sets],
        [[] for _ in found] + [[ids[row] for row in rows] for rows in sets.values()],
        texts + [" ".join(texts[row] for row in rows) for rows in sets.values()],
    )


def check_single(queries: Queries, source: str, who: str) -> None:
    """Refuse queries that are not the loss of one completion, each of its own.

    Raises:
        InputError: names the file, the query, and who does not take it.
    """
    for row, (name, weights) in enumerate(zip(queries.ids, queries.measurements, strict=True)):
        if weights != {row: 1.0}:
            raise InputError(f"{source}, query {name!r}: {who} takes neither contrasts nor sets; remove it")


def _sets(found: list[Record]) -> dict[str, list[int]]:
    """The rows of each set that the records' `set` fields name, in order of first mention."""
    sets: dict[str, list[int]] = {}
    for row, record in enumerate(found):
        named = record.get("set") or []
        for name in [named] if isinstance(named, str) else dict.fromkeys(named):
            sets.setdefault(name, []).append(row)
    taken = sets.keys() & {r["id"] for r in found}
    if taken:
        raise InputError(f"set {min(taken)!r} has the name of a query; give it another, it gets an answer of its own")
    return sets


def contrast_of(record: Record) -> Record:
    """The same question with the other completion (of a classification: the other label)."""
    kept = {key: value for key, value in record.items() if key not in ("input_ids", "labels")}
    if "messages" in record and record["messages"][-1]["role"] == chats.ASSISTANT:
        kept["messages"] = record["messages"][:-1]
    words = "prompt" in record or "messages" in record
    return kept | {"completion" if words else "label": record["contrast"]}


def _completed(
    found: list[Record],
    generated: list[bool],
    tokenizer: Any,
    max_length: int,
    complete: Complete | None,
    start: str,
) -> list[Record]:
    """The records, those to be generated with the model's own tokens as their targets."""
    rows = [row for row, alone in enumerate(generated) if alone]
    if not rows:
        return found
    if complete is None:
        raise InputError(
            f"query {found[rows[0]]['id']!r} has no completion, and without a language model none can be generated; "
            "give it a completion"
        )
    prompts = encode_prompts([found[row] for row in rows], tokenizer, start)
    found = list(found)
    for row, prompt, answer in zip(rows, prompts, complete(prompts), strict=True):
        prompt = prompt[max(0, len(prompt) + len(answer) - max_length) :]
        found[row] = found[row] | {
            "completion": tokenizer.decode(answer, skip_special_tokens=True),
            "input_ids": prompt + answer,
            "labels": [IGNORED] * len(prompt) + answer,
        }
    return found


def _one_window_each(
    found: list[Record], tokenizer: Any, max_length: int, task: str, cut: bool, start: str
) -> Sequences:
    """Each query's one sequence."""
    window = max_length if cut else UNCUT
    sequences, rows = corpus.encode_list(found, tokenizer, window, task, start, last_turn=True)
    lengths = dict.fromkeys(rows.tolist(), 0)
    for row, ids in zip(rows.tolist(), sequences.input_ids, strict=True):
        lengths[row] += len(ids)
    for row, record in enumerate(found):
        if row not in lengths:
            raise InputError(f"query {record['id']!r} has no token whose loss could be explained; give it more text")
        if lengths[row] > max_length:
            raise InputError(
                f"query {record['id']!r} does not fit one window of {max_length} tokens; shorten it, or raise "
                "corpus.max_length as far as the model reads"
            )
    return sequences
