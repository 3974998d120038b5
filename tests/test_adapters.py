"""PEFT adapters: refused by name, or merged on request."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from msif_core.config import Config, CurvatureSettings, Stage
from msif_core.errors import InputError
from msif_core.models import load_model, model_fingerprint
from msif_core.pipeline import Pipeline
from msif_core.tracking import tracked_maps
from tests.conftest import make_model

RANK, ALPHA = 2, 6
MAP = "gpt_neox.layers.1.mlp.dense_h_to_4h"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_model("gpt_neox", dtype=torch.float32).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path) -> Path:
    """A LoRA adapter of one map, written by hand in PEFT's format."""
    folder = base.parent / "adapter"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(RANK, 8, generator=generator), torch.randn(12, RANK, generator=generator)
    prefix = f"base_model.model.{MAP}"
    save_file({f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": RANK,
        "lora_alpha": ALPHA, "target_modules": [MAP], "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_an_adapter_is_refused_with_what_to_do(adapter: Path, base: Path) -> None:
    with pytest.raises(InputError) as error:
        load_model(str(adapter))
    assert str(error.value) == (
        f"{adapter}: a PEFT adapter of {base}, not a whole model; set `adapter: merge` on its stage, or merge it "
        "yourself (merge_and_unload) and name the saved folder"
    )
    assert Stage(name="s", model="m", documents="d").adapter == "refuse"


@pytest.mark.parametrize("damaged", ["base/model.safetensors", "adapter/adapter_model.safetensors"])
def test_damaged_weights_are_named(adapter: Path, damaged: str) -> None:
    file = adapter.parent / damaged
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(InputError, match=rf"{file.parent}: its weights are damaged \(.*\); copy or save them again"):
        load_model(str(file.parent), adapter="merge")


def test_a_pickled_adapter_is_refused(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors; save it in that format"):
        load_model(str(adapter), adapter="merge")


def test_without_peft_a_merge_says_what_to_install(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="peft is needed: pip install peft"):
        load_model(str(adapter), adapter="merge")


def test_a_merged_adapter_adds_its_product_to_the_base(adapter: Path, base: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{MAP}.lora_{x}.weight"] for x in "AB")
    merged, plain = load_model(str(adapter), adapter="merge"), load_model(str(base))
    assert set(dict(merged.named_modules())) == set(dict(plain.named_modules()))
    for name, weight in plain.named_parameters():
        expected = weight + ALPHA / RANK * B @ A if name == f"{MAP}.weight" else weight
        torch.testing.assert_close(merged.get_parameter(name), expected)


def test_the_structure_is_that_of_the_base_model(adapter: Path, base: Path, tmp_path: Path) -> None:
    def pipeline(**stage: str) -> Pipeline:
        stages = [{"name": "s", "documents": "d", **stage}]
        return Pipeline(Config.model_validate({"workspace": tmp_path, "stages": stages}))

    merged, whole = pipeline(model=str(adapter), adapter="merge"), pipeline(model=str(base))
    assert merged.max_length("s") == whole.max_length("s") == 32
    assert merged.maps("s") == whole.maps("s") == tracked_maps(merged.model("s"), CurvatureSettings())
    with pytest.raises(InputError, match=r"a PEFT adapter of .*, not a whole model"):
        pipeline(model=str(adapter)).max_length("s")


def test_the_fingerprint_is_that_of_adapter_and_base(adapter: Path, base: Path) -> None:
    whole, seen = model_fingerprint(str(base)), set()
    seen.add(model_fingerprint(str(adapter)))
    (base / "config.json").write_text((base / "config.json").read_text() + "\n")
    assert model_fingerprint(str(base)) != whole, "though it was read in this process before"
    seen.add(model_fingerprint(str(adapter)))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 1}))
    seen.add(model_fingerprint(str(adapter)))
    assert len(seen) == 3
