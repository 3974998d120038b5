"""The tiny project with mixtures of experts in the place of its models, random and related."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

from msif_core.models import load_tokenizer
from msif_core.pipeline import Pipeline


def put_mixtures(config: Path) -> Pipeline:
    """Save a Mixtral for each stage below the configuration's folder, and name them in it."""
    settings = json.loads(config.read_text())
    tokenizer = load_tokenizer(settings["stages"][0]["model"])
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, intermediate_size=12, max_position_embeddings=64, num_local_experts=4,
            num_experts_per_tok=2, initializer_range=0.3, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    for stage in settings["stages"]:
        stage["model"] = str(config.parent / f"mixture-{stage['name']}")
        model.save_pretrained(stage["model"])
        tokenizer.save_pretrained(stage["model"])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    config.write_text(json.dumps(settings))
    return Pipeline.from_config(config)
