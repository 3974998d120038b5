"""How far pinned factors have drifted from the corpus: the eigenvalue correction on a sample, in the pinned bases.

Eigenvalues are means of squared rotated gradients, (Q_S^T G Q_A)^2, over the corpus that the factors were fitted on.
The same means over a sample of today's corpus, with fresh sampled labels, are compared with them. A small sample is
noisy, and so is the fit's own, so halves of the sample are compared too: a difference far above that is drift. What
neither half has seen is no noise: where a few labels are rare and their gradients huge, expect differences above it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from msif_core.batching import Sequences
from msif_core.curvature.factors import Factors
from msif_core.curvature.fit import NonFiniteError, eigenvalue_sums, finite_sequences, partitions, statistics
from msif_core.tracking import TrackedMap

SAMPLE_SEED = 0xD21F
"""Of the sample and of its labels: neither is that of the fit."""

BLOCKS = 8
"""Blocks that the sample is dealt into, of which halves are put together: a power of two."""


def keys(fingerprints: list[str], document_ids: list[str]) -> list[str]:
    """A random number for each sequence, as hex digits, and another for each copy of it: the lowest are the sample.

    While the corpus changes, the sample changes no more than the corpus does.
    """
    pairs = zip(fingerprints, document_ids, strict=True)
    return [hashlib.sha256(f"{SAMPLE_SEED} {name} {document}".encode()).hexdigest()[:16] for name, document in pairs]


def measure_drift(
    model: nn.Module,
    maps: list[TrackedMap],
    factors: Factors,
    sequences: Sequences,
    *,
    task: str,
    seed: int,
    batch_tokens: int,
    budget_gb: float,
) -> dict[str, Any]:
    """Compare the eigenvalues of each map with those of `sequences`.

    Returns:
        `trace`: today's trace over the pinned one. `difference`: sum of absolute differences of the eigenvalues over
        the pinned trace. `noise`: what the sizes of this sample and of the fit's alone give for `difference`, from
        several splits into halves. Over all maps, and for each below `maps`. Empty without two different sequences
        whose gradients are finite.
    """
    options: dict[str, Any] = {"task": task, "seed": seed + SAMPLE_SEED, "batch_tokens": batch_tokens}
    sequences = sequences.take(
        np.flatnonzero(finite_sequences(model, maps, sequences, task=task, batch_tokens=batch_tokens))
    )
    blocks = _blocks(sequences)
    if len(blocks) < 2:
        return {}
    splits = _splits([block.fingerprints for block in blocks], factors.sequences)
    found: dict[str, torch.Tensor] = {}
    device = next(model.parameters()).device
    for part in partitions(maps, budget_gb, lambda m: statistics(m) + BLOCKS * m.size):
        held = {m.name: factors[m.name] for m in part}
        try:
            sums = [eigenvalue_sums(model, part, held, block, **options) for block in blocks]
        except NonFiniteError:  # with the sampled labels alone
            return {}
        for m in part:
            of_blocks = [total.pop(m.name) for total in sums]
            pinned = held[m.name].eigenvalues.to(device).double()
            now = sum(of_blocks, torch.zeros_like(pinned)) / len(sequences)
            noise = sum((_weighted(row, of_blocks) for row in splits), torch.zeros_like(pinned[0, 0, 0])) / len(splits)
            found[m.name] = torch.stack((pinned.sum(), now.sum(), (now - pinned).abs().sum(), noise)).cpu()
    total = torch.stack(list(found.values())).sum(dim=0)
    return {
        "sequences": len(sequences),
        **_ratios(total),
        "maps": {name: _ratios(values) for name, values in found.items()},
    }


def _blocks(sequences: Sequences) -> list[Sequences]:
    """The sequences dealt out at random, all copies of one to the same block: they share their sampled labels."""
    dealt = {name: place % BLOCKS for place, name in enumerate(sorted(set(sequences.fingerprints)))}
    block = np.array([dealt[name] for name in sequences.fingerprints])
    return [sequences.take(np.flatnonzero(block == number)) for number in sorted(set(dealt.values()))]


def _splits(blocks: list[list[str]], fitted: int) -> npt.NDArray[np.float64]:
    """Weights of the sums of the blocks, given as fingerprints: a row for each split that has sequences in both halves.

    A row's weighted sum is the difference of the halves' means, scaled to the error expected of today's mean minus
    the pinned one. In units of one sequence's variance, a mean over n has the variance v of `_variance`, and so
    the halves' means differ by v_a + v_b. Today's mean and that over N pinned ones differ by v + 1/N + v - 1/n: that
    v is above 1/n is the share of pairs that are copies, which the pinned corpus is taken to have too. For equal
    halves without copies the scale is sqrt(1 + n/N) / 2.

    The halves are the signs of Walsh functions: any two splits halve each other's halves.
    """
    names = [name for block in blocks for name in block]
    expected = 2 * _variance(names) - 1 / len(names) + 1 / fitted
    rows = []
    for split in range(1, BLOCKS):
        inside = np.array([(split & number).bit_count() % 2 == 1 for number in range(len(blocks))])
        if inside.any():
            halves = [[name for block in np.flatnonzero(half) for name in blocks[block]] for half in (inside, ~inside)]
            scale = (expected / sum(map(_variance, halves))) ** 0.5
            rows.append(np.where(inside, scale / len(halves[0]), -scale / len(halves[1])))
    return np.stack(rows)


def _variance(fingerprints: list[str]) -> float:
    """Variance of a mean over sequences, in units of one's: the sum of squared shares, 1/n where none is a copy."""
    return sum((count / len(fingerprints)) ** 2 for count in Counter(fingerprints).values())


def _weighted(weights: npt.NDArray[np.float64], sums: list[torch.Tensor]) -> torch.Tensor:
    """Sum of absolute values of a weighted sum."""
    total = torch.zeros_like(sums[0])
    for weight, values in zip(weights.tolist(), sums, strict=True):
        total.add_(values, alpha=weight)
    return total.abs_().sum(dtype=torch.float64)


def _ratios(values: torch.Tensor) -> dict[str, float]:
    pinned, now, difference, noise = values.tolist()
    scale = pinned or 1.0  # a map that the fit's data never reached
    return {"trace": now / scale, "difference": difference / scale, "noise": noise / scale}
