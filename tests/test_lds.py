"""The linear datamodeling score against numbers worked out by hand and against a linear ground truth."""

from __future__ import annotations

import numpy as np
import pytest

from msif_core.errors import InputError
from msif_core.evaluation.lds import datamodeling, mean_and_error, noise_ceiling, paired_difference, ranks, spearman


def test_ranks_give_ties_their_mean() -> None:
    np.testing.assert_array_equal(ranks([[3.0], [1.0], [3.0], [2.0]])[:, 0], [3.5, 1.0, 3.5, 2.0])


def test_spearman_by_hand() -> None:
    x = np.array([[1.0, 1.0, 1.0], [2.0, 2.0, 1.0], [3.0, 3.0, 1.0], [4.0, 4.0, 1.0]])
    y = np.array([[10.0, 4.0, 1.0], [20.0, 3.0, 2.0], [40.0, 1.0, 3.0], [30.0, 2.0, 4.0]])
    # 1 - 6 sum d^2 / (n (n^2 - 1)): sum d^2 is 2 and 18; a constant column has none.
    np.testing.assert_allclose(spearman(x, y), [1 - 12 / 60, 1 - 108 / 60, 0.0])


def test_the_true_linear_effect_scores_one_and_its_negative_minus_one() -> None:
    generator = np.random.default_rng(0)
    effect = generator.normal(size=(5, 40))
    masks = generator.random((30, 40)) < 0.5
    losses = 7.0 - masks @ effect.T
    np.testing.assert_allclose(datamodeling(effect, masks, losses), 1.0)
    np.testing.assert_allclose(datamodeling(-effect, masks, losses), -1.0)
    unrelated = datamodeling(generator.normal(size=(5, 40)), masks, losses)
    assert (np.abs(unrelated) < 0.6).all()


@pytest.mark.parametrize(
    ("scores", "masks", "losses", "message"),
    [
        (np.zeros((2, 3)), np.zeros((4, 2)), np.zeros((4, 2)), "do not fit"),
        (np.zeros((2, 3)), np.zeros((4, 3)), np.zeros((2, 4)), "do not fit"),
        (np.full((2, 3), np.inf), np.zeros((4, 3)), np.zeros((4, 2)), "not a finite number"),
    ],
)
def test_what_does_not_fit_is_refused(scores: object, masks: object, losses: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        datamodeling(scores, masks, losses)  # type: ignore[arg-type]


def test_bootstrap_error_is_the_standard_error_of_the_mean() -> None:
    values = np.random.default_rng(1).normal(2.0, 3.0, size=200)
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(values.std() / np.sqrt(200), rel=0.08)
    difference, paired = paired_difference(values + 0.5, values)
    assert (difference, paired) == (pytest.approx(0.5), pytest.approx(0.0, abs=1e-9))


def test_noise_ceiling_is_what_the_true_mean_reaches_against_one_seed() -> None:
    generator = np.random.default_rng(2)
    truth = generator.normal(size=(4000, 3))
    first, second = (truth + s * generator.normal(size=truth.shape) for s in (0.5, 0.5))
    ceiling, error = noise_ceiling(first, second)
    assert ceiling == pytest.approx(spearman(truth, first).mean(), abs=0.02)
    assert 0 < error < 0.02
    both, _ = noise_ceiling(first, second, repeated=1)
    assert both == pytest.approx(spearman(truth, (first + second) / 2).mean(), abs=0.02)
    assert both > ceiling + 0.03
    assert noise_ceiling(first, -first)[0] == 0.0


def test_where_some_subsets_are_repeated_the_ceiling_is_what_the_true_mean_reaches() -> None:
    """60 subsets of which 20 are the mean of two starts, as in docs/accuracy.md: 0.814, and 0.788 against one start."""
    generator = np.random.default_rng(0)
    perfect, ceilings, of_one = [], [], []
    for _ in range(60):
        truth = generator.normal(size=(60, 110))
        first = truth + 0.72 * generator.normal(size=truth.shape)
        second = truth[:20] + 0.72 * generator.normal(size=(20, 110))
        losses = first.copy()
        losses[:20] = (first[:20] + second) / 2
        perfect.append(spearman(truth, losses).mean())
        ceilings.append(noise_ceiling(first[:20], second, repeated=20 / 60)[0])
        of_one.append(noise_ceiling(first[:20], second)[0])
    assert np.mean(ceilings) == pytest.approx(np.mean(perfect), abs=0.006)
    assert np.mean(ceilings) > np.mean(of_one) + 0.02
