"""Queries of low rank: each filtered gradient cut to its r largest singular values.

A filtered gradient takes as much memory as the model's tracked maps, so that many queries of a large model need many
passes over the documents (`scoring.query_groups`). Cut to rank r they take (d_in + d_out) r a map, and all queries
share one pass: <V, G> is a sum over tokens of (U^T d_t) . (W a_t), the sequence's gradient G never formed. What the
cut leaves out is known: the share of V's norm that is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from msif_core import products
from msif_core.batching import Sequences
from msif_core.capture import batches_of, capture
from msif_core.curvature.fit import sum_dtype
from msif_core.curvature.gradients import CHUNK_ENTRIES
from msif_core.losses import target_loss
from msif_core.rows import Rows
from msif_core.tracking import TrackedMap

OVERSAMPLING, ITERATIONS = 8, 2
"""Extra directions and power iterations of the range finder (Halko et al. 2011, arXiv 0909.4061, algorithm 4.4)."""


@dataclass(frozen=True)
class LowRank:
    """V ~ U W of each query and block: U [Q, G, b, r], W [Q, G, r, d_in]; squared norms of V and of its rest [Q]."""

    U: torch.Tensor
    W: torch.Tensor
    squares: torch.Tensor
    lost: torch.Tensor


def cut(V: torch.Tensor, rank: int) -> LowRank:
    """V [Q, G, b, d_in] cut to that rank, block by block, by a randomised singular value decomposition.

    Nearly the best of that rank, and the same for the same V.
    """
    width = min(rank + OVERSAMPLING, *V.shape[-2:])
    with torch.random.fork_rng(devices=[V.device] if V.is_cuda else []):
        torch.manual_seed(0)
        U, S, W = torch.svd_lowrank(V, q=width, niter=ITERATIONS)
    U, S, W = U[..., :rank], S[..., :rank], W[..., :rank]
    squares = V.double().square().sum(dim=(1, 2, 3))
    kept = S.double().square().sum(dim=(1, 2))
    return LowRank(U * S[..., None, :], W.mT.contiguous(), squares, (squares - kept).clamp_min(0))


def joined(first: LowRank | None, second: LowRank) -> LowRank:
    """The queries of both."""
    if first is None:
        return second
    pairs = zip(vars(first).values(), vars(second).values(), strict=True)
    return LowRank(*(torch.cat(pair) for pair in pairs))


def relative_error(queries: Mapping[str, LowRank]) -> npt.NDArray[np.float64]:
    """Norm of what all maps' cuts leave out over the norm of the whole gradient, [Q]; 0 where that is 0."""
    lost = torch.stack([q.lost.cpu() for q in queries.values()]).sum(dim=0)
    squares = torch.stack([q.squares.cpu() for q in queries.values()]).sum(dim=0)
    return torch.where(squares > 0, lost / squares, 0).sqrt().numpy()


def score_low_rank(
    model: nn.Module,
    maps: list[TrackedMap],
    queries: Mapping[str, LowRank],
    sequences: Sequences,
    batch_tokens: int,
    *,
    task: str,
) -> npt.NDArray[np.float64]:
    """Scores [Q, N] of the sequences, up to what the cuts leave out."""
    device, dtype = next(model.parameters()).device, sum_dtype(model)
    maps = [m for m in maps if m.name in queries]
    count = len(next(iter(queries.values())).U)
    scores = np.zeros((count, len(sequences)), dtype=np.float64)
    for batch in batches_of(model, maps, sequences, batch_tokens):
        total = torch.zeros(count, len(batch.rows), dtype=torch.float64, device=device)

        def consume(m: TrackedMap, rows: Rows, total: torch.Tensor = total) -> None:
            a, d, held = rows.a.to(dtype), rows.d.to(dtype), queries[m.name]
            step = max(1, CHUNK_ENTRIES // (a.shape[0] * a.shape[1] * m.groups * held.W.shape[2]))
            for part in (slice(start, start + step) for start in range(0, count, step)):
                U, W = held.U[part].to(a.device, dtype), products.padded(held.W[part].to(a.device, dtype), a.shape[-1])
                inputs = (a @ W.flatten(0, 2).mT).unflatten(-1, (-1, *W.shape[1:3]))
                outputs = torch.einsum("ntgb,qgbr->ntqgr", d, U)
                total[part] += inputs.mul_(outputs).sum(dim=(1, 3, 4)).mT

        capture(model, maps, batch, target_loss(task), consume)
        scores[:, batch.rows] = total.cpu().numpy()
    return scores
