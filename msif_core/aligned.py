"""Matrices whose rows start on 64-byte boundaries, as views of wider ones.

A bias makes rows of d + 1 entries. A matrix product that writes such rows one right behind the other runs at 0.55 to
0.85 of its rate (docs/performance.md); which rows it reads matters little.
"""

from __future__ import annotations

import torch

ROW = 16
"""Entries of a row are held in multiples of this."""


def _held(n: int) -> int:
    return -(-n // ROW) * ROW


def zeros(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Zeros on the device of `like`, and of its dtype where none is given."""
    return like.new_zeros(*shape[:-1], _held(shape[-1]), dtype=dtype)[..., : shape[-1]]


def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """X [..., k] times y [k, n], without a gradient: [..., n]."""
    n = y.shape[1]
    out = x.new_empty(*x.shape[:-1], _held(n))[..., :n]
    torch.mm(x.flatten(0, -2), y, out=out.flatten(0, -2))
    return out
