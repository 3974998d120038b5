"""The sums of the EK-FAC fit over sequences in memory: covariances, corrected eigenvalues (METHOD section 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from msif_core import products
from msif_core.batching import Sequences
from msif_core.capture import Consume, batches_of, capture
from msif_core.curvature.factors import MapFactors
from msif_core.curvature.gradients import RotatedGradients
from msif_core.errors import InputError
from msif_core.losses import Loss, sampled_loss, target_loss
from msif_core.randomness import uniforms
from msif_core.rows import Rows
from msif_core.tracking import ATTENDED, TrackedMap

EIGENVALUE_SEED = 0x5EED
"""Added to the seed of the second pass: fresh labels, independent of the first pass's."""


SYMMETRIC_BLOCK, ACCELERATOR_BLOCK = 256, 512
"""Columns in a block of a symmetric update: narrower ones cost the matrix product its speed."""


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


def statistics(tracked: TrackedMap) -> float:
    """Entries that a pass holds of a map: its covariances or bases, its eigenvalues and room to form them."""
    return float(tracked.d_in**2 + tracked.s_entries + 2 * tracked.size)


def partitions(
    maps: list[TrackedMap], budget_gb: float, held: Callable[[TrackedMap], float] = statistics
) -> Iterator[list[TrackedMap]]:
    """Consecutive maps of which what is `held`, in float32 entries, fits the budget; each part is one pass."""
    part: list[TrackedMap] = []
    used = 0.0
    for tracked in maps:
        need = 4e-9 * held(tracked)
        if part and used + need > budget_gb:
            yield part
            part, used = [], 0.0
        part.append(tracked)
        used += need
    yield part


def covariance_sums(
    model: nn.Module, maps: list[TrackedMap], sequences: Sequences, *, task: str, seed: int, batch_tokens: int
) -> dict[str, torch.Tensor]:
    """Sums over tokens: `A/<input group>` [d_in, d_in] of a a^T and `S/<map>` [P, p, p] of d d^T.

    Of the tokens that a target depends on through the map: where d is zero, a is no part of a gradient either.
    """
    dtype = sum_dtype(model)
    sums: dict[str, torch.Tensor] = {}

    def add(key: str, rows: torch.Tensor) -> None:
        if key not in sums:
            sums[key] = products.zeros(rows, len(rows), *2 * rows.shape[-1:], dtype=dtype)
        add_products(sums[key], products.factor(rows, dtype))

    def consume(tracked: TrackedMap, rows: Rows) -> None:
        if owners[tracked.input_group] == tracked:
            add(f"A/{tracked.input_group}", reached(tracked, rows).flatten(0, 1)[None])
        add(f"S/{tracked.name}", rows.d.reshape(-1, *tracked.pieces).transpose(0, 1))

    owners = {m.input_group: m for m in maps}  # one map of each group adds its inputs
    capture_all(model, maps, sequences, batch_tokens, sampled_loss(task, seed), consume)
    found = {}
    for m in maps:
        A, S = (sums.get(key) for key in (f"A/{m.input_group}", f"S/{m.name}"))
        found[f"A/{m.input_group}"] = _square(A, 1, m.d_in, model, dtype)[0]
        found[f"S/{m.name}"] = _square(S, *m.pieces, model, dtype)
    return found


