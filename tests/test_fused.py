"""Blocks of maps that hold queries, keys and values in one matrix, against each model's own attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import transformers

from msif_core.config import CurvatureSettings
from msif_core.models import freeze
from msif_core.tracking import FUSED, tracked_maps
from tests.conftest import VOCAB

HEADS, WIDTH = 4, 16
SMALL = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": HEADS}
GPT = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 1, "n_head": HEADS, "n_positions": 32}


def falcon(**kind: Any) -> Any:
    return transformers.FalconConfig(**SMALL, **kind)


LAYOUTS: dict[str, tuple[Callable[[], Any], str, str, int]] = {
    "gpt_neox": (
        lambda: transformers.GPTNeoXConfig(**SMALL, intermediate_size=12), "query_key_value", "dense", HEADS
    ),
    "bloom": (
        lambda: transformers.BloomConfig(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=1, n_head=HEADS),
        "query_key_value", "dense", HEADS,
    ),
    "gpt2": (lambda: transformers.GPT2Config(**GPT), "c_attn", "c_proj", HEADS),
    "mpt": (
        lambda: transformers.MptConfig(vocab_size=VOCAB, d_model=WIDTH, n_layers=1, n_heads=HEADS), "Wqkv", "out_proj",
        HEADS,
    ),
    "codegen": (lambda: transformers.CodeGenConfig(**GPT, rotary_dim=2), "qkv_proj", "out_proj", HEADS),
    "phi3": (
        lambda: transformers.Phi3Config(**SMALL, intermediate_size=12, num_key_value_heads=2, pad_token_id=0),
        "qkv_proj", "o_proj", 2,
    ),
    "gpt_bigcode, one key": (lambda: transformers.GPTBigCodeConfig(**GPT, multi_query=True), "c_attn", "c_proj", 1),
    "gpt_bigcode": (lambda: transformers.GPTBigCodeConfig(**GPT, multi_query=False), "c_attn", "c_proj", HEADS),
    "falcon, one key": (
        lambda: falcon(multi_query=True, new_decoder_architecture=False), "query_key_value", "dense", 1
    ),
    "falcon with alibi": (
        lambda: falcon(multi_query=False, alibi=True, new_decoder_architecture=False), "query_key_value", "dense", HEADS
    ),
    "falcon, new": (
        lambda: falcon(new_decoder_architecture=True, num_kv_heads=2), "query_key_value", "dense", 2
    ),
}  # fmt: skip
"""Configuration, names of the fused map and of the map after the attention, and heads of the keys."""

Kind = Literal["query", "key", "value"]


def context(model: Any, fused: str, after: str, row: int = 0, token: int = 0, by: float = 0.0) -> torch.Tensor:
    """What the attention's heads give [tokens, heads, width], with one output row of the fused map moved at a token."""
    seen: list[torch.Tensor] = []

    def move(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        moved = output.clone()
        moved[0, token, row] += by
        return moved

    hooks = [
        model.get_submodule(fused).register_forward_hook(move),
        model.get_submodule(after).register_forward_pre_hook(lambda _module, args: seen.append(args[0])),
    ]
    model(input_ids=torch.tensor([[3, 5, 2, 7, 11, 4]]))
    for hook in hooks:
        hook.remove()
    return seen[0].detach().reshape(6, HEADS, -1)


def role(model: Any, fused: str, after: str, row: int) -> tuple[Kind, frozenset[int]]:
    """What an output row of the fused map is, and the heads that it belongs to.

    The first token attends to itself alone: moved there, a query has no effect, a key moves the later tokens' contexts,
    and a value that of the first one too.
    """
    still = context(model, fused, after)
    first, second = (
        (context(model, fused, after, row, token, 1.0) - still).abs().amax(dim=-1) > 1e-9 for token in (0, 1)
    )
    kind: Kind = "value" if first[0].any() else "key" if first.any() else "query"
    return kind, frozenset(second.any(dim=0).nonzero().flatten().tolist())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_are_those_of_the_models_own_attention(layout: str) -> None:
    config, fused, after, keys = LAYOUTS[layout]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    model = freeze(model.double())
    (name,) = [n for n, _ in model.named_modules() if n.endswith(f".{fused}")]
    height = model.get_submodule(name).weight.numel() // WIDTH
    rows = [role(model, name, f"{name.rpartition('.')[0]}.{after}", row) for row in range(height)]
    assert [kind for kind, _ in rows].count("value") == keys * WIDTH // HEADS

    def blocks(split: Any) -> list[set[tuple[Kind, frozenset[int]]]]:
        (m,) = [m for m in tracked_maps(model, CurvatureSettings(qkv_split=split)) if m.name == name]
        return [{rows[i] for i in block} for block in m.blocks(torch.arange(m.d_out)).tolist()]

    assert blocks("none") == [set(rows)]
    projections = blocks("projection")
    assert all(len({kind for kind, _ in block}) == 1 for block in projections)
    kinds = sorted(next(iter(block))[0] for block in projections)
    assert kinds == ["key", *["query"] * (HEADS // keys), "value"]
    heads = blocks("head")
    assert all(len(block) == 1 for block in heads)
    found = [next(iter(block)) for block in heads]
    assert sorted((h for kind, h in found if kind == "query"), key=min) == [{head} for head in range(HEADS)]
    sharing = [set(range(first, first + HEADS // keys)) for first in range(0, HEADS, HEADS // keys)]
    for kind in ("key", "value"):
        assert sorted((h for k, h in found if k == kind), key=min) == sharing


def test_every_known_layout_is_tried() -> None:
    assert {layout.partition(",")[0].partition(" ")[0] for layout in LAYOUTS} == {name for name, _ in FUSED}
