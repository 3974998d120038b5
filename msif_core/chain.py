"""The multi-stage chain: each stage is a spectral filter in its own eigenbasis, applied from the last stage down."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Protocol

import torch

from msif_core.curvature.filters import Damped, SpectralFilter, Unrolled


class MapCurvature(Protocol):
    """Curvature of one map, of which spectral functions can be taken (EK-FAC, or a dense matrix in the tests)."""

    @property
    def eigenvalues(self) -> torch.Tensor:
        """Eigenvalues [G, b, d_in]."""
        ...

    def rotate(self, V: torch.Tensor) -> torch.Tensor:
        """V in the eigenbasis."""
        ...

    def unrotate(self, V: torch.Tensor) -> torch.Tensor:
        """Back from the eigenbasis."""
        ...


class StageCurvature(Protocol):
    """Curvature of a stage's maps, by name."""

    def __contains__(self, name: str) -> bool: ...

    def __getitem__(self, name: str) -> MapCurvature: ...


@dataclass(frozen=True)
class FilteredStage:
    """A stage of the chain: its curvature and its filter."""

    curvature: StageCurvature
    filter: SpectralFilter


@dataclass(frozen=True)
class Chain:
    """The stages in training order, seen from the one that is attributed to (METHOD section 2).

    A query's gradient may be given `rotated`, in the last stage's eigenbasis: formed from rotated tokens it costs
    less than rotating it.
    """

    stages: tuple[FilteredStage, ...]
    attributed: int = 0

    def filter(self, name: str, V: torch.Tensor, *, rotated: bool = False) -> torch.Tensor | None:
        """A query's gradient V [..., G, b, d_in] of one map, filtered by stages K, K-1, .. s+1, and then s.

        None where the map has no parent in a lower stage (a new head): it drops out of the score.
        """
        passed = self.passed(name, V, rotated=rotated)
        if passed is None:
            return None
        stage = self.stages[self.attributed]
        curvature = stage.curvature[name]
        return curvature.unrotate(passed * stage.filter.attributed(curvature.eigenvalues))

    def filter_all(
        self, gradients: MutableMapping[str, torch.Tensor], *, rotated: bool = False
    ) -> dict[str, torch.Tensor]:
        """The filtered gradients of all maps; those without a parent stage are left out.

        Empties `gradients`: each is let go when it is filtered.
        """
        filtered = {name: self.filter(name, gradients.pop(name), rotated=rotated) for name in list(gradients)}
        return {name: V for name, V in filtered.items() if V is not None}

    def filter_back(self, name: str, V: torch.Tensor) -> torch.Tensor | None:
        """The transpose of `filter`, for a document's gradient V [..., G, b, d_in]: filters s, and then s+1 .. K.

        <filter(v), V> = <v, filter_back(V)>, as every filter is symmetric; None for a map that drops out.
        """
        stages = self.stages[self.attributed :]
        if not all(_has(stage, name, V) for stage in stages):
            return None
        for stage in stages:
            curvature = stage.curvature[name]
            function = stage.filter.attributed if stage is stages[0] else stage.filter.passing
            V = curvature.unrotate(curvature.rotate(V) * function(curvature.eigenvalues))
        return V

    def passed(self, name: str, V: torch.Tensor, *, rotated: bool = False) -> torch.Tensor | None:
        """V filtered by the stages above the attributed one, in the attributed stage's eigenbasis."""
        stages = self.stages[self.attributed :]
        if not all(_has(stage, name, V) for stage in stages):
            return None
        for stage in reversed(stages):
            curvature = stage.curvature[name]
            V = V if rotated and stage is stages[-1] else curvature.rotate(V)
            if stage is not stages[0]:
                V = curvature.unrotate(V * stage.filter.passing(curvature.eigenvalues))
        return V

    def levels(self, name: str) -> list[list[float]]:
        """The damping (or tau) that each stage uses for each block of a map, for the record."""
        found = []
        for stage in self.stages[self.attributed :]:
            used = isinstance(stage.filter, Damped | Unrolled) and name in stage.curvature
            level = stage.filter.level(stage.curvature[name].eigenvalues) if used else torch.zeros(0)  # type: ignore[attr-defined]
            found.append(level.flatten().tolist())
        return found


def _has(stage: FilteredStage, name: str, V: torch.Tensor) -> bool:
    """Whether the stage has that map in that shape; another shape is a new head, not an error."""
    return name in stage.curvature and stage.curvature[name].eigenvalues.shape == V.shape[-3:]
