"""Chats: the tokenizer's own template, the loss on the assistant's turns, queries that are chats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msif_core import chats, corpus, encoding, records
from msif_core.batching import IGNORED
from msif_core.config import HubDataset
from msif_core.errors import InputError
from msif_core.generating import complete
from msif_core.queries import load_queries
from tests.conftest import make_model
from tests.real_tokenizers import gemma, llama, qwen2
from tests.words import build, write_jsonl

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'assistant: ' }}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% else %}"
    "{{ m['role'] + ': ' + m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TOOLED = (
    "{% if enable_thinking %}[on]{% endif %}"
    "{% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for d in documents or [] %}{{ '<|im_start|>document\n' + d['text'] + '<|im_end|>\n' }}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{{ m.content if m.content is defined else '' }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}[{{ m['content'] }}]{% endif %}{% endfor %}"
)
ASK = {"role": "user", "content": "What is a kite?"}
ANSWER = {"role": "assistant", "content": "A thing that flies."}
MORE = {"role": "user", "content": "What is an oak?"}
LAST = {"role": "assistant", "content": [{"type": "text", "text": "An "}, {"type": "text", "text": "oak."}]}


def with_template(tokenizer: Any, template: str | None) -> Any:
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def chatml() -> Any:
    return with_template(qwen2(), CHATML)


@pytest.fixture(scope="module")
def marked() -> Any:
    return with_template(llama(), MARKED)


def encode(messages: list[dict[str, Any]], tokenizer: Any, length: int = 512, **options: Any) -> list[encoding.Window]:
    return encoding.encode([{"id": "a", "messages": messages}], tokenizer, length, "causal_lm", **options)[0]


def runs(labels: list[int], tokenizer: Any) -> list[str]:
    """What has a loss, run by run."""
    texts: list[list[int]] = []
    for before, label in zip([IGNORED, *labels], labels, strict=False):
        if label != IGNORED:
            texts += [[]] if before == IGNORED else []
            texts[-1].append(label)
    return [tokenizer.decode(ids) for ids in texts]


def test_the_templates_text_with_a_loss_on_the_assistants_turns(chatml: Any) -> None:
    [(ids, labels)] = encode([ASK, ANSWER, MORE, LAST], chatml)
    plain = [ASK, ANSWER, MORE, {"role": "assistant", "content": "An oak."}]
    assert ids == chatml.apply_chat_template(plain, tokenize=True)["input_ids"]
    assert runs(labels, chatml) == ["A thing that flies.<|im_end|>", "An oak.<|im_end|>"]
    assert ids.count(chatml.convert_tokens_to_ids("<|im_start|>")) == 4, "special tokens are tokens"


def test_what_a_template_marks_has_the_loss_and_the_start_stands_once(marked: Any) -> None:
    [(ids, labels)] = encode([ASK, ANSWER, MORE, LAST], marked)
    plain = [ASK, ANSWER, MORE, {"role": "assistant", "content": "An oak."}]
    mask = marked.apply_chat_template(plain, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert ids == mask["input_ids"]
    assert [label != IGNORED for label in labels] == [bool(on) for on in mask["assistant_masks"]]
    assert runs(labels, marked) == ["A thing that flies.</s>", "An oak.</s>"]
    assert ids.count(marked.bos_token_id) == 1


def test_a_chat_begins_as_its_template_writes_it() -> None:
    tokenizer = with_template(gemma(), CHATML)
    assert tokenizer.bos_token_id not in encode([ASK, ANSWER], tokenizer)[0][0]
    assert encode([ASK, ANSWER], tokenizer, start="always")[0][0][0] == tokenizer.bos_token_id


def test_the_last_turn_alone(chatml: Any, marked: Any) -> None:
    for tokenizer in (chatml, marked):
        [(_, labels)] = encode([ASK, ANSWER, MORE, LAST], tokenizer, last_turn=True)
        assert runs(labels, tokenizer) == [f"An oak.{tokenizer.eos_token}"]


@pytest.mark.parametrize("length", [12, 20, 40])
def test_a_long_chat_loses_its_beginning_and_keeps_its_last_turn(chatml: Any, length: int) -> None:
    messages = [ASK, ANSWER, MORE, LAST, {"role": "user", "content": "And what else? " * 20}]
    [(ids, labels)] = encode(messages, chatml, length)
    assert len(ids) <= length
    assert runs(labels, chatml)[-1] == "An oak.<|im_end|>"
    [(ids, labels)] = encode([ASK, {"role": "assistant", "content": "no " * 100}], chatml, length)
    assert len(ids) == length
    assert [label != IGNORED for label in labels] == [False] + [True] * (length - 1)


def test_a_model_without_a_template_is_named(tmp_path: Path) -> None:
    tokenizer = qwen2()
    tokenizer.save_pretrained(tmp_path / "plain")
    named = type(tokenizer).from_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match=rf"'a' is a chat \(messages\), but the tokenizer of {tmp_path}/plain has no"):
        encode([ASK, ANSWER], named)


def test_a_template_that_rewrites_earlier_turns_is_refused_by_name() -> None:
    tokenizer = with_template(qwen2(), FORGETFUL)
    message = (
        r"record 'a': the chat template of .* writes earlier turns otherwise once later ones follow, so the "
        r"assistant's part of message 2 is not known; give prompt and completion, or put \{% generation %\} marks into "
    )
    with pytest.raises(InputError, match=message):
        encode([ASK, ANSWER, MORE, LAST], tokenizer)


def test_what_is_written_already_is_not_written_again(chatml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last turn ends where the whole text does."""
    calls: list[int] = []
    render = chats.render_jinja_template

    def counted(found: list[Any], **options: Any) -> Any:
        calls.append(len(found[0]))
        return render(found, **options)

    monkeypatch.setattr(chats, "render_jinja_template", counted)
    encode([ASK, ANSWER, MORE, LAST], chatml)
    assert calls == [4, 1, 2, 3]


