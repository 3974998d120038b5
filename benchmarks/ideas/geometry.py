"""Other curvatures of the same stage: what the bases and the eigenvalues are taken of, and Adam's geometry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from benchmarks.ideas.subject import Idea, Subject
from benchmarks.ideas.training import Trace
from msif_core.batching import Sequences
from msif_core.curvature.factors import MapFactors
from msif_core.curvature.filters import block_mean
from msif_core.curvature.fit import EIGENVALUE_SEED, capture_all, covariance_sums
from msif_core.curvature.gradients import RotatedGradients, rotate_outputs
from msif_core.evaluation.methods import Gradients
from msif_core.losses import Loss, sampled_loss, target_loss
from msif_core.rows import Rows
from msif_core.tracking import TrackedMap

BATCH_TOKENS = 4096
Curvature = dict[str, MapFactors]


@dataclass(frozen=True)
class Scaled:
    """A curvature of the coordinates theta / scale: gradients are multiplied by `scale`, then by `after`.

    With `after` = scale it is (H + c scale^-2)^-1, with 1 / scale the passing filter of the same proximity.
    """

    inner: MapFactors
    scale: torch.Tensor
    after: torch.Tensor

    @property
    def eigenvalues(self) -> torch.Tensor:
        return self.inner.eigenvalues

    @property
    def mean(self) -> torch.Tensor:
        return self.inner.mean

    def rotate(self, V: torch.Tensor) -> torch.Tensor:
        return self.inner.rotate(self.scale * V)

    def unrotate(self, V: torch.Tensor) -> torch.Tensor:
        return self.after * self.inner.unrotate(V)

    def rebase(self, V: torch.Tensor, other: Self) -> torch.Tensor:
        return other.rotate(self.unrotate(V))


@dataclass(frozen=True)
class Diagonal:
    """A curvature that is diagonal in the parameters: [G, b, d_in]."""

    eigenvalues: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        return block_mean(self.eigenvalues)

    def rotate(self, V: torch.Tensor) -> torch.Tensor:
        return V

    def unrotate(self, V: torch.Tensor) -> torch.Tensor:
        return V

    def rebase(self, V: torch.Tensor, other: Self) -> torch.Tensor:
        return V


def covariances(
    models: Sequence[tuple[torch.nn.Module, int]], maps: list[TrackedMap], sequences: Sequences
) -> dict[str, torch.Tensor]:
    """The fit's first sums over tokens, added over (model, seed of the labels)."""
    total: dict[str, torch.Tensor] = {}
    for model, seed in models:
        found = covariance_sums(model, maps, sequences, task="causal_lm", seed=seed, batch_tokens=BATCH_TOKENS)
        total = {name: value + total.get(name, 0) for name, value in found.items()}
    return total


def bases(maps: list[TrackedMap], sums: dict[str, torch.Tensor]) -> Curvature:
    """Eigenbases of the sums; the eigenvalues are K-FAC's, the products of both sides'."""
    found = {}
    for m in maps:
        A, S = (torch.linalg.eigh(sums[key].double()) for key in (f"A/{m.input_group}", f"S/{m.name}"))
        eigenvalues = S.eigenvalues.clamp_min(0)[..., None] * A.eigenvalues.clamp_min(0)
        found[m.name] = MapFactors(A.eigenvectors.float(), S.eigenvectors.float(), eigenvalues.float())
    return found


def corrected(
    models: Sequence[tuple[torch.nn.Module, int]], maps: list[TrackedMap], curvature: Curvature, sequences: Sequences
) -> Curvature:
    """EK-FAC's eigenvalues: mean squares of rotated gradients, over sequences and (model, seed)."""
    sums = {m.name: torch.zeros(m.shape) for m in maps}
    for model, seed in models:
        rotated = RotatedGradients(curvature, torch.float32)

        def consume(m: TrackedMap, captured: Rows, rotated: RotatedGradients = rotated) -> None:
            for _, rows, gradients in rotated.blocks(m, captured.a, captured.d):
                sums[m.name].flatten(0, 1)[rows].add_(gradients.square().sum(0))

        capture_all(model, maps, sequences, BATCH_TOKENS, sampled_loss("causal_lm", seed + EIGENVALUE_SEED), consume)
    count = len(models) * len(sequences)
    return {m: MapFactors(f.Q_A, f.Q_S, sums[m] / count) for m, f in curvature.items()}


def by_token(model: torch.nn.Module, maps: list[TrackedMap], curvature: Curvature, sequences: Sequences) -> Curvature:
    """Eigenvalues that are mean squares of single tokens' gradients, as if tokens were independent."""
    sums = {m.name: torch.zeros(m.shape) for m in maps}

    def consume(m: TrackedMap, captured: Rows) -> None:
        factors = curvature[m.name]
        a, d = (captured.a @ factors.Q_A).square(), rotate_outputs(captured.d, factors.Q_S).square()
        sums[m.name].add_(torch.einsum("ntgb,nti->gbi", d, a))

    capture_all(model, maps, sequences, BATCH_TOKENS, sampled_loss("causal_lm", EIGENVALUE_SEED), consume)
    return {m: MapFactors(f.Q_A, f.Q_S, sums[m] / len(sequences)) for m, f in curvature.items()}


