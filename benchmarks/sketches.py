"""The sketches that benchmarks.recall compares: what is stored of a whitened gradient, and in how many bits.

A gradient is seen flat, [n, D], in the attributed stage's eigenbasis, map after map. Every sketch is a linear map of
it, so that documents' and queries' vectors have the exact score as inner product (or near it); a coding then keeps
some bits a dimension and one norm correction a vector, as RaBitQ does (Gao and Long 2024, arXiv 2405.12497).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from msif_core.randomness import random_signs
from msif_core.sketch import Sketcher, hadamard
from msif_core.tracking import TrackedMap

STEPS = {1: 8.0, 2: 0.996, 4: 0.335}
"""Step of the uniform quantiser with the least error for a normal distribution; one bit keeps the sign alone."""

NORM_BYTES = 8
"""A code's norm and its correction."""


@dataclass(frozen=True)
class Coding:
    """Keep the first `prefix` dimensions (all of them if 0) in `bits` bits; 32 is float32."""

    name: str
    bits: int
    prefix: int = 0

    def bytes(self, dimensions: int) -> float:
        kept = self.prefix or dimensions
        return kept * self.bits / 8 + (NORM_BYTES if self.bits < 32 else 0)

    def scores(self, phi: torch.Tensor, psi: torch.Tensor) -> torch.Tensor:
        """Estimated inner products [n, Q] of documents phi [n, M] and queries psi [Q, M]."""
        if self.prefix:
            scale = phi.shape[1] / self.prefix
            phi, psi = phi[:, : self.prefix], psi[:, : self.prefix] * scale
        if self.bits == 32:
            return phi @ psi.T
        half = 2 ** (self.bits - 1)
        step = STEPS[self.bits] * phi.norm(dim=1, keepdim=True) / math.sqrt(phi.shape[1])
        code = (phi / step.clamp_min(1e-30)).floor().clamp(-half, half - 1) + 0.5
        correction = phi.square().sum(1) / (phi * code).sum(1).clamp_min(1e-30)
        return (code @ psi.T) * correction[:, None]


class Sketch(Protocol):
    """A linear map of flat gradients."""

    def documents(self, flat: torch.Tensor) -> torch.Tensor:
        """Phi [n, M] of documents' gradients [n, D]."""
        ...

    def queries(self, flat: torch.Tensor) -> torch.Tensor:
        """Psi [Q, M] of queries' gradients [Q, D], filtered by all stages above the attributed one."""
        ...


@dataclass(frozen=True)
class Weights:
    """How the attributed stage's filter f [D] is split: documents times `document`, queries times f / document."""

    f: torch.Tensor
    document: torch.Tensor

    @property
    def query(self) -> torch.Tensor:
        return torch.where(self.f > 0, self.f / self.document.clamp_min(1e-30), 0)

    def of_map(self, flat: torch.Tensor, weight: torch.Tensor, part: slice, m: TrackedMap) -> torch.Tensor:
        """Weighted gradients of one map, [n, d_out, d_in]."""
        return (flat[:, part] * weight[part]).unflatten(1, (m.d_out, m.d_in))


class Signed:
    """Gradients times one side's weights and the library's random signs, which are the same for all dimensions.

    The last product is kept: sketches of several dimensions are made of one batch after the other.
    """

    def __init__(self, sketcher: Sketcher, weights: Weights, kept: torch.Tensor | None = None) -> None:
        signs = torch.cat([sketcher._signed(m, torch.ones(m.size)) for m in sketcher.maps])
        signs = signs if kept is None else signs * kept
        self.weights = weights
        self._document, self._query = signs * weights.document, signs * weights.query
        self._flat: torch.Tensor | None = None
        self._product: torch.Tensor | None = None

    def documents(self, flat: torch.Tensor) -> torch.Tensor:
        if self._flat is not flat or self._product is None:
            self._flat, self._product = flat, flat * self._document
        return self._product

    def queries(self, flat: torch.Tensor) -> torch.Tensor:
        return flat * self._query


class Folded:
    """The library's own sketch: signed folding to M dimensions, then a Hadamard transform."""

    def __init__(self, sketcher: Sketcher, signed: Signed) -> None:
        self.sketcher, self.signed = sketcher, signed

    def documents(self, flat: torch.Tensor) -> torch.Tensor:
        return self._fold(self.signed.documents(flat))

    def queries(self, flat: torch.Tensor) -> torch.Tensor:
        return self._fold(self.signed.queries(flat))

    def _fold(self, weighted: torch.Tensor) -> torch.Tensor:
        folded = torch.zeros(len(weighted), self.sketcher.fold)
        self.sketcher._add(folded, weighted, 0)
        return self.sketcher._mix(folded)


class Coordinates:
    """Chosen eigen-coordinates; `mixed` by a Hadamard transform where their number is a power of two."""

    def __init__(self, weights: Weights, chosen: torch.Tensor, mixed: bool) -> None:
        self.weights, self.chosen, self.mixed = weights, chosen, mixed
        self._signs = random_signs(len(chosen), 1)

    def documents(self, flat: torch.Tensor) -> torch.Tensor:
        return self._mix(flat[:, self.chosen] * self.weights.document[self.chosen])

    def queries(self, flat: torch.Tensor) -> torch.Tensor:
        return self._mix(flat[:, self.chosen] * self.weights.query[self.chosen])

    def _mix(self, x: torch.Tensor) -> torch.Tensor:
        return hadamard(x * self._signs) if self.mixed else x


