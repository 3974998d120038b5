"""Matrix products as a device does them fastest (docs/performance.md).

A bias makes rows of d + 1 entries. A CPU's product that writes such rows one right behind the other runs at 0.70 to
0.90 of its rate: they are views of wider ones that start on 64-byte boundaries. An accelerator's tensor cores multiply
matrices of odd width at 0.3 to 0.4 of their rate, wherever the rows start: there rows are wider themselves, with zeros.
And it multiplies bfloat16 as it is and sums in float32, which a CPU has to be given in float32.
"""

from __future__ import annotations

import torch

ROW = 16
"""Entries of a row are held in multiples of this."""


def _held(n: int) -> int:
    return -(-n // ROW) * ROW


def width(n: int, device: torch.device) -> int:
    """Columns in which `n` are held, those from `n` on zero: as many on a CPU, a multiple of 16 on an accelerator."""
    return n if device.type == "cpu" else _held(n)


def padded(x: torch.Tensor, *shape: int) -> torch.Tensor:
    """X with zeros behind it along its last axes, until they have this shape; x itself where they do."""
    more = [want - n for want, n in zip(shape, x.shape[-len(shape) :], strict=True)]
    return torch.nn.functional.pad(x, [n for each in reversed(more) for n in (0, each)]) if any(more) else x


def zeros(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Zeros with aligned rows on the device of `like`, and of its dtype where none is given."""
    return like.new_zeros(*shape[:-1], _held(shape[-1]), dtype=dtype)[..., : shape[-1]]


def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """X [..., k] times y [k, n], without a gradient: [..., n], with aligned rows."""
    n = y.shape[1]
    out = x.new_empty(*x.shape[:-1], _held(n))[..., :n]
    torch.mm(x.flatten(0, -2), y, out=out.flatten(0, -2))
    return out


def factor(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """X as it goes into a product that is summed in `dtype`: of that dtype, but narrower where the device can."""
    return x if x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16) else x.to(dtype)


def batched(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The factors' products [n, r, k] times [n, k, c] in `out`."""
    return torch.bmm(x, y, out=out) if x.dtype == out.dtype else torch.bmm(x, y, out_dtype=out.dtype, out=out)


def add(total: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    """Add the factors' product, of two matrices or of batches of them, to `total`."""
    add_product = torch.baddbmm if total.ndim == 3 else torch.addmm
    if x.dtype == total.dtype:
        add_product(total, x, y, out=total)
    else:
        add_product(total, x, y, out_dtype=total.dtype, out=total)


def squares_(x: torch.Tensor) -> torch.Tensor:
    """Sums of squares along the first axis; x itself may be spoilt.

    An accelerator's norm reads x once, where squares are written and read again; a CPU's norm along it is slow.
    """
    return x.square_().sum(dim=0) if x.device.type == "cpu" else torch.linalg.vector_norm(x, dim=0).square_()
