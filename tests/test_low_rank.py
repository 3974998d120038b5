"""Queries of low rank, against the whole filtered gradient and numpy's singular values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msif_core import low_rank, scoring, storage
from msif_core.config import Config, CurvatureSettings
from msif_core.pipeline import Pipeline
from msif_core.tracking import tracked_maps
from tests.conftest import make_sequences, task_of
from tests.tiny_project import write_project

BATCH = 64


def queries_of(model: Any, maps: Any, task: str, smooth: float = 0.0) -> dict[str, torch.Tensor]:
    """Gradients with a full spectrum that falls off, as filtered ones have."""
    generator = torch.Generator().manual_seed(0)
    found = scoring.query_gradients(model, maps, make_sequences(3, 2, task), BATCH, task=task)
    return {
        n: v + smooth * v.std() * torch.randn(v.shape, generator=generator, dtype=v.dtype) for n, v in found.items()
    }


@pytest.mark.parametrize("split", ["none", "head"])
def test_full_rank_is_exact(small_models: dict[str, Any], architecture: str, split: str) -> None:
    model, task = small_models[architecture], task_of(architecture)
    maps = tracked_maps(model, CurvatureSettings(qkv_split=split))  # type: ignore[arg-type]
    documents, V = make_sequences(6, 1, task), queries_of(model, maps, task, smooth=0.5)
    whole = scoring.score_sequences(model, maps, dict(V), documents, BATCH, task=task)
    cut = {name: low_rank.cut(v, 1000) for name, v in V.items()}
    found = low_rank.score_low_rank(model, maps, cut, documents, BATCH, task=task)
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-5 * np.abs(whole).max())
    assert (low_rank.relative_error(cut) < 1e-3).all()


def test_a_cut_scores_as_the_matrix_that_it_is_and_says_what_it_lost(small_models: dict[str, Any]) -> None:
    model = small_models["gpt_neox"]
    maps = tracked_maps(model, CurvatureSettings())
    documents, V = make_sequences(6, 1, "causal_lm"), queries_of(model, maps, "causal_lm", smooth=0.5)
    cut = {name: low_rank.cut(v, 3) for name, v in V.items()}
    product = {name: c.U @ c.W for name, c in cut.items()}
    expected = scoring.score_sequences(model, maps, dict(product), documents, BATCH, task="causal_lm")
    found = low_rank.score_low_rank(model, maps, cut, documents, BATCH, task="causal_lm")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())

    best, squares = np.zeros(3), np.zeros(3)
    for v in V.values():
        singular = np.linalg.svd(v.double().numpy(), compute_uv=False)  # [Q, G, min(b, d_in)]
        best += (singular[..., 3:] ** 2).sum(axis=(1, 2))
        squares += (singular**2).sum(axis=(1, 2))
    error = low_rank.relative_error(cut)
    true = np.sqrt(sum((v - product[n]).double().square().sum(dim=(1, 2, 3)).numpy() for n, v in V.items()) / squares)
    np.testing.assert_allclose(error, true, rtol=1e-3)
    assert (error < 1.02 * np.sqrt(best / squares)).all(), "nearly the best of that rank"
    assert (error > 0.1).all(), "this cut does lose something"


def test_a_cut_is_the_same_every_time_and_leaves_the_generator_alone() -> None:
    V = torch.randn(2, 1, 20, 30)
    state = torch.random.get_rng_state()
    one, two = low_rank.cut(V, 4), low_rank.cut(V, 4)
    assert torch.equal(one.U, two.U)
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_query_without_a_gradient_loses_nothing() -> None:
    V = torch.randn(2, 1, 20, 30)
    V[0] = 0
    error = low_rank.relative_error({"map": low_rank.cut(V, 4)})
    assert error[0] == 0
    assert error[1] > 0


def test_recall_measured_by_cut_queries(tmp_path: Path) -> None:
    """Full rank gives the exact scores again, a low one says what it lost."""
    config = Config.load(write_project(tmp_path))
    whole = Pipeline(config)
    whole.run()
    exact = np.load(whole.exact_shard(0))
    cut, coarse = (Pipeline(config.model_copy(update={"index": config.index.model_copy(update={"recall_rank": rank})}))
                   for rank in (1000, 1))  # fmt: skip
    np.testing.assert_allclose(np.load(cut.exact_shard(0)), exact, rtol=1e-3, atol=1e-4 * np.abs(exact).max())
    assert coarse.exact_shard(0) != whole.exact_shard(0)
    found = storage.read_json(coarse.publish_generation() / "manifest.json")["recall"]["cut"]
    assert found["rank"] == 1
    assert 0.05 < found["relative_error"] < 1
