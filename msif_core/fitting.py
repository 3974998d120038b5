"""The stages' EK-FAC factors, and the chain that they form with their filters."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch

from msif_core import corpus, models, storage, tracking
from msif_core.batching import Sequences
from msif_core.chain import Chain, FilteredStage
from msif_core.coverage import LOW, Coverage, coverage_of
from msif_core.curvature import filters, fit
from msif_core.curvature.factors import VERSION, Factors
from msif_core.curvature.steps import Fit
from msif_core.module_calls import module_calls
from msif_core.stages import Stages


class Fitting(Stages):
    """The stages of one configuration, and their curvature."""

    def recipe(self, stage: str) -> str:
        """What the stage's factors depend on beside its documents: model weights and settings, their windows too."""
        settings = self.config.stage(stage)
        return storage.fingerprint(
            VERSION,
            models.model_fingerprint(settings.model, revision=settings.revision),
            self.config.curvature.model_dump(exclude={"memory_budget_gb"}, exclude_none=True),
            self.config.compute.dtype,
            self.config.corpus.max_length,
            self.config.corpus.start,
            *(["tf32"] if self.config.compute.tf32 else []),
        )

    def factors_fingerprint(self, stage: str) -> str:
        """Address of the stage's factors: its recipe, and the data they were fitted on.

        The data is that of the last full build: the pin keeps finished factors while documents come and go.
        A fit that did not finish before its documents changed starts again on the new ones.
        """
        if stage in self._factors:
            return self._factors[stage]
        recipe = self.recipe(stage)
        path = self.workspace.root / "pins" / f"{stage}.json"
        pin = storage.read_json(path) if path.exists() else None
        if pin is not None and pin["recipe"] == recipe and self._finished(pin["factors"]):
            return str(pin["factors"])
        fresh = storage.fingerprint(recipe, self.corpus_manifest(stage)["fingerprint"])
        if pin != {"recipe": recipe, "factors": fresh}:
            storage.write_json(path, {"recipe": recipe, "factors": fresh})
        return fresh

    def as_it_stands(self) -> Self:
        """The same configuration with the factors and the corpora of now, which a build is to be of throughout."""
        return self.holding({stage.name: self.factors_fingerprint(stage.name) for stage in self.config.stages})

    def unpin(self) -> None:
        """Forget the pinned factors: the next build fits them on the corpus as it is."""
        for stage in self.config.stages:
            (self.workspace.root / "pins" / f"{stage.name}.json").unlink(missing_ok=True)

    def factors_folder(self, stage: str) -> Path:
        """Folder of the stage's factors."""
        return self.workspace.factors(self.factors_fingerprint(stage))

    def fit_parts(self, stage: str) -> list[list[Path]]:
        """The shards, in runs that hold about `curvature.part_sequences` sequences of the fit's sample each."""
        entries = self.corpus_manifest(stage)["shards"]
        share = self.fit_share(stage)
        before = np.cumsum([0, *(share * entry["n_sequences"] for entry in entries)])[:-1]
        part = (before // self.config.curvature.part_sequences).astype(int)
        shards = self.shards(stage)
        return [[shards[row] for row in np.flatnonzero(part == number)] for number in np.unique(part)]

    def fit_share(self, stage: str) -> float:
        """Share of the stage's sequences that the fit uses."""
        return min(1.0, self.config.curvature.max_sequences / max(1, self.sequence_count(stage)))

    def fit_sample(self, stage: str, part: int) -> Sequences:
        """One part of the random sample that the fit uses."""
        share, seed = self.fit_share(stage), self.config.curvature.seed
        return corpus.read_rows(self.fit_parts(stage)[part], lambda names: fit.sample_rows(names, share, seed))

    def covariance_part(self, stage: str, part: int) -> list[Path]:
        """Sum a a^T and d d^T over one part of the sample; nothing where another process has finished the fit."""
        if self.fitted(stage):
            return []
        return self.fit(stage, self.model(stage)).covariances(part, self.fit_sample(stage, part))

    def eigenbasis_part(self, stage: str, part: int) -> list[Path]:
        """Diagonalise one part's share of the covariances; nothing where another process has finished the fit."""
        if self.fitted(stage):
            return []
        return self.fit(stage, self.structure(stage)).eigenbases(part, len(self.fit_parts(stage)), self.device)

    def eigenvalue_part(self, stage: str, part: int) -> list[Path]:
        """Sum the squared rotated gradients of one part; nothing where another process has finished the fit."""
        if self.fitted(stage):
            return []
        return self.fit(stage, self.model(stage)).eigenvalues(part, self.fit_sample(stage, part))

    def combine_eigenvalues(self, stage: str) -> Path:
        """Add the parts' sums into the corrected eigenvalues; returns the finished factors' folder."""
        with storage.locked(self.factors_folder(stage) / "factors.json"):
            if self.fitted(stage):
                return self.factors_folder(stage)
            return self.fit(stage, self.structure(stage)).finish(len(self.fit_parts(stage)))

    def fit_stage(self, stage: str) -> Path:
        """The whole fit, step by step; returns the finished factors' folder."""
        parts = len(self.fit_parts(stage))
        for step in (self.covariance_part, self.eigenbasis_part, self.eigenvalue_part):
            run = self.reporting(f"{step.__name__} {stage}", partial(step, stage), parts)
            storage.free_first(range(parts), run)
        folder = self.combine_eigenvalues(stage)
        for remark in self.remarks(stage, self.coverage(stage)):
            warnings.warn(remark, stacklevel=3)
        return folder

    def reporting(self, name: str, step: Callable[[int], object], count: int) -> Callable[[int], None]:
        """The step, which tells `progress` each time how many of its parts are done."""
        done = 0

        def run(part: int) -> None:
            nonlocal done
            step(part)
            done += 1
            self.progress(name, done, count)

        return run

    def remove_sums(self, stage: str) -> None:
        """Remove the parts' sums: of no more use when the factors are finished, and many times their size."""
        for sums in self.factors_folder(stage).glob("partial-*"):
            shutil.rmtree(sums, ignore_errors=True)  # another process may be at it too

    def fit(self, stage: str, model: torch.nn.Module) -> Fit:
        """The stage's fit, by its structure where no pass is run.

        Documents whose gradients are not finite go into the corpus's quarantine.
        """
        folder, factors = self.workspace.corpus(stage), self.factors_fingerprint(stage)

        def quarantine(part: int, documents: list[str]) -> None:
            corpus.quarantine(folder, f"fit-{factors}-{part:05d}", documents, "the gradient is not finite")

        return Fit(
            model,
            self.maps(stage),
            self.factors_folder(stage),
            self.config.stage(stage).task,
            self.config.curvature.seed,
            self.config.compute.batch_tokens,
            self.config.curvature.memory_budget_gb,
            quarantine,
        )

    def coverage(self, stage: str) -> Coverage:
        """The share of the stage's model that is tracked."""
        return coverage_of(self.structure(stage), self.maps(stage))

    def remarks(self, stage: str, coverage: Coverage) -> list[str]:
        """What a user should know of the stage's tracked maps, a sentence each; empty where all is well."""
        maps, found = self.maps(stage), []
        if coverage.share < LOW:
            found.append(coverage.told())
        if module_calls(self.structure(stage)) is None:
            found.append(
                "the model cannot be tried on a short text without its weights, so every linear module is taken to be "
                "reached by texts, and to read [sequences, tokens, features]"
            )
        if whole := tracking.in_unknown_order(maps, self.config.curvature.qkv_split):
            found.append(
                f"the order of query, key and value rows in {_some(whole)} is not known for this type of model, so "
                "each has one block of curvature"
            )
        if self.fitted(stage) and (unreached := self.factors(stage).unreached):
            found.append(
                f"{len(unreached)} of {len(maps)} maps have a block that no sequence of the fit's sample reached "
                f"beyond rounding ({_some(unreached)}): experts among them are filtered by their damping alone, others "
                "have no say in scores"
            )
        return [f"stage {stage}: {remark}" for remark in found]

    def fitted(self, stage: str) -> bool:
        """Whether the stage's factors are finished (and, being pinned, stay as they are)."""
        return self._finished(self.factors_fingerprint(stage))

    def _finished(self, factors: str) -> bool:
        return (self.workspace.factors(factors) / "factors.json").exists()

    def factors(self, stage: str) -> Factors:
        """The stage's finished factors, memory-mapped."""
        return Factors.open(self.factors_folder(stage), device=str(self.device))

    def curvature(self, stage: str) -> FilteredStage:
        """The stage's factors with its filter."""
        factors = self.factors(stage)
        return FilteredStage(factors, filters.from_settings(self.config.stage(stage).filter, factors.mean_targets))

    def chain(self) -> Chain:
        """Every stage's curvature and filter, from the attributed stage's point of view."""
        stages = tuple(self.curvature(stage.name) for stage in self.config.stages)
        return Chain(stages, self.config.attributed_index)


def _some(names: list[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
