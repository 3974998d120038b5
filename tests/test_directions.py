"""The kept eigendirections: energies against draws, the choice against a search, thin bases against whole ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msif_core import directions, scoring
from msif_core.chain import Chain, FilteredStage
from msif_core.config import CurvatureSettings, SketchSettings
from msif_core.curvature.factors import MapFactors
from msif_core.curvature.filters import Damped, Identity, Unrolled
from msif_core.curvature.gradients import RotatedGradients
from msif_core.directions import Directions
from msif_core.sketch import Sketcher
from msif_core.tracking import TrackedMap, tracked_maps
from tests.conftest import make_sequences
from tests.test_sketch import BATCH, random_factors, synthetic


def chain_of(maps: list[TrackedMap], stages: int = 2) -> Chain:
    filters = (Damped(0.1), Damped(0.5), Unrolled(2.0))
    return Chain(tuple(FilteredStage(random_factors(maps, seed), filters[seed]) for seed in range(stages)))


def two_maps() -> list[TrackedMap]:
    """Of one input group, the second with two blocks that are cut in half."""
    return [
        TrackedMap("m0", 7, 5, False, 1, 1, "shared"),
        TrackedMap("m1", 7, 12, False, 2, 1, "shared", cuts=2),
        TrackedMap("m2", 4, 6, False, 1, 1, "own"),
    ]


def fitted(maps: list[TrackedMap], seed: int) -> dict[str, MapFactors]:
    """Random factors with pieces of S, energies spread over rows and columns."""
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, torch.Tensor] = {}

    def basis(*shape: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(*shape, generator=generator, dtype=torch.float64))[0]

    found = {}
    for m in maps:
        Q_A = inputs.setdefault(m.input_group, basis(m.d_in, m.d_in))
        rows, columns = (torch.exp(2 * torch.randn(n, generator=generator)) for n in (m.d_out, m.d_in))
        eigenvalues = torch.outer(rows, columns).view(m.shape).double()
        found[m.name] = MapFactors(Q_A, basis(*m.pieces, m.pieces[1]), eigenvalues)
    return found


@pytest.fixture
def chain() -> Chain:
    maps = two_maps()
    return Chain((FilteredStage(fitted(maps, 1), Damped(0.1)), FilteredStage(fitted(maps, 2), Damped(0.5))))


# -- expected energies ----------------------------------------------------------------------------------


def test_energies_are_the_mean_squares_of_draws(chain: Chain) -> None:
    """Queries drawn from the last stage's curvature and filtered down by the chain, documents from their own."""
    generator = torch.Generator().manual_seed(0)
    for m in two_maps():
        first, last = (stage.curvature[m.name] for stage in chain.stages)
        f = chain.stages[0].filter.attributed(first.eigenvalues)
        draws = [
            c.unrotate(torch.randn(40_000, *m.shape, generator=generator, dtype=torch.float64) * c.eigenvalues.sqrt())
            for c in (first, last)
        ]
        whitened = (first.rotate(draws[0]) * f.sqrt(), chain.passed(m.name, draws[1]) * f.sqrt())
        for expected, drawn in zip(directions.expected_energies(chain, m), whitened, strict=True):
            torch.testing.assert_close(drawn.square().mean(0), expected, rtol=0.06, atol=0)


def test_energies_of_a_single_stage_are_the_same_on_both_sides() -> None:
    (m,) = maps = synthetic([(2, 4, 6)])
    chain = chain_of(maps, stages=1)
    documents, queries = directions.expected_energies(chain, m)
    assert torch.equal(documents, queries)
    kept = directions.choose(maps, chain, 1.0, 0)["m0"]
    torch.testing.assert_close(kept.split, torch.ones(m.size))


def test_a_map_without_a_parent_is_left_out() -> None:
    maps = synthetic([(1, 5, 7), (1, 3, 4)])
    chain = chain_of(maps)
    del chain.stages[1].curvature["m1"]  # type: ignore[attr-defined]
    assert list(directions.choose(maps, chain, 0.5, 0)) == ["m0"]


