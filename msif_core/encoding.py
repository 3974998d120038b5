"""Records to token windows with labels: where the loss is, and where a text is cut.

What a record says is one text, encoded at once as the model's own tokenizer does it; its parts are told apart by the
characters that each token stands for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from msif_core import chats, records
from msif_core.batching import IGNORED
from msif_core.errors import InputError
from msif_core.tokenizers import end_token, start_tokens

Window = tuple[list[int], list[int]]
"""input_ids, and labels aligned with them."""

Pair = tuple[int, int]
"""A run of characters or of tokens: the first, and the one after the last."""


@dataclass(frozen=True)
class Written:
    """A record's text, and its parts that have a loss, None for all of it.

    A chat begins and ends as its template writes it.
    """

    text: str
    spans: chats.Spans | None
    chat: bool = False


def encode(
    found: Sequence[records.Record],
    tokenizer: Any,
    max_length: int,
    task: str,
    start: str = "auto",
    last_turn: bool = False,
) -> list[list[Window]]:
    """Each record as windows; the tokenizer takes all texts at once, on all cores where it can.

    Text and given tokens are cut into windows of `max_length`; windows without a target are left out. A prompt
    with its completion, or a chat, is one window, its beginning cut away where it does not fit, with the loss on the
    completion, or on the assistant's turns (`last_turn`: on the last one alone). A text begins with the tokens of
    `corpus.start`, and ends with the end token, once. For a classification, the label stands at the first position.

    Raises:
        InputError: a record needs a tokenizer and the stage has none, or a chat template and the tokenizer has none,
            or lacks the label that the task needs.
    """
    if task == "classification":
        return [[_encode_classified(record, tokenizer, max_length)] for record in found]
    end = (None, set[int]()) if tokenizer is None else end_token(tokenizer)
    texts = [None if "input_ids" in record else _written(record, tokenizer, last_turn) for record in found]
    tokens = _tokens([text for text in texts if text is not None], tokenizer, start)
    return [
        _cut_given(record, max_length) if text is None else _windows(text, *next(tokens), end, max_length)
        for record, text in zip(found, texts, strict=True)
    ]


def encode_prompts(found: Sequence[records.Record], tokenizer: Any, start: str = "auto") -> list[list[int]]:
    """What the model reads before it answers: the prompts, or the chats with the template's prompt for the answer."""
    texts = [
        Written(chats.asked(record, tokenizer), None, chat=True)
        if "messages" in record
        else Written(record["prompt"], None)
        for record in found
    ]
    return [ids for ids, _ in _tokens(texts, tokenizer, start)]


def _written(record: records.Record, tokenizer: Any, last_turn: bool) -> Written:
    _need_tokenizer(record, tokenizer)
    if "messages" in record:
        return Written(*chats.written(record, tokenizer, last_turn), chat=True)
    if records.is_pair(record):
        text = record["prompt"] + record["completion"]
        return Written(text, [(len(record["prompt"]), len(text))])
    return Written(record["text"], None)


def _tokens(texts: list[Written], tokenizer: Any, start: str) -> Iterator[tuple[list[int], list[Pair] | None]]:
    """Each text's tokens, begun as `start` has it, and the runs of them that have a loss (None: all from the second).

    Two calls of the tokenizer: offsets of whole texts are not needed, and take their time.
    """
    if not texts:
        return
    whole, parted = ([text for text in texts if (text.spans is None) == one] for one in (True, False))
    plain = iter(tokenizer([t.text for t in whole], add_special_tokens=False)["input_ids"] if whole else [])
    located = iter(_located(parted, tokenizer) if parted else [])
    begin = start_tokens(tokenizer, start)
    for text in texts:
        ids, runs = (next(plain), None) if text.spans is None else next(located)
        # Templates write the start token themselves, and the tokenizer adds none to what they write.
        own = [] if ids[: len(begin)] == begin or (text.chat and start == "auto") else begin
        yield own + ids, runs and [(first + len(own), last + len(own)) for first, last in runs]


