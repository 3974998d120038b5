"""Exact scores: the queries' filtered gradients against each sequence's gradient, no sketch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from msif_core import products
from msif_core.batching import Batch, Sequences, batches
from msif_core.capture import batches_of, capture
from msif_core.curvature.factors import Factors
from msif_core.curvature.fit import sum_dtype
from msif_core.curvature.gradients import CHUNK_ENTRIES, PerSequenceGradients, RotatedGradients
from msif_core.forward import forward
from msif_core.losses import target_loss, target_losses
from msif_core.rows import Rows
from msif_core.tracking import TrackedMap

FloatArray = npt.NDArray[np.float32]
Gradients = dict[str, torch.Tensor]

COPIES = 2
"""Of a query's gradient that are held at one time, raw and filtered; of the map that is being filtered, one more."""


def query_groups(maps: list[TrackedMap], queries: int, budget_gb: float) -> Iterator[tuple[slice, list[TrackedMap]]]:
    """Cut `queries` x maps into blocks whose gradients, raw and filtered, fit the budget (or are as small as can be).

    As many queries together as the largest map allows, then as many maps together as fit for those.
    """
    largest = max(m.size for m in maps)
    step = max(1, min(queries, int(budget_gb / ((COPIES + 1) * 4e-9 * largest))))
    for start in range(0, queries, step):
        rows = slice(start, min(start + step, queries))
        group: list[TrackedMap] = []
        for m in maps:
            if group and COPIES * 4e-9 * (rows.stop - start) * (sum(g.size for g in group) + m.size) > budget_gb:
                yield rows, group
                group = []
            group.append(m)
        yield rows, group


def queries_within(maps: list[TrackedMap], budget_gb: float) -> int:
    """How many queries' gradients of all maps fit into the budget, raw and filtered; at least one."""
    return max(1, int(budget_gb / (COPIES * 4e-9 * sum(m.size for m in maps))))


def query_gradients(
    model: nn.Module,
    maps: list[TrackedMap],
    sequences: Sequences,
    batch_tokens: int,
    *,
    task: str,
    measurements: Sequence[Mapping[int, float]] | None = None,
    factors: Factors | None = None,
) -> Gradients:
    """Gradient of each measurement: map name to [Q, G, b, d_in], in the sums' dtype; with `factors`, rotated by them.

    A measurement is a weighted sum of sequences' summed losses, a mapping of rows to weights; without
    `measurements`, each sequence is one.
    """
    device, dtype = next(model.parameters()).device, sum_dtype(model)
    terms = [{row: 1.0} for row in range(len(sequences))] if measurements is None else measurements
    owners, members, weights = (
        torch.tensor(column, device=device)
        for column in zip(*((q, row, w) for q, term in enumerate(terms) for row, w in term.items()), strict=True)
    )
    found = {m.name: torch.zeros(len(terms), *m.shape, dtype=dtype, device=device) for m in maps}
    formed = PerSequenceGradients(dtype) if factors is None else RotatedGradients(factors, dtype)
    for batch in batches_of(model, maps, sequences, batch_tokens):
        place = torch.full((len(sequences),), -1, device=device)
        place[torch.from_numpy(batch.rows).to(device)] = torch.arange(len(batch.rows), device=device)
        at = place[members]

        def consume(m: TrackedMap, captured: Rows, at: torch.Tensor = at) -> None:
            total = found[m.name].flatten(1, 2)
            for part, rows, gradients in formed.blocks(m, captured.a, captured.d):
                used = (at >= part.start) & (at < part.stop)
                own = gradients[at[used] - part.start, :, : m.d_in] * weights[used, None, None].to(dtype)
                total[:, rows].index_add_(0, owners[used], own)

        capture(model, maps, batch, target_loss(task), consume)
    return found


def score_sequences(
    model: nn.Module,
    maps: list[TrackedMap],
    filtered: Gradients,
    sequences: Sequences,
    batch_tokens: int,
    *,
    task: str,
) -> npt.NDArray[np.float64]:
    """Exact scores [Q, N]: the inner products of filtered query gradients and sequence gradients.

    One query is contracted with the tokens; several share the sequence's gradient, formed once.
    Empties `filtered`: an accelerator holds each padded, and not both.
    """
    device, dtype = next(model.parameters()).device, sum_dtype(model)
    maps = [m for m in maps if m.name in filtered]
    queries = next(iter(filtered.values())).shape[0]
    held = {
        m.name: products.padded(filtered.pop(m.name).to(device, dtype), products.width(m.d_in, device)) for m in maps
    }
    scores = np.zeros((queries, len(sequences)), dtype=np.float64)
    formed = PerSequenceGradients(dtype, together=True)
    for batch in batches_of(model, maps, sequences, batch_tokens):
        total = torch.zeros(queries, len(batch.rows), dtype=torch.float64, device=device)

        def consume(m: TrackedMap, captured: Rows, total: torch.Tensor = total) -> None:
            V = held[m.name].flatten(1, 2)
            if queries == 1:
                total[0] += row_products(V[0], captured.a.to(dtype), captured.d).sum(dim=1)
            else:
                for part, rows, gradients in formed.blocks(m, captured.a, captured.d):
                    total[:, part] += V[:, rows].flatten(1) @ gradients.flatten(1).mT

        capture(model, maps, batch, target_loss(task), consume)
        scores[:, batch.rows] = total.cpu().numpy()
    return scores


