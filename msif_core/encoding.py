"""Records to token windows with labels: where the loss is, and where a text is cut."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from msif_core import records, storage
from msif_core.batching import IGNORED
from msif_core.errors import InputError

Window = tuple[list[int], list[int]]
"""input_ids, and labels aligned with them."""


def encode(found: Sequence[records.Record], tokenizer: Any, max_length: int, task: str) -> list[list[Window]]:
    """Each record as windows; the tokenizer takes all texts at once, on all cores where it can.

    Text and given tokens are cut into windows of `max_length`; windows without a target are left out. A prompt
    with its completion is one window, the prompt's beginning cut away where both do not fit, with the loss on
    the completion and its end token. For a classification, the label stands at the first position.

    Raises:
        InputError: a record needs a tokenizer and the stage has none, or lacks the label that the task needs.
    """
    if task == "classification":
        return [[_encode_classified(record, tokenizer, max_length)] for record in found]
    texts = [text for record in found for text in _texts(record, tokenizer)]
    tokens = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
    return [_windows(record, tokens, tokenizer, max_length) for record in found]


def _texts(record: records.Record, tokenizer: Any) -> list[str]:
    """What is to become tokens."""
    if "input_ids" in record:
        return []
    _need_tokenizer(record, tokenizer)
    return [record["prompt"], record["completion"]] if records.is_pair(record) else [record["text"]]


def _windows(record: records.Record, tokens: Iterator[list[int]], tokenizer: Any, max_length: int) -> list[Window]:
    """One record's; `tokens` come in the order of its texts."""
    if "input_ids" in record:
        ids, labels = record["input_ids"], record.get("labels") or record["input_ids"]
    elif records.is_pair(record):
        prompt, completion = next(tokens), next(tokens) + _end(tokenizer)
        completion = completion[: max_length - 1]
        prompt = prompt[max(0, len(prompt) + len(completion) - max_length) :]
        ids, labels = prompt + completion, [IGNORED] * len(prompt) + completion
    else:
        ids = next(tokens) + _end(tokenizer)
        labels = list(ids)
    windows = [(ids[i : i + max_length], labels[i : i + max_length]) for i in range(0, len(ids), max_length)]
    return [window for window in windows if any(label != IGNORED for label in window[1][1:])]


def _encode_classified(record: records.Record, tokenizer: Any, max_length: int) -> Window:
    if "input_ids" in record:
        ids, labels = record["input_ids"], record.get("labels") or [IGNORED]
        if len(ids) > max_length or labels[0] < 0:
            raise InputError(
                f"record {record['id']!r}: a classification needs its label at the first position of `labels` "
                f"and at most {max_length} input_ids"
            )
        return ids, labels
    label = record.get("label")
    if "text" not in record or isinstance(label, bool) or not isinstance(label, int) or label < 0:
        raise InputError(
            f"record {record['id']!r}: a stage with task classification needs `text` and an integer `label` from 0"
        )
    _need_tokenizer(record, tokenizer)
    ids = tokenizer(record["text"], truncation=True, max_length=max_length)["input_ids"]
    return ids, [label] + [IGNORED] * (len(ids) - 1)


def _need_tokenizer(record: records.Record, tokenizer: Any) -> None:
    if tokenizer is None:
        raise InputError(
            f"record {record['id']!r} is text, but the stage's model has no tokenizer; give input_ids, or a model "
            "folder with a tokenizer"
        )


def _end(tokenizer: Any) -> list[int]:
    return [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Digest of what a tokenizer does, less the truncation and padding that its last call left in it."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return storage.fingerprint(type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.eos_token_id)
    state = json.loads(backend.to_str())
    return storage.fingerprint({**state, "truncation": None, "padding": None}, tokenizer.eos_token_id)
