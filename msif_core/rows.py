"""What a pass hands out of a tracked map: its inputs and output gradients, row by row of each sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from msif_core import products
from msif_core.module_calls import TOKENS, Layout


@dataclass(frozen=True)
class Rows:
    """The rows of N sequences: input vectors and the gradients of the loss with respect to what became of them.

    Most maps read one row a token. An expert reads the tokens that were routed to it, a pooler one row a sequence, a
    map that a forward calls twice two rows a token. A sequence's gradient is the sum over its rows, d_r a_r^T.

    Attributes:
        a: inputs [N, R, d_in], zero in rows that only fill up.
        d: gradients [N, R, G, b], zero there too.
        tokens: positions of the rows' tokens, int64 [N, R]; 0 where a row belongs to none, or to several.
    """

    a: torch.Tensor
    d: torch.Tensor
    tokens: torch.Tensor

    def by_token(self, values: torch.Tensor, length: int) -> torch.Tensor:
        """Sums of the rows' values [N, ..., R] over the rows of each token: [N, ..., length]."""
        index = self.tokens.view(len(values), *[1] * (values.ndim - 2), -1).expand_as(values)
        return values.new_zeros(*values.shape[:-1], length).scatter_add_(-1, index, values)


def arrange(x: torch.Tensor, layout: Layout | None, n: int, t: int) -> torch.Tensor | None:
    """X with axes as `layout` says, and one more, by sequence: [N, R, d]; None where its axes have other sizes.

    Rows of one sequence alone need no layout.
    """
    sizes: dict[str | int, int] = {"N": n, "T": t, "NT": n * t}
    if layout is None or x.shape[:-1] != tuple(sizes.get(axis, axis) for axis in layout):
        return x.reshape(1, -1, x.shape[-1]) if n == 1 else None
    if layout == TOKENS:
        return x
    if "NT" in layout:
        at = layout.index("NT")
        x = x.unflatten(at, (n, t))
    else:
        at = layout.index("N")
    return x.movedim(at, 0).flatten(1, -2) if x.ndim > 2 else x[:, None]


def positions(layout: Layout | None, rows: torch.Tensor, n: int, t: int) -> torch.Tensor | None:
    """The token of each of the `rows` [N, R, d] of an input with that layout, [N, R]; None where it is not known."""
    if layout is None or not {"T", "NT"} & set(layout):
        return None
    axes = [axis for axis in layout if axis != "N"]
    sizes = [t if axis in ("T", "NT") else int(axis) for axis in axes]
    if torch.Size(sizes).numel() != rows.shape[1]:
        return None
    at = next(i for i, axis in enumerate(axes) if axis in ("T", "NT"))
    shape = [t if i == at else 1 for i in range(len(axes))]
    tokens = torch.arange(t, device=rows.device).view(shape).expand(sizes)
    return tokens.reshape(1, -1).expand(n, -1)


def pack(tokens: torch.Tensor, n: int, t: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where rows of a batch's `tokens` (their numbers, sequence after sequence) go in [N, R].

    Returns their sequences and places [rows], and the positions of the tokens, [N, R].
    """
    sequences = tokens.div(t, rounding_mode="floor")
    order = sequences.argsort(stable=True)
    counts = torch.bincount(sequences, minlength=n)
    places = torch.empty_like(tokens)
    places[order] = torch.arange(len(tokens), device=tokens.device) - (counts.cumsum(0) - counts)[sequences[order]]
    positions = tokens.new_zeros(n, int(counts.max()))
    positions[sequences, places] = tokens % t
    return sequences, places, positions


def map_inputs(a: torch.Tensor, mask: torch.Tensor | None, bias: bool) -> torch.Tensor:
    """Inputs [N, R, d], with a coordinate of one for a bias, that are zero where the `mask` [N, R, 1] is not set.

    Of `products.width` columns.
    """
    d = a.shape[-1]
    width = products.width(d + bias, a.device)
    if width == d:
        return a if mask is None else a * mask
    scale = a.new_ones(1) if mask is None else mask.to(a.dtype)
    out = a.new_empty(*a.shape[:-1], width)
    torch.mul(a, scale, out=out[..., :d])
    out[..., d:] = 0
    if bias:
        out[..., d : d + 1] = scale
    return out
