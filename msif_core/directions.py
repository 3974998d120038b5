"""The eigendirections that a sketch keeps, and how it splits the filter between documents and queries.

A score is a sum of phi_p psi_p over eigen-coordinates p. The factors alone tell the mean squares of both: for documents
f Lambda of the attributed stage; for queries that are like the last stage's own data f e, where e is the last stage's
Lambda, multiplied by the square of each later stage's filter and carried from one eigenbasis to that below it by the
squared cosines between them (coordinates count as uncorrelated, which is EK-FAC's own assumption). From these:

- An eigendirection, a column of Q_A or of a piece of Q_S, is worth what its coordinates are, sum of E phi^2 E psi^2,
  for what rotating into it costs. The best are kept, up to a share of the rotations' operations.
- Any split of f into a document's and a query's weight gives the same scores; the least E |phi|^2 E |psi|^2, which the
  error of a sketch goes by, has the document's f^(1/2) (E psi^2 / E phi^2)^(1/4). Kept is the best of those that are
  f^(1/2) times a row times a column of each map.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file

from msif_core.chain import Chain
from msif_core.curvature.factors import MapFactors, write_tensors
from msif_core.tracking import TrackedMap

TURNS = 10
"""In which the split's rows and columns are found: on the demo both sides' energies then agree to a hundredth."""


@dataclass(frozen=True)
class Directions:
    """What is kept of one map: r rows of each of the P pieces of S, and c columns of A.

    Attributes:
        rows: places among a piece's eigenvectors, int64 [P, r].
        columns: places among A's eigenvectors, int64 [c].
        row_split, column_split: a document's weight beside f^(1/2), row times column: float32 [P, r] and [c].
    """

    rows: torch.Tensor
    columns: torch.Tensor
    row_split: torch.Tensor
    column_split: torch.Tensor

    @classmethod
    def even(cls, m: TrackedMap, share: float = 1.0) -> Directions:
        """The first directions of either side, that share of them, and the even split."""
        (pieces, p), d_in = m.pieces, m.d_in
        r, c = max(1, round(share * p)), max(1, round(share * d_in))
        return cls(torch.arange(r).expand(pieces, r), torch.arange(c), torch.ones(pieces, r), torch.ones(c))

    @property
    def size(self) -> int:
        """Coordinates that are kept, P r c."""
        return self.rows.numel() * len(self.columns)

    def take(self, V: torch.Tensor) -> torch.Tensor:
        """The kept coordinates of V [..., G, b, d_in] in the eigenbasis: [..., P r c]."""
        (pieces, r), c = self.rows.shape, len(self.columns)
        if r * c * pieces == V.shape[-3:].numel():
            return V.flatten(-3)
        rows = V.reshape(*V.shape[:-3], pieces, -1, V.shape[-1])
        index = self.rows.to(V.device)[..., None].expand(*rows.shape[:-3], pieces, r, V.shape[-1])
        return rows.gather(-2, index)[..., self.columns.to(V.device)].flatten(-3)

    def factors(self, whole: MapFactors) -> MapFactors:
        """The kept columns of Q_A [d_in, c] and of each piece of Q_S [P, p, r], without eigenvalues."""
        Q_A, Q_S = whole.Q_A, whole.Q_S
        if self.size < Q_A.shape[1] * Q_S.shape[0] * Q_S.shape[2]:
            index = self.rows.to(Q_S.device)[:, None].expand(-1, Q_S.shape[1], -1)
            Q_A, Q_S = Q_A[:, self.columns.to(Q_A.device)], Q_S.gather(2, index)
        return MapFactors(Q_A, Q_S, torch.empty(0))

    @property
    def split(self) -> torch.Tensor:
        """A document's weight beside f^(1/2), [P r c]."""
        return (self.row_split[..., None] * self.column_split).flatten()


