"""A language model fine-tuned as a classifier: the new head has no parent, the body is scored exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from msif_core import scoring
from msif_core.chain import Chain, FilteredStage
from msif_core.config import CurvatureSettings
from msif_core.curvature.factors import Factors, MapFactors
from msif_core.curvature.filters import Damped, Identity, SpectralFilter, Unrolled
from msif_core.tracking import tracked_maps
from tests.conftest import make_model, make_sequences
from tests.oracle import dense
from tests.oracle.test_chain import fit_factors

FILTERS: list[SpectralFilter] = [Damped(0.3), Damped(0.02, relative=False), Unrolled(2.0), Identity()]


@pytest.mark.parametrize("decoder", ["gpt_neox", "llama"])
def test_scores_of_a_classifier_on_a_language_model(decoder: str, tmp_path: Path) -> None:
    language, classifier = make_model(decoder, 0), make_model(decoder, 1, task="classification")
    tasks = ("causal_lm", "classification")
    settings = CurvatureSettings()
    factors: list[Factors] = []
    for k, model in enumerate((language, classifier)):
        (tmp_path / str(k)).mkdir()
        factors.append(fit_factors(model, tracked_maps(model, settings), tmp_path / str(k), tasks[k], k))
    chain = Chain((FilteredStage(factors[0], Damped(0.1)), FilteredStage(factors[1], Damped(0.2))))
    queries, documents = make_sequences(2, 7, "classification"), make_sequences(3, 8)
    upper, lower = tracked_maps(classifier, settings), tracked_maps(language, settings)
    raw = scoring.query_gradients(classifier, upper, queries, 1000, task="classification")
    passed = {name: chain.filter(name, v) for name, v in raw.items()}
    assert [name for name, v in passed.items() if v is None] == ["score"]
    filtered = {name: v for name, v in passed.items() if v is not None}
    assert set(filtered) == {m.name for m in lower}
    scores = scoring.score_sequences(language, lower, filtered, documents, 1000, task="causal_lm")
    V = dense.gradients(classifier, upper, queries.input_ids[1], queries.labels[1], "classification")
    g = dense.gradients(language, lower, documents.input_ids[2], documents.labels[2], "causal_lm")
    total = 0.0
    for m in lower:
        v, level = dense.damped_solve(dense.matrix(factors[1][m.name]), V[m.name][None], 0.2)
        v, _ = dense.damped_solve(dense.matrix(factors[0][m.name]), level * v, 0.1)
        total += float((v[0] * g[m.name]).sum())
    assert scores[1, 2] == pytest.approx(total, rel=1e-5)


def random_factors(seed: int, shape: tuple[int, int, int] = (2, 3, 4)) -> MapFactors:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    groups, block, d_in = shape
    return MapFactors(
        torch.linalg.qr(draw(d_in, d_in))[0], torch.linalg.qr(draw(groups, block, block))[0], draw(*shape).square()
    )


def dense_filter(spectral: SpectralFilter, H: torch.Tensor, attributed: bool) -> torch.Tensor:
    """The filter as a function of the matrix H of one block, written without an eigenbasis."""
    eye = torch.eye(len(H), dtype=H.dtype)
    mean = H.trace() / len(H)
    if isinstance(spectral, Damped):
        c = spectral.damping * (mean if spectral.relative else 1.0)
        inverse = torch.linalg.inv(H + c * eye)
        return inverse if attributed else c * inverse
    if isinstance(spectral, Unrolled):
        decay = torch.linalg.matrix_exp(-spectral.tau / mean * H)
        return torch.linalg.solve(H, eye - decay) if attributed else decay
    return eye


@pytest.mark.parametrize("top", FILTERS, ids=repr)
@pytest.mark.parametrize("bottom", FILTERS, ids=repr)
def test_three_stages_of_any_filters_equal_matrix_functions(top: SpectralFilter, bottom: SpectralFilter) -> None:
    """K = 3, in its order: the matrices do not commute, so another order gives another vector."""
    factors = [random_factors(seed) for seed in range(3)]
    middle = Damped(0.5)
    filters: list[SpectralFilter] = [bottom, middle, top]
    chain = Chain(tuple(FilteredStage({"w": f}, s) for f, s in zip(factors, filters, strict=True)))
    V = torch.randn(5, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    found = chain.filter("w", V)
    rotated = chain.passed("w", V)
    assert found is not None
    assert rotated is not None
    for method in (chain.filter, chain.passed):
        own = method("w", factors[2].rotate(V), rotated=True)
        torch.testing.assert_close(own, method("w", V))
    root = bottom.attributed(factors[0].eigenvalues).sqrt()
    torch.testing.assert_close(factors[0].unrotate(root * (root * rotated)), found)
    W = torch.randn(4, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(10))
    back = chain.filter_back("w", W)
    assert back is not None
    torch.testing.assert_close(found.flatten(1) @ W.flatten(1).mT, V.flatten(1) @ back.flatten(1).mT)
    torch.testing.assert_close(chain.filter_back("w", factors[0].rotate(W), rotated=True), back)
    again = chain.filter("w", V)
    assert again is not None
    assert torch.equal(again, found)  # nothing is changed in place: the damping does not grow
    for g in range(2):
        matrices = [dense_filter(s, dense.matrix(f)[g], k == 0) for k, (s, f) in enumerate(zip(filters, factors))]  # noqa: B905
        expected = V[:, g].flatten(1) @ matrices[2].mT @ matrices[1].mT @ matrices[0].mT
        torch.testing.assert_close(found[:, g].flatten(1), expected, rtol=1e-9, atol=1e-12)
        swapped = V[:, g].flatten(1) @ matrices[1].mT @ matrices[2].mT @ matrices[0].mT
        if not isinstance(top, Identity):
            assert not torch.allclose(found[:, g].flatten(1), swapped, rtol=1e-3)


@pytest.mark.parametrize("count", [1, 3])
def test_between_two_eigenbases_one_turn_is_as_good_as_two(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single square gradient takes two, more of them the product of the bases."""
    first, second = (random_factors(seed, (1, 4, 4)) for seed in range(2))
    V = torch.randn(count, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = second.Q_S[0].mT @ first.Q_S[0] @ V @ first.Q_A.mT @ second.Q_A
    turned, unrotate = [], MapFactors.unrotate
    monkeypatch.setattr(MapFactors, "unrotate", lambda self, V: turned.append(V) or unrotate(self, V))
    torch.testing.assert_close(first.rebase(V, second), expected)
    assert len(turned) == (1 if count == 1 else 0)


def test_a_map_missing_in_any_lower_stage_drops_out() -> None:
    f = random_factors(0)
    stages: list[dict[str, Any]] = [{"w": f, "v": f}, {"w": f}, {"w": f, "v": f, "head": f}]
    chain = Chain(tuple(FilteredStage(s, Damped(0.1)) for s in stages))
    V = torch.ones(1, 2, 3, 4, dtype=torch.float64)
    assert chain.filter("w", V) is not None
    assert chain.filter("v", V) is None
    assert chain.filter("head", V) is None
    assert chain.passed("head", V) is None
