"""Records to windows and labels."""

from typing import Any

import pytest

from msif_core import encoding
from msif_core.batching import IGNORED
from msif_core.errors import InputError
from tests.words import END, word_tokenizer, words


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer()


def test_text_is_cut_into_windows_that_keep_document_boundaries(tokenizer: Any):
    [windows] = encoding.encode([{"id": "a", "text": words(10)}], tokenizer, 4, "causal_lm")
    assert [len(ids) for ids, _ in windows] == [4, 4, 3]
    assert windows[-1][0][-1] == END
    assert all(ids == labels for ids, labels in windows)


def test_a_last_window_without_a_target_is_left_out(tokenizer: Any):
    [windows] = encoding.encode([{"id": "a", "text": words(4)}], tokenizer, 4, "causal_lm")
    assert [len(ids) for ids, _ in windows] == [4]


def test_the_loss_is_on_the_completion_and_its_end(tokenizer: Any):
    [[(ids, labels)]] = encoding.encode(
        [{"id": "a", "prompt": "w1 w2", "completion": " w3"}], tokenizer, 8, "causal_lm"
    )
    assert ids == [1, 2, 3, END]
    assert labels == [IGNORED, IGNORED, 3, END]


@pytest.mark.parametrize(("prompt", "completion"), [(20, 3), (3, 20), (20, 20), (0, 5)])
def test_a_long_prompt_loses_its_beginning_never_the_completion_s(tokenizer: Any, prompt: int, completion: int):
    record = {"id": "a", "prompt": words(prompt), "completion": " " + words(completion, 30)}
    [[(ids, labels)]] = encoding.encode([record], tokenizer, 8, "causal_lm")
    assert len(ids) == len(labels) <= 8
    targets = [label for label in labels if label != IGNORED]
    assert targets == tokenizer(record["completion"])["input_ids"][:7] + ([END] if completion < 7 else [])
    assert labels[0] == IGNORED or not prompt


def test_records_of_all_kinds_are_encoded_together_as_one_by_one(tokenizer: Any):
    found = [
        {"id": "a", "text": words(7)},
        {"id": "b", "input_ids": [1, 2, 3]},
        {"id": "c", "prompt": "w1 w2", "completion": " w3"},
        {"id": "d", "text": "w4 w5"},
    ]
    together = encoding.encode(found, tokenizer, 4, "causal_lm")
    assert together == [encoding.encode([record], tokenizer, 4, "causal_lm")[0] for record in found]
    assert encoding.encode([], tokenizer, 4, "causal_lm") == []


def test_given_tokens_need_no_tokenizer_and_are_cut_too():
    record = {"id": "a", "input_ids": list(range(1, 8)), "labels": [-100, -100, 3, 4, 5, -100, -100]}
    [windows] = encoding.encode([record], None, 3, "causal_lm")
    assert windows == [([1, 2, 3], [-100, -100, 3]), ([4, 5, 6], [4, 5, -100])]
    with pytest.raises(InputError, match=r"'b' is text, .* no tokenizer; give input_ids, or a model folder with"):
        encoding.encode([{"id": "b", "text": "w1"}], None, 3, "causal_lm")


def test_classification_puts_its_label_first(tokenizer: Any):
    [[(ids, labels)]] = encoding.encode([{"id": "a", "text": words(9), "label": 2}], tokenizer, 4, "classification")
    assert len(ids) == 4
    assert labels == [2, IGNORED, IGNORED, IGNORED]


@pytest.mark.parametrize("label", [None, "good", True, -1, 1.5])
def test_classification_without_a_usable_label_is_an_input_error(tokenizer: Any, label: Any):
    with pytest.raises(InputError, match="record 'a': a stage with task classification needs `text` and an integer"):
        encoding.encode([{"id": "a", "text": "w1", "label": label}], tokenizer, 4, "classification")
