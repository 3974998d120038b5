"""Chats: messages as the tokenizer's own template writes them, and where in that text the assistant speaks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Self

from transformers.utils.chat_template_utils import render_jinja_template

from msif_core.errors import InputError
from msif_core.tokenizers import special_tokens

Messages = list[dict[str, Any]]
Spans = list[tuple[int, int]]
"""Parts of a text: first character, and the one after the last."""

ASSISTANT = "assistant"
VARIABLES = {"tools", "documents", "chat_template_kwargs"}
"""Fields of a chat that its template reads beside `messages`, as `apply_chat_template` takes them."""

OWN = {"messages", "chat_template", "add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"}
"""Names that `chat_template_kwargs` cannot give, beside `tools` and `documents`: who renders a template sets them."""

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
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not _speaks(message):
            return (
                f'message {number}: write {{"role": ..., "content": ...}}, the content as text or as parts of text; '
                "only a message with tool_calls needs none"
            )
    if completion is not None and not isinstance(completion, str):
        return "a completion beside messages must be text"
    if completion and messages[-1]["role"] == ASSISTANT:
        return "messages end with the assistant's turn, and there is a completion too; leave one of them out"
    if answered and not completion and all(message["role"] != ASSISTANT for message in messages):
        return "no turn of the assistant in messages, so that no token has a loss; add one, or remove the record"
    return _problem_of_variables(record)


def _speaks(message: Mapping[str, Any]) -> bool:
    """Whether a message has a content that is text, or none and calls of tools."""
    if message.get("content") is None:
        return bool(message.get("tool_calls"))
    return _text(message) is not None


def _problem_of_variables(record: Mapping[str, Any]) -> str | None:
    for name in ("tools", "documents"):
        found = _decoded(record.get(name))
        if found is not None and not (isinstance(found, list) and all(isinstance(one, dict) for one in found)):
            kind = "JSON schemas" if name == "tools" else "objects"
            return f"{name} beside messages must be a list of {kind}, as JSON or as a text of it"
    given = _decoded(record.get("chat_template_kwargs"))
    if given is not None and not isinstance(given, dict):
        return "chat_template_kwargs must be an object, the names of the template's variables to their values"
    if taken := sorted((OWN | VARIABLES) & set(given or {})):
        return f"chat_template_kwargs cannot give {taken[0]}; tools and documents are fields of the record itself"
    return None


def _decoded(value: Any) -> Any:
    """A value that may be given as a text of JSON; a text that is none as it stands."""
    if not isinstance(value, str):
        return _without_nulls(value)
    try:
        return json.loads(value)
    except ValueError:
        return value


def _without_nulls(value: Any) -> Any:
    """The value without what is null in objects: Parquet gives every object of a column the fields of all of them."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


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
    found = [_without_nulls({**message, "content": _text(message)}) for message in record["messages"]]
    completion = record.get("completion")
    return found + ([{"role": ASSISTANT, "content": completion}] if completion else [])


def said(message: Mapping[str, Any]) -> str:
    """What a person reads of a message: its content, or the tools that it calls, or both."""
    calls = message.get("tool_calls")
    content = [message["content"]] if "content" in message and (message["content"] or not calls) else []
    return "\n".join([*content, json.dumps(calls, ensure_ascii=False)] if calls else content)


