"""Measurements, and the query's side of a score, against autograd's gradients and explicit matrices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from msif_core import scoring
from msif_core.chain import Chain, FilteredStage
from msif_core.config import CurvatureSettings
from msif_core.curvature.filters import Damped
from msif_core.tracking import tracked_maps
from tests.conftest import make_model, make_sequences, task_of
from tests.oracle import dense
from tests.oracle.test_chain import dense_scores, fit_factors

MEASUREMENTS = [{0: 1.0}, {1: 1.0, 2: -1.0}, {0: 0.5, 1: 0.5, 2: -0.5}]
"""A query, a contrast, and the set of both."""


def test_scores_of_measurements_are_those_of_the_differences(architecture: str, tmp_path: Path) -> None:
    """Contrast and set through two stages, against dense solves of the combined gradients."""
    task = task_of(architecture)
    built = [make_model(architecture, seed) for seed in range(2)]
    maps = tracked_maps(built[0], CurvatureSettings())
    stages = []
    for k, model in enumerate(built):
        (tmp_path / str(k)).mkdir()
        stages.append((model, fit_factors(model, maps, tmp_path / str(k), task, k), 0.1 * (k + 1)))
    chain = Chain(tuple(FilteredStage(f, Damped(c)) for _, f, c in stages))
    asked, documents = make_sequences(3, 100, task), make_sequences(4, 200, task)
    factors = stages[1][1]
    rotated = scoring.query_gradients(built[1], maps, asked, 20, task=task, measurements=MEASUREMENTS, factors=factors)
    filtered = chain.filter_all(rotated, rotated=True)
    scores = scoring.score_sequences(built[0], maps, filtered, documents, 16, task=task)

    pairs = [zip(s.input_ids, s.labels, strict=True) for s in (asked, documents)]
    own = [dense.gradients(built[1], maps, *pair, task) for pair in pairs[0]]
    combined = [{n: sum(w * own[row][n] for row, w in terms.items()) for n in own[0]} for terms in MEASUREMENTS]
    theirs = [dense.gradients(built[0], maps, *pair, task) for pair in pairs[1]]
    np.testing.assert_allclose(scores, dense_scores(combined, theirs, maps, stages, 0), rtol=1e-4, atol=1e-4)

    # The query's side: the same score, split over the tokens of the query's sequences.
    bottom = stages[0][1]
    gradients = scoring.query_gradients(built[0], maps, documents, 1000, task=task, factors=bottom)
    back = {n: V for n, v in gradients.items() if (V := chain.filter_back(n, v, rotated=True)) is not None}
    parts = scoring.query_contributions(built[1], maps, back, asked, 20, task=task)
    assert [part.shape for part in parts] == [(4, len(ids)) for ids in asked.input_ids]
    totals = [sum(w * parts[row].sum(axis=1) for row, w in terms.items()) for terms in MEASUREMENTS]
    np.testing.assert_allclose(totals, scores, rtol=1e-4, atol=1e-4)


def test_a_tokens_part_is_its_own_outer_product(small_models: dict[str, torch.nn.Module]) -> None:
    """With the curvature left out, the part of position t is <d_t a_t^T, V>: perturbing one map's weight along V
    at position t alone changes the loss by it."""
    model = small_models["gpt_neox"]
    (m,) = tracked_maps(model, CurvatureSettings(include="layers.1.mlp.dense_h_to_4h"))
    one = make_sequences(1, lengths=(6, 7))
    V = torch.randn(1, *m.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (part,) = scoring.query_contributions(model, [m], {m.name: V}, one, 100, task="causal_lm")
    step = 1e-6
    for position in range(len(one.input_ids[0])):

        def hook(_module: object, args: tuple[torch.Tensor], output: torch.Tensor, at: int = position) -> torch.Tensor:
            a = torch.cat([args[0], torch.ones_like(args[0][..., :1])], dim=-1)
            moved = output.clone()
            moved[:, at] += step * (a[:, at] @ V[0, 0].mT)
            return moved

        before = dense.sequence_loss(model, one.input_ids[0], one.labels[0], "causal_lm")
        handle = model.get_submodule(m.name).register_forward_hook(hook)
        after = dense.sequence_loss(model, one.input_ids[0], one.labels[0], "causal_lm")
        handle.remove()
        assert float(part[0, position]) == pytest.approx(float(after - before) / step, rel=1e-3, abs=1e-5)