def held_gradients(model: torch.nn.Module, maps: list[TrackedMap], sequences: Sequences, loss: Loss) -> Gradients:
    """Every sequence's gradient [S, G, b, d_in], in the order of the batches."""
    found: dict[str, list[torch.Tensor]] = {m.name: [] for m in maps}

    def consume(m: TrackedMap, captured: Rows) -> None:
        found[m.name].append(torch.einsum("ntgb,nti->ngbi", captured.d, captured.a))

    capture_all(model, maps, sequences, BATCH_TOKENS, loss, consume)
    return {name: torch.cat(parts) for name, parts in found.items()}


def by_sequence(gradients: Gradients, fresh: Gradients) -> Curvature:
    """Bases of whole sequences' gradients, E[G^T G] and E[G G^T] of each block; eigenvalues from `fresh` ones."""
    found = {}
    for name, G in gradients.items():
        Q_A = torch.linalg.eigh(torch.einsum("sgbi,sgbj->ij", G, G).double()).eigenvectors.float()
        Q_S = torch.linalg.eigh(torch.einsum("sgbi,sgci->gbc", G, G).double()).eigenvectors.float()
        rotated = MapFactors(Q_A, Q_S, torch.empty(0)).rotate(fresh[name])
        found[name] = MapFactors(Q_A, Q_S, rotated.square().mean(0))
    return found


def geometry_ideas(subject: Subject, trace: Trace) -> Iterator[Idea]:
    """Each change made at both stages, unless it says otherwise."""
    pool, maps, score = subject.pool, subject.maps, subject.subsets.score
    kfac: dict[str, Curvature] = {}
    found: dict[str, dict[str, Curvature]] = {}
    diagonal: dict[str, dict[str, Diagonal]] = {}
    adam: dict[str, dict[str, Scaled]] = {"the last": {}, "the mean": {}}
    for stage in (pool.target, pool.last):
        model, sequences = pool.stages.model(stage), subject.sequences(stage)
        kfac[stage] = bases(maps, covariances([(model, 0)], maps, sequences))
        seeds = [(model, seed) for seed in range(4)]
        first, fresh = (
            held_gradients(model, maps, sequences, sampled_loss("causal_lm", seed)) for seed in (0, EIGENVALUE_SEED)
        )
        own = held_gradients(model, maps, sequences, target_loss("causal_lm"))
        found[stage] = {
            "K-FAC: eigenvalues not corrected": kfac[stage],
            "eigenvalues of tokens, not of sequences": by_token(model, maps, kfac[stage], sequences),
            "bases of sequences, not of tokens": by_sequence(first, fresh),
            "the same, empirical Fisher (the data's own labels)": by_sequence(own, own),
            "four draws of the labels": corrected(
                seeds, maps, bases(maps, covariances(seeds, maps, sequences)), sequences
            ),
        }
        diagonal[stage] = {name: Diagonal(value.square().mean(0)) for name, value in fresh.items()}
        for kind, moments in (("the last", trace.last[stage]), ("the mean", trace.mean[stage])):
            scale = {name: adam_scale(v) for name, v in moments.items()}
            inner = by_sequence(*({name: G * scale[name] for name, G in held.items()} for held in (first, fresh)))
            for name, factors in inner.items():
                after = scale[name] if stage == pool.target else 1 / scale[name]
                adam[kind][f"{stage}/{name}"] = Scaled(factors, scale[name], after)
    for name in found[pool.target]:
        yield name, score(subject.chained(found[pool.target][name], found[pool.last][name]))
    yield (
        "diagonal Fisher in the parameters, both stages",
        score(subject.chained(diagonal[pool.target], diagonal[pool.last])),
    )
    yield "the same at the attributed stage alone", score(subject.chained(diagonal[pool.target]))
    roots = {stage: {n: Diagonal(v.sqrt()) for n, v in trace.last[stage].items()} for stage in (pool.target, pool.last)}
    yield "Adam's 1 / (root v + 0.1 mean), attributed stage", score(subject.chained(roots[pool.target]))
    yield "Adam's at both stages", score(subject.chained(roots[pool.target], roots[pool.last]))
    for kind, scaled in adam.items():
        target, last = (
            {name: scaled[f"{stage}/{name}"] for name in (m.name for m in maps)} for stage in (pool.target, pool.last)
        )
        yield f"EK-FAC in Adam's coordinates, v {kind}, attributed stage", score(subject.chained(target))
        yield f"EK-FAC in Adam's coordinates, v {kind}, both stages", score(subject.chained(target, last))


def adam_scale(v: torch.Tensor) -> torch.Tensor:
    """(root v + a tenth of its mean)^(-1/2) of Adam's second moments [G, b, d_in]: the root of its steps' scale."""
    root = v.sqrt()
    return (root + 0.1 * root.mean()).rsqrt()
