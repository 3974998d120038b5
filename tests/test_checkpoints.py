"""Checkpoints that cannot be attributed with: each is told in one sentence, before anything is built."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from msif_core.config import Config
from msif_core.errors import InputError
from msif_core.meta_models import meta_model
from msif_core.models import load_model
from tests.conftest import CONFIGS, make_model


def saved(folder: Path, model: Any, **changes: Any) -> str:
    """A checkpoint's folder, with changes in its config.json."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


def structure(source: str, task: str = "causal_lm", **compute: Any) -> Any:
    stage = {"name": "a", "model": source, "documents": "a.jsonl", "task": task}
    config = Config.model_validate({"workspace": "w", "stages": [stage], "compute": compute})
    return meta_model(config, config.stages[0])


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "fp8"])
def test_quantized_weights_are_refused_by_name(tmp_path: Path, method: str) -> None:
    quantized = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    source = saved(tmp_path, make_model("llama", dtype=torch.float32), quantization_config=quantized)
    for read in (load_model, structure):
        with pytest.raises(InputError, match=rf"quantized \({method}\).*name the checkpoint that it was made from"):
            read(source)


def test_code_that_comes_with_a_checkpoint_is_not_run_unless_asked_for(tmp_path: Path) -> None:
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    source = saved(tmp_path, make_model("llama", dtype=torch.float32), model_type="own", auto_map=auto)
    (tmp_path / "own.py").write_text("raise SystemExit('it was run')\n")
    for read in (load_model, structure):
        with pytest.raises(InputError, match=r"auto_map in config.json.*compute.trust_remote_code: true"):
            read(source)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoders_are_refused(tmp_path: Path, kind: str) -> None:
    settings = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "vocab_size": 13}
    config = transformers.T5Config(**settings) if kind == "t5" else transformers.BartConfig()
    config.save_pretrained(tmp_path)
    for read in (load_model, structure):
        with pytest.raises(InputError, match=f"{kind} is an encoder-decoder; msif takes decoders"):
            read(str(tmp_path))


def test_a_type_without_a_language_model_is_refused(tmp_path: Path) -> None:
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no language model that continues a text of type 'vit'; name another model"):
        structure(str(tmp_path))


def test_a_model_that_reads_later_tokens_is_no_causal_language_model(tmp_path: Path) -> None:
    config = CONFIGS["bert"]()
    for decoder in (False, True):
        config.is_decoder = decoder
        source = saved(tmp_path / str(decoder), transformers.BertLMHeadModel(config))
        if decoder:
            assert load_model(source)
        else:
            with pytest.raises(InputError, match=r"BertLMHeadModel reads later tokens too.*set is_decoder to true"):
                load_model(source)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_decoder_of_the_tests_is_causal(tmp_path: Path, decoder: str, dtype: str) -> None:
    assert load_model(saved(tmp_path, make_model(decoder, dtype=torch.float32)), dtype=dtype)


def test_attention_that_is_not_installed_says_how_to_choose_another(tmp_path: Path) -> None:
    source = saved(tmp_path, make_model("llama", dtype=torch.float32))
    for read in (
        lambda: load_model(source, attention="flash_attention_2"),
        lambda: structure(source, attention="flash_attention_2"),
    ):
        with pytest.raises(InputError, match=r"not installed .*compute.attention: sdpa \(or eager\)"):
            read()
    assert load_model(source, attention="eager").config._attn_implementation == "eager"
    asking = saved(
        tmp_path / "asking", make_model("llama", dtype=torch.float32), attn_implementation="flash_attention_2"
    )
    assert load_model(asking, attention="sdpa").config._attn_implementation == "sdpa"


def test_experts_run_in_float64(tmp_path: Path) -> None:
    """As transformers' own fused products of experts do not."""
    source = saved(tmp_path, make_model("mixtral", dtype=torch.float32))
    ids = torch.arange(1, 9)[None]
    double, single = (load_model(source, dtype=dtype)(input_ids=ids).logits for dtype in ("float64", "float32"))
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-4)


def test_a_configuration_that_contradicts_itself_is_named(tmp_path: Path) -> None:
    source = saved(tmp_path, make_model("llama", dtype=torch.float32), num_attention_heads=3)
    for read in (load_model, structure):
        with pytest.raises(
            InputError, match=rf"{re.escape(source)}: .*not a multiple of the number of attention heads"
        ):
            read(source)


@pytest.mark.parametrize("name", ["{}/missing", "./missing", "runs/models/mine"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_a_hub(tmp_path: Path, name: str) -> None:
    source = name.format(tmp_path)
    for read in (load_model, structure):
        with pytest.raises(InputError, match=f"{re.escape(source)}: no such folder"):
            read(source)


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    source = saved(tmp_path, make_model("llama", dtype=torch.float32), vocab_size=20)
    with pytest.raises(InputError, match=f"{re.escape(source)}: no model can be loaded from it: .*size"):
        load_model(source)
