"""Texts as the models' own tokenizers encode them: the start, the seam between prompt and completion, the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msif_core import encoding
from msif_core.batching import IGNORED
from msif_core.errors import InputError
from msif_core.queries import load_queries
from msif_core.tokenizers import token_texts
from tests.real_tokenizers import MAKERS, saved

STARTED = {"llama": "<s>", "gemma": "<bos>", "unigram": "<s>"}
TEXT = st.text(alphabet="aeiosy nxz.:,?\n\té日本🙂e\u0301", max_size=12)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {name: saved(name, tmp_path_factory.mktemp(name)) for name in MAKERS}


@pytest.fixture(params=MAKERS)
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Any]) -> Any:
    return tokenizers[request.param]


def encode(record: dict[str, Any], tokenizer: Any, length: int = 512, **options: Any) -> list[encoding.Window]:
    return encoding.encode([{"id": "a", **record}], tokenizer, length, "causal_lm", **options)[0]


def own(text: str, tokenizer: Any) -> list[int]:
    """What the tokenizer makes of a text by itself, without an end."""
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def split(record: dict[str, Any], tokenizer: Any) -> tuple[list[str], list[str]]:
    """Tokens without and with a loss."""
    [(ids, labels)] = encode(record, tokenizer)
    names = tokenizer.convert_ids_to_tokens(ids)
    first = next(i for i, label in enumerate(labels) if label != IGNORED)
    assert labels == [IGNORED] * first + ids[first:]
    return names[:first], names[first:]


# -- the start ----------------------------------------------------------------------------------------


def test_a_text_begins_as_the_tokenizer_itself_begins_it(tokenizers: dict[str, Any]) -> None:
    for name, tokenizer in tokenizers.items():
        [(ids, _)] = encode({"text": "What is a kite?"}, tokenizer)
        assert ids == [*own("What is a kite?", tokenizer), tokenizer.eos_token_id]
        started = tokenizer.convert_ids_to_tokens(ids[:1])[0] == STARTED.get(name)
        assert started == (name in STARTED), name


def test_no_text_begins_twice(tokenizers: dict[str, Any]) -> None:
    for name, start in STARTED.items():
        [(ids, _)] = encode({"text": f"{start}What is a kite?"}, tokenizers[name])
        assert ids.count(tokenizers[name].bos_token_id) == 1
        [(ids, _)] = encode({"prompt": f"{start}What is", "completion": " a kite?"}, tokenizers[name], start="always")
        assert ids.count(tokenizers[name].bos_token_id) == 1


def test_only_the_first_window_of_a_document_begins(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["llama"]
    windows = encode({"text": "What is a kite? " * 5}, tokenizer, 8)
    ids = [token for ids, _ in windows for token in ids]
    assert len(windows) > 2
    assert ids == [*own("What is a kite? " * 5, tokenizer), tokenizer.eos_token_id]


def test_the_start_as_the_setting_has_it(tokenizers: dict[str, Any]) -> None:
    llama, qwen2 = tokenizers["llama"], tokenizers["qwen2"]
    [(ids, _)] = encode({"text": "a kite"}, llama, start="never")
    assert llama.bos_token_id not in ids
    qwen2.bos_token = None
    with pytest.raises(InputError, match=r"corpus.start is always, but its tokenizer has no start token"):
        encode({"text": "a kite"}, qwen2, start="always")
    [(ids, _)] = encode({"text": "a kite"}, tokenizers["gpt2"], start="always")
    assert ids[0] == tokenizers["gpt2"].bos_token_id


# -- the seam -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(prompt=TEXT, completion=TEXT.filter(bool))
def test_prompt_and_completion_are_one_text(tokenizers: dict[str, Any], prompt: str, completion: str) -> None:
    """The tokens are those of the joined text, and those without a loss are the ones that lie within the prompt."""
    for name, tokenizer in tokenizers.items():
        plain = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
        for ids, labels in encode({"prompt": prompt, "completion": completion}, tokenizer):
            start = len(own("", tokenizer))
            assert ids == [*own("", tokenizer), *plain, tokenizer.eos_token_id], name
            first = next(i for i, label in enumerate(labels) if label != IGNORED)
            assert labels == [IGNORED] * first + ids[first:], name
            if tokenizer.is_fast:
                ends = tokenizer(prompt + completion, add_special_tokens=False, return_offsets_mapping=True)
                inside = [end <= len(prompt) for _, end in ends["offset_mapping"]] if prompt else []
                assert first == start + sum(inside), name
            else:  # of bytes, whatever the text
                assert first == start + len(prompt.encode()), name


def test_no_space_comes_into_the_seam(tokenizers: dict[str, Any]) -> None:
    for name in ("llama", "gemma", "unigram"):
        _, targets = split({"prompt": "The answer is:", "completion": "yes"}, tokenizers[name])
        assert "".join(targets[:-1]) == "yes", name
        assert split({"prompt": "x", "completion": "y"}, tokenizers[name])[1][:-1] == ["y"], name


def test_a_token_that_straddles_the_seam_is_the_completions(tokenizers: dict[str, Any]) -> None:
    without, targets = split({"prompt": "nothing els", "completion": "e, and nothing else."}, tokenizers["qwen2"])
    assert "".join(without).replace("Ġ", " ") == "nothing"
    assert targets[0] == "Ġelse"
    without, targets = split({"prompt": "no  ", "completion": "  yes"}, tokenizers["gpt2"])
    assert "".join(without + targets[:-1]).replace("Ġ", " ") == "no    yes"
    assert len("".join(without)) <= len("no  "), "tokens of white space alone have no characters of their own there"


def slow_words(folder: Path) -> Any:
    """A slow tokenizer, which does not give back what it does not know, nor capitals."""
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy as BertTokenizer

    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "foo", "##bar", "bar"]))
    return BertTokenizer(str(folder / "vocab.txt"), eos_token="[SEP]")


def test_without_offsets_the_seam_is_found_or_refused(tmp_path: Path) -> None:
    tokenizer = slow_words(tmp_path)
    assert not tokenizer.is_fast
    assert split({"prompt": "foo ", "completion": "bar"}, tokenizer) == (["[CLS]", "foo"], ["bar", "[SEP]"])
    assert split({"prompt": "foo", "completion": "bar"}, tokenizer) == (["[CLS]", "foo"], ["##bar", "[SEP]"])
    with pytest.raises(InputError, match=r"prompt and completion cannot be told apart; give input_ids and labels, or"):
        encode({"prompt": "Qux", "completion": "zot bar"}, tokenizer)


def test_queries_contrasts_and_the_models_answers_are_encoded_so_too(tokenizers: dict[str, Any]) -> None:
    tokenizer, asked = tokenizers["llama"], []

    def complete(prompts: list[list[int]]) -> list[list[int]]:
        asked.extend(prompts)
        return [[tokenizer.convert_tokens_to_ids("▁yes"), tokenizer.eos_token_id] for _ in prompts]

    record = {"prompt": "The answer is:", "completion": "yes", "contrast": "no"}
    alone = {"id": "alone", "prompt": "The answer is:"}
    found = load_queries([{"id": "q", **record}, alone], tokenizer, 64, "causal_lm", complete)
    prompt = own("The answer is:", tokenizer)
    assert asked == [prompt]
    texts = [tokenizer.convert_ids_to_tokens(ids[len(prompt) :].tolist()) for ids in found.sequences.input_ids]
    assert texts == [["y", "es", "</s>"], ["▁yes", "</s>"], ["no", "</s>"]]
    assert all(ids[: len(prompt)].tolist() == prompt for ids in found.sequences.input_ids)


# -- the end ------------------------------------------------------------------------------------------


def test_a_text_ends_once(tokenizer: Any) -> None:
    for record in (
        {"prompt": "The answer is:", "completion": "yes"},
        {"prompt": "The answer is:", "completion": f"yes{tokenizer.eos_token}"},
        {"text": "What is a kite?"},
        {"text": f"What is a kite?{tokenizer.eos_token}"},
    ):
        [(ids, labels)] = encode(record, tokenizer)
        assert ids.count(tokenizer.eos_token_id) == 1
        assert ids[-1] == labels[-1] == tokenizer.eos_token_id


def test_a_turn_that_ends_with_another_special_token_gets_no_end(tokenizers: dict[str, Any]) -> None:
    record = {"prompt": "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n", "completion": "yes<|endoftext|>"}
    assert split(record, tokenizers["qwen2"])[1][-1] == "<|endoftext|>"


def test_a_text_cut_at_its_windows_end_has_no_end_token(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["llama"]
    [(ids, labels)] = encode({"prompt": "The answer is:", "completion": "yes " * 20}, tokenizer, 8)
    assert len(ids) == 8
    assert tokenizer.eos_token_id not in ids
    assert labels[0] == IGNORED
    assert labels[1:] == ids[1:]


# -- what tokens read as ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(text=TEXT.filter(str.strip))
def test_joined_token_texts_are_the_text(tokenizers: dict[str, Any], text: str) -> None:
    for name, tokenizer in tokenizers.items():
        ids = tokenizer(text)["input_ids"]
        assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids), name


def test_the_space_that_sentencepiece_puts_before_a_text_takes_no_other_tokens_place(
    tokenizers: dict[str, Any],
) -> None:
    llama, unigram = tokenizers["llama"], tokenizers["unigram"]

    def texts(tokenizer: Any, names: list[str]) -> list[str]:
        return token_texts(tokenizer, tokenizer.convert_tokens_to_ids(names))

    for tokenizer in (llama, unigram):
        assert texts(tokenizer, ["▁", "T", "h", "e"]) == ["", "T", "h", "e"]
        assert texts(tokenizer, ["▁", "▁", "x"]) == ["", " ", "x"]
        assert texts(tokenizer, ["x", "▁", "x"]) == ["x", " ", "x"]
    assert texts(llama, ["▁", "<0xC3>", "<0xA9>", "x"]) == ["", "é", "", "x"]
    assert texts(llama, ["▁", "<0xC3>", "x"]) == ["", "\ufffd", "x"]
    assert token_texts(llama, [5000, *llama.convert_tokens_to_ids(["x", "y"])]) == ["", "x", "y"], "of a padded model"
    assert texts(tokenizers["byt5"], ["Ã", "©", "x"]) == ["é", "", "x"]
    assert texts(tokenizers["gpt2"], ["Ã", "©", "x"]) == ["é", "", "x"]


def test_token_texts_keep_spaces_characters_and_special_tokens(tokenizers: dict[str, Any]) -> None:
    llama, gpt2 = tokenizers["llama"], tokenizers["gpt2"]
    ids = llama("What is 🙂?")["input_ids"]
    assert token_texts(llama, ids)[-6:] == [" ", "🙂", "", "", "", "?"]
    assert token_texts(llama, ids)[0] == "<s>"
    ids = gpt2(" a kite 🙂<|endoftext|>")["input_ids"]
    assert token_texts(gpt2, ids)[:2] == [" a", " kite"]
    assert token_texts(gpt2, ids)[-5:-1] == ["🙂", "", "", ""]
    bytes_alone = gpt2("🙂", add_special_tokens=False)["input_ids"]
    assert token_texts(gpt2, bytes_alone[1:]) == ["\ufffd"] * 3, "a window may begin within a character"
    assert token_texts(None, [3, 4]) == ["3", "4"]
