"""A stage's tokenizer: its own code only where that is trusted, and the window that it and the model take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GemmaTokenizer, PreTrainedTokenizerFast, dynamic_module_utils

from flows.plain_console import PlainConsole
from flows.show_tokens import print_tokens
from msif_core import corpus
from msif_core.config import Config
from msif_core.errors import InputError
from msif_core.pipeline import Pipeline
from msif_core.plan import make_plan
from msif_core.tokenizers import unknown_token
from tests.real_tokenizers import MAKERS, TEXTS, saved

CODE = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def save_tokenizer(folder: Path, **settings: Any) -> None:
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1, "w": 2}, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>", **settings)
    tokenizer.save_pretrained(folder)


def pipeline(folder: Path, **changes: Any) -> Pipeline:
    (folder / "a.jsonl").write_text(json.dumps({"id": "a", "text": "w " * 100, "label": 0}) + "\n")
    stage = {"name": "s", "model": str(folder), "documents": str(folder / "a.jsonl"), "task": "classification"}
    return Pipeline(Config.model_validate({"workspace": str(folder / "workspace"), "stages": [stage], **changes}))


@pytest.fixture
def roberta(tmp_path: Path) -> Path:
    """Its positions start after the padding token's: of 12, a text has 10."""
    config = transformers.RobertaConfig(
        vocab_size=3, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=12, pad_token_id=1, type_vocab_size=1,
    )  # fmt: skip
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    return tmp_path


def test_the_window_is_what_the_model_and_its_tokenizer_take(roberta: Path) -> None:
    save_tokenizer(roberta, model_max_length=10)
    found = pipeline(roberta)
    assert found.max_length("s") == 10
    queries = found.read_queries([{"id": "q", "text": "w " * 100, "label": 1}])
    _, gradients = next(iter(found.query_gradients(queries, rotated=False)))
    assert gradients
    assert pipeline(roberta, corpus={"max_length": 5}).max_length("s") == 5


@pytest.mark.parametrize("length", [None, 20])
def test_a_tokenizer_that_names_no_window_or_a_longer_one_leaves_the_model_s(roberta: Path, length: int | None) -> None:
    if length:
        save_tokenizer(roberta, model_max_length=length)
    assert pipeline(roberta).max_length("s") == 12


@pytest.mark.parametrize("content", ["{}", "", "[1, 2"])
def test_a_broken_tokenizer_is_named(roberta: Path, content: str) -> None:
    save_tokenizer(roberta)
    (roberta / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=rf"{roberta}: its tokenizer cannot be loaded \(.*\); save it there again"):
        pipeline(roberta).tokenizer("s")


def test_a_tokenizer_s_own_code_runs_only_where_it_is_trusted(roberta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(roberta / "modules"))
    monkeypatch.syspath_prepend(str(roberta / "modules"))
    save_tokenizer(roberta)
    settings = json.loads((roberta / "tokenizer_config.json").read_text())
    named = {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"}
    (roberta / "tokenizer_config.json").write_text(json.dumps(settings | named))
    (roberta / "own.py").write_text(CODE)
    assert type(pipeline(roberta, compute={"trust_remote_code": True}).tokenizer("s")).__name__ == "OwnTokenizer"
    assert type(pipeline(roberta).tokenizer("s")).__name__ != "OwnTokenizer"


def test_the_tokens_of_a_classification_are_shown_with_its_label(roberta: Path) -> None:
    save_tokenizer(roberta, model_max_length=10)
    (seen,) = pipeline(roberta).tokens("s")
    assert (seen.label, len(seen.tokens), any(token.target for token in seen.tokens)) == (0, 10, False)


def test_the_space_before_a_text_is_shown_as_sentencepiece_writes_it(tmp_path: Path) -> None:
    found = language_model(tmp_path, "llama", [{"id": "a", "text": "🙂x"}], corpus={"start": "never"})
    saved("llama", tmp_path)
    with (console := PlainConsole(width=80)).capture() as printed:
        print_tokens(found.tokens("s"), console)
    assert printed.get().splitlines()[1:] == ["       │▁│", "loss ▶ │🙂│…│…│…│x│</s>│", ""]


# -- a folder without its tokenizer -------------------------------------------------------------------


SIZE = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 420}
FAMILIES: dict[str, Any] = {
    "gemma": lambda: transformers.GemmaConfig(**SIZE, intermediate_size=8, num_key_value_heads=1, head_dim=4),
    "llama": lambda: transformers.LlamaConfig(**SIZE, intermediate_size=8),
    "qwen2": lambda: transformers.Qwen2Config(**SIZE, intermediate_size=8),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=420, n_embd=8, n_layer=1, n_head=2),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZE, intermediate_size=8),
    "opt": lambda: transformers.OPTConfig(**SIZE, ffn_dim=8, word_embed_proj_dim=8),
    "xglm": lambda: transformers.XGLMConfig(vocab_size=420, d_model=8, num_layers=1, attention_heads=2, ffn_dim=8),
}  # fmt: skip


