"""Small models of every kind of class: captured gradients are autograd's; and, as a drill, of every class."""

from __future__ import annotations

import pytest
import transformers

from benchmarks.architectures import NOT_ALONE, NOT_CAUSAL, NOT_TRIED, cover, try_small
from benchmarks.small_models import causal_classes

FAMILIES = [
    "llama", "gemma2", "gemma3n_text", "gemma4_text", "phi3", "gptj", "falcon", "mpt", "codegen", "gpt_bigcode",
    "qwen2_moe", "gpt_oss", "deepseek_v3", "llama4_text", "dbrx", "jetmoe", "longcat_flash", "mamba", "mamba2", "jamba",
    "zamba2", "recurrent_gemma", "rwkv", "hrm_text",
]  # fmt: skip

MISSED = {
    "falcon_mamba": {"dt_proj"},
    "jamba": {"dt_proj"},
    "longcat_flash": {"classifier"},
    "mamba": {"dt_proj"},
}
"""Linear modules whose weights the model's own code multiplies with, without a call of the module."""


@pytest.mark.parametrize("name", FAMILIES)
def test_captured_gradients_are_autograds(name: str) -> None:
    check(name)


@pytest.mark.drill
@pytest.mark.parametrize("name", [config.model_type for config, _ in causal_classes()])  # type: ignore[attr-defined]
def test_every_class_is_covered_and_exact(name: str) -> None:
    if name in NOT_ALONE:
        pytest.skip(NOT_ALONE[name])
    coverage, maps = cover(transformers.CONFIG_MAPPING[name])
    assert maps
    assert coverage.share >= 0.9 or name in NOT_CAUSAL
    if name not in NOT_TRIED:
        check(name)


def check(name: str) -> None:
    tried = try_small(transformers.CONFIG_MAPPING[name])
    assert tried.comparison.maps
    assert tried.causal is (name not in NOT_CAUSAL)
    assert tried.exact or not tried.causal
    assert {place.rpartition(".")[2] for place in tried.comparison.missing} == MISSED.get(name, set())
