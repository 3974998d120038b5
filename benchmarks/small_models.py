"""Models of every class of `AutoModelForCausalLM`: of its default configuration, and small enough to be tried.

A small configuration is the default one with every size cut by its name; what the names do not tell is in tables.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCAB = 13
WIDTH = 16
HEADS = 2
HEAD_WIDTH = WIDTH // HEADS

_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_INDEXER = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 2048,
    "indexer_compress_ratio": 4, "num_hidden_layers": 4,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 48},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
}
"""By model type, the arguments without which the default configuration cannot be built."""

ENCODERS = {
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
"""Model types that are causal with `is_decoder: true` alone; the small models have it."""

_SHARED = {
    "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * HEAD_WIDTH,
}  # fmt: skip
"""Two blocks that share their weights."""

SMALL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_expert_group": 2},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1},
    "codegen": {"n_head": 4, "n_embd": 32, "rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1},
    "dots3_note_text": {"head_dim": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "llama4_text": {"moe_layers": [1]},
    "longcat_flash": {"qk_rope_head_dim": 4, "head_dim": 4, "qk_head_dim": 12, "zero_expert_num": 2},
    "mamba2": {"num_heads": 4, "head_dim": 8, "n_groups": 1},
    "mpt": {"attn_config": {"alibi": True}},
    "reformer": {
        "attention_head_size": 8, "axial_pos_embds": False, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4,
        "num_buckets": 2, "feed_forward_size": 12, "attn_layers": ["local", "lsh"], "hash_seed": 0,
    },
    "xlm": {"causal": True},
    "xlnet": {"d_head": 8},
    "xlstm": {"num_blocks": 2, "ffn_round_up_to_multiple_of": 4},
    "zamba": _SHARED | {"use_mamba_kernels": False},
    "zamba2": _SHARED | {"mamba_headdim": 4, "hybrid_layer_ids": [1, 3], "use_mamba_kernels": False},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""By model type, sizes of the small model that their names do not tell."""

KEYS = r"num_key_value_heads|num_kv_heads|kv_heads"
"""Names of the number of heads that keys have; where it is that of the queries, it stays so."""

SIZES: list[tuple[str, Any]] = [
    (r"vocab_size|text_vocab_size|vocab_size_per_layer_input", VOCAB),
    (r"pad_token_id", 0),
    (r".*bos_token_id|decoder_start_token_id", 1),
    (r".*eos_token_id|sep_token_id", 2),
    (r"num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers", 2),
    (r"hidden_size|d_model|n_embd|dim_model|embedding_size|emb_dim|embedding_dim|hidden_size_global|lru_width", WIDTH),
    (r"word_embed_proj_dim|attention_hidden_size|adapter_(in|out|input)_(dim|size)", WIDTH),
    (r"(num|n)_(attention_)?heads?|(en|de)coder_attention_heads|num_(en|de)coder_attention_heads", HEADS),
    (KEYS, 1),
    (r"head_dim|global_head_dim|.*_head_dim|kv_channels|d_kv|dim_head|v_head_dim|rotary_dim", HEAD_WIDTH),
    (r".*intermediate_size.*|n_inner|d_ff|d_inner|dim_ff|ffn_dim|.*_ffn_dim|ffn_hidden_size|.*_ffn_hidden_size", 12),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts", 4),
    (r"num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_k_experts|moe_top_k", 2),
    (r"n_group|topk_group", 1),
    (r"(q|kv|o)_lora_rank|.*_rank", 6),
    (r"max_position_embeddings|n_positions|max_seq_len|n_ctx|max_target_positions|max_source_positions", 64),
    (r"sliding_window|attention_window_size|window_size|local_attention|attention_chunk_size", 4),
    (r"state_size|ssm_state_size|mamba_d_state|mamba_state_dim", 4),
    (r"chunk_size|mamba_chunk_size|chunk_length", 4),
    (r".*dropout.*|.*pdrop.*|.*_drop|layerdrop", 0),
]
"""Patterns of a configuration's names, and the values of a small model; the first that matches counts."""


def causal_classes() -> list[tuple[type, type]]:
    """Configuration and model class of each model type, by name."""
    found = []
    for config, model in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        found.append((config, model[0] if isinstance(model, tuple) else model))
    return sorted(set(found), key=lambda pair: pair[0].model_type)


def default_config(config: type) -> Any:
    """The default configuration, or as near to it as transformers makes a model of."""
    return config(**DEFAULTS.get(config.model_type, {}))


def without_weights(config: Any) -> nn.Module:
    """The model of a configuration, without weights."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def small_config(config: type) -> Any:
    """The default configuration with every size cut."""
    return config(**_cut(default_config(config).to_dict()))


def small_model(config: type, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """A small model with random weights, biases and norms included, so that nothing is zero by luck."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(small_config(config))
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(centre + 0.4 * torch.randn_like(parameter))
    return model.to(dtype).eval()


LAYERS = r"num_hidden_layers|n_layers?|num_layers|decoder_layers"
"""Names of the number of layers."""


def _cut(sizes: dict[str, Any]) -> dict[str, Any]:
    """Each size by its name; nested configurations too; a layer of every kind that there is."""
    found = {
        name: _cut(value) if name.endswith("_config") and isinstance(value, dict) else _size(name, value, sizes)
        for name, value in sizes.items()
        if name not in ("transformers_version", "architectures", "dtype")
    }
    if sizes.get("model_type") in ENCODERS:
        found["is_decoder"] = True
    depth = next((n for n in sizes if re.fullmatch(LAYERS, n) and isinstance(sizes[n], int)), None)
    if depth is None:
        return found | SMALL.get(str(sizes.get("model_type")), {})
    by_layer = {n: v for n, v in sizes.items() if isinstance(v, list | tuple) and len(v) == sizes[depth] > 1}
    by_layer.pop("moe_layers", None)  # numbers of layers
    own = {int(layer): values for layer, values in (sizes.get("per_layer_config") or {}).items()}
    kinds = [(*(v[i] for v in by_layer.values()), own.get(i)) for i in range(sizes[depth])]
    kept = [i for i, kind in enumerate(kinds) if kinds.index(kind) == i]
    kept = kept if len(kept) > 1 else [0, 1]
    found[depth] = len(kept)
    for name, values in by_layer.items():
        found[name] = [_size(name, values[i], sizes) for i in kept]
    if own:
        found["per_layer_config"] = {new: _cut(own[old]) for new, old in enumerate(kept) if old in own}
    return found | SMALL.get(str(sizes.get("model_type")), {})


def _size(name: str, value: Any, sizes: dict[str, Any]) -> Any:
    if re.fullmatch(KEYS, name) and value in (sizes.get("num_attention_heads"), sizes.get("n_head")):
        return HEADS
    for pattern, small in SIZES:
        if re.fullmatch(pattern, name) and value is not None and not isinstance(value, list | dict | bool):
            return type(value)(small) if small == 0 else small
    return value
