"""A new head that answers to its body: the Schur complement of the head in the last stage's curvature.

The last stage minimises over the body theta and a head phi that its parent did not have. Where theta's start moves by
dtheta_0, phi follows: with D = H_tt + alpha, B = H_pp + beta and C = H_tp,

    dtheta = (D - C B^-1 C^T)^-1 alpha dtheta_0        dphi = -B^-1 C^T dtheta

so the query's gradient in theta is g_t - C B^-1 g_p, and C B^-1 C^T is taken from the curvature that it passes.
alpha is a number for each block, so that it stands on the left of the inverse once the query is transposed.
Rows are gradients of the last stage's Fisher, H = rows^T rows / N, cut at the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from msif_core.curvature.factors import MapFactors
from msif_core.curvature.filters import Damped

Gradients = dict[str, torch.Tensor]
Curvature = dict[str, MapFactors]


@dataclass(frozen=True)
class NewHead:
    """The Fisher's rows of the body and of the head, with what is needed of both.

    Attributes:
        body: map to rows [R, G, b, d_in].
        head: rows [R, p].
        count: N, the sequences that the rows were taken of (several rows each).
        damping: the body's, relative to a block's mean eigenvalue: alpha.
        head_damping: the head's, relative to its mean eigenvalue: beta.
    """

    body: Gradients
    head: torch.Tensor
    count: int
    damping: float = 0.1
    head_damping: float = 0.1

    @property
    def beta(self) -> float:
        """The head's absolute damping."""
        return self.head_damping * float(self.head.square().sum()) / self.count / self.head.shape[1]

    @cached_property
    def head_curvature(self) -> torch.Tensor:
        """B = H_pp + beta: [p, p]."""
        return self.head.T @ self.head / self.count + self.beta * torch.eye(self.head.shape[1], dtype=self.head.dtype)

    @cached_property
    def cross(self) -> Gradients:
        """C^T = H_pt, map by map: [p, G, b, d_in]."""
        return {name: torch.einsum("rp,r...->p...", self.head, rows) / self.count for name, rows in self.body.items()}

    def corrected(self, g_t: Gradients, g_p: torch.Tensor) -> Gradients:
        """g_t - C B^-1 g_p of queries: g_t [Q, G, b, d_in], g_p [Q, p]."""
        solved = torch.linalg.solve(self.head_curvature, g_p.T)
        return {name: g - torch.einsum("pq,p...->q...", solved, self.cross[name]) for name, g in g_t.items()}

    def in_eigenbasis(self, curvature: Curvature, V: Gradients) -> Gradients:
        """Pass V through alpha / (Lambda + alpha), Lambda less what the head takes up along each eigenvector."""
        found = {}
        for name, f in curvature.items():
            level = Damped(self.damping).level(f.eigenvalues)
            rotated = f.rotate(self.cross[name]).flatten(1)
            taken = (rotated * torch.linalg.solve(self.head_curvature, rotated)).sum(0).view_as(f.eigenvalues)
            passing = level / ((f.eigenvalues - taken).clamp_min(0) + level)
            found[name] = f.unrotate(f.rotate(V[name]) * passing)
        return found

    def through(self, curvature: Curvature, V: Gradients, jointly: bool) -> tuple[Gradients, float]:
        """Give alpha (D - C B^-1 C^T)^-1 V by Woodbury, D from EK-FAC; over all maps jointly, or each map alone.

        Also the smallest eigenvalue of the inner matrix I - B^-1/2 C^T D^-1 C B^-1/2: where it is below 0, D is too
        small for C and the result means nothing (D is block-diagonal, what C belongs to is not).
        """
        spectral = Damped(self.damping)
        DC = {name: f.apply(self.cross[name], spectral.attributed).flatten(1) for name, f in curvature.items()}
        parts = {name: self.cross[name].flatten(1) @ DC[name].T for name in curvature}
        CDV = {name: DC[name] @ V[name].flatten(1).T for name in curvature}
        if jointly:
            parts = dict.fromkeys(parts, torch.stack(list(parts.values())).sum(0))
            CDV = dict.fromkeys(CDV, torch.stack(list(CDV.values())).sum(0))
        found, least = {}, float("inf")
        root = torch.linalg.inv(torch.linalg.cholesky(self.head_curvature))
        for name, f in curvature.items():
            solved = torch.linalg.solve(self.head_curvature - parts[name], CDV[name])
            level = spectral.level(f.eigenvalues)
            found[name] = f.apply(V[name], spectral.passing) + level * (solved.T @ DC[name]).view_as(V[name])
            least = min(least, 1 - float(torch.linalg.eigvalsh(root @ parts[name] @ root.T)[-1]))
        return found, least

    def exactly(self, curvature: Curvature, g_t: Gradients, g_p: torch.Tensor | None) -> Gradients:
        """The body's part of A (H + A)^-1 g with the whole Fisher, no EK-FAC; A is what each block is damped with.

        Without g_p the head is held fast, and H is the body's alone. By Woodbury among the rows.
        """
        levels = {name: Damped(self.damping).level(f.eigenvalues) for name, f in curvature.items()}
        gram = self.count * torch.eye(len(self.head), dtype=self.head.dtype)
        inner = torch.zeros(len(self.head), len(next(iter(g_t.values()))), dtype=self.head.dtype)
        for name, level in levels.items():
            scaled = (self.body[name] / level).flatten(1)
            gram += self.body[name].flatten(1) @ scaled.T
            inner += scaled @ g_t[name].flatten(1).T
        if g_p is not None:
            gram += self.head @ self.head.T / self.beta
            inner += self.head @ g_p.T / self.beta
        solved = torch.linalg.solve(gram, inner)
        return {name: g - torch.einsum("rq,r...->q...", solved, self.body[name]) for name, g in g_t.items()}
