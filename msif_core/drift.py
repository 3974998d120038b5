"""How far pinned factors have drifted from the corpus: the eigenvalue correction on a sample, in the pinned bases.

Eigenvalues are means of squared rotated gradients, (Q_S^T G Q_A)^2, over the corpus that the factors were fitted on.
The same means over a sample of today's corpus, with fresh sampled labels, are compared with them. A small sample is
noisy, and so is the fit's own, so the sample's two halves are compared too: a difference far above that is drift.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from msif_core.batching import Sequences
from msif_core.curvature.factors import Factors
from msif_core.curvature.fit import NonFiniteError, eigenvalue_sums, finite_sequences, partitions
from msif_core.models import TrackedMap
from msif_core.randomness import uniforms

SAMPLE_SEED = 0xD21F
"""Of the sample and of its labels: neither is that of the fit."""


def sample(fingerprints: Iterable[str], count: int) -> set[str]:
    """A fixed random sample of `count` sequences: those whose fingerprints hash lowest.

    While the corpus changes, the sample changes no more than the corpus does.
    """
    distinct = sorted(set(fingerprints))
    if not distinct or not count:
        return set()
    lowest = np.argsort(uniforms(distinct, 1, SAMPLE_SEED)[:, 0], kind="stable")[:count]
    return {distinct[row] for row in lowest}


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
        the pinned trace. `noise`: what the sizes of this sample and of the fit's alone give for `difference`. Over all
        maps, and for each below `maps`. Empty without two sequences whose gradients are finite.
    """
    options: dict[str, Any] = {"task": task, "seed": seed + SAMPLE_SEED, "batch_tokens": batch_tokens}
    sequences = sequences.take(
        np.flatnonzero(finite_sequences(model, maps, sequences, task=task, batch_tokens=batch_tokens))
    )
    if len(sequences) < 2:
        return {}
    halves = [sequences.take(np.arange(start, len(sequences), 2)) for start in (0, 1)]
    sums: dict[str, torch.Tensor] = {}
    scale = (1 + len(sequences) / factors.sequences) ** 0.5 / 2  # two samples' errors add up in squares
    device = next(model.parameters()).device
    for part in partitions(maps, budget_gb):
        held = {m.name: factors[m.name] for m in part}
        try:
            first, second = (eigenvalue_sums(model, part, held, half, **options) for half in halves)
        except NonFiniteError:  # with the sampled labels alone
            return {}
        for m in part:
            pinned = held[m.name].eigenvalues.to(device).double()
            a, b = first[m.name].double() / len(halves[0]), second[m.name].double() / len(halves[1])
            now = (first[m.name] + second[m.name]).double() / len(sequences)
            values = (pinned.sum(), now.sum(), (now - pinned).abs().sum(), scale * (a - b).abs().sum())
            sums[m.name] = torch.stack(values).cpu()
    total = torch.stack(list(sums.values())).sum(dim=0)
    return {
        "sequences": len(sequences),
        **_ratios(total),
        "maps": {name: _ratios(values) for name, values in sums.items()},
    }


def _ratios(values: torch.Tensor) -> dict[str, float]:
    pinned, now, difference, noise = values.tolist()
    scale = pinned or 1.0  # a map that the fit's data never reached
    return {"trace": now / scale, "difference": difference / scale, "noise": noise / scale}
