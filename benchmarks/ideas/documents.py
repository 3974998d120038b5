"""Documents' gradients scaled: by their norm, by their self-influence, by their length."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.accuracy import DEFAULT
from benchmarks.ideas.subject import Idea, Subject
from msif_core.curvature.filters import Damped
from msif_core.evaluation.lds import FloatArray
from msif_core.evaluation.methods import Pool, norms


def self_influence(pool: Pool) -> FloatArray:
    """g^T (H + damping)^-1 g of each sequence: [S]."""
    factors = pool.stages.factors(pool.target)
    found = np.zeros(len(pool.sequences))
    for name, value in pool.document_gradients(pool.target).items():
        filtered = factors[name].apply(value, Damped(DEFAULT).attributed)
        found += (filtered * value).flatten(1).sum(1).double().numpy()
    return found


def unit_weights(pool: Pool) -> FloatArray:
    """1 / norm of each sequence's gradient, 1 in the mean."""
    weights = 1 / norms(pool.document_gradients(pool.target))
    return weights / weights.mean()


def weight_ideas(subject: Subject) -> Iterator[Idea]:
    """One weight a sequence."""
    pool = subject.pool
    norm, own = norms(pool.document_gradients(pool.target)), self_influence(pool)
    lengths = np.array([len(ids) for ids in pool.sequences.input_ids], dtype=np.float64)
    weights = {
        "documents' gradients of unit norm": 1 / norm,
        "divided by the root of the norm": norm**-0.5,
        "divided by the root of self-influence": own**-0.5,
        "divided by self-influence": 1 / own,
        "divided by 1 + self-influence / N": 1 / (1 + own / len(own)),
        "divided by length": 1 / lengths,
    }
    for name, weight in weights.items():
        yield name, subject.of_pool(pool, weight / weight.mean()).lds(subject.filters)
