"""The share of a model that is tracked, and the rest of it by its reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from benchmarks import small_models
from msif_core.config import CurvatureSettings
from msif_core.coverage import Coverage, coverage_of
from msif_core.module_calls import module_calls
from msif_core.tracking import tracked_maps
from tests.conftest import VOCAB, make_model

EXPERTS = transformers.MixtralConfig(
    vocab_size=VOCAB, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    intermediate_size=12, num_local_experts=4, num_experts_per_tok=2,
)  # fmt: skip


def covered(model: Any, **settings: Any) -> Coverage:
    return coverage_of(model, tracked_maps(model, CurvatureSettings(**settings)))


def without_weights(config: Any) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def reasons(coverage: Coverage) -> dict[str, str]:
    return {u.name: u.reason for u in coverage.untracked}


def test_all_but_norms_of_a_small_model() -> None:
    model = make_model("gpt_neox")
    coverage = covered(model)
    inside = {n: p.numel() for n, p in model.named_parameters() if "layers" in n or "norm" in n}
    assert coverage.parameters == sum(inside.values())
    assert coverage.tracked == sum(count for n, count in inside.items() if "norm" not in n)
    assert {u.reason for u in coverage.untracked} == {"norm, scale or bias"}
    assert sum(u.parameters for u in coverage.untracked) == coverage.parameters - coverage.tracked
    assert reasons(coverage)["gpt_neox.layers.*.input_layernorm.weight"] == "norm, scale or bias"


def test_a_tracked_head_is_not_counted() -> None:
    model = make_model("gpt_neox")
    assert covered(model, track_unembedding=True) == covered(model)


@pytest.mark.parametrize("include", [r"experts\.", r"experts\..*\.[01]$", "attn"])
def test_what_the_settings_leave_out(include: str) -> None:
    model = without_weights(EXPERTS)
    whole, part = covered(model), covered(model, include=include)
    maps = tracked_maps(model, CurvatureSettings(include=include))
    assert part.parameters == whole.parameters
    assert part.tracked == sum(m.size for m in maps) < whole.tracked
    left = {name for name, reason in reasons(part).items() if reason == "left out by curvature.include"}
    attention = {f"model.layers.*.self_attn.{x}_proj.weight" for x in "qkvo"}
    experts = {f"model.layers.*.mlp.experts.{x}" for x in ("gate_up_proj", "down_proj")}
    assert left == {r"experts\.": attention, "attn": experts}.get(include, attention | experts)


def test_without_weights_as_with_them() -> None:
    model = transformers.AutoModelForCausalLM.from_config(EXPERTS)
    assert covered(without_weights(EXPERTS)) == covered(model)


def test_what_no_text_reaches_is_no_part_of_the_share() -> None:
    """BART's decoder has attention to an encoder, which a text alone does not bring."""
    config = transformers.BartConfig(
        vocab_size=VOCAB, d_model=8, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=12
    )
    coverage = covered(without_weights(config))
    assert reasons(coverage)["model.decoder.layers.*.encoder_attn.k_proj.weight"] == "no text reaches it"
    assert coverage.share > 0.8
    assert not any("encoder_attn" in m.name for m in tracked_maps(without_weights(config), CurvatureSettings()))


def test_matrices_outside_linear_modules_and_convolutions() -> None:
    config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1, state_size=4)
    found = reasons(covered(without_weights(config)))
    assert found["backbone.layers.*.mixer.dt_proj.weight"] == "a matrix that no linear module applies"
    assert found["backbone.layers.*.mixer.conv1d.weight"] == "convolution"


def test_layouts_are_known_without_weights() -> None:
    """Most models ask for the values of their attention mask, which a model without weights does not have."""
    config = transformers.OPTConfig(
        vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1, ffn_dim=12, num_attention_heads=2, word_embed_proj_dim=8
    )
    calls = module_calls(without_weights(config))
    weighed = module_calls(transformers.AutoModelForCausalLM.from_config(config).eval())
    assert calls is not None
    assert weighed is not None
    assert {n: c.layout for n, c in calls.items()} == {n: c.layout for n, c in weighed.items()}
    assert calls["model.decoder.layers.0.self_attn.q_proj"].layout == ("N", "T")
    assert calls["model.decoder.layers.0.fc1"].layout == ("NT",)


@pytest.mark.parametrize("name", ["gemma3n_text", "jetmoe", "qwen4_exp_text"])
def test_maps_without_weights_are_those_with_them(name: str) -> None:
    """Code that training alone runs, that cuts rows by counts, and that asks which values are not zero."""
    config = transformers.CONFIG_MAPPING[name]
    structure = small_models.without_weights(small_models.small_config(config))
    model = small_models.small_model(config)
    assert tracked_maps(structure, CurvatureSettings()) == tracked_maps(model, CurvatureSettings())
    assert structure.training, "the run leaves the mode as it was"


def test_blocks_that_share_their_weights_are_one_map() -> None:
    """Zamba repeats its attention's block; each of its weights is tracked once, with all places that hold it."""
    config = transformers.ZambaConfig(
        vocab_size=VOCAB, hidden_size=8, num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid"] * 2,
        num_attention_heads=2, intermediate_size=12, mamba_d_state=4, mamba_dt_rank=2, n_mamba_heads=2,
    )  # fmt: skip
    model = without_weights(config)
    maps = {m.name: m for m in tracked_maps(model, CurvatureSettings())}
    shared = maps["model.layers.1.shared_transf.self_attn.q_proj"]
    assert shared.also == ("model.layers.3.shared_transf.self_attn.q_proj",)
    assert shared.also[0] not in maps
    assert 0.5 < covered(model).share < 1
