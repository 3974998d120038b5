"""Per-sequence gradients of one map, as they are or in an eigenbasis, in blocks that are soon used up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from msif_core import products
from msif_core.curvature.factors import Factors, MapFactors
from msif_core.tracking import TrackedMap

CHUNK_ENTRIES = 1 << 26
"""Entries of per-sequence gradients held at one time (256 MB in float32)."""

CACHED_ENTRIES = 1 << 20
"""The same on a CPU (4 MB): a block that is read again while it is in the cache costs a third less."""

CPU_ROWS, CPU_SEQUENCES = 192, 8
"""Rows of a map in a CPU's block, and of how many sequences a multiple: threads share a block by its sequences, and
fewer of either would cost the matrix product its speed."""

Block = tuple[slice, slice, torch.Tensor]
"""Sequences of a batch, rows of the map's G b, and those sequences' gradients in those rows [n, r, d_in].

On an accelerator of `products.width` columns, the last ones zero.
"""


class PerSequenceGradients:
    """sum_t d_t a_t^T of each sequence, formed in one memory block by block.

    A CPU takes blocks that stay in its cache, an accelerator large ones. With `together` a block has all sequences
    of the batch (up to `CHUNK_ENTRIES`): for those who read something else of a map's size for every block.
    """

    def __init__(self, dtype: torch.dtype, *, together: bool = False) -> None:
        self._dtype, self._together = dtype, together
        self._memory = torch.empty(0)

    def blocks(self, _: TrackedMap, a: torch.Tensor, d: torch.Tensor) -> Iterator[Block]:
        """The gradients' blocks, from a [N, T, d_in] and d [N, T, G, b]; each stands until the next is asked for."""
        a, d = products.factor(a, self._dtype), products.factor(d, self._dtype).flatten(2)
        cached = a.device.type == "cpu" and not self._together
        r = even_step(d.shape[2], CPU_ROWS) if a.device.type == "cpu" else d.shape[2]
        n = self.sequences(len(a), r * a.shape[2], a.device, CPU_SEQUENCES if cached else 1)
        if self._memory.numel() < n * r * a.shape[2] or self._memory.device != a.device:
            self._memory = a.new_empty(n * r * a.shape[2], dtype=self._dtype)
        for rows in slices(d.shape[2], r):
            for part in slices(len(a), n):
                left, right = d[part, :, rows].mT, a[part]
                shape = (len(right), left.shape[1], right.shape[2])
                yield part, rows, products.batched(left, right, self._memory[: math.prod(shape)].view(shape))

    def sequences(self, count: int, entries: int, device: torch.device, multiple: int = 1) -> int:
        """How many of `count` sequences, with that many entries each, a block takes."""
        most = CACHED_ENTRIES if device.type == "cpu" and not self._together else CHUNK_ENTRIES
        most = multiple * max(1, most // (multiple * entries))
        return even_step(count, most) if multiple == 1 else min(count, most)


class RotatedGradients:
    """Per-sequence gradients in the eigenbases of `factors`.

    Rotates the tokens or the gradients, whichever takes fewer operations; inputs that several maps share are
    rotated once: `capture` hands all of them the same tensor, and they have one Q_A.
    """

    def __init__(self, factors: Mapping[str, MapFactors] | Factors, dtype: torch.dtype) -> None:
        self.factors = factors
        self._dtype = dtype
        self._inputs: torch.Tensor | None = None
        self._rotated: torch.Tensor | None = None
        self._gradients = PerSequenceGradients(dtype)

    def blocks(self, m: TrackedMap, a: torch.Tensor, d: torch.Tensor) -> Iterator[Block]:
        """As `PerSequenceGradients.blocks`, rotated; where gradients are rotated, a block has all rows.

        Of thin bases, Q_A [d_in, c] and Q_S [P, p, r], blocks have the P r rows and c columns that they lead to.
        """
        factors = self.factors[m.name]
        Q_A, Q_S = (Q.to(a.device, self._dtype) for Q in (factors.Q_A, factors.Q_S))
        c, rows = products.width(Q_A.shape[1], a.device), Q_S.shape[0] * Q_S.shape[2]
        tokens = a.shape[1] * (Q_A.numel() + Q_S.numel() + rows * c)
        if tokens <= m.size * (a.shape[1] + c) + Q_S.numel() * c:
            if self._rotated is None or a is not self._inputs:
                Q_A = products.padded(Q_A, a.shape[-1], c)
                self._inputs, self._rotated = a, products.product(a.to(self._dtype), Q_A)
            yield from self._gradients.blocks(m, self._rotated, rotate_outputs(d.to(self._dtype), Q_S))
        else:
            Q_A = products.padded(Q_A, a.shape[-1], c)
            a, d = a.to(self._dtype), d.to(self._dtype).flatten(2)
            for part in slices(len(a), self._gradients.sequences(len(a), m.size, a.device)):
                gradients = (torch.bmm(d[part].mT, a[part]) @ Q_A).unflatten(1, Q_S.shape[:2])
                yield part, slice(0, rows), (Q_S.mT @ gradients).flatten(1, 2)


def even_step(count: int, most: int) -> int:
    """The step that cuts `count` into the fewest parts of at most `most`, nearly equal ones."""
    return -(-count // -(-count // most))


def slices(count: int, step: int) -> Iterator[slice]:
    """0 .. `count` in slices of `step`."""
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def rotate_outputs(d: torch.Tensor, Q_S: torch.Tensor) -> torch.Tensor:
    """D [N, T, G, b] times Q_S [P, p, r], as blocks on a diagonal: [N, T, P, r]."""
    if Q_S.shape[0] == 1:
        return products.product(d, Q_S[0])
    return torch.einsum("ntgb,gbc->ntgc", d.reshape(*d.shape[:2], *Q_S.shape[:2]), Q_S)