def _located(texts: list[Written], tokenizer: Any) -> Iterator[tuple[list[int], list[Pair]]]:
    """Each text's tokens, and the tokens of its spans; one that straddles a span's edge belongs to the span."""
    strings = [text.text for text in texts]
    if tokenizer.is_fast:
        found = tokenizer(strings, add_special_tokens=False, return_offsets_mapping=True)
        for text, ids, offsets in zip(texts, found["input_ids"], found["offset_mapping"], strict=True):
            yield ids, [_tokens_of(offsets, *span) for span in text.spans or []]
        return
    for text, ids in zip(texts, tokenizer(strings, add_special_tokens=False)["input_ids"], strict=True):
        spans = [[_before(tokenizer, text.text, ids, edge) for edge in span] for span in text.spans or []]
        yield ids, [(first[0], last[1]) for first, last in spans]


def _tokens_of(offsets: Sequence[Pair], first: int, last: int) -> Pair:
    """The run of tokens that stand for characters from `first` to before `last`.

    White space is sometimes no part of its token's characters, which are then empty and stand at its end.
    """
    inside = [i for i, (a, b) in enumerate(offsets) if (b > first or not first) and (a < last or b <= last)]
    return (inside[0], inside[-1] + 1) if inside else (len(offsets), len(offsets))


def _before(tokenizer: Any, text: str, ids: list[int], edge: int) -> Pair:
    """How many tokens stand wholly before a character, and how many begin before it, of a tokenizer without offsets.

    Raises:
        InputError: the tokens do not decode to the text, so that this cannot be known.
    """
    if edge == len(text):
        return len(ids), len(ids)
    head = tokenizer(text[:edge], add_special_tokens=False)["input_ids"]
    if ids[: len(head)] == head and tokenizer.unk_token_id not in head[-1:]:
        return len(head), len(head)

    def read(count: int) -> str:
        return str(tokenizer.decode(ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    if read(len(ids)) != text:
        raise InputError(
            f"{tokenizer.name_or_path}: its tokenizer ({type(tokenizer).__name__}) does not tell which characters a "
            f"token stands for, and its tokens of {text[:40]!r} do not decode to that text, so that prompt and "
            "completion cannot be told apart; give input_ids and labels, or save a fast tokenizer (tokenizer.json)"
        )
    count = next((i for i, (a, b) in enumerate(zip(ids, head, strict=False)) if a != b), min(len(ids), len(head)))
    while count and not text[:edge].startswith(read(count)):
        count -= 1
    while count < len(ids) and text[:edge].startswith(read(count + 1)):
        count += 1
    return count, count if read(count) == text[:edge] else count + 1


def _windows(
    text: Written, ids: list[int], runs: list[Pair] | None, end: tuple[int | None, set[int]], max_length: int
) -> list[Window]:
    """One text's windows."""
    if end[0] is not None and not text.chat and not (ids and ids[-1] in end[1]):
        ids = [*ids, end[0]]
        runs = runs and [*runs[:-1], (runs[-1][0], len(ids))]
    if runs is None:
        return _split(ids, ids, max_length)
    labels = [IGNORED] * len(ids)
    for first, last in runs:
        labels[first:last] = ids[first:last]
    if len(ids) > max_length and runs:
        # The last run keeps its beginning, and a token to predict it from; the text before it loses its own.
        stop = min(runs[-1][1], runs[-1][0] + max_length - 1)
        kept = slice(max(0, stop - max_length), stop)
        ids, labels = ids[kept], labels[kept]
    return _with_targets([(ids, labels)])


def _cut_given(record: records.Record, max_length: int) -> list[Window]:
    """Windows of given tokens."""
    return _split(record["input_ids"], record.get("labels") or record["input_ids"], max_length)


def _split(ids: list[int], labels: list[int], max_length: int) -> list[Window]:
    cuts = range(0, len(ids), max_length)
    return _with_targets([(ids[i : i + max_length], labels[i : i + max_length]) for i in cuts])


def _with_targets(windows: list[Window]) -> list[Window]:
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
