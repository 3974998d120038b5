"""Does a new head that answers to its body predict retraining better? `python -m benchmarks.new_head [LEARNING_RATE]`.

Trains what is missing of the ground truth (benchmarks.families: five minutes of one core), then scores the pool by
the chain as it is, which drops the head, and with the head's Schur complement (benchmarks.schur).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from rich.table import Table

from benchmarks.accuracy import DEFAULT, console
from benchmarks.families import BATCH_TOKENS, FAMILIES, REPEATS, SUBSETS, GroundTruth, label_losses
from benchmarks.ideas.geometry import bases, corrected, covariances
from benchmarks.schur import Curvature, Gradients, NewHead
from msif_core import scoring
from msif_core.batching import Sequences
from msif_core.chain import Chain, FilteredStage
from msif_core.config import CurvatureSettings
from msif_core.curvature.factors import MapFactors
from msif_core.curvature.filters import Damped, Identity, SpectralFilter
from msif_core.curvature.fit import covariance_sums
from msif_core.evaluation.lds import FloatArray, mean_and_error, noise_ceiling, paired_difference, spearman
from msif_core.tracking import TrackedMap, tracked_maps

HEAD = "score"
HEAD_DAMPINGS = (0.001, 0.01, 1.0)
TASK = "classification"


def gradients(model: torch.nn.Module, maps: list[TrackedMap], sequences: Sequences, task: str) -> Gradients:
    """Each sequence's gradient: map to [S, G, b, d_in]."""
    return scoring.query_gradients(model, maps, sequences, BATCH_TOKENS, task=task)


