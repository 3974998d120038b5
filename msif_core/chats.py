"""Chats: messages as the tokenizer's own template writes them, and where in that text the assistant speaks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from msif_core.errors import InputError
from msif_core.tokenizers import special_tokens

Messages = list[dict[str, Any]]
Spans = list[tuple[int, int]]
"""Parts of a text: first character, and the one after the last."""

ASSISTANT = "assistant"
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""A template that says itself what the assistant generates."""

DATED, UNDATED = "strftime_now is defined", "{% set strftime_now = undefined_today %}"
"""A template that writes the day of its use, unless there is no clock; and what takes the clock away.

A record's tokens must not change from day to day.
"""


def problem_of_messages(record: Mapping[str, Any], answered: bool = True) -> str | None:
    """What is wrong with a record's `messages`, None if nothing is; `answered` ones need a turn of the assistant's."""
    messages, completion = record["messages"], record.get("completion")
    if not isinstance(messages, list) or not messages:
        return 'messages must be a list of {"role", "content"}, and not empty'
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or _text(message) is None:
            return f'message {number}: write {{"role": ..., "content": ...}}, the content as text or as parts of text'
    if completion is not None and not isinstance(completion, str):
        return "a completion beside messages must be text"
    if completion and messages[-1]["role"] == ASSISTANT:
        return "messages end with the assistant's turn, and there is a completion too; leave one of them out"
    if answered and not completion and all(message["role"] != ASSISTANT for message in messages):
        return "no turn of the assistant in messages, so that no token has a loss; add one, or remove the record"
    return None


def _text(message: Mapping[str, Any]) -> str | None:
    """A message's content as text, None where it is not text alone."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return None
    texts = [part.get("text") for part in content if part.get("type") == "text"]
    return "".join(map(str, texts)) if texts and len(texts) == len(content) else None


def turns(record: Mapping[str, Any]) -> Messages:
    """A record's messages with their contents as text, a given completion as the assistant's last turn."""
    found = [
        {key: value for key, value in message.items() if value is not None} | {"content": _text(message)}
        for message in record["messages"]
    ]
    completion = record.get("completion")
    return found + ([{"role": ASSISTANT, "content": completion}] if completion else [])


def transcript(messages: Messages) -> str:
    """Messages as a person reads them; one alone as its content."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def written(record: Mapping[str, Any], tokenizer: Any, last_turn: bool = False) -> tuple[str, Spans]:
    """A record's text by the tokenizer's template, and the assistant's turns in it: those that have a loss.

    They are what the template marks ({% generation %}); without marks, what each turn adds to the text up to the
    prompt for it, less the white space at its end, which only parts it from the next turn. `last_turn` leaves out
    all but the last one.

    Raises:
        InputError: the tokenizer has no template, the template refuses the messages, or a later message changes
            what it writes of the ones before.
    """
    messages, name = turns(record), str(record["id"])
    text, spans = _render(tokenizer, messages, name)
    if not MARKED.search(_template(tokenizer, name)):
        rows = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
        spans = [_added(tokenizer, messages, i, text, name) for i in (rows[-1:] if last_turn else rows)]
    spans = [(start, end) for start, end in spans if start < end]
    return text, spans[-1:] if last_turn else spans


def asked(record: Mapping[str, Any], tokenizer: Any) -> str:
    """A record's messages by the template, and the template's prompt for the assistant's turn."""
    return _render(tokenizer, turns(record), str(record["id"]), prompt=True)[0]


def turn_end(tokenizer: Any) -> int | None:
    """The special token that ends the assistant's turn by the template, None without one."""
    try:
        example = [{"role": "user", "content": "a"}, {"role": ASSISTANT, "content": "b"}]
        text, spans = written({"id": "", "messages": example}, tokenizer, last_turn=True)
    except InputError:  # no template, or none for such a chat
        return None
    if not spans:
        return None
    ids, special = tokenizer(text[spans[0][0] :], add_special_tokens=False)["input_ids"], special_tokens(tokenizer)
    return next((token for token in ids if token in special), None)


def _added(tokenizer: Any, messages: Messages, row: int, text: str, name: str) -> tuple[int, int]:
    """Where in the whole text the assistant's turn at `row` stands: what it adds to the messages before it."""
    before = _render(tokenizer, messages[:row], name, prompt=True)[0] if row else ""
    after = _render(tokenizer, messages[: row + 1], name)[0]
    if not row or not after.startswith(before) or not text.startswith(after):
        raise InputError(
            f"record {name!r}: the chat template of {tokenizer.name_or_path} does not mark what the assistant "
            f"generates, and its text of the messages before message {row + 1} is not how its whole text begins; give "
            "the record as prompt and completion, or put {% generation %} marks into the template"
        )
    return len(before), max(len(before), len(after.rstrip()))


def _template(tokenizer: Any, name: str) -> str:
    try:
        template = str(tokenizer.get_chat_template())
    except (AttributeError, ValueError):
        raise InputError(
            f"record {name!r} is a chat (messages), but the tokenizer of {tokenizer.name_or_path} has no chat "
            "template; give the record as prompt and completion, or add the model's chat_template.jinja to its folder"
        ) from None
    return UNDATED + template if DATED in template else template


def _render(tokenizer: Any, messages: Messages, name: str, prompt: bool = False) -> tuple[str, Spans]:
    """The text, and the parts of it that the template marks."""
    template = _template(tokenizer, name)
    try:
        texts, marked = render_jinja_template(
            [messages],
            chat_template=template,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=MARKED.search(template) is not None,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # of many kinds: a template is code of others
        raise InputError(
            f"record {name!r}: the chat template of {tokenizer.name_or_path} refuses its messages ({error}); "
            "write them as that model's chats are"
        ) from None
    return texts[0], [(int(start), int(end)) for start, end in (marked[0] if marked else [])]
