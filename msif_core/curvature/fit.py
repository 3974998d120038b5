"""The sums of the EK-FAC fit over sequences in memory: covariances, corrected eigenvalues (METHOD section 3)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from msif_core.batching import Sequences, batches
from msif_core.capture import Consume, capture
from msif_core.curvature.factors import MapFactors
from msif_core.errors import InputError
from msif_core.losses import Loss, sampled_loss, target_loss, uniforms
from msif_core.models import TrackedMap

EIGENVALUE_SEED = 0x5EED
"""Added to the seed of the second pass: fresh labels, independent of the first pass's."""


CHUNK_ENTRIES = 1 << 26
"""Entries of per-sequence gradients held at one time (256 MB in float32)."""


class NonFiniteError(InputError):
    """NaN or infinite gradients; names the map, and lists the rows of such sequences."""

    def __init__(self, name: str, sequences: Sequences, rows: npt.NDArray[np.int64]) -> None:
        self.rows = rows
        super().__init__(
            f"{name}: NaN or infinite gradients from document {sequences.document_ids[rows[0]]!r} (of {len(rows)} such "
            "sequences in its batch); set compute.dtype: float32, or take the document out"
        )


def sample_rows(fingerprints: list[str], share: float, seed: int) -> npt.NDArray[np.int64]:
    """Rows of a random sample of about `share` of the sequences: those whose hash falls below it.

    Which sequences are taken depends on their content and the seed alone, not on shards or order.
    """
    return np.flatnonzero(uniforms(fingerprints, 1, seed ^ 0xC0FFEE)[:, 0] < share)


def sum_dtype(model: nn.Module) -> torch.dtype:
    """float64 for a float64 model, float32 for every other."""
    return torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32


def partitions(maps: list[TrackedMap], budget_gb: float) -> Iterator[list[TrackedMap]]:
    """Consecutive maps whose statistics fit the budget together; each part is one pass over the shard."""
    part: list[TrackedMap] = []
    used = 0.0
    for tracked in maps:
        groups, block, d_in = tracked.shape
        need = 4e-9 * (d_in * d_in + groups * block * block + 2 * groups * block * d_in)
        if part and used + need > budget_gb:
            yield part
            part, used = [], 0.0
        part.append(tracked)
        used += need
    yield part


def covariance_sums(
    model: nn.Module, maps: list[TrackedMap], sequences: Sequences, *, task: str, seed: int, batch_tokens: int
) -> dict[str, torch.Tensor]:
    """Sums over tokens: `A/<input group>` [d_in, d_in] of a a^T and `S/<map>` [G, b, b] of d d^T."""
    dtype = sum_dtype(model)
    sums: dict[str, torch.Tensor] = {}

    def add(key: str, rows: torch.Tensor) -> None:
        rows = rows.to(dtype)
        if key not in sums:
            sums[key] = rows.new_zeros(*rows.shape[:-2], rows.shape[-1], rows.shape[-1])
        if rows.ndim == 2:
            sums[key].addmm_(rows.mT, rows)
        else:
            sums[key].baddbmm_(rows.mT, rows)

    def consume(tracked: TrackedMap, a: torch.Tensor, d: torch.Tensor) -> None:
        if tracked.name in owners:
            add(f"A/{tracked.input_group}", a.flatten(0, 1))
        flat = d.flatten(0, 1)
        add(f"S/{tracked.name}", flat.squeeze(1)[None] if tracked.groups == 1 else flat.transpose(0, 1))

    owners = {m.name for m in {m.input_group: m for m in maps}.values()}  # one map of each group adds its inputs
    capture_all(model, maps, sequences, batch_tokens, sampled_loss(task, seed), consume)
    return sums


def capture_all(
    model: nn.Module, maps: list[TrackedMap], sequences: Sequences, batch_tokens: int, loss: Loss, consume: Consume
) -> None:
    """Capture all batches of `sequences`.

    Raises:
        NonFiniteError: a sequence's inputs or gradients are not finite; what was summed is spoilt.
    """
    for batch in batches(sequences, batch_tokens, next(model.parameters()).device):
        finite: dict[str, torch.Tensor] = {}

        def checked(m: TrackedMap, a: torch.Tensor, d: torch.Tensor, finite: dict[str, torch.Tensor] = finite) -> None:
            finite[m.name] = finite_rows(a, d)
            consume(m, a, d)

        capture(model, maps, batch, loss, checked)
        table = torch.stack(list(finite.values())).cpu()
        if not bool(table.all()):
            first = int(torch.nonzero(~table.all(dim=1))[0])
            raise NonFiniteError(list(finite)[first], sequences, batch.rows[(~table.all(dim=0)).numpy()])


