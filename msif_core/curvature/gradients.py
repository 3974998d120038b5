"""Per-sequence gradients of one map, and their rotation into an eigenbasis."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from msif_core.curvature.factors import MapFactors
from msif_core.models import TrackedMap

CHUNK_ENTRIES = 1 << 26
"""Entries of per-sequence gradients held at one time (256 MB in float32)."""


def gradient_chunks(tracked: TrackedMap, count: int) -> Iterator[slice]:
    """Slices of `count` sequences whose gradients of one map fit into `CHUNK_ENTRIES` together."""
    step = max(1, CHUNK_ENTRIES // tracked.size)
    return (slice(start, start + step) for start in range(0, count, step))


class PerSequenceGradients:
    """sum_t d_t a_t^T of each sequence, [N, G, b, d_in], from a [N, T, d_in] and d [N, T, G, b]; the next call's too.

    One memory for all calls: on a CPU, the pages that the system hands out anew for each result cost as much time as
    the product.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def __call__(self, a: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        """The gradients; they stand until the next call."""
        rows = d.flatten(2).mT
        shape = (len(a), rows.shape[1], a.shape[2])
        if self._memory.numel() < math.prod(shape) or (self._memory.device, self._memory.dtype) != (a.device, a.dtype):
            self._memory = a.new_empty(math.prod(shape))
        out = self._memory[: math.prod(shape)].view(shape)
        return torch.bmm(rows, a, out=out).unflatten(1, d.shape[2:])


class PlainGradients:
    """Per-sequence gradients as they are, in the dtype of the sums."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._gradients = PerSequenceGradients()

    def chunks(self, m: TrackedMap, a: torch.Tensor, d: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """As those of `RotatedGradients`."""
        for part in gradient_chunks(m, len(a)):
            yield part, self._gradients(a[part].to(self._dtype), d[part].to(self._dtype))


class RotatedGradients:
    """Per-sequence gradients in the eigenbases of `factors`, in the factors' dtype.

    Rotates the tokens or the gradients, whichever takes fewer operations; inputs that several maps share are
    rotated once: `capture` hands all of them the same tensor, and they have one Q_A.
    """

    def __init__(self, factors: Mapping[str, MapFactors]) -> None:
        self.factors = factors
        self._inputs: torch.Tensor | None = None
        self._rotated: torch.Tensor | None = None
        self._gradients = PerSequenceGradients()

    def chunks(self, m: TrackedMap, a: torch.Tensor, d: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows of the batch and their rotated gradients [n, G, b, d_in], from a [N, T, d_in] and d [N, T, G, b].

        A chunk's gradients stand until the next one is asked for.
        """
        factors = self.factors[m.name]
        Q_A, Q_S = factors.Q_A, factors.Q_S
        tokens = a.shape[1] * (m.d_in**2 + m.groups * m.shape[1] ** 2)
        if tokens <= m.size * (m.shape[1] + m.d_in):
            if self._rotated is None or a is not self._inputs:
                self._inputs, self._rotated = a, a.to(Q_A.dtype) @ Q_A
            outputs = rotate_outputs(d.to(Q_A.dtype), Q_S)
            for part in gradient_chunks(m, len(a)):
                yield part, self._gradients(self._rotated[part], outputs[part])
        else:
            for part in gradient_chunks(m, len(a)):
                yield part, factors.rotate(self._gradients(a[part].to(Q_A.dtype), d[part].to(Q_A.dtype)))


def rotate_outputs(d: torch.Tensor, Q_S: torch.Tensor) -> torch.Tensor:
    """D [N, T, G, b] times each block's Q_S [G, b, b]."""
    if Q_S.shape[0] == 1:
        return d @ Q_S[0]
    return torch.einsum("ntgb,gbc->ntgc", d, Q_S)
