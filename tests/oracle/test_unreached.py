"""Maps that the fit's sample hardly reaches, or not at all: their filters and scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from msif_core import scoring
from msif_core.chain import Chain, FilteredStage
from msif_core.config import CurvatureSettings
from msif_core.curvature.filters import Damped
from msif_core.curvature.steps import reached_means
from msif_core.tracking import Expert, TrackedMap, tracked_maps
from tests.conftest import make_model, make_sequences
from tests.oracle.test_chain import autograd, dense_scores, fit_factors


def expert(number: int) -> TrackedMap:
    return TrackedMap(f"e.{number}", 2, 2, False, 1, 1, f"e.{number}", expert=Expert("e", "w", number))


def test_an_unreached_expert_has_the_damping_of_those_beside_it() -> None:
    maps = [expert(0), expert(1), expert(2), TrackedMap("other", 2, 2, False, 1, 1, "other")]
    means = {name: torch.tensor([value]) for name, value in {"e.0": 2.0, "e.1": 0.0, "e.2": 4.0, "other": 0.0}.items()}
    found, unreached = reached_means(maps, means)
    assert {name: float(mean) for name, mean in found.items()} == {"e.0": 2, "e.1": 3, "e.2": 4, "other": 0}
    assert unreached == ["e.1", "other"]
    nothing = torch.zeros(1, 2, 2)
    assert torch.equal(Damped(0.1).attributed(nothing, found["e.1"][:, None, None]), torch.full((1, 2, 2), 1 / 0.3))
    assert torch.equal(Damped(0.1).passing(nothing, found["e.1"][:, None, None]), torch.ones(1, 2, 2))


def test_documents_that_reach_an_unreached_expert_are_scored_as_dense_matrices_say(tmp_path: Path) -> None:
    model = make_model("mixtral")
    maps = tracked_maps(model, CurvatureSettings())
    factors = fit_factors(model, maps, tmp_path, "causal_lm", seed=0, count=1)
    aside = [m for m in maps if m.name in factors.unreached]
    assert aside
    assert all(m.expert for m in aside)
    documents, queries = make_sequences(6, 200), make_sequences(2, 100)
    reached = scoring.query_gradients(model, aside, documents, 64, task="causal_lm")
    assert any(G.abs().max() > 0 for G in reached.values())

    chain = Chain((FilteredStage(factors, Damped(0.1)),))
    filtered = chain.filter_all(scoring.query_gradients(model, maps, queries, 64, task="causal_lm"))
    scores = scoring.score_sequences(model, maps, filtered, documents, 64, task="causal_lm")
    G = autograd(model, maps, queries, "causal_lm"), autograd(model, maps, documents, "causal_lm")
    np.testing.assert_allclose(scores, dense_scores(*G, maps, [(model, factors, 0.1)], 0), rtol=1e-4)


def test_a_map_that_documents_reach_by_rounding_alone_has_no_say(tmp_path: Path) -> None:
    """Relative damping of eigenvalues of 1e-24 would make scores of 1e12 and more of it."""
    hardly, well = (make_model("gpt_neox", dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        hardly.gpt_neox.layers[1].mlp.dense_4h_to_h.weight.mul_(1e-12)
    maps = tracked_maps(hardly, CurvatureSettings())
    factors = fit_factors(hardly, maps, tmp_path, "causal_lm", seed=0)
    assert factors.unreached == ["gpt_neox.layers.1.mlp.dense_h_to_4h"]
    assert 0 < float(factors[factors.unreached[0]].eigenvalues.mean()) < 1e-20

    chain = Chain((FilteredStage(factors, Damped(0.1)), FilteredStage(factors, Damped(0.1))))
    documents, queries = make_sequences(6, 200), make_sequences(2, 100)
    gradients = scoring.query_gradients(well, maps, queries, 64, task="causal_lm")
    kept = {name: V for name, V in gradients.items() if name not in factors.unreached}
    scores = [
        scoring.score_sequences(hardly, maps, chain.filter_all(found), documents, 64, task="causal_lm")
        for found in (gradients, kept)
    ]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5)