NO_TOKENIZER = (
    r"stage 's': {} has no tokenizer \(no tokenizer.json, no tokenizer.model, .*\), and record '{}' is text; "
    "put the files of the model's tokenizer there, or give input_ids"
)


def language_model(folder: Path, family: str, documents: list[dict[str, Any]], **changes: Any) -> Pipeline:
    """A configuration of one stage; its model has no weights, which tokens need none of."""
    FAMILIES[family]().save_pretrained(folder)
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in documents))
    stage = {"name": "s", "model": str(folder), "documents": str(folder / "a.jsonl")}
    return Pipeline(Config.model_validate({"workspace": str(folder / "workspace"), "stages": [stage], **changes}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_class_that_makes_up_a_vocabulary_is_no_tokenizer(tmp_path: Path, family: str) -> None:
    found = language_model(tmp_path, family, [{"id": "a", "text": "What is a kite?"}])
    assert found.tokenizer("s") is None
    with pytest.raises(InputError, match=NO_TOKENIZER.format(tmp_path, "a")):
        found.tokenize("s")


def test_a_folder_without_its_tokenizer_is_named_wherever_records_are_read(tmp_path: Path) -> None:
    found = language_model(tmp_path, "llama", [{"id": "a", "input_ids": [7, 8, 9]}, {"id": "b", "text": "a kite"}])
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": "q", "prompt": "What is", "completion": " a kite?"}) + "\n")
    asked: list[tuple[str, Callable[[], Any]]] = [
        ("b", lambda: found.tokens("s")),
        ("q", lambda: found.tokens(queries=tmp_path / "q.jsonl")),
        ("q", lambda: found.read_queries(tmp_path / "q.jsonl")),
        ("p", lambda: found.tokens(queries=[{"id": "p", "prompt": "What is"}])),
        ("p", lambda: found.read_queries([{"id": "p", "prompt": "What is"}])),
        ("b", lambda: found.score([{"id": "t", "input_ids": [7, 8]}], [{"id": "b", "text": "a kite"}])),
    ]
    for record, ask in asked:
        with pytest.raises(InputError, match=NO_TOKENIZER.format(tmp_path, record)):
            ask()


def test_tokens_need_no_tokenizer_whatever_the_class_makes_up(tmp_path: Path) -> None:
    found = language_model(tmp_path, "gemma", [{"id": "a", "input_ids": [7, 8, 9]}])
    assert found.tokenize("s").exists()


def test_a_tokenizer_far_smaller_than_its_model_is_refused(tmp_path: Path) -> None:
    found = language_model(tmp_path, "gemma", [{"id": "a", "text": "What is a kite?"}])
    GemmaTokenizer(vocab={"<unk>": 0, "a": 1}, merges=[]).save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=rf"{tmp_path}: its tokenizer \(GemmaTokenizer\) knows \d tokens and its model 4"
    ):
        found.tokenize("s")


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_sentencepiece_file_is_read_and_a_broken_one_is_named(tmp_path: Path, family: str) -> None:
    found = language_model(tmp_path, family, [{"id": "a", "text": "What is a kite?"}])
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "tokenizer"), vocab_size=380, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    assert len(found.tokenizer("s")) > 256
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    message = rf"{tmp_path}: its tokenizer cannot be loaded .* tokenizer.model is damaged, or what reads it is missing"
    with pytest.raises(InputError, match=message):
        found.tokenizer("s")


