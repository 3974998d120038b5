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
from msif_core.errors import InputError, NoTokenizerError
from msif_core.tokenizers import EndOfTexts, end_of_texts, start_tokens

Window = tuple[list[int], list[int]]
"""input_ids, and labels aligned with them."""


@dataclass(frozen=True)
class Written:
    """A record's text, and the spans of its characters that have a loss, None for all of it.

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
        NoTokenizerError: a record needs a tokenizer and there is none.
        InputError: a record needs a chat template and the tokenizer has none, or lacks the label that the task needs.
    """
    if task == "classification":
        return [[_encode_classified(record, tokenizer, max_length)] for record in found]
    end = end_of_texts(tokenizer)
    texts = [None if "input_ids" in record else _written(record, tokenizer, last_turn) for record in found]
    tokens = _tokens([text for text in texts if text is not None], tokenizer, start)
    return [
        _cut_given(record, max_length) if text is None else _windows(text, *next(tokens), end, max_length)
        for record, text in zip(found, texts, strict=True)
    ]


def encode_prompts(found: Sequence[records.Record], tokenizer: Any, start: str = "auto") -> list[list[int]]:
    """What the model reads before it answers: the prompts, or the chats with the template's prompt for the answer.

    Raises:
        NoTokenizerError: there is no tokenizer.
        InputError: a record needs a chat template and the tokenizer has none.
    """
    return [ids for ids, _ in _tokens([_asked(record, tokenizer) for record in found], tokenizer, start)]


def _asked(record: records.Record, tokenizer: Any) -> Written:
    _need_tokenizer(record, tokenizer)
    if "messages" in record:
        return Written(chats.asked(record, tokenizer), None, chat=True)
    return Written(record["prompt"], None)


def _written(record: records.Record, tokenizer: Any, last_turn: bool) -> Written:
    _need_tokenizer(record, tokenizer)
    if "messages" in record:
        return Written(*chats.written(record, tokenizer, last_turn), chat=True)
    if records.is_pair(record):
        text = record["prompt"] + record["completion"]
        return Written(text, [(len(record["prompt"]), len(text))])
    return Written(record["text"], None)


def _tokens(texts: list[Written], tokenizer: Any, start: str) -> Iterator[tuple[list[int], list[range] | None]]:
    """Each text's tokens, begun as `start` has it, and where in them the tokens with a loss stand (None: everywhere).

    Two calls of the tokenizer: offsets of whole texts are not needed, and take their time.
    """
    if not texts:
        return
    whole, parted = ([text for text in texts if (text.spans is None) == one] for one in (True, False))
    plain = iter(tokenizer([t.text for t in whole], add_special_tokens=False)["input_ids"] if whole else [])
    located = iter(_located(parted, tokenizer) if parted else [])
    begin = start_tokens(tokenizer, start)
    for text in texts:
        ids, targets = (next(plain), None) if text.spans is None else next(located)
        # Templates write the start token themselves, and the tokenizer adds none to what they write.
        begun = ids[: len(begin)] == begin or (text.chat and start == "auto")
        yield (ids, targets) if begun else (begin + ids, _moved(targets, len(begin)))


def _moved(targets: list[range] | None, by: int) -> list[range] | None:
    return None if targets is None else [range(run.start + by, run.stop + by) for run in targets]


def _located(texts: list[Written], tokenizer: Any) -> Iterator[tuple[list[int], list[range]]]:
    """Each text's tokens, and those of its spans; a token that straddles a span's edge belongs to the span."""
    strings = [text.text for text in texts]
    if tokenizer.is_fast:
        found = tokenizer(strings, add_special_tokens=False, return_offsets_mapping=True)
        for text, ids, offsets in zip(texts, found["input_ids"], found["offset_mapping"], strict=True):
            yield ids, [_by_offsets(offsets, *span) for span in text.spans or []]
        return
    for text, ids in zip(texts, tokenizer(strings, add_special_tokens=False)["input_ids"], strict=True):
        edges = [[_around(tokenizer, text.text, ids, edge) for edge in span] for span in text.spans or []]
        yield ids, [range(wholly_before, begun_before) for (wholly_before, _), (_, begun_before) in edges]


def _by_offsets(offsets: Sequence[tuple[int, int]], first: int, last: int) -> range:
    """The tokens that share characters with those from `first` to before `last`; `offsets` are each token's own.

    White space is sometimes no part of its token's characters: the token has none then, and stands where its white
    space ends. It goes with what is before that place, unless that is the text's beginning.
    """
    inside = [
        row
        for row, (start, end) in enumerate(offsets)
        if (end > first or first == 0) and (start < last or start == end == last)
    ]
    return range(inside[0], inside[-1] + 1) if inside else range(len(offsets), len(offsets))


def _around(tokenizer: Any, text: str, ids: list[int], edge: int) -> tuple[int, int]:
    """How many tokens stand wholly before a character, and how many begin before it, of a tokenizer without offsets.

    Raises:
        InputError: it cannot be known.
    """
    if edge == len(text):
        return len(ids), len(ids)
    head = tokenizer(text[:edge], add_special_tokens=False)["input_ids"]
    alike = next((i for i, (a, b) in enumerate(zip(ids, head, strict=False)) if a != b), min(len(ids), len(head)))
    # Words of any length are one unknown token, so that such a one at the edge may go on behind it.
    if alike == len(head) and tokenizer.unk_token_id not in head[-1:]:
        return alike, alike
    return _around_by_decoding(tokenizer, text, ids, edge, alike)


def _around_by_decoding(tokenizer: Any, text: str, ids: list[int], edge: int, near: int) -> tuple[int, int]:
    """The same by what the first tokens decode to; `near` is a number of tokens to begin the search at.

    Raises:
        InputError: the tokens do not decode to the text, so that this cannot be known.
    """

    def read(count: int) -> str:
        return str(tokenizer.decode(ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    if read(len(ids)) != text:
        raise InputError(
            f"{tokenizer.name_or_path}: its tokenizer ({type(tokenizer).__name__}) does not tell which characters a "
            f"token stands for, and its tokens of {text[:40]!r} do not decode to that text, so that prompt and "
            "completion cannot be told apart; give input_ids and labels, or save a fast tokenizer (tokenizer.json)"
        )
    before, count = text[:edge], near
    while count and not before.startswith(read(count)):
        count -= 1
    while count < len(ids) and before.startswith(read(count + 1)):
        count += 1
    return count, count if read(count) == before else count + 1


def _windows(
    text: Written, ids: list[int], targets: list[range] | None, end: EndOfTexts, max_length: int
) -> list[Window]:
    """One text's windows."""
    ended = ids if text.chat else end.put_after(ids)
    if targets and len(ended) > len(ids):
        targets = [*targets[:-1], range(targets[-1].start, len(ended))]
    ids = ended
    if targets is None:
        return _split(ids, ids, max_length)
    labels = [IGNORED] * len(ids)
    for run in targets:
        labels[run.start : run.stop] = ids[run.start : run.stop]
    if len(ids) > max_length and targets:
        # The last run keeps its beginning, and a token to predict it from; the text before it loses its own.
        stop = min(targets[-1].stop, targets[-1].start + max_length - 1)
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
        raise NoTokenizerError(str(record["id"]))