def test_a_prompt_that_no_turn_begins_with_is_refused_by_name() -> None:
    """As of templates whose prompt opens the model's thoughts, which its earlier turns do not show."""
    tokenizer = with_template(qwen2(), CHATML.replace("assistant\n' }}", "assistant\n<think>' }}"))
    with pytest.raises(InputError, match=r"does not begin that turn as its own prompt for it does, so the assistant's"):
        encode([ASK, ANSWER], tokenizer)


# -- the assistant's turn comes first -----------------------------------------------------------------


GREETING = {"role": "assistant", "content": "What is an oak, or a kite?"}


@pytest.mark.parametrize("front", ["", "{{ '<|im_start|>system\n' + 'user asks<|im_end|>\n' }}"])
def test_a_greeting_has_a_loss(front: str) -> None:
    tokenizer = with_template(qwen2(), front + CHATML)
    for messages in ([GREETING, ASK, ANSWER], [GREETING]):
        [(ids, labels)] = encode(messages, tokenizer)
        assert ids == tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
        turns = [f"{m['content']}<|im_end|>" for m in messages if m["role"] == "assistant"]
        assert runs(labels, tokenizer) == turns
    [(_, labels)] = encode([GREETING, ASK, ANSWER], tokenizer, last_turn=True)
    assert runs(labels, tokenizer) == ["A thing that flies.<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML.replace("+ m['content']", "+ m['content'] | length | string + m['content']"), GREETING),
        (CHATML.replace("+ m['content']", "+ m['reasoning_content'] + m['content']"), {"reasoning_content": "user"}),
    ],
)
def test_a_greeting_that_cannot_be_located_has_a_reason_of_its_own(template: str, message: dict[str, Any]) -> None:
    tokenizer = with_template(qwen2(), template)
    refused = r"does not show where the content of a first message begins, so the assistant's part of message 1 is not"
    with pytest.raises(InputError, match=refused):
        encode([GREETING | message], tokenizer)


# -- tools, documents and the template's other variables ----------------------------------------------


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"x": {}}}}}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"x": 1}}}]}
RESULT = {"role": "tool", "name": "look", "content": "An oak."}
GIVEN = {"tools": [TOOL], "documents": [{"text": "user asks"}], "chat_template_kwargs": {"enable_thinking": True}}


@pytest.fixture(scope="module")
def tooled() -> Any:
    return with_template(qwen2(), TOOLED)


def reference(messages: list[dict[str, Any]], tokenizer: Any, **options: Any) -> list[int]:
    """What `apply_chat_template` makes of a chat with all of GIVEN."""
    given = {**{name: GIVEN[name] for name in ("tools", "documents")}, **GIVEN["chat_template_kwargs"]}
    return list(tokenizer.apply_chat_template(messages, tokenize=True, **given, **options)["input_ids"])


@pytest.mark.parametrize("written", [lambda value: value, json.dumps], ids=["json", "text of json"])
def test_tools_documents_and_variables_reach_the_template(tooled: Any, written: Any) -> None:
    given = {name: written(value) for name, value in GIVEN.items()}
    messages = [ASK, CALL, RESULT, ANSWER]
    record = {"id": "a", "messages": messages, **given}
    assert records.problem_of(record) is None
    [[(ids, labels)]] = encoding.encode([record], tooled, 512, "causal_lm")
    assert ids == reference(messages, tooled)
    call = '<call>{"type": "function", "function": {"name": "look", "arguments": {"x": 1}}}<|im_end|>'
    assert runs(labels, tooled) == [call, "A thing that flies.<|im_end|>"]
    asked = encoding.encode_prompts([{"id": "q", "messages": messages[:3], **given}], tooled)
    assert asked == [reference(messages[:3], tooled, add_generation_prompt=True)]
    found = load_queries([record], tooled, 512, "causal_lm")
    assert found.sequences.input_ids[0].tolist() == ids
    assert found.metadata == [{}]
    shown = f"user: What is a kite?\nassistant: {json.dumps(CALL['tool_calls'])}\ntool: An oak."
    assert found.prompts == [shown]