# -- the choice -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_kept_directions_are_those_worth_most_for_their_cost(chain: Chain, share: float) -> None:
    maps = two_maps()
    kept = directions.choose(maps, chain, share, 0)
    worth: list[tuple[float, float, bool]] = []
    products = {m.name: torch.mul(*directions.expected_energies(chain, m)).view(*m.pieces, m.d_in) for m in maps}
    for group in ("shared", "own"):
        members = [m for m in maps if m.input_group == group]
        energies = sum(products[m.name].sum((0, 1)) for m in members)
        chosen = {tuple(kept[m.name].columns.tolist()) for m in members if m.name in kept} or {()}
        assert len(chosen) == 1, "maps of one input group keep the same columns"
        worth += [
            (float(e) / members[0].d_in, members[0].d_in, i in next(iter(chosen))) for i, e in enumerate(energies)
        ]
    for m in maps:
        rows = products[m.name].sum(2)
        r = kept[m.name].rows.shape[1] if m.name in kept else 0
        for k, energy in enumerate(rows.sort(descending=True).values.sum(0)):
            worth.append((float(energy) / m.d_out, m.d_out, k < r))
        if r:
            for piece, chosen_rows in zip(rows, kept[m.name].rows, strict=True):
                assert set(chosen_rows.tolist()) == set(piece.argsort(descending=True)[:r].tolist())
    total, spent = sum(cost for _, cost, _ in worth), sum(cost for _, cost, taken in worth if taken)
    assert spent <= share * total
    assert min(w for w, _, taken in worth if taken) > max(w for w, _, taken in worth if not taken)
    following = max((w, cost) for w, cost, taken in worth if not taken)[1]
    assert spent + following > share * total, "one more would cost too much"


def test_a_sketch_has_no_fewer_coordinates_than_dimensions(chain: Chain) -> None:
    maps = two_maps()
    for least in (10, 60, 100):
        kept = directions.choose(maps, chain, 0.01, least)
        assert sum(d.size for d in kept.values()) >= least
    for m, (name, d) in zip(maps, directions.choose(maps, chain, 0.01, 10_000).items(), strict=True):
        assert (name, d.size) == (m.name, m.size)


def test_the_split_is_the_best_where_it_can_be() -> None:
    """Energies whose ratio is a row times a column in each map: both sides get the same, and no split has less."""
    maps, generator = two_maps(), torch.Generator().manual_seed(5)
    lower = fitted(maps, 1)
    upper = {}
    for scale, m in zip((0.1, 1.0, 30.0), maps, strict=True):
        rows, columns = (torch.exp(torch.randn(n, generator=generator, dtype=torch.float64)) for n in (m.d_out, m.d_in))
        ratio = scale * torch.outer(rows, columns).view(m.shape)
        upper[m.name] = replace(lower[m.name], eigenvalues=lower[m.name].eigenvalues * ratio)
    chain = Chain((FilteredStage(lower, Damped(0.1)), FilteredStage(upper, Identity())))
    kept = directions.choose(maps, chain, 1.0, 0)
    documents, queries, split = [], [], []
    for m in maps:
        for found, energy in zip((documents, queries), directions.expected_energies(chain, m), strict=True):
            found.append(kept[m.name].take(energy))
        split.append(kept[m.name].split.double().square())
    both = torch.cat(documents) * torch.cat(split), torch.cat(queries) / torch.cat(split)
    torch.testing.assert_close(*both, rtol=1e-5, atol=0)


def test_the_split_lessens_the_error_where_the_ratio_is_no_product(chain: Chain) -> None:
    for m in two_maps():
        split = directions.choose(two_maps(), chain, 1.0, 0)[m.name].split.double().square()
        documents, queries = (e.flatten() for e in directions.expected_energies(chain, m))
        even, balanced = documents.sum() * queries.sum(), (documents * split).sum() * (queries / split).sum()
        least = (documents * queries).sqrt().sum() ** 2
        assert least <= balanced < even


