"""Spectral filters: limits, scale and what they leave alone."""

from __future__ import annotations

import pytest
import torch

from msif_core import config
from msif_core.curvature.filters import Damped, Identity, Unrolled, from_settings

L = torch.tensor([[[0.0, 1.0], [2.0, 5.0]], [[0.1, 0.1], [0.1, 0.1]]], dtype=torch.float64)


def test_relative_damping_is_each_blocks_own() -> None:
    f = Damped(0.5)
    torch.testing.assert_close(f.level(L).flatten(), torch.tensor([1.0, 0.05]).double())
    torch.testing.assert_close(f.attributed(L)[0], 1 / (L[0] + 1))
    torch.testing.assert_close(f.passing(L)[1], 0.05 / (L[1] + 0.05))


def test_eigenvalues_are_left_as_they_are() -> None:
    before = L.clone()
    for f in (Damped(0.5), Unrolled(1.0), Identity()):
        f.attributed(L)
        f.passing(L)
    assert torch.equal(L, before)


@pytest.mark.filterwarnings("ignore:unrolled filter")
def test_unrolled_limits() -> None:
    f = Unrolled(0.7, relative=False)
    assert f.attributed(L)[0, 0, 0] == pytest.approx(0.7)
    tiny = torch.full((1, 1, 1), 1e-14, dtype=torch.float64)
    assert f.attributed(tiny).item() == pytest.approx(0.7, rel=1e-12)
    huge = torch.full((1, 1, 1), 1e4, dtype=torch.float64)
    assert f.attributed(huge).item() == pytest.approx(1e-4)
    assert f.passing(huge).item() == 0
    torch.testing.assert_close(f.passing(L), torch.exp(-0.7 * L))


def test_per_token_mean_rescales_absolute_values_only() -> None:
    absolute = config.Filter(damping=0.1, relative=False, per_token_mean=True)
    assert from_settings(absolute, 12.0) == Damped(0.1, False, 12.0)
    torch.testing.assert_close(Damped(0.1, False, 12.0).attributed(L), 1 / (L + 1.2))
    unrolled = config.Filter(kind="unrolled", tau=6.0, relative=False, per_token_mean=True)
    torch.testing.assert_close(from_settings(unrolled, 12.0).passing(L), torch.exp(-0.5 * L))
    relative = config.Filter(damping=0.1, per_token_mean=True)
    torch.testing.assert_close(from_settings(relative, 12.0).attributed(L), Damped(0.1).attributed(L))


@pytest.mark.filterwarnings("ignore:unrolled filter")
@pytest.mark.parametrize("f", [Damped(0.1), Unrolled(1.0)])
def test_a_block_that_the_fit_never_reached_passes_a_query_and_has_no_say(f: Damped | Unrolled) -> None:
    zero = torch.zeros(1, 2, 2)
    assert torch.equal(f.attributed(zero), zero)
    assert torch.equal(f.passing(zero), torch.ones(1, 2, 2))


def test_a_tau_that_hardly_filters_is_warned_about() -> None:
    for f in (Unrolled(0.05), Unrolled(1e-5, relative=False)):
        with pytest.warns(UserWarning, match="nearly a gradient dot product"):
            f.passing(L)