def test_another_tool_is_another_document(tmp_path: Path, tooled: Any) -> None:
    rows = [{"id": "a", "messages": [ASK, ANSWER], **GIVEN}]
    seen = []
    for tools in ([TOOL], [TOOL, TOOL], None):
        build(write_jsonl(tmp_path / "a.jsonl", [rows[0] | {"tools": tools}]), tmp_path / "c", tooled, max_length=512)
        seen.append(corpus.sequences_of_documents(tmp_path / "c", ["a"]).fingerprints[0])
        assert corpus.rows_of_documents(tmp_path / "c", ["a"], ["metadata"])["a"]["metadata"] == "{}"
    assert len(set(seen)) == 3


def test_tools_are_the_same_from_parquet(tmp_path: Path, tooled: Any) -> None:
    """There every tool and every call has the fields of all of them, null where it has none."""
    other = {"type": "function", "function": {"name": "ask", "parameters": {"type": "object", "properties": {"y": {}}}}}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "ask", "arguments": {"y": "no"}}}]}
    rows = [
        {"id": "a", "messages": [ASK, CALL], "tools": [TOOL]},
        {"id": "b", "messages": [ASK, call], "tools": [other]},
    ]
    rows = json.loads(json.dumps(rows).replace("{}", '{"type": "string"}'))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    build(str(tmp_path / "a.parquet"), tmp_path / "parquet", tooled, max_length=512)
    build(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "jsonl", tooled, max_length=512)
    found = [corpus.sequences_of_documents(tmp_path / name, ["a", "b"]) for name in ("parquet", "jsonl")]
    names = [[tooled.decode(ids) for ids in sequences.input_ids] for sequences in found]
    assert names[0] == names[1]


def test_tools_of_a_text_are_metadata() -> None:
    assert records.metadata_of({"id": "a", "text": "x", **GIVEN}) == GIVEN


def test_a_template_for_tools_is_taken_where_there_are_some() -> None:
    tokenizer = with_template(qwen2(), {"default": CHATML, "tool_use": TOOLED})
    plain, tools = ({"id": "a", "messages": [ASK, ANSWER], **more} for more in ({}, {"tools": [TOOL]}))
    [[(with_tools, _)]] = encoding.encode([tools], tokenizer, 512, "causal_lm")
    [[(without, _)]] = encoding.encode([plain], tokenizer, 512, "causal_lm")
    assert '"name": "look"' in tokenizer.decode(with_tools)
    assert without == with_tools[-len(without) :]


def test_messages_that_a_template_refuses_are_named() -> None:
    tokenizer = with_template(qwen2(), "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match=r"record 'a': .* refuses its messages \(roles must alternate\)"):
        encode([ASK, ANSWER], tokenizer)


def test_a_chat_is_the_same_every_day() -> None:
    """As Llama 3.2's template has it: the day of use where there is a clock, and its own day without one."""
    dated = "{% set day = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}{{ day }}\n" + CHATML
    tokenizer = with_template(qwen2(), dated)
    [(ids, _)] = encode([ASK, ANSWER], tokenizer)
    assert tokenizer.decode(ids).startswith("26 Jul 2024\n<|im_start|>user\n")


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"messages": []}, "messages must be a list of"),
        ({"messages": "hello"}, "messages must be a list of"),
        ({"messages": [{"role": "user"}]}, "message 1: write"),
        ({"messages": [ASK, {"role": "assistant", "content": [{"type": "image"}]}]}, "message 2: write"),
        ({"messages": [ASK, "no"]}, "message 2: write"),
        ({"messages": [ASK, {"role": "assistant", "tool_calls": []}]}, "message 2: write"),
        (
            {"messages": [ASK, ANSWER], "tools": "look"},
            "tools beside messages must be a list of JSON schemas, as JSON or",
        ),
        ({"messages": [ASK, ANSWER], "tools": {"a": 1}}, "tools beside messages must be a list of JSON schemas"),
        ({"messages": [ASK, ANSWER], "documents": ["x"]}, "documents beside messages must be a list of objects"),
        ({"messages": [ASK, ANSWER], "chat_template_kwargs": [1]}, "chat_template_kwargs must be an object"),
        (
            {"messages": [ASK, ANSWER], "chat_template_kwargs": {"tools": []}},
            "chat_template_kwargs cannot give tools; tools and documents are fields of the record itself",
        ),
        ({"messages": [ASK]}, "no turn of the assistant in messages"),
        ({"messages": [ASK, ANSWER], "completion": "no"}, "messages end with the assistant's turn, and there is a"),
        ({"messages": [ASK], "completion": 3}, "a completion beside messages must be text"),
        ({"messages": 5, "input_ids": [1, 2]}, "messages must be a list of"),
    ],
)
def test_messages_that_are_no_chat(record: dict[str, Any], problem: str) -> None:
    assert str(records.problem_of({"id": "a", **record})).startswith(problem)