def expected_energies(chain: Chain, m: TrackedMap) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squares of a map's evenly weighted coordinates, of documents and of queries: float64 [G, b, d_in] each.

    Those of queries are zero where the map has no parent in a lower stage.
    """
    links = chain.links(m.name, torch.Size(m.shape))
    if links is None:
        return torch.zeros(m.shape, dtype=torch.float64), torch.zeros(m.shape, dtype=torch.float64)
    f, attributed = links[0]
    energy = links[-1][1].eigenvalues.double()
    for (passing, upper), (_, lower) in pairwise(reversed(links)):
        assert isinstance(upper, MapFactors), "sketches are of EK-FAC's coordinates"
        energy = upper.rebase_squares(energy * passing.double().square(), cast(MapFactors, lower))
    return f.double() * attributed.eigenvalues.double(), f.double() * energy


def choose(maps: list[TrackedMap], chain: Chain, share: float, least: int) -> dict[str, Directions]:
    """Directions of the maps that keep any.

    Args:
        maps: maps of the attributed stage.
        chain: the stages' factors and filters.
        share: of the operations of all rotations, what those into the kept directions may take.
        least: coordinates that are kept in any case, or all: a sketch of so many dimensions loses nothing to them.
    """
    sums = {m.name: _Sums.of(m, chain) for m in maps}
    shared: dict[str, torch.Tensor] = {}
    for m in maps:
        shared[m.input_group] = shared.get(m.input_group, 0) + sums[m.name].columns
    # The k-th best of each piece of a map's S count as one direction, so that pieces stay of one size.
    energies = {f"A/{group}": columns.sort(descending=True).values for group, columns in shared.items()}
    energies |= {f"S/{m.name}": sums[m.name].rows.sort(descending=True).values.sum(0) for m in maps}
    costs = {f"A/{m.input_group}": m.d_in for m in maps} | {f"S/{m.name}": m.d_out for m in maps}
    cost = torch.cat([torch.full((len(e),), float(costs[key])) for key, e in energies.items()])
    owner = torch.cat([torch.full((len(e),), i) for i, e in enumerate(energies.values())])
    best = (torch.cat(list(energies.values())) / cost).argsort(descending=True, stable=True)

    def counts(directions: int) -> dict[str, int]:
        found = torch.bincount(owner[best[:directions]], minlength=len(energies))
        return dict(zip(energies, found.tolist(), strict=True))

    def coordinates(directions: int) -> int:
        of = counts(directions)
        return sum(m.pieces[0] * of[f"S/{m.name}"] * of[f"A/{m.input_group}"] for m in maps)

    spent = cost[best].double().cumsum(0)
    paid = int((spent <= share * spent[-1] * (1 + 1e-9)).sum())
    of = counts(bisect_left(range(len(best)), least, lo=paid, key=coordinates))
    return {
        m.name: sums[m.name].directions(of[f"S/{m.name}"], shared[m.input_group], of[f"A/{m.input_group}"])
        for m in maps
        if of[f"S/{m.name}"] and of[f"A/{m.input_group}"]
    }


def save(path: Path, kept: Mapping[str, Directions]) -> None:
    """Write the directions of all maps to a safetensors file."""
    write_tensors(path, {f"{name}/{key}": value for name, d in kept.items() for key, value in vars(d).items()})


def load(path: Path) -> dict[str, Directions]:
    """The directions that `save` wrote."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(path).items():
        name, field = key.rsplit("/", 1)
        found.setdefault(name, {})[field] = value
    return {name: Directions(**fields) for name, fields in found.items()}


@dataclass(frozen=True)
class _Sums:
    """Of one map: what its directions are worth, rows [P, p] and columns [d_in], and the best split."""

    rows: torch.Tensor
    columns: torch.Tensor
    row_split: torch.Tensor
    column_split: torch.Tensor

    @classmethod
    def of(cls, m: TrackedMap, chain: Chain) -> _Sums:
        documents, queries = (e.reshape(-1, m.d_in) for e in expected_energies(chain, m))
        both = documents * queries
        # The best rows for given columns have the same energy on both sides, and so on in turns: a geometric program.
        column = torch.ones_like(both[0])
        for _ in range(TURNS):
            row = _ratio(queries @ (1 / column), documents @ column).sqrt()
            column = _ratio((1 / row) @ queries, row @ documents).sqrt()
        rows, row = (x.view(m.pieces) for x in (both.sum(1), row))
        return cls(rows.cpu(), both.sum(0).cpu(), row.sqrt().float().cpu(), column.sqrt().float().cpu())

    def directions(self, r: int, columns: torch.Tensor, c: int) -> Directions:
        """The best `r` rows of each piece, and the best `c` of the group's `columns`, in their order."""
        chosen = self.rows.argsort(descending=True, stable=True)[:, :r].sort().values
        kept = columns.argsort(descending=True, stable=True)[:c].sort().values
        return Directions(chosen, kept, self.row_split.gather(1, chosen), self.column_split[kept])


def _ratio(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """Of two energies; 1 where there is none."""
    return torch.where((queries > 0) & (documents > 0), queries / documents.clamp_min(1e-300), 1.0)