def finite_rows(a: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """Whether each sequence's inputs and gradients are finite: [N]."""
    return (a.flatten(1).sum(dim=1, dtype=torch.float64) + d.flatten(1).sum(dim=1, dtype=torch.float64)).isfinite()


def finite_sequences(
    model: nn.Module, maps: list[TrackedMap], sequences: Sequences, *, task: str, batch_tokens: int
) -> npt.NDArray[np.bool_]:
    """Whether each sequence's gradients are finite in every map, [N]; the others belong into quarantine."""
    flags = np.ones(len(sequences), dtype=np.bool_)
    for batch in batches(sequences, batch_tokens, next(model.parameters()).device):
        found: list[torch.Tensor] = []

        def consume(_: TrackedMap, a: torch.Tensor, d: torch.Tensor, found: list[torch.Tensor] = found) -> None:
            found.append(finite_rows(a, d))

        capture(model, maps, batch, target_loss(task), consume)
        flags[batch.rows] = torch.stack(found).all(dim=0).cpu().numpy()
    return flags


def eigenvalue_sums(
    model: nn.Module,
    maps: list[TrackedMap],
    factors: dict[str, MapFactors],
    sequences: Sequences,
    *,
    task: str,
    seed: int,
    batch_tokens: int,
) -> dict[str, torch.Tensor]:
    """Sums over sequences of (Q_S^T G Q_A)^2, [G, b, d_in] for each map."""  # fmt: skip
    dtype = sum_dtype(model)
    sums = {m.name: torch.zeros(m.shape, dtype=dtype, device=next(model.parameters()).device) for m in maps}

    def consume(tracked: TrackedMap, a: torch.Tensor, d: torch.Tensor) -> None:
        for part in gradient_chunks(tracked, len(a)):
            rotated = rotated_gradients(a[part].to(dtype), d[part].to(dtype), factors[tracked.name])
            sums[tracked.name].add_(rotated.square_().sum(dim=0))

    capture_all(model, maps, sequences, batch_tokens, sampled_loss(task, seed + EIGENVALUE_SEED), consume)
    return sums


def gradient_chunks(tracked: TrackedMap, count: int) -> Iterator[slice]:
    """Slices of `count` sequences whose gradients of one map fit into `CHUNK_ENTRIES` together."""
    step = max(1, CHUNK_ENTRIES // tracked.size)
    return (slice(start, start + step) for start in range(0, count, step))


def rotated_gradients(a: torch.Tensor, d: torch.Tensor, factors: MapFactors) -> torch.Tensor:
    """Per-sequence gradients in the eigenbasis, [N, G, b, d_in], from a [N, T, d_in] and d [N, T, G, b].

    Rotates the tokens or the gradients, whichever takes fewer operations.
    """
    groups, block, d_in = d.shape[-2], d.shape[-1], a.shape[-1]
    tokens = a.shape[1] * (d_in * d_in + groups * block * block)
    gradients = groups * block * d_in * (block + d_in)
    if tokens <= gradients:
        return per_sequence_gradients(a @ factors.Q_A, rotate_outputs(d, factors.Q_S))
    return factors.rotate(per_sequence_gradients(a, d))


def rotate_outputs(d: torch.Tensor, Q_S: torch.Tensor) -> torch.Tensor:
    """D [N, T, G, b] times each block's Q_S [G, b, b]."""
    if Q_S.shape[0] == 1:
        return d @ Q_S[0]
    return torch.einsum("ntgb,gbc->ntgc", d, Q_S)


def per_sequence_gradients(a: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """sum_t d_t a_t^T of each sequence: [N, G, b, d_in]."""
    return torch.bmm(d.flatten(2).mT, a).unflatten(1, d.shape[2:])