def test_chats_are_documents_from_every_source(tmp_path: Path, chatml: Any) -> None:
    rows = [{"id": "a", "messages": [ASK, ANSWER]}, {"id": "b", "messages": [MORE], "completion": "An oak."}]
    build(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "jsonl", chatml, max_length=64)
    table = [{"id": "a", "messages": [{**ASK, "name": None}, ANSWER], "completion": None}, rows[1]]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "a.parquet")
    build(str(tmp_path / "a.parquet"), tmp_path / "parquet", chatml, max_length=64)
    (tmp_path / "hub").mkdir()
    write_jsonl(tmp_path / "hub" / "train.jsonl", rows[:1])
    build(HubDataset(dataset=str(tmp_path / "hub"), id="id"), tmp_path / "set", chatml, max_length=64)
    found = [corpus.sequences_of_documents(tmp_path / name, ["a"]) for name in ("jsonl", "parquet", "set")]
    assert len({sequences.fingerprints[0] for sequences in found}) == 1
    texts = corpus.rows_of_documents(tmp_path / "jsonl", ["a", "b"], ["text", "metadata"])
    assert texts["a"]["text"] == "user: What is a kite?\nassistant: A thing that flies."
    assert texts["b"]["metadata"] == "{}"
    (labels,) = corpus.sequences_of_documents(tmp_path / "jsonl", ["b"]).labels
    assert runs(labels.tolist(), chatml) == ["An oak.<|im_end|>"]


def test_a_query_of_messages_is_explained_by_its_last_turn_or_answered(chatml: Any) -> None:
    asked: list[list[int]] = []
    answer = chatml("Yes.<|im_end|>")["input_ids"]

    def complete(prompts: list[list[int]]) -> list[list[int]]:
        asked.extend(prompts)
        return [answer for _ in prompts]

    queries = [
        {"id": "given", "messages": [ASK, ANSWER, MORE, LAST], "contrast": "A tree."},
        {"id": "beside", "messages": [ASK, ANSWER, MORE], "completion": "An oak.", "contrast": "A tree."},
        {"id": "alone", "messages": [ASK, ANSWER, MORE], "contrast": "A tree."},
    ]
    found = load_queries(json.loads(json.dumps(queries)), chatml, 512, "causal_lm", complete)
    assert found.generated == [False, False, True]
    prompt = chatml.apply_chat_template([ASK, ANSWER, MORE], tokenize=True, add_generation_prompt=True)["input_ids"]
    assert asked == [prompt]
    texts = [runs(labels.tolist(), chatml) for labels in found.sequences.labels]
    assert texts == [["An oak.<|im_end|>"]] * 2 + [["Yes.<|im_end|>"]] + [["A tree.<|im_end|>"]] * 3
    assert all(ids[: len(prompt)].tolist() == prompt for ids in found.sequences.input_ids)
    shown = "user: What is a kite?\nassistant: A thing that flies.\nuser: What is an oak?"
    assert found.prompts == [shown] * 3
    assert found.completions == ["An oak.", "An oak.", "Yes."]
    assert found.metadata == [{}] * 3
    assert all("oak" in text and "A tree." in text for text in found.texts)
    with pytest.raises(InputError, match="contrast is the completion itself"):
        load_queries([{"id": "q", "messages": [ASK, ANSWER], "contrast": ANSWER["content"]}], chatml, 64, "causal_lm")


def test_an_answer_ends_where_the_template_ends_a_turn() -> None:
    """A chat model's turns may end with another token than its texts."""
    tokenizer = with_template(qwen2(), CHATML)
    tokenizer.eos_token = "<|endoftext|>"
    assert chats.turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chats.turn_end(with_template(qwen2(), None)) is None
    assert chats.turn_end(with_template(llama(), MARKED)) == llama().eos_token_id
    model, options = make_model("llama"), {"max_length": 30, "max_new_tokens": 8, "batch_tokens": 64}
    (answer,) = complete(model, [[3, 4, 5]], ends=[None], **options)
    stop = next(i for i, token in enumerate(answer) if i and token != answer[0])
    assert complete(model, [[3, 4, 5]], ends=[None, answer[stop]], **options) == [answer[: stop + 1]]