def row_products(V: torch.Tensor, a: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """d^T V a of each row: [N, R], for one query's V [G b, d_in]."""
    return (a @ V.mT).mul_(d.flatten(2)).sum(dim=-1)


def contributions(
    model: nn.Module,
    maps: list[TrackedMap],
    filtered: Gradients,
    sequences: Sequences,
    batch_tokens: int,
    *,
    task: str,
) -> tuple[list[dict[str, float]], list[FloatArray]]:
    """One query's score of each sequence, split by map and, the other way, by token.

    A token's part is what its input position contributes, d_t^T V a_t summed over maps; that of maps that read
    one vector a sequence goes to the first token. Both splits add up to the exact score.
    """  # fmt: skip
    device, dtype = next(model.parameters()).device, sum_dtype(model)
    maps = [m for m in maps if m.name in filtered]
    by_map: list[dict[str, float]] = [{} for _ in range(len(sequences))]
    by_token: list[FloatArray] = [np.zeros(len(ids), np.float32) for ids in sequences.input_ids]
    for batch in batches_of(model, maps, sequences, batch_tokens):

        def consume(m: TrackedMap, captured: Rows, batch: Batch = batch) -> None:
            V = products.padded(filtered[m.name][0].to(device, dtype).flatten(0, 1), captured.a.shape[-1])
            products_of_rows = row_products(V, captured.a.to(dtype), captured.d)
            found = captured.by_token(products_of_rows, batch.input_ids.shape[1]).cpu().numpy()
            for i, row in enumerate(batch.rows):
                by_map[row][m.name] = float(found[i].sum())
                by_token[row] += found[i, : len(by_token[row])].astype(np.float32)

        capture(model, maps, batch, target_loss(task), consume)
    return by_map, by_token


def query_contributions(
    model: nn.Module,
    maps: list[TrackedMap],
    documents: Gradients,
    sequences: Sequences,
    batch_tokens: int,
    *,
    task: str,
) -> list[FloatArray]:
    """Scores of documents, split over the tokens of a query's sequences: of each sequence float32 [D, T].

    `documents` are gradients [D, G, b, d_in] of documents, filtered back up the chain (`Chain.filter_back`). As
    <v, V> with the query's gradient v = sum_t d_t a_t^T is sum_t d_t^T V a_t, a document's row adds up to its exact
    score with that sequence.
    """
    dtype = sum_dtype(model)
    maps = [m for m in maps if m.name in documents]
    count = len(next(iter(documents.values())))
    found: list[FloatArray] = [np.zeros((count, len(ids)), np.float32) for ids in sequences.input_ids]
    for batch in batches_of(model, maps, sequences, batch_tokens):

        def consume(m: TrackedMap, captured: Rows, batch: Batch = batch) -> None:
            a, d = captured.a.to(dtype), captured.d.to(dtype)
            step = max(1, CHUNK_ENTRIES // (d.numel() + 1))
            parts = torch.cat([row_products_of(V, a, d) for V in documents[m.name].split(step)], dim=1)
            split = captured.by_token(parts, batch.input_ids.shape[1]).cpu().numpy()
            for i, row in enumerate(batch.rows):
                found[row] += split[i, :, : found[row].shape[1]].astype(np.float32)

        capture(model, maps, batch, target_loss(task), consume)
    return found


def row_products_of(V: torch.Tensor, a: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """d^T V a of each row and document: [N, D, R], for V [D, G, b, d_in]."""
    V = products.padded(V.to(a.device, a.dtype), a.shape[-1])
    reached = (a @ V.flatten(0, 2).mT).unflatten(-1, (len(V), -1))
    return (reached * d.flatten(2)[:, :, None]).sum(dim=-1).mT


@torch.no_grad()
def losses(model: nn.Module, sequences: Sequences, batch_tokens: int, *, task: str) -> Sequence[float]:
    """Summed negative log-likelihood of each sequence's targets."""
    found = np.zeros(len(sequences))
    for batch in batches(sequences, batch_tokens, next(model.parameters()).device):
        found[batch.rows] = target_losses(forward(model, batch), batch, task).double().cpu().numpy()
    return [float(x) for x in found]
