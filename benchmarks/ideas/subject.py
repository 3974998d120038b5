"""What an idea starts from: the ground truth, the reference models, and multi-stage damped at the default settings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from benchmarks.accuracy import DEFAULT, Subsets, open_subsets, sequence_masks
from msif_core.batching import Sequences
from msif_core.chain import Chain, FilteredStage, StageCurvature
from msif_core.config import Config
from msif_core.curvature.filters import Damped, SpectralFilter
from msif_core.evaluation.lds import FloatArray
from msif_core.evaluation.methods import Gradients, Pool
from msif_core.evaluation.retraining import Retraining
from msif_core.tracking import TrackedMap

Idea = tuple[str, FloatArray]
"""A name, and the score of each query."""


@dataclass(frozen=True)
class Subject:
    """The ground truth and the pool's gradients at the reference models, summed over its subsets."""

    retraining: Retraining
    subsets: Subsets

    @classmethod
    def open(cls, config: Config) -> Subject:
        retraining = Retraining(config)
        return cls(retraining, open_subsets(retraining))

    @property
    def pool(self) -> Pool:
        return self.subsets.pool

    @cached_property
    def maps(self) -> list[TrackedMap]:
        return self.pool.stages.maps(self.pool.target)

    @cached_property
    def filters(self) -> dict[str, SpectralFilter]:
        return {self.pool.target: Damped(DEFAULT), self.pool.last: Damped(DEFAULT)}

    @cached_property
    def default(self) -> FloatArray:
        """Score of each query of multi-stage damped."""
        return self.subsets.lds(self.filters)

    def sequences(self, stage: str) -> Sequences:
        """What the stage was trained on."""
        if stage == self.pool.target:
            return self.pool.sequences
        return self.retraining.sequences(self.retraining.config.stage(stage))

    @cached_property
    def masks(self) -> torch.Tensor:
        """Which sequences were in each subset, float32 [M, S]."""
        return sequence_masks(self.pool, self.retraining, self.subsets.losses)

    def summed(self, gradients: Gradients, pool: Pool | None = None, weights: FloatArray | None = None) -> Subsets:
        """Other gradients of the pool's sequences, summed over subsets."""
        subsets = self.subsets
        return Subsets.summing(pool or self.pool, gradients, self.retraining, subsets.losses, subsets.gold, weights)

    def of_pool(self, pool: Pool, weights: FloatArray | None = None) -> Subsets:
        """Gradients at other models, summed over subsets."""
        return self.summed(pool.document_gradients(pool.target), pool, weights)

    def chained(
        self,
        target: StageCurvature | None = None,
        last: StageCurvature | None = None,
        subsets: Subsets | None = None,
        queries: Gradients | None = None,
    ) -> FloatArray:
        """Summed influences [M, Q] with another curvature of a stage, other documents' or other queries' gradients."""
        pool = self.pool
        links = (
            FilteredStage(target or pool.stages.factors(pool.target), self.filters[pool.target]),
            FilteredStage(last or pool.stages.factors(pool.last), self.filters[pool.last]),
        )
        found = (subsets or self.subsets).through(Chain(links), queries or pool.query_gradients(pool.last))
        return np.sum(list(found.values()), axis=0)
