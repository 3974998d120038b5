"""Filters, chain and score of every architecture against dense solves in float64."""

import numpy as np
import pytest
import torch

from msif_core import scoring, tracking
from msif_core.chain import Chain, FilteredStage
from msif_core.config import CurvatureSettings
from msif_core.curvature.factors import Factors
from msif_core.curvature.filters import Damped
from msif_core.curvature.steps import Fit
from tests.conftest import make_model, make_sequences, task_of, tolerance
from tests.oracle import dense


def fit_factors(model, maps, folder, task, seed, count=12):
    """Factors of a model on sequences of its own."""
    job = Fit(model, maps, folder, task, seed, batch_tokens=64, budget_gb=1.0)
    sequences = make_sequences(count, seed, task)
    job.covariances(0, sequences)
    job.eigenbases(0, 1, torch.device("cpu"))
    job.eigenvalues(0, sequences)
    job.finish(1)
    return Factors.open(folder)


def dense_scores(queries, documents, maps, stages, attributed, skip=None):
    """Scores [Q, N] from explicit matrices and autograd's gradients; `skip` leaves one stage's filter out."""
    total = torch.zeros(len(queries), len(documents), dtype=torch.float64)
    for m in maps:
        V = torch.stack([gradients[m.name] for gradients in queries])
        for k in range(len(stages) - 1, attributed - 1, -1):
            own = stages[k][1][m.name]
            if k != skip:
                solved, level = dense.damped_solve(dense.matrix(own), V, stages[k][2], own.mean)
                V = solved if k == attributed else level * solved
        total += V.flatten(1) @ torch.stack([gradients[m.name] for gradients in documents]).flatten(1).mT
    return total.numpy()


def autograd(model, maps, sequences, task):
    """Each sequence's gradients by autograd."""
    pairs = zip(sequences.input_ids, sequences.labels, strict=True)
    return [dense.gradients(model, maps, ids, labels, task) for ids, labels in pairs]


@pytest.mark.parametrize(
    ("split", "depth", "attributed"),
    [("none", 1, 0), ("projection", 2, 0), ("head", 2, 0), ("projection", 3, 0), ("head", 3, 1)],
)
def test_score_equals_dense_solves_and_needs_every_stage(architecture, split, depth, attributed, tmp_path):
    task = task_of(architecture)
    built = [make_model(architecture, seed) for seed in range(depth)]
    maps = tracking.tracked_maps(built[0], CurvatureSettings(qkv_split=split))
    stages = []
    for k, model in enumerate(built):
        folder = tmp_path / str(k)
        folder.mkdir()
        stages.append((model, fit_factors(model, maps, folder, task, k), 0.1 * (k + 1)))
    chain = Chain(tuple(FilteredStage(f, Damped(c)) for _, f, c in stages), attributed)
    queries, documents = make_sequences(3, 100, task), make_sequences(4, 200, task)
    raw = scoring.query_gradients(built[-1], maps, queries, 64, task=task)
    filtered = {name: chain.filter(name, v) for name, v in raw.items()}
    rotated = scoring.query_gradients(built[-1], maps, queries, 64, task=task, factors=stages[-1][1])
    for name, v in chain.filter_all(rotated, rotated=True).items():
        torch.testing.assert_close(v, filtered[name], rtol=1e-4, atol=1e-5 * float(filtered[name].abs().max()))
    scores = scoring.score_sequences(built[attributed], maps, filtered, documents, 16, task=task)

    G = autograd(built[-1], maps, queries, task), autograd(built[attributed], maps, documents, task)
    np.testing.assert_allclose(scores, dense_scores(*G, maps, stages, attributed), rtol=1e-4, atol=1e-4)
    for stage in range(attributed, depth):
        without = dense_scores(*G, maps, stages, attributed, skip=stage)
        assert np.abs(scores - without).max() > 0.05 * np.abs(scores).max()


def test_gradients_equal_autograd_whatever_the_batch(architecture):
    task = task_of(architecture)
    model = make_model(architecture)
    maps = tracking.tracked_maps(model, CurvatureSettings(qkv_split="head"))
    sequences = make_sequences(6, task=task)
    together = scoring.query_gradients(model, maps, sequences, 1000, task=task)
    alone = scoring.query_gradients(model, maps, sequences, 1, task=task)
    close = tolerance(architecture, rtol=1e-8, atol=1e-10)
    for row in range(len(sequences)):
        expected = dense.gradients(model, maps, sequences.input_ids[row], sequences.labels[row], task)
        for name, G in expected.items():
            torch.testing.assert_close(together[name][row], G, **close)
            torch.testing.assert_close(alone[name][row], G, **close)


def test_contributions_add_up_to_the_exact_score(architecture):
    task = task_of(architecture)
    model = make_model(architecture)
    maps = tracking.tracked_maps(model, CurvatureSettings())
    V = {m.name: torch.randn(1, *m.shape, dtype=torch.float64) for m in maps}
    sequences = make_sequences(5, task=task)
    exact = scoring.score_sequences(model, maps, dict(V), sequences, 64, task=task)[0]
    by_map, by_token = scoring.contributions(model, maps, V, sequences, 64, task=task)
    np.testing.assert_allclose([sum(row.values()) for row in by_map], exact, rtol=1e-5)
    np.testing.assert_allclose([row.sum() for row in by_token], exact, rtol=1e-4)


def test_a_new_head_drops_out_and_is_no_error(tmp_path):
    """A tracked head whose rows differ between stages has no parent: its part of the score is zero."""
    model, other = make_model("gpt_neox", 0), make_model("gpt_neox", 1)
    other.resize_token_embeddings(17)
    settings = CurvatureSettings(track_unembedding=True)
    factors = []
    for k, stage in enumerate((model, other)):
        folder = tmp_path / str(k)
        folder.mkdir()
        factors.append(fit_factors(stage, tracking.tracked_maps(stage, settings), folder, "causal_lm", k))
    chain = Chain(tuple(FilteredStage(f, Damped(0.1)) for f in factors))
    maps = tracking.tracked_maps(other, settings)
    filtered = {m.name: chain.filter(m.name, torch.randn(1, *m.shape, dtype=torch.float64)) for m in maps}
    assert [name for name, v in filtered.items() if v is None] == ["lm_head"]


def test_bf16_scores_stay_within_its_tolerance():
    exact, coarse = make_model("gpt_neox", dtype=torch.float32), make_model("gpt_neox", dtype=torch.bfloat16)
    maps = tracking.tracked_maps(exact, CurvatureSettings())
    V = {m.name: torch.randn(2, *m.shape) for m in maps}
    sequences = make_sequences(40)
    a = scoring.score_sequences(exact, maps, dict(V), sequences, 64, task="causal_lm")
    b = scoring.score_sequences(coarse, maps, V, sequences, 64, task="causal_lm")
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.999
