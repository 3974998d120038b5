"""Which maps of a model are tracked and which refused; checkpoints that are read, kept and read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from msif_core.checkpoint_cache import while_files_stay
from msif_core.config import CurvatureSettings
from msif_core.errors import InputError
from msif_core.models import load_model, model_fingerprint
from msif_core.tracking import tracked_maps
from tests.conftest import make_model


def test_a_tracked_tied_head_is_refused() -> None:
    model = make_model("gpt2")
    assert not any("lm_head" in m.name for m in tracked_maps(model, CurvatureSettings()))
    with pytest.raises(InputError, match="lm_head: tied to the embedding"):
        tracked_maps(model, CurvatureSettings(track_unembedding=True))


def test_an_untied_head_is_tracked_on_request() -> None:
    model = make_model("gpt_neox")
    extra = {m.name for m in tracked_maps(model, CurvatureSettings(track_unembedding=True))}
    extra -= {m.name for m in tracked_maps(model, CurvatureSettings())}
    assert len(extra) == 1
    assert model.get_submodule(extra.pop()) is model.get_output_embeddings()


@pytest.mark.parametrize("split", ["projection", "head"])
def test_a_fused_map_in_an_unknown_order_is_one_block(split: Any) -> None:
    model = make_model("gpt_neox")
    model.config.model_type = "unheard_of"
    fused = [m for m in tracked_maps(model, CurvatureSettings(qkv_split=split)) if "query_key_value" in m.name]
    assert [(m.groups, m.heads) for m in fused] == [(1, 1), (1, 1)]


def test_nothing_to_track_lists_the_maps() -> None:
    with pytest.raises(InputError, match=r"matches none of the linear maps: \['gpt_neox"):
        tracked_maps(make_model("gpt_neox"), CurvatureSettings(include="transformer"))


def test_a_checkpoint_without_a_head_is_refused(tmp_path: Path) -> None:
    make_model("gpt2", dtype=torch.float32).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).training is False
    with pytest.raises(InputError, match=r"no weights for \['score.weight'\]"):
        load_model(str(tmp_path), task="classification")


def test_a_model_trained_again_into_its_folder_is_read_again(tmp_path: Path) -> None:
    loaded, fingerprints = [], []
    for seed in (0, 1):
        model = make_model("gpt2", seed, dtype=torch.float32)
        model.save_pretrained(tmp_path)
        loaded.append(load_model(str(tmp_path)))
        fingerprints.append(model_fingerprint(str(tmp_path)))
        assert load_model(str(tmp_path)) is loaded[-1]
        assert model_fingerprint(str(tmp_path)) is fingerprints[-1]
        for name, weight in model.named_parameters():
            torch.testing.assert_close(loaded[-1].get_parameter(name), weight)
    assert len(set(fingerprints)) == 2


def test_as_many_models_are_kept_as_asked_for() -> None:
    read: list[str] = []
    keep = while_files_stay(2)(lambda source: read.append(source) or source)
    for name in ("a", "b", "a", "c", "b", "c", "a"):
        assert keep(name) == name
    assert read == ["a", "b", "c", "a"]
