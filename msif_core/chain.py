"""The multi-stage chain: each stage is a spectral filter in its own eigenbasis, applied from the last stage down."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, Self

import torch

from msif_core.curvature.filters import Damped, SpectralFilter, Unrolled


class MapCurvature(Protocol):
    """Curvature of one map, of which spectral functions can be taken (EK-FAC, or a dense matrix in the tests)."""

    @property
    def eigenvalues(self) -> torch.Tensor:
        """Eigenvalues [G, b, d_in]."""
        ...

    @property
    def mean(self) -> torch.Tensor:
        """The mean eigenvalue [G, 1, 1] that relative filters refer to."""
        ...

    def rotate(self, V: torch.Tensor) -> torch.Tensor:
        """V in the eigenbasis."""
        ...

    def unrotate(self, V: torch.Tensor) -> torch.Tensor:
        """Back from the eigenbasis."""
        ...

    def rebase(self, V: torch.Tensor, other: Self) -> torch.Tensor:
        """V of this eigenbasis in that of another stage: `other.rotate(self.unrotate(V))`, or what equals it."""
        ...


class StageCurvature(Protocol):
    """Curvature of a stage's maps, by name."""

    def __contains__(self, name: str) -> bool: ...

    def __getitem__(self, name: str) -> MapCurvature: ...


Link = tuple[torch.Tensor, MapCurvature]
"""A stage's curvature of one map, and before it the filter's values at its eigenvalues."""


@dataclass(frozen=True)
class FilteredStage:
    """A stage of the chain: its curvature and its filter."""

    curvature: StageCurvature
    filter: SpectralFilter


@dataclass(frozen=True)
class Chain:
    """The stages in training order, seen from the one that is attributed to (METHOD section 2).

    A gradient may be given `rotated`, in the eigenbasis of the stage that is first to filter it: formed from rotated
    tokens it costs less than rotating it.
    """

    stages: tuple[FilteredStage, ...]
    attributed: int = 0

    def filter(self, name: str, V: torch.Tensor, *, rotated: bool = False) -> torch.Tensor | None:
        """A query's gradient V [..., G, b, d_in] of one map, filtered by stages K, K-1, .. s+1, and then s.

        None where the map has no parent in a lower stage (a new head): it drops out of the score.
        """
        links = self.links(name, V.shape)
        if links is None:
            return None
        f, curvature = links[0]
        return curvature.unrotate(_passed(links, V, rotated=rotated) * f)

    def filter_all(
        self, gradients: MutableMapping[str, torch.Tensor], *, rotated: bool = False
    ) -> dict[str, torch.Tensor]:
        """The filtered gradients of all maps; those without a parent stage are left out.

        Empties `gradients`: each is let go when it is filtered.
        """
        filtered = {name: self.filter(name, gradients.pop(name), rotated=rotated) for name in list(gradients)}
        return {name: V for name, V in filtered.items() if V is not None}

    def filter_back(self, name: str, V: torch.Tensor, *, rotated: bool = False) -> torch.Tensor | None:
        """The transpose of `filter`, for a document's gradient V [..., G, b, d_in]: filters s, and then s+1 .. K.

        A `rotated` one is in the attributed stage's eigenbasis.
        <filter(v), V> = <v, filter_back(V)>, as every filter is symmetric; None for a map that drops out.
        """
        links = self.links(name, V.shape)
        if links is None:
            return None
        V = V if rotated else links[0][1].rotate(V)
        for (f, lower), (_, upper) in pairwise(links):
            V = lower.rebase(V * f, upper)
        f, last = links[-1]
        return last.unrotate(V * f)

    def passed(self, name: str, V: torch.Tensor, *, rotated: bool = False) -> torch.Tensor | None:
        """V filtered by the stages above the attributed one, in the attributed stage's eigenbasis."""
        links = self.links(name, V.shape)
        return None if links is None else _passed(links, V, rotated=rotated)

    def links(self, name: str, shape: torch.Size) -> list[Link] | None:
        """The links of a map with gradients [..., G, b, d_in] of that shape, from the attributed stage up.

        None where a stage has no such map, or one of another shape: a new head, not an error.
        """
        links: list[Link] = []
        for stage in self.stages[self.attributed :]:
            if name not in stage.curvature:
                return None
            curvature = stage.curvature[name]
            if curvature.eigenvalues.shape != shape[-3:]:
                return None
            function = stage.filter.passing if links else stage.filter.attributed
            links.append((function(curvature.eigenvalues, curvature.mean), curvature))
        return links

    def levels(self, name: str) -> list[list[float]]:
        """The damping (or tau) that each stage uses for each block of a map, for the record."""
        found = []
        for stage in self.stages[self.attributed :]:
            used = isinstance(stage.filter, Damped | Unrolled) and name in stage.curvature
            if used:
                curvature = stage.curvature[name]
                level = stage.filter.level(curvature.eigenvalues, curvature.mean)  # type: ignore[attr-defined]
            found.append(level.flatten().tolist() if used else [])
        return found


def _passed(links: list[Link], V: torch.Tensor, *, rotated: bool) -> torch.Tensor:
    """V filtered from the last link down to the first one's eigenbasis; `rotated`: it is in the last one's."""
    V = V if rotated else links[-1][1].rotate(V)
    for (f, upper), (_, lower) in pairwise(reversed(links)):
        V = upper.rebase(V * f, lower)
    return V