def fisher_rows(classifier: torch.nn.Module, maps: list[TrackedMap], sequences: Sequences, classes: int) -> Gradients:
    """sqrt(p(y | x)) grad loss(x, y) for every label y: map to [classes S, G, b, d_in], their squares the Fisher."""
    parts = []
    for label in range(classes):
        relabelled = dataclasses.replace(sequences, labels=[np.full_like(row, label) for row in sequences.labels])
        root = torch.from_numpy(np.exp(-label_losses(classifier, relabelled) / 2)).float()[:, None, None, None]
        parts.append({name: root * g for name, g in gradients(classifier, maps, relabelled, TASK).items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True)
class Bench:
    """The models of the whole pool, and the subsets' losses [M, Q] that scores are held against.

    `of_texts` are the language model's, before the head came: what a method that works predicts (the control).
    """

    truth: GroundTruth
    language: torch.nn.Module
    classifier: torch.nn.Module
    losses: FloatArray
    of_texts: FloatArray

    @cached_property
    def maps(self) -> list[TrackedMap]:
        """The maps of the body, which both models have."""
        return tracked_maps(self.language, CurvatureSettings())

    @cached_property
    def sums(self) -> Gradients:
        """The pool's gradients summed over each subset: [M, G b d_in]."""
        found = gradients(self.language, self.maps, self.truth.pool, "causal_lm")
        return {name: self.truth.masks @ g.flatten(1) for name, g in found.items()}

    @cached_property
    def first(self) -> Curvature:
        """EK-FAC of pre-training."""
        seeded = [(self.language, 0)]
        found = bases(self.maps, covariances(seeded, self.maps, self.truth.pool))
        return corrected(seeded, self.maps, found, self.truth.pool)

    @cached_property
    def queries(self) -> Gradients:
        """The queries' gradients at the classifier, the head's among them."""
        return gradients(self.classifier, self.all_maps, self.truth.queries, TASK)

    @cached_property
    def all_maps(self) -> list[TrackedMap]:
        return tracked_maps(self.classifier, CurvatureSettings())

    @cached_property
    def head(self) -> NewHead:
        """The last stage's Fisher, exact over the labels, cut at the head."""
        rows = fisher_rows(self.classifier, self.all_maps, self.truth.labelled, len(FAMILIES))
        return NewHead(rows, rows.pop(HEAD).flatten(1), len(self.truth.labelled), DEFAULT, DEFAULT)

    @cached_property
    def last(self) -> Curvature:
        """EK-FAC of fine-tuning, its eigenvalues exact over the labels."""
        sums = covariance_sums(
            self.classifier, self.maps, self.truth.labelled, task=TASK, seed=0, batch_tokens=BATCH_TOKENS
        )
        found = {}
        for name, f in bases(self.maps, sums).items():
            squares = f.rotate(self.head.body[name]).square().sum(0) / self.head.count
            found[name] = MapFactors(f.Q_A, f.Q_S, squares)
        return found

    def lds(
        self, passed: Gradients, attributed: SpectralFilter | None = None, losses: FloatArray | None = None
    ) -> FloatArray:
        """Score of each query, from its gradient as the last stage has passed it down."""
        chain = Chain((FilteredStage(self.first, attributed or Damped(DEFAULT)),))
        found = chain.filter_all(dict(passed))
        predicted = sum((self.sums[name] @ g.flatten(1).T).double().numpy() for name, g in found.items())
        return spearman(predicted, -(self.losses if losses is None else losses))

    def methods(self) -> Iterator[tuple[str, FloatArray]]:
        """A name and the score of each query."""
        body = {name: g for name, g in self.queries.items() if name != HEAD}
        g_p, head = self.queries[HEAD].flatten(1), self.head
        moved = head.corrected(body, g_p)
        yield "multi-stage, head dropped", self.lds(self.passed(body))
        yield "gradient corrected", self.lds(self.passed(moved))
        yield "gradient and eigenvalues corrected", self.lds(head.in_eigenbasis(self.last, moved))
        for jointly, name in ((False, "each map alone"), (True, "all maps jointly")):
            found, least = head.through(self.last, moved, jointly)
            yield f"gradient and curvature corrected, {name} (least eigenvalue {least:.2f})", self.lds(found)
        yield "whole Fisher, head dropped", self.lds(head.exactly(self.last, body, None))
        yield "whole Fisher, with the head", self.lds(head.exactly(self.last, body, g_p))
        yield "EK-FAC, query's gradient at the last stage", self.lds(body)
        yield "the same, gradient corrected", self.lds(moved)
        yield "gradient dot product", self.lds(body, Identity())
        texts = gradients(self.language, self.maps, self.truth.texts, "causal_lm")
        yield "control: EK-FAC, the text's loss before the head", self.lds(texts, losses=self.of_texts)
        for damping in HEAD_DAMPINGS:
            other = dataclasses.replace(head, head_damping=damping)
            moved = other.corrected(body, g_p)
            yield f"gradient corrected, head's damping {damping:g}", self.lds(self.passed(moved))
            yield (
                f"gradient and eigenvalues corrected, head's damping {damping:g}",
                self.lds(other.in_eigenbasis(self.last, moved)),
            )
            yield f"whole Fisher, head's damping {damping:g}", self.lds(other.exactly(self.last, body, g_p))

    def passed(self, V: Gradients) -> Gradients:
        """What alpha / (Lambda + alpha) of the last stage's EK-FAC lets through."""
        return {name: f.apply(V[name], Damped(DEFAULT).passing) for name, f in self.last.items()}


def main() -> None:
    torch.set_num_threads(1)
    truth = GroundTruth(*map(float, sys.argv[1:2]))
    losses = []
    for subset in range(SUBSETS):
        losses.append(truth.losses(subset))
        print(f"subsets: {subset + 1}/{SUBSETS}", file=sys.stderr)
    found, of_texts = np.stack(losses, axis=1)
    again = np.stack([truth.losses(subset, 1) for subset in range(REPEATS)], axis=1)
    ceiling, error = noise_ceiling(found[:REPEATS], again[0])
    of_text, text_error = noise_ceiling(of_texts[:REPEATS], again[1])
    bench = Bench(truth, *truth.train(np.arange(len(truth.pool)), 0), found, of_texts)
    methods = dict(bench.methods())
    base = next(iter(methods.values()))
    table = Table("method", "LDS", "minus the first", title=f"A new head: {len(base)} queries, {SUBSETS} subsets")
    for name, scores in methods.items():
        value, deviation = mean_and_error(scores)
        difference, paired = paired_difference(scores, base)
        table.add_row(name, f"{value:.3f} ± {deviation:.3f}", f"{difference:+.3f} ± {paired:.3f}")
    console.print(table)
    console.print(f"Noise ceiling {ceiling:.3f} ± {error:.3f}; of the control {of_text:.3f} ± {text_error:.3f}")
    spread = found.std(axis=0).mean()
    console.print(
        f"Noise ceiling {ceiling:.3f} ± {error:.3f}; mean loss {found.mean():.3f}, over subsets ± {spread:.3f}"
    )


if __name__ == "__main__":
    main()