def test_directions_are_read_as_they_were_written(chain: Chain, tmp_path: Path) -> None:
    kept = directions.choose(two_maps(), chain, 0.5, 0)
    directions.save(tmp_path / "directions.safetensors", kept)
    found = directions.load(tmp_path / "directions.safetensors")
    assert found.keys() == kept.keys()
    for name, d in kept.items():
        for key, value in vars(d).items():
            assert torch.equal(value, vars(found[name])[key])


# -- thin bases -----------------------------------------------------------------------------------------


def some(m: TrackedMap, seed: int = 0) -> Directions:
    """Some directions of a map, every second row and the first half of the columns."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(0, m.pieces[1], 2).expand(m.pieces[0], -1)
    columns = torch.arange(m.d_in // 2)
    split = (torch.rand(n, generator=generator) + 0.5 for n in (rows.shape, columns.shape))
    return Directions(rows, columns, *split)


@pytest.mark.parametrize("tokens", [1, 50])
def test_thin_bases_give_the_kept_coordinates(tokens: int) -> None:
    """Few tokens are rotated, of many the gradients are."""
    maps = two_maps()
    factors = fitted(maps, 3)
    generator = torch.Generator().manual_seed(1)
    thin = RotatedGradients({m.name: some(m).factors(factors[m.name]) for m in maps}, torch.float64)
    inputs = {width: torch.randn(3, tokens, width, generator=generator, dtype=torch.float64) for width in (7, 4)}
    for m in maps:
        d = torch.randn(3, tokens, *m.shape[:2], generator=generator, dtype=torch.float64)
        gradients = torch.einsum("ntgb,nti->ngbi", d, inputs[m.d_in])
        expected = some(m).take(factors[m.name].rotate(gradients))
        found = torch.zeros_like(expected).unflatten(1, (-1, m.d_in // 2))
        for part, rows, block in thin.blocks(m, inputs[m.d_in], d):
            found[part, rows] = block
        torch.testing.assert_close(found.flatten(1), expected)


@pytest.mark.parametrize("whitening", ["balanced", "eigen", "kronecker"])
def test_the_sketch_of_some_directions_is_their_part_of_the_score(
    small_models: dict[str, Any], whitening: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msif_core.curvature.gradients.CPU_ROWS", 3)  # several blocks a map
    model = small_models["gpt_neox"]
    maps = tracked_maps(model, CurvatureSettings(qkv_split="head"))
    chain = chain_of(maps)
    kept = {m.name: some(m) for m in maps[1:]}
    settings = SketchSettings(dimensions=sum(m.size for m in maps), whitening=whitening)
    first = chain.stages[0]
    sketcher = Sketcher(maps, first.curvature, first.filter, settings, "causal_lm", kept)  # type: ignore[arg-type]
    documents, queries = make_sequences(6, 1), make_sequences(3, 2)
    gradients = scoring.query_gradients(model, maps, queries, BATCH, task="causal_lm")
    own = scoring.query_gradients(model, maps, documents, BATCH, task="causal_lm")
    expected = np.zeros((3, 6))
    for m in maps[1:]:
        curvature = first.curvature[m.name]
        f = first.filter.attributed(curvature.eigenvalues)
        passed = kept[m.name].take(chain.passed(m.name, gradients[m.name]) * f)
        expected += (passed @ kept[m.name].take(curvature.rotate(own[m.name])).T).numpy()
    estimate = sketcher.queries(gradients, chain) @ sketcher.documents(model, documents, BATCH, 8.0).T
    np.testing.assert_allclose(estimate, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    root = kept[maps[1].name].take(first.filter.attributed(first.curvature[maps[1].name].eigenvalues)).sqrt()
    expected_weight = {"balanced": root * kept[maps[1].name].split, "eigen": root}.get(whitening)
    if expected_weight is not None:
        torch.testing.assert_close(sketcher.document_weight(maps[1].name), expected_weight)