def test_bytes_need_no_file_of_a_vocabulary(tmp_path: Path) -> None:
    found = language_model(tmp_path, "llama", [{"id": "a", "text": "What is 日本?"}])
    saved("byt5", tmp_path)
    assert type(found.tokenizer("s")).__name__ == "ByT5Tokenizer"


# -- unknown tokens -----------------------------------------------------------------------------------


def test_the_share_of_unknown_tokens_is_kept_and_a_large_one_refused(tmp_path: Path) -> None:
    known = [{"id": f"d{i}", "text": "What is a kite? A thing that flies in the wind."} for i in range(9)]
    found = language_model(tmp_path, "llama", [*known, {"id": "odd", "text": "a kite ☃ flies"}])
    saved("unigram", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 80}))
    found.tokenize("s")
    unknown = found.corpus_manifest("s")["unknown"]
    sequences = corpus.sequences_of_documents(found.workspace.corpus("s"), [r["id"] for r in known] + ["odd"])
    counted = sum(int((ids == 0).sum()) for ids in sequences.input_ids)
    assert counted == 1
    assert unknown["share"] == pytest.approx(1 / sum(map(len, sequences.input_ids)))
    assert (unknown["document"], unknown["example"]) == ("odd", "☃")
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "g", "text": "Ω Ψ Φ a kite"}) + "\n")
    with pytest.raises(InputError, match=r"\d\d% of its tokens are unknown to the tokenizer of .*'Ω' of document 'g'"):
        found.tokenize("s")


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_a_vocabulary_of_bytes_lacks_nothing(name: str) -> None:
    """Their unknown token is the end of a text, written between documents."""
    assert unknown_token(MAKERS[name]()) is None


# -- the window ---------------------------------------------------------------------------------------


def test_a_long_context_is_no_window(tmp_path: Path) -> None:
    found = language_model(tmp_path, "llama", [{"id": "a", "text": "What is a kite? " * 1000}])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 131_072}))
    saved("llama", tmp_path)
    assert (found.max_length("s"), found.query_length()) == (2048, 131_072)
    found.tokenize("s")
    assert found.corpus_manifest("s")["max_length"] == 2048
    (size,) = make_plan(found.config, "h100").stages
    assert (size.window, size.positions) == (2048, 131_072)
    wide = Config.model_validate(found.config.model_dump() | {"corpus": {"max_length": 131_072}})
    steps = [{step.name: step.memory for step in make_plan(c, "h100").steps} for c in (found.config, wide)]
    assert steps[1]["covariances"] > steps[0]["covariances"] + 1e8, "the plan shows what a longer window takes"


def test_another_start_is_another_corpus_and_other_factors(tmp_path: Path) -> None:
    found = language_model(tmp_path, "llama", [{"id": "a", "text": "What is a kite?"}])
    saved("llama", tmp_path)
    never = Pipeline(Config.model_validate(found.config.model_dump() | {"corpus": {"start": "never"}}))
    manifests = []
    for each in (found, never, found):
        each.tokenize("s")
        manifests.append(each.corpus_manifest("s")["fingerprint"])
    assert manifests[0] == manifests[2] != manifests[1]
    transformers.LlamaForCausalLM(FAMILIES["llama"]()).save_pretrained(tmp_path)
    assert found.recipe("s") != never.recipe("s")
