"""Exact scores: both contractions, every batch, linearity; what cannot be scored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from msif_core import scoring
from msif_core.config import CurvatureSettings
from msif_core.curvature import fit
from msif_core.tracking import TrackedMap, tracked_maps
from tests.conftest import make_model, make_sequences, task_of


def random_queries(maps: list[TrackedMap], count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {m.name: torch.randn(count, *m.shape, dtype=torch.float64, generator=generator) for m in maps}


def test_one_query_and_several_give_the_same_scores(
    architecture: str, small_models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens contracted with the query, gradients formed and multiplied, in one chunk and in many."""
    model, task = small_models[architecture], task_of(architecture)
    maps = tracked_maps(model, CurvatureSettings(qkv_split="head"))
    V, sequences = random_queries(maps, 3), make_sequences(7, task=task)
    several = scoring.score_sequences(model, maps, dict(V), sequences, 1000, task=task)
    assert several.shape == (3, 7)
    assert several.dtype == np.float64
    gradients = scoring.query_gradients(model, maps, sequences, 1000, task=task)
    expected = sum(V[m.name].flatten(1) @ gradients[m.name].flatten(1).mT for m in maps)
    np.testing.assert_allclose(several, expected.float().numpy(), rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]
    for q in range(3):
        one = scoring.score_sequences(model, maps, {n: v[q : q + 1] for n, v in V.items()}, sequences, 20, task=task)
        np.testing.assert_allclose(one[0], several[q], rtol=1e-5, atol=1e-5)
    monkeypatch.setattr("msif_core.curvature.gradients.CHUNK_ENTRIES", 1)
    monkeypatch.setattr("msif_core.curvature.gradients.CPU_ROWS", 5)
    np.testing.assert_allclose(
        scoring.score_sequences(model, maps, dict(V), sequences, 1000, task=task), several, rtol=1e-5, atol=1e-5
    )


def test_losses_are_those_of_the_sequence_alone(architecture: str, small_models: dict[str, Any]) -> None:
    model, task = small_models[architecture], task_of(architecture)
    sequences = make_sequences(5, task=task)
    together = scoring.losses(model, sequences, 1000, task=task)
    alone = [scoring.losses(model, sequences.take([i]), 1000, task=task)[0] for i in range(5)]
    np.testing.assert_allclose(together, alone, rtol=1e-6)


def test_a_wide_head_has_a_block_diagonal_curvature(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("gpt_neox")
    model.resize_token_embeddings(30)
    settings = CurvatureSettings(track_unembedding=True)
    assert tracked_maps(model, settings)[-1].shape == (1, 30, 8)
    monkeypatch.setattr("msif_core.tracking.WIDEST_BLOCK", 12)
    head = tracked_maps(model, settings)[-1]
    assert (head.shape, head.pieces) == ((1, 30, 8), (3, 10))
    model.resize_token_embeddings(31)
    assert tracked_maps(model, settings)[-1].pieces == (31, 1)
    sums = fit.covariance_sums(
        model, tracked_maps(model, settings)[-1:], make_sequences(3), task="causal_lm", seed=0, batch_tokens=99
    )
    assert sums["S/lm_head"].shape == (31, 1, 1)


def test_block_size_keeps_the_diagonal_blocks_of_the_whole_curvature() -> None:
    """Of every map with wider blocks, a fused one's in its permuted order, and of no other."""
    model, sequences = make_model("gpt_neox"), make_sequences(4)
    whole, cut = (tracked_maps(model, CurvatureSettings(block_size=size)) for size in (None, 6))
    sums = [
        fit.covariance_sums(model, maps, sequences, task="causal_lm", seed=0, batch_tokens=99) for maps in (whole, cut)
    ]
    assert any(m.pieces[1] > 6 for m in whole)
    for before, after in zip(whole, cut, strict=True):
        assert after.pieces[1] <= 6
        assert after.shape == before.shape
        S, blocks = (found[f"S/{before.name}"] for found in sums)
        (count, width), each = after.pieces, after.cuts
        for g in range(count):
            rows = slice((g % each) * width, (g % each + 1) * width)
            torch.testing.assert_close(blocks[g], S[g // each, rows, rows])
        torch.testing.assert_close(sums[0][f"A/{before.input_group}"], sums[1][f"A/{before.input_group}"])


def test_block_size_of_a_head_replaces_its_own() -> None:
    model = make_model("gpt_neox")
    model.resize_token_embeddings(30)
    settings = CurvatureSettings(track_unembedding=True, block_size=15)
    assert tracked_maps(model, settings)[-1].pieces == (2, 15)
