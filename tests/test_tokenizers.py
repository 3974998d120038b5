"""A stage's tokenizer: its own code only where that is trusted, and the window that it and the model take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, dynamic_module_utils

from msif_core.config import Config
from msif_core.errors import InputError
from msif_core.pipeline import Pipeline

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
