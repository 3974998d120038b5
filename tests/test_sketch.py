"""Sketches: exact where nothing collides, unbiased where something does, the same in any batch and order."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msif_core import scoring
from msif_core.chain import Chain, FilteredStage
from msif_core.config import CurvatureSettings, SketchSettings
from msif_core.curvature.factors import MapFactors
from msif_core.curvature.filters import Damped, Unrolled
from msif_core.errors import InputError
from msif_core.randomness import random_signs, uniforms
from msif_core.sketch import Sketcher, fold_length, hadamard
from msif_core.tracking import TrackedMap, tracked_maps
from tests.conftest import make_sequences, task_of

WHITENINGS = ["balanced", "eigen", "kronecker", "none"]
BATCH = 64


def random_factors(maps: list[TrackedMap], seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, MapFactors]:
    """Random bases, eigenvalues over six decades."""
    generator = torch.Generator().manual_seed(seed)

    def basis(*shape: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(*shape, generator=generator, dtype=torch.float64))[0].to(dtype)

    found: dict[str, MapFactors] = {}
    inputs: dict[str, torch.Tensor] = {}
    for m in maps:
        groups, block, d_in = m.shape
        Q_A = inputs.setdefault(m.input_group, basis(d_in, d_in))
        eigenvalues = torch.exp(3 * torch.randn(*m.shape, generator=generator, dtype=torch.float64)).to(dtype)
        found[m.name] = MapFactors(Q_A, basis(groups, block, block), eigenvalues)
    return found


def make(maps: list[TrackedMap], factors: Any, dimensions: int, whitening: str = "eigen", seed: int = 0,
         task: str = "causal_lm", spectral: Any = None) -> Sketcher:  # fmt: skip
    settings = SketchSettings(dimensions=dimensions, whitening=whitening, seed=seed)  # type: ignore[arg-type]
    return Sketcher(maps, factors, spectral or Damped(0.1), settings, task)


def synthetic(widths: list[tuple[int, int, int]]) -> list[TrackedMap]:
    """Maps without a model."""
    return [TrackedMap(f"m{i}", d, g * b, False, g, 1, f"m{i}") for i, (g, b, d) in enumerate(widths)]


@pytest.fixture(scope="module")
def model(small_models: dict[str, Any]) -> Any:
    return small_models["gpt_neox"]


# -- against the exact score --------------------------------------------------------------------------


@pytest.mark.parametrize("whitening", WHITENINGS)
def test_it_is_exact_when_nothing_collides(small_models: dict[str, Any], architecture: str, whitening: str):
    """Two stages, so that a dropped filter would show."""
    model, task = small_models[architecture], task_of(architecture)
    maps = tracked_maps(model, CurvatureSettings(qkv_split="head"))
    documents, queries = make_sequences(6, 1, task), make_sequences(3, 2, task)
    stages = (FilteredStage(random_factors(maps, 1), Damped(0.1)), FilteredStage(random_factors(maps, 2), Damped(0.5)))
    chain = Chain(stages)
    gradients = scoring.query_gradients(model, maps, queries, BATCH, task=task)
    filtered = {name: chain.filter(name, g) for name, g in gradients.items()}
    exact = scoring.score_sequences(model, maps, filtered, documents, BATCH, task=task)
    total = sum(m.size for m in maps)
    sketcher = make(maps, stages[0].curvature, total + 50, whitening, task=task)
    assert sketcher.fold >= total
    estimate = sketcher.queries(gradients, chain) @ sketcher.documents(model, documents, BATCH, 8.0).T
    np.testing.assert_allclose(estimate, exact, rtol=1e-3, atol=1e-4 * np.abs(exact).max())


@pytest.mark.parametrize("whitening", WHITENINGS)
def test_document_and_query_weights_multiply_to_the_filter(whitening: str):
    maps = synthetic([(1, 5, 7), (3, 4, 6)])
    for spectral in (Damped(0.1), Unrolled(3.0)):
        sketcher = make(maps, random_factors(maps), 64, whitening, spectral=spectral)
        for m in maps:
            product = sketcher.document_weight(m.name) * sketcher.query_weight(m.name)
            torch.testing.assert_close(product, spectral.attributed(sketcher.factors[m.name].eigenvalues).flatten())


def test_the_kronecker_weight_is_rank_one_and_exact_for_a_rank_one_filter():
    maps = synthetic([(1, 5, 7)])
    eigenvalues = torch.outer(torch.arange(1.0, 6), torch.arange(1.0, 8))[None]

    class Inverse:
        def attributed(self, eigenvalues: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
            return 1 / eigenvalues

    factors = {"m0": MapFactors(torch.eye(7), torch.eye(5)[None], eigenvalues)}
    weight = make(maps, factors, 64, "kronecker", spectral=Inverse()).document_weight("m0")
    torch.testing.assert_close(weight.view(1, 5, 7), eigenvalues.rsqrt())
    weight = make(maps, random_factors(maps), 64, "kronecker").document_weight("m0")
    assert torch.linalg.matrix_rank(weight.view(5, 7)) == 1


@pytest.mark.parametrize("whitening", WHITENINGS)
def test_a_block_without_curvature_adds_nothing_and_breaks_nothing(whitening: str):
    maps = synthetic([(2, 4, 6)])
    factors = random_factors(maps)
    factors["m0"].eigenvalues[1] = 0
    sketcher = make(maps, factors, 64, whitening)
    for weight in (sketcher.document_weight("m0"), sketcher.query_weight("m0")):
        assert torch.isfinite(weight).all()
        assert (weight.view(2, 4, 6)[1] == 0).all()


# -- the linear map -----------------------------------------------------------------------------------


def project(sketcher: Sketcher, vectors: torch.Tensor) -> torch.Tensor:
    """The sketch of flat vectors [N, D] without whitening."""
    folded = torch.zeros(len(vectors), sketcher.fold)
    position = 0
    for m in sketcher.maps:
        flat = vectors[:, position : position + m.size]
        sketcher._add(folded, flat * sketcher._signed(m, torch.ones(m.size)), sketcher.offsets[m.name])
        position += m.size
    return sketcher._mix(folded)


def test_folding_is_the_coordinate_modulo_m():
    maps = synthetic([(1, 5, 7), (1, 9, 20), (2, 3, 4)])
    sketcher = make(maps, {}, 33)
    total = sum(m.size for m in maps)
    vector = torch.randn(2, total)
    folded, expected = torch.zeros(2, sketcher.fold), torch.zeros(2, sketcher.fold)
    for m in maps:
        start = sketcher.offsets[m.name]
        sketcher._add(folded, vector[:, start : start + m.size], start)
    expected.index_add_(1, torch.arange(total) % sketcher.fold, vector)
    torch.testing.assert_close(folded, expected)


@pytest.mark.parametrize("dimensions", [16, 100, 1000, 1024])
def test_mixing_keeps_inner_products(dimensions: int):
    sketcher = make(synthetic([(1, 5, 7)]), {}, dimensions)
    x = torch.randn(5, sketcher.fold)
    mixed = sketcher._mix(x)
    assert mixed.shape == (5, dimensions)
    torch.testing.assert_close(mixed @ mixed.T, x @ x.T, rtol=1e-4, atol=1e-4)


def test_hadamard_is_the_orthonormal_matrix():
    matrix = torch.ones(1, 1)
    for _ in range(4):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    x = torch.randn(3, 16)
    torch.testing.assert_close(hadamard(x), x @ matrix / 4)


def test_the_fold_shares_no_factor_with_a_row():
    assert fold_length(32_000, {513, 2049, 2048}) == 31_999
    assert fold_length(16, {4, 6}) == 13
    for dimensions in (16, 1000, 4096):
        found = fold_length(dimensions, {65, 129, 257})
        assert all(np.gcd(found, width) == 1 for width in (65, 129, 257) if width < found)


def test_random_products_are_unbiased_with_the_error_of_the_dimensions():
    maps = synthetic([(1, 40, 65), (3, 16, 33)])  # 4,184 coordinates into 512 dimensions
    total = sum(m.size for m in maps)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 1, total, generator=generator)
    y = 0.3 * x + y
    x, y = x / x.norm(), y / y.norm()
    found = []
    for seed in range(200):
        sketcher = make(maps, {}, 512, seed=seed)
        found.append(float(project(sketcher, x) @ project(sketcher, y).T))
    exact, error = float(x @ y.T), np.std(found)
    assert abs(np.mean(found) - exact) < 4 * error / np.sqrt(200)
    assert error == pytest.approx(np.sqrt((1 + exact**2) / 512), rel=0.2)


def test_sketched_products_correlate_with_the_exact_ones():
    maps = synthetic([(1, 64, 65), (1, 65, 129)])
    total = sum(m.size for m in maps)
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(20, total, generator=generator)
    queries = torch.randn(30, 20, generator=generator) @ shared
    documents = torch.randn(50, 20, generator=generator) @ shared
    exact = (queries @ documents.T).flatten()
    correlations = []
    for dimensions in (256, 4096):
        sketcher = make(maps, {}, dimensions)
        estimate = (project(sketcher, queries) @ project(sketcher, documents).T).flatten()
        correlations.append(float(np.corrcoef(exact, estimate)[0, 1]))
    assert correlations[0] > 0.9
    assert correlations[1] > 0.99


def test_strong_columns_do_not_meet_in_one_bucket():
    """A map whose energy is in one input column: as good as any other vector of that energy."""
    maps = synthetic([(1, 200, 64)])
    sketcher = make(maps, {}, 512)
    vector = torch.zeros(1, 200, 64)
    vector[:, :, 0] = 1
    folded = torch.zeros(1, sketcher.fold)
    sketcher._add(folded, vector.flatten(1), 0)
    assert folded.abs().max() == 1


def test_maps_of_unequal_scale_spread_evenly_over_the_dimensions():
    maps = synthetic([(1, 30, 33), (1, 30, 35)])
    vectors = torch.randn(400, sum(m.size for m in maps), generator=torch.Generator().manual_seed(0))
    vectors[:, maps[0].size :] *= 100
    energy = project(make(maps, {}, 1000), vectors).square().mean(0)
    assert energy.max() / energy.mean() < 2
    assert energy.min() / energy.mean() > 0.4


def test_signs_are_balanced_and_fixed():
    signs = random_signs(10_000, 5)
    assert abs(float(signs.mean())) < 0.05
    assert set(signs.tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(signs[:100], random_signs(100, 5))
    assert not torch.equal(signs, random_signs(10_000, 6))
    pinned = [1, -1, 1, -1, 1, 1, -1, -1]  # stored sketches depend on them: a change needs a new sketch.VERSION
    assert random_signs(8, 0).tolist() == pinned
    below = uniforms([f"{5:016x}"], 600_000, 1)[0] < 0.5
    assert torch.equal(random_signs(600_000, 5) < 0, torch.from_numpy(below)), "the same in every block"


# -- invariances --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sketcher(model: Any) -> Sketcher:
    maps = tracked_maps(model, CurvatureSettings())
    return make(maps, random_factors(maps), 300)


def test_batches_order_and_company_do_not_matter(model: Any, sketcher: Sketcher):
    sequences = make_sequences(9, 3)
    phi = sketcher.documents(model, sequences, 1000, 8.0)
    assert phi.shape == (9, 300)
    assert phi.dtype == np.float32
    tolerance = {"rtol": 1e-4, "atol": 1e-5 * np.abs(phi).max()}
    np.testing.assert_allclose(sketcher.documents(model, sequences, 1, 8.0), phi, **tolerance)
    order = np.random.default_rng(0).permutation(9)
    np.testing.assert_allclose(sketcher.documents(model, sequences.take(order), 20, 8.0), phi[order], **tolerance)


def test_chunks_of_gradients_do_not_matter(model: Any, sketcher: Sketcher, monkeypatch: pytest.MonkeyPatch):
    sequences = make_sequences(9, 3)
    phi = sketcher.documents(model, sequences, 1000, 8.0)
    monkeypatch.setattr("msif_core.curvature.gradients.CACHED_ENTRIES", 1)
    monkeypatch.setattr("msif_core.curvature.gradients.CPU_ROWS", 5)
    np.testing.assert_allclose(sketcher.documents(model, sequences, 1000, 8.0), phi, rtol=1e-4, atol=1e-4)


def test_a_small_budget_takes_more_passes_and_gives_the_same_sketches(model: Any, sketcher: Sketcher):
    sequences = make_sequences(5, 9)
    whole, parts = (sketcher.documents(model, sequences, BATCH, budget) for budget in (8.0, 1e-9))
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-5 * np.abs(whole).max())


def test_a_query_s_sketch_is_linear(model: Any, sketcher: Sketcher):
    chain = Chain((FilteredStage(sketcher.factors, Damped(0.1)),))
    gradients = scoring.query_gradients(model, sketcher.maps, make_sequences(2, 4), BATCH, task="causal_lm")
    psi = sketcher.queries(gradients, chain)
    summed = sketcher.queries({n: 2 * g[:1] - 3 * g[1:] for n, g in gradients.items()}, chain)
    np.testing.assert_allclose(summed[0], 2 * psi[0] - 3 * psi[1], rtol=1e-3, atol=1e-4 * np.abs(psi).max())


def test_a_map_that_the_query_lacks_drops_out(model: Any, sketcher: Sketcher):
    chain = Chain((FilteredStage(sketcher.factors, Damped(0.1)),))
    gradients = scoring.query_gradients(model, sketcher.maps, make_sequences(2, 4), BATCH, task="causal_lm")
    name = sketcher.maps[0].name
    without = sketcher.queries({n: g for n, g in gradients.items() if n != name}, chain)
    alone = sketcher.queries({name: gradients[name]}, chain)
    whole = sketcher.queries(gradients, chain)
    np.testing.assert_allclose(without + alone, whole, rtol=1e-3, atol=1e-4 * np.abs(whole).max())


# -- the manifest -------------------------------------------------------------------------------------


def test_the_manifest_is_checked(tmp_path: Path):
    maps = synthetic([(1, 5, 7)])
    make(maps, {}, 64).check_or_write(tmp_path / "sketch.json")
    make(maps, {}, 64).check_or_write(tmp_path / "sketch.json")
    for other, key in (
        (make(maps, {}, 64, seed=1), "seed"),
        (make(maps, {}, 64, "none"), "whitening"),
        (make(maps, {}, 65), "dimensions"),
        (make(synthetic([(1, 7, 5)]), {}, 64), "maps"),
    ):
        with pytest.raises(
            InputError, match=rf"sketch.json: made with another sketch \(.*{key}.*\); rebuild the index"
        ):
            other.check_or_write(tmp_path / "sketch.json")