def transcript(messages: Messages) -> str:
    """Messages as a person reads them; one alone without its role."""
    if len(messages) == 1:
        return said(messages[0])
    return "\n".join(f"{message['role']}: {said(message)}" for message in messages)


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template, with all that a record gives it beside messages.

    Attributes:
        model, record: their names, for messages of errors.
        text: the template itself.
        variables: `tools`, `documents`, the tokenizer's special tokens and the record's own variables.
    """

    model: str
    record: str
    text: str
    variables: dict[str, Any]

    @classmethod
    def of(cls, tokenizer: Any, record: Mapping[str, Any]) -> Self:
        """The one for this record: some tokenizers have another one for chats with tools.

        Raises:
            InputError: the tokenizer has none.
        """
        given = {name: _decoded(record.get(name)) for name in VARIABLES}
        name, own = str(record["id"]), given.pop("chat_template_kwargs") or {}
        try:
            text = str(tokenizer.get_chat_template(tools=given["tools"]))
        except (AttributeError, ValueError):
            raise InputError(
                f"record {name!r} is a chat (messages), but the tokenizer of {tokenizer.name_or_path} has no chat "
                "template; give the record as prompt and completion, or add the model's chat_template.jinja to its "
                "folder"
            ) from None
        text = UNDATED + text if DATED in text else text
        return cls(str(tokenizer.name_or_path), name, text, {**tokenizer.special_tokens_map, **own, **given})

    @property
    def marks(self) -> bool:
        """Whether it says itself what the assistant generates."""
        return MARKED.search(self.text) is not None

    def write(self, messages: Messages, prompt: bool = False) -> tuple[str, Spans]:
        """The messages' text, with the prompt for the assistant's turn or without, and the parts that are marked.

        Raises:
            InputError: the template refuses the messages.
        """
        try:
            texts, marked = render_jinja_template(
                [messages],
                chat_template=self.text,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=self.marks,
                **self.variables,
            )
        except Exception as error:  # of many kinds: a template is code of others
            raise InputError(
                f"record {self.record!r}: the chat template of {self.model} refuses its messages ({error}); "
                "write them as that model's chats are"
            ) from None
        return texts[0], [(int(start), int(end)) for start, end in (marked[0] if marked else [])]


def written(record: Mapping[str, Any], tokenizer: Any, last_turn: bool = False) -> tuple[str, Spans]:
    """A record's text by the tokenizer's template, and the assistant's turns in it: those that have a loss.

    They are what the template marks ({% generation %}); without marks, what each turn adds to the text up to the
    prompt for it, less the white space at its end, which only parts it from the next turn. `last_turn` leaves out
    all but the last one.

    Raises:
        InputError: the tokenizer has no template, the template refuses the messages, or a later message changes
            what it writes of the ones before.
    """
    messages, template = turns(record), Template.of(tokenizer, record)
    text, spans = template.write(messages)
    if not template.marks:
        rows = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
        spans = [_added(template, messages, i, text) for i in (rows[-1:] if last_turn else rows)]
    spans = [(start, end) for start, end in spans if start < end]
    return text, spans[-1:] if last_turn else spans


def asked(record: Mapping[str, Any], tokenizer: Any) -> str:
    """A record's messages by the template, and the template's prompt for the assistant's turn."""
    return Template.of(tokenizer, record).write(turns(record), prompt=True)[0]


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


def _added(template: Template, messages: Messages, row: int, text: str) -> tuple[int, int]:
    """Where in the whole text the assistant's turn at `row` stands: what it adds to the prompt for it.

    Raises:
        InputError: this cannot be known; says why.
    """
    before = template.write(messages[:row], prompt=True)[0] if row else _opening(template, messages, text)
    after = text if row + 1 == len(messages) else template.write(messages[: row + 1])[0]
    if not text.startswith(after):
        raise _unknown_turn(template, row, "writes earlier turns otherwise once later ones follow")
    if not after.startswith(before):
        raise _unknown_turn(template, row, "does not begin that turn as its own prompt for it does")
    return len(before), max(len(before), len(after.rstrip()))


def _opening(template: Template, messages: Messages, text: str) -> str:
    """What stands before the content of a first message, which no prompt shows: what is there whatever it says.

    Raises:
        InputError: the message says more than its content, or its content does not follow.
    """
    first, rest = messages[0], messages[1:]
    one, other = (template.write([first | {"content": content}, *rest])[0] for content in "ab")
    opening = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    content = str(first.get("content", "")).strip()
    follows = text.startswith(opening) and text[len(opening) :].lstrip().startswith(content)
    if not content or not follows or first.keys() - {"role", "content", "name"}:
        raise _unknown_turn(template, 0, "does not show where the content of a first message begins")
    return opening


def _unknown_turn(template: Template, row: int, why: str) -> InputError:
    return InputError(
        f"record {template.record!r}: the chat template of {template.model} {why}, so the assistant's part of message "
        f"{row + 1} is not known; give prompt and completion, or put {{% generation %}} marks into the template"
    )