class TwoSided:
    """Left W_m right of each map: left [r, d_out], right [d_in, r]."""

    def __init__(
        self, maps: list[TrackedMap], weights: Weights, sides: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        self.maps, self.weights, self.sides = maps, weights, sides
        self._parts = parts_of(maps)

    @classmethod
    def random(cls, maps: list[TrackedMap], weights: Weights, rank: int) -> TwoSided:
        generator = torch.Generator().manual_seed(0)
        sides = {}
        for m in maps:
            left = torch.randn(rank, m.d_out, generator=generator) / math.sqrt(rank)
            sides[m.name] = (left, torch.randn(m.d_in, rank, generator=generator) / math.sqrt(rank))
        return cls(maps, weights, sides)

    def documents(self, flat: torch.Tensor) -> torch.Tensor:
        return self._project(flat, self.weights.document)

    def queries(self, flat: torch.Tensor) -> torch.Tensor:
        return self._project(flat, self.weights.query)

    def _project(self, flat: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        found = []
        for m in self.maps:
            left, right = self.sides[m.name]
            found.append((left @ (self.weights.of_map(flat, weight, self._parts[m.name], m) @ right)).flatten(1))
        return torch.cat(found, 1)


@dataclass(frozen=True)
class Principal:
    """Leading directions [M, r] of another sketch's documents."""

    inner: Sketch
    directions: torch.Tensor

    def documents(self, flat: torch.Tensor) -> torch.Tensor:
        return self.inner.documents(flat) @ self.directions

    def queries(self, flat: torch.Tensor) -> torch.Tensor:
        return self.inner.queries(flat) @ self.directions


@dataclass
class Learned:
    """What a sample of documents (and of query proxies) tells: energies of coordinates, covariances of rows, columns.

    `weights` is the even split f^(1/2) in which directions are learned.
    """

    maps: list[TrackedMap]
    weights: Weights
    inner: Folded
    energy: torch.Tensor = field(init=False)
    proxy_energy: torch.Tensor = field(init=False)
    count: int = 0

    def __post_init__(self) -> None:
        self.energy = torch.zeros(len(self.weights.f))
        self._rows = {m.name: torch.zeros(m.d_out, m.d_out) for m in self.maps}
        self._columns = {m.name: torch.zeros(m.d_in, m.d_in) for m in self.maps}
        self._phi: list[torch.Tensor] = []

    def add(self, flat: torch.Tensor) -> None:
        """Documents' gradients [n, D]."""
        self.count += len(flat)
        self.energy += flat.square().sum(0)
        self._phi.append(self.inner.documents(flat))
        parts = parts_of(self.maps)
        for m in self.maps:
            X = self.weights.of_map(flat, self.weights.document, parts[m.name], m)
            rows = X.transpose(0, 1).flatten(1)
            self._rows[m.name] += rows @ rows.T
            columns = X.flatten(0, 1)
            self._columns[m.name] += columns.T @ columns

    def set_proxies(self, flat: torch.Tensor) -> None:
        """Proxies of queries [P, D], filtered by the stages above."""
        self.proxy_energy = flat.square().mean(0)

    def two_sided(self, rank: int) -> TwoSided:
        """Leading row and column directions of each map."""
        sides = {}
        for m in self.maps:
            rows, columns = (torch.linalg.eigh(t[m.name]).eigenvectors for t in (self._rows, self._columns))
            sides[m.name] = (rows[:, -rank:].T.contiguous(), columns[:, -rank:].contiguous())
        return TwoSided(self.maps, self.weights, sides)

    def principal(self, rank: int) -> Principal:
        """Leading directions of the documents' sketches."""
        phi = torch.cat(self._phi)
        values, vectors = torch.linalg.eigh((phi @ phi.T).double())
        directions = phi.T @ (vectors[:, -rank:] / values[-rank:].sqrt()).float()
        return Principal(self.inner, directions)

    def whitened(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean squares of documents' and proxies' evenly whitened coordinates, each lifted by a tenth of its mean."""
        d, p = self.weights.f * self.energy / self.count, self.weights.f * self.proxy_energy
        return d + 0.1 * d.mean(), p + 0.1 * p.mean()

    def coordinates(self, count: int) -> torch.Tensor:
        """Those of the largest energy of documents times energy of proxies."""
        d, p = self.whitened()
        return (d * p).topk(count).indices.sort().values

    def split(self) -> Weights:
        """The split of f with the least |phi|^2 |psi|^2 on average: w = f^(1/2) (proxy energy / energy)^(1/4)."""
        d, p = self.whitened()
        return Weights(self.weights.f, self.weights.document * (p / d) ** 0.25)


def parts_of(maps: list[TrackedMap]) -> dict[str, slice]:
    """Where each map's entries stand in a flat gradient."""
    parts, start = {}, 0
    for m in maps:
        parts[m.name] = slice(start, start + m.size)
        start += m.size
    return parts