def _square(total: torch.Tensor | None, count: int, width: int, model: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """Symmetric sums, whole and of their own width: [count, width, width]; zero where no row came."""
    if total is None:
        return torch.zeros(count, width, width, dtype=dtype, device=next(model.parameters()).device)
    mirror(total)
    return total[:, :width, :width].contiguous()


def reached(tracked: TrackedMap, rows: Rows) -> torch.Tensor:
    """The inputs a [N, R, d_in], zero where the gradients d [N, R, G, b] are.

    Behind the last attention that is so at a prompt's tokens. Queries, keys and values share one A: a target depends
    on all tokens before it by their keys and values, if not by their queries.
    """
    if tracked.name.rpartition(".")[2] in ATTENDED:
        return rows.a
    return rows.a * (rows.d.flatten(2).abs().amax(-1, keepdim=True) > 0)


def add_products(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add rows^T rows to `total` [G, b, b], for `rows` [G, n, b], but for the blocks that `mirror` fills in.

    Block rows of the upper triangle: for many of them, half of the operations of the whole product.
    """
    width = symmetric_block(total)
    if total.shape[-1] <= width:
        products.add(total, rows.mT, rows)
        return
    for of_group, own in zip(total, rows, strict=True):
        for start in range(0, total.shape[-1], width):
            stop = start + width
            products.add(of_group[start:stop, start:], own[:, start:stop].mT, own[:, start:])


def symmetric_block(total: torch.Tensor) -> int:
    """Columns in a block of the symmetric `total`, by where it is."""
    return SYMMETRIC_BLOCK if total.device.type == "cpu" else ACCELERATOR_BLOCK


def mirror(total: torch.Tensor) -> None:
    """Copy the blocks above the diagonal of symmetric sums [G, b, b] to below it."""
    width = symmetric_block(total)
    for start in range(0, total.shape[-1], width):
        stop = start + width
        total[:, stop:, start:stop] = total[:, start:stop, stop:].mT


def capture_all(
    model: nn.Module, maps: list[TrackedMap], sequences: Sequences, batch_tokens: int, loss: Loss, consume: Consume
) -> None:
    """Capture all batches of `sequences`.

    Raises:
        NonFiniteError: a sequence's inputs or gradients are not finite; what was summed is spoilt.
    """
    for batch in batches_of(model, maps, sequences, batch_tokens):
        finite: dict[str, torch.Tensor] = {}

        def checked(m: TrackedMap, rows: Rows, finite: dict[str, torch.Tensor] = finite) -> None:
            finite[m.name] = finite_sequence_rows(rows)
            consume(m, rows)

        capture(model, maps, batch, loss, checked)
        table = torch.stack(list(finite.values())).cpu() if finite else torch.ones(1, len(batch.rows))
        if not bool(table.all()):
            first = int(torch.nonzero(~table.all(dim=1))[0])
            raise NonFiniteError(list(finite)[first], sequences, batch.rows[(~table.all(dim=0)).numpy()])


def finite_sequence_rows(rows: Rows) -> torch.Tensor:
    """Whether each sequence's inputs and gradients are finite, and their sums in float32 at least: [N]."""
    dtype = torch.promote_types(rows.d.dtype, torch.float32)
    return (rows.a.flatten(1).sum(dim=1, dtype=dtype) + rows.d.flatten(1).sum(dim=1, dtype=dtype)).isfinite()


def finite_sequences(
    model: nn.Module, maps: list[TrackedMap], sequences: Sequences, *, task: str, batch_tokens: int
) -> npt.NDArray[np.bool_]:
    """Whether each sequence's gradients are finite in every map, [N]; the others belong into quarantine."""
    flags = np.ones(len(sequences), dtype=np.bool_)
    for batch in batches_of(model, maps, sequences, batch_tokens):
        found: list[torch.Tensor] = []

        def consume(_: TrackedMap, rows: Rows, found: list[torch.Tensor] = found) -> None:
            found.append(finite_sequence_rows(rows))

        capture(model, maps, batch, target_loss(task), consume)
        if found:
            flags[batch.rows] = torch.stack(found).all(dim=0).cpu().numpy()
    return flags


def eigenvalue_sums(
    model: nn.Module,
    maps: list[TrackedMap],
    factors: Mapping[str, MapFactors],
    sequences: Sequences,
    *,
    task: str,
    seed: int,
    batch_tokens: int,
) -> dict[str, torch.Tensor]:
    """Sums over sequences of (Q_S^T G Q_A)^2, [G, b, d_in] for each map."""  # fmt: skip
    dtype = sum_dtype(model)
    device = next(model.parameters()).device
    sums = {m.name: torch.zeros(*m.shape[:2], products.width(m.d_in, device), dtype=dtype, device=device) for m in maps}
    rotated = RotatedGradients(factors, dtype)

    def consume(m: TrackedMap, captured: Rows) -> None:
        total = sums[m.name].flatten(0, 1)
        for _, rows, gradients in rotated.blocks(m, captured.a, captured.d):
            total[rows].add_(products.squares_(gradients))

    capture_all(model, maps, sequences, batch_tokens, sampled_loss(task, seed + EIGENVALUE_SEED), consume)
    return {m.name: sums[m.name][..., : m.d_in] for m in maps}
