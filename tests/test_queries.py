"""Records to queries: their order, what each weighs, and what cannot be asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from msif_core.errors import InputError
from msif_core.queries import Queries, load_queries

RECORDS: list[dict[str, Any]] = [
    {"id": "q2", "prompt": "w1", "completion": " w2", "set": ["x"], "topic": "t"},
    {"id": "q1", "text": "w3 w4"},
    {"id": "q3", "prompt": "w1", "completion": " w2", "contrast": " w5 w6", "set": ["y", "x"]},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    backend = Tokenizer(models.WordLevel({"<end>": 0} | {f"w{i}": i for i in range(1, 50)}, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


@pytest.fixture
def queries(tmp_path: Path, tokenizer: Any) -> Queries:
    path = tmp_path / "queries.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return load_queries(path, tokenizer, 8, "causal_lm")


def test_queries_keep_their_order_and_metadata(queries: Queries) -> None:
    assert queries.ids == ["q2", "q1", "q3", "x", "y"]
    assert queries.prompts == ["w1", "", "w1", "", ""]
    assert queries.completions == [" w2", "w3 w4", " w2", "", ""]
    assert queries.metadata == [{"topic": "t"}, {}, {}, {}, {}]
    assert queries.members == [[], [], [], ["q2", "q3"], ["q3"]]
    assert [ids.tolist() for ids in queries.sequences.input_ids] == [[1, 2, 0], [3, 4, 0], [1, 2, 0], [1, 5, 6, 0]]
    assert all(word in queries.texts[3] for word in ("w2", "w5"))


def test_a_contrast_is_subtracted_and_a_set_averaged(queries: Queries) -> None:
    assert queries.measurements == [{0: 1}, {1: 1}, {2: 1, 3: -1}, {0: 0.5, 2: 0.5, 3: -0.5}, {2: 1, 3: -1}]


def test_taken_queries_bring_the_sequences_that_they_weigh(queries: Queries) -> None:
    taken = queries.take([2, 1])
    assert taken.ids == ["q3", "q1"]
    assert taken.measurements == [{1: 1, 2: -1}, {0: 1}]
    assert [ids.tolist() for ids in taken.sequences.input_ids] == [[3, 4, 0], [1, 2, 0], [1, 5, 6, 0]]


@pytest.mark.parametrize("completion", [None, ""])
def test_a_prompt_alone_keeps_the_models_own_tokens(tokenizer: Any, completion: str | None) -> None:
    asked: list[list[int]] = []

    def complete(prompts: list[list[int]]) -> list[list[int]]:
        asked.extend(prompts)
        return [[7, 8, 0] for _ in prompts]

    record = {"id": "q", "prompt": "w1 w2 w3", "completion": completion, "contrast": " w9"}
    found = load_queries([record], tokenizer, 5, "causal_lm", complete)
    assert asked == [[1, 2, 3]]
    assert found.completions == ["w7 w8"]
    assert found.generated == [True]
    assert found.sequences.input_ids[0].tolist() == [2, 3, 7, 8, 0]
    assert found.sequences.labels[0].tolist() == [-100, -100, 7, 8, 0]
    assert found.sequences.labels[1].tolist() == [-100, -100, -100, 9, 0]
    assert found.measurements == [{0: 1, 1: -1}]
    with pytest.raises(InputError, match=r"query 'q' has no completion, .* give it a completion"):
        load_queries([{"id": "q", "prompt": "w1"}], tokenizer, 8, "causal_lm")


def test_a_classification_contrasts_two_labels(tokenizer: Any) -> None:
    found = load_queries([{"id": "q", "text": "w1 w2", "label": 2, "contrast": 0}], tokenizer, 8, "classification")
    assert [labels[0] for labels in found.sequences.labels] == [2, 0]
    assert found.contrasts == ["0"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": "q", "text": "w1 " * 20}, "query 'q' does not fit one window of 8 tokens; shorten it, or raise"),
        ({"id": "q", "prompt": "w1 " * 20, "completion": "w2"}, "query 'q' does not fit one window of 8 tokens"),
        ({"id": "q", "prompt": "w1", "completion": " w2" * 20}, "query 'q' does not fit one window of 8 tokens"),
        ({"id": "q", "input_ids": [3]}, "query 'q' has no token whose loss could be explained; give it more text"),
        ({"id": "q", "prompt": " "}, "record 1: empty prompt; write what the model should answer"),
        ({"id": "q", "text": "a b", "contrast": "c"}, "contrast must be another completion of its prompt"),
        ({"id": "q", "prompt": "a", "completion": "b", "contrast": "b"}, "contrast is the completion itself"),
        ({"id": "q", "prompt": "a", "completion": "b", "set": 3}, "set must be a name, or a list of names"),
        (
            {"id": "q", "text": "a b", "gold_doc_ids": "d1"},
            "gold_doc_ids must be a list of documents' ids, each as text",
        ),
        (
            {"id": "q", "text": "a b", "gold_doc_ids": [1.5]},
            "gold_doc_ids must be a list of documents' ids, each as text",
        ),
        ({"id": "q", "prompt": "a \ud800"}, "record 1: a lone surrogate is no text; re-encode it"),
        ({"id": "q", "text": "a b", "by": ["\udfff"]}, "record 1: a lone surrogate is no text; re-encode it"),
        ({"id": "q", "prompt": "a", "completion": " b", "set": "q"}, "set 'q' has the name of a query"),
    ],
)
def test_questions_that_cannot_be_asked(tokenizer: Any, record: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_queries([record], tokenizer, 8, "causal_lm")


def test_queries_may_be_cut_as_training_cuts_its_records(tokenizer: Any) -> None:
    record = {"id": "q", "prompt": "w1 " * 20, "completion": "w2 w3"}
    (ids,) = load_queries([record], tokenizer, 8, "causal_lm", cut=True).sequences.input_ids
    assert ids.tolist() == [1, 1, 1, 1, 1, 2, 3, 0]
    with pytest.raises(InputError, match="query 'q' does not fit one window of 8 tokens"):
        load_queries([{"id": "q", "text": "w1 " * 20}], tokenizer, 8, "causal_lm", cut=True)


def test_a_query_id_stands_once(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="record 2: id 'q1' stands already at record 1"):
        load_queries([RECORDS[1], RECORDS[1]], tokenizer, 8, "causal_lm")
