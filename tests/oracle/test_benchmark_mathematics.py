"""The mathematics that only benchmarks use: recall's sketches, and the other curvatures of accuracy_ideas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.ideas.geometry import Scaled, bases, by_sequence, by_token, corrected, covariances, held_gradients
from benchmarks.sketches import Coding, Coordinates, Folded, Learned, Signed, TwoSided, Weights
from msif_core import scoring
from msif_core.config import CurvatureSettings, SketchSettings
from msif_core.curvature.factors import MapFactors
from msif_core.curvature.filters import Damped
from msif_core.curvature.fit import EIGENVALUE_SEED, capture_all
from msif_core.losses import sampled_loss, target_loss
from msif_core.rows import Rows
from msif_core.sketch import Sketcher
from msif_core.tracking import TrackedMap, tracked_maps
from tests.conftest import make_model, make_sequences

MAPS = [TrackedMap("first", 7, 12, False, 3, 1, "first"), TrackedMap("second", 5, 8, False, 1, 1, "second")]
TOTAL = sum(m.size for m in MAPS)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def weights() -> Weights:
    f = torch.exp(2 * normal(TOTAL))
    return Weights(f, f.sqrt())


@pytest.fixture(scope="module")
def sketcher() -> Sketcher:
    factors = {m.name: MapFactors(torch.eye(m.d_in), torch.eye(m.shape[1]), torch.ones(m.shape)) for m in MAPS}
    return Sketcher(MAPS, factors, Damped(0.1), SketchSettings(dimensions=256), "causal_lm")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def learned(weights: Weights, sketcher: Sketcher) -> Learned:
    found = Learned(MAPS, weights, Folded(sketcher, Signed(sketcher, weights)))
    found.add(normal(40, TOTAL, seed=1))
    found.set_proxies(normal(30, TOTAL, seed=2) * torch.exp(normal(TOTAL, seed=3)))
    return found


@pytest.mark.parametrize("kind", ["folded", "split", "coordinates", "two-sided", "head and tail"])
def test_a_sketch_that_loses_nothing_gives_the_exact_score(
    kind: str, weights: Weights, sketcher: Sketcher, learned: Learned
) -> None:
    documents, queries = normal(9, TOTAL, seed=4), normal(4, TOTAL, seed=5)
    head = learned.coordinates(64)
    rest = torch.ones(TOTAL)
    rest[head] = 0
    sketches: dict[str, list[Any]] = {
        "folded": [Folded(sketcher, Signed(sketcher, weights))],
        "split": [Folded(sketcher, Signed(sketcher, learned.split()))],
        "coordinates": [Coordinates(weights, torch.arange(TOTAL), mixed=False)],
        "two-sided": [learned.two_sided(12)],
        "head and tail": [Coordinates(weights, head, mixed=True), Folded(sketcher, Signed(sketcher, weights, rest))],
    }
    found = sum(s.documents(documents) @ s.queries(queries).T for s in sketches[kind])
    torch.testing.assert_close(found, (documents * weights.f) @ queries.T, rtol=1e-4, atol=1e-3)


def test_the_learned_split_lowers_the_product_of_the_norms(weights: Weights, learned: Learned) -> None:
    """On the energies that it was learned from, below the even split and below all on the query."""
    documents, queries = learned.energy / learned.count, learned.proxy_energy

    def product(w: Weights) -> float:
        return float((documents * w.document**2).sum() * (queries * w.query**2).sum())

    assert product(learned.split()) < 0.95 * product(weights)
    assert product(learned.split()) < 0.95 * product(Weights(weights.f, torch.ones(TOTAL)))


def test_a_two_sided_random_sketch_is_unbiased(weights: Weights) -> None:
    documents, queries = normal(3, TOTAL, seed=6), normal(3, TOTAL, seed=6)
    exact = ((documents * weights.f) @ queries.T).diagonal()
    sketch = TwoSided.random(MAPS, weights, 400)
    found = (sketch.documents(documents) @ sketch.queries(queries).T).diagonal()
    torch.testing.assert_close(found, exact, rtol=0.3, atol=0.0)


@pytest.mark.parametrize(("bits", "correlation"), [(1, 0.75), (2, 0.92), (4, 0.99), (32, 1 - 1e-6)])
def test_more_bits_come_nearer(bits: int, correlation: float) -> None:
    phi, psi = normal(200, 512, seed=7), normal(5, 512, seed=8)
    coding = Coding("", bits)
    found = coding.scores(phi, psi)
    assert np.corrcoef(found.flatten(), (phi @ psi.T).flatten())[0, 1] > correlation
    assert coding.bytes(512) == 512 * bits / 8 + (8 if bits < 32 else 0)


def test_a_code_of_the_document_itself_has_the_right_size() -> None:
    """RaBitQ's correction: the estimate of <phi, phi> is exact whatever the bits."""
    phi = normal(6, 64, seed=9)
    for bits in (1, 2, 4):
        torch.testing.assert_close(Coding("", bits).scores(phi, phi).diagonal(), phi.square().sum(1))


def test_curvatures_from_held_gradients() -> None:
    model = make_model("gpt_neox", dtype=torch.float32)
    maps = tracked_maps(model, CurvatureSettings(qkv_split="head"))
    sequences = make_sequences(6, 3)
    loss = target_loss("causal_lm")
    held = held_gradients(model, maps, sequences, loss)
    named = scoring.query_gradients(model, maps, sequences, 4096, task="causal_lm")
    whole = by_sequence(held, held)
    found = bases(maps, covariances([(model, 0)], maps, sequences))
    one, twice = (corrected([(model, 0)] * n, maps, found, sequences) for n in (1, 2))
    tokens = by_token(model, maps, found, sequences)
    squares: dict[str, float] = {}  # of tokens' outer products, |a|^2 |d|^2, which rotations keep

    def consume(m: TrackedMap, captured: Rows) -> None:
        norms = captured.a.square().sum(-1) * captured.d.square().sum((-2, -1))
        squares[m.name] = squares.get(m.name, 0.0) + float(norms.sum())

    capture_all(model, maps, sequences, 4096, sampled_loss("causal_lm", EIGENVALUE_SEED), consume)
    for m in maps:
        energy = named[m.name].square().sum() / len(sequences)
        torch.testing.assert_close(whole[m.name].eigenvalues.sum(), energy, rtol=1e-3, atol=0.0)
        torch.testing.assert_close(twice[m.name].eigenvalues, one[m.name].eigenvalues)
        torch.testing.assert_close(
            float(tokens[m.name].eigenvalues.sum()), squares[m.name] / len(sequences), rtol=1e-3, atol=0.0
        )
        V = named[m.name]
        scale = torch.exp(normal(*m.shape, seed=10))
        scaled = Scaled(whole[m.name], scale, scale)
        solved = scaled.unrotate(scaled.rotate(V) * Damped(0.1).attributed(scaled.eigenvalues))
        # (H' + c) applied in the scaled coordinates undoes it.
        level = Damped(0.1).level(whole[m.name].eigenvalues)
        back = whole[m.name].apply(solved / scale, lambda eigenvalues, level=level: eigenvalues + level) / scale
        torch.testing.assert_close(back, V, rtol=1e-2, atol=1e-3 * float(V.abs().max()))
