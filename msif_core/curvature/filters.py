"""Spectral filters: what a stage does to a gradient, as a function of the curvature's eigenvalues.

`attributed` is the filter of the stage whose documents are ranked, `passing` that of each later stage
(docs/method.md). Both map eigenvalues [..., b, d_in] to factors of the same shape. Relative values refer to a mean
eigenvalue [..., 1, 1]: as the factors have it (`MapFactors.mean`), or that of each block, over the last two axes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from msif_core import config


NEGLIGIBLE = 0.1
"""A tau below this many inverse mean eigenvalues hardly filters."""


class SpectralFilter(Protocol):
    """f(Lambda) of one stage."""

    def attributed(self, eigenvalues: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
        """Filter of the attributed stage."""
        ...

    def passing(self, eigenvalues: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
        """Filter of a stage that the query passes on its way down."""
        ...


def block_mean(eigenvalues: torch.Tensor) -> torch.Tensor:
    """Mean eigenvalue of each block, kept broadcastable."""
    return eigenvalues.mean(dim=(-2, -1), keepdim=True)


@dataclass(frozen=True)
class Damped:
    """Converged training with proximity to its start: 1/(Lambda + c), and alpha/(Lambda + alpha).

    `damping` is relative to the block's mean eigenvalue, or absolute. `tokens` is the mean number of targets
    of a sequence where training minimised a per-token mean, else 1: it rescales absolute values. A block that the
    fit's data never reached has no mean eigenvalue to be relative to: it lets a query pass, and has no say itself.
    """

    damping: float
    relative: bool = True
    tokens: float = 1.0

    def level(self, eigenvalues: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
        """The absolute damping of each block."""
        mean = block_mean(eigenvalues) if mean is None else mean
        return self.damping * mean if self.relative else torch.full_like(mean, self.damping * self.tokens)

    def attributed(self, eigenvalues: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
        """1 / (Lambda + damping)."""
        level = self.level(eigenvalues, mean)
        return torch.where(level > 0, 1 / (eigenvalues + level), 0)

    def passing(self, eigenvalues: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
        """Damping / (Lambda + damping)."""
        level = self.level(eigenvalues, mean)
        return torch.where(level > 0, level / (eigenvalues + level), 1)


@dataclass(frozen=True)
class Unrolled:
    """A finite number of gradient steps whose learning rates sum to tau (SOURCE, arXiv 2405.12186).

    `tau` is relative to the inverse of the block's mean eigenvalue, or absolute.
    """

    tau: float
    relative: bool = True
    tokens: float = 1.0

    def level(self, eigenvalues: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
        """The absolute tau of each block. Warns where it leaves every block almost unfiltered."""
        mean = block_mean(eigenvalues) if mean is None else mean
        if self.relative:
            level = torch.where(mean > 0, self.tau / mean, 0)
        else:
            level = torch.full_like(mean, self.tau / self.tokens)
        if bool((mean > 0).any()) and bool((level * mean < NEGLIGIBLE).all()):
            warnings.warn(
                f"unrolled filter: tau is below {NEGLIGIBLE} / mean eigenvalue, so the score is nearly a gradient dot "
                "product (the learning rates of Adam do not add up to a tau)",
                stacklevel=2,
            )
        return level

    def attributed(self, eigenvalues: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
        """(1 - exp(-tau Lambda)) / Lambda, which is tau at Lambda = 0."""
        tau = self.level(eigenvalues, mean)
        safe = torch.where(eigenvalues > 0, eigenvalues, torch.ones_like(eigenvalues))
        return torch.where(eigenvalues > 0, -torch.expm1(-tau * eigenvalues) / safe, tau)

    def passing(self, eigenvalues: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
        """exp(-tau Lambda)."""
        return torch.exp(-self.level(eigenvalues, mean) * eigenvalues)


@dataclass(frozen=True)
class Identity:
    """No curvature: the gradient dot product."""

    def attributed(self, eigenvalues: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
        """1."""
        return torch.ones_like(eigenvalues)

    def passing(self, eigenvalues: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
        """1."""
        return torch.ones_like(eigenvalues)


def from_settings(settings: config.Filter, mean_targets: float) -> SpectralFilter:
    """The filter that a stage's settings describe; `mean_targets` is T of METHOD's scale rule."""
    tokens = mean_targets if settings.per_token_mean else 1.0
    if settings.kind == "damped":
        return Damped(settings.damping, settings.relative, tokens)
    if settings.kind == "unrolled":
        assert settings.tau is not None, "config.Filter checks that unrolled has tau"
        return Unrolled(settings.tau, settings.relative, tokens)
    return Identity()
