"""Other spectral filters, cheaper ones, and maps left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.accuracy import DEFAULT
from benchmarks.ideas.subject import Idea, Subject
from msif_core.curvature.filters import Damped, Identity, SpectralFilter, Unrolled, block_mean


@dataclass(frozen=True)
class RootDamped:
    """1 / (Lambda + c sqrt(Lambda mean)): damping that grows with curvature, as Adam's second moments would have it."""

    c: float

    def level(self, eigenvalues: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
        mean = block_mean(eigenvalues) if mean is None else mean
        return self.c * (eigenvalues * mean).sqrt() + 1e-3 * mean

    def attributed(self, eigenvalues: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
        return 1 / (eigenvalues + self.level(eigenvalues, mean))

    def passing(self, eigenvalues: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
        level = self.level(eigenvalues, mean)
        return level / (eigenvalues + level)


@dataclass(frozen=True)
class Averaged:
    """The default's filter, its logarithm averaged over `axes`: -1 are the inputs, -2 the outputs.

    Over one axis a filter of the other side alone; with `both`, the product of the two: the rank-one fit.
    """

    axes: tuple[int, ...]
    both: bool = False

    def attributed(self, eigenvalues: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
        return self._fit(Damped(DEFAULT).attributed(eigenvalues, mean))

    def passing(self, eigenvalues: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
        return self._fit(Damped(DEFAULT).passing(eigenvalues, mean))

    def _fit(self, f: torch.Tensor) -> torch.Tensor:
        log = f.log()
        if self.both:
            whole = log.mean((-2, -1), keepdim=True)
            return (log.mean(-1, keepdim=True) + log.mean(-2, keepdim=True) - whole).exp()
        return log.mean(self.axes, keepdim=True).expand_as(f).exp()


def filter_ideas(subject: Subject) -> Iterator[Idea]:
    """The spectral function."""
    subsets, target, last = subject.subsets, subject.pool.target, subject.pool.last
    for damping in (0.01, 0.001):
        yield (
            f"damping {damping:g} at the attributed stage",
            subsets.lds({target: Damped(damping), last: Damped(DEFAULT)}),
        )
    yield "no filter at the attributed stage", subsets.lds({target: Identity(), last: Damped(DEFAULT)})
    for c in (0.3, 1.0):
        yield f"damping as Adam's root, c {c:g}", subsets.lds({target: RootDamped(c), last: Damped(DEFAULT)})
    for tau in (1.0, 10.0, 100.0):
        yield f"unrolled, tau {tau:g} at both", subsets.lds({target: Unrolled(tau), last: Unrolled(tau)})
    yield "unrolled, tau 100 and later 1", subsets.lds({target: Unrolled(100.0), last: Unrolled(1.0)})
    yield "unrolled later stage alone, tau 1", subsets.lds({target: Damped(DEFAULT), last: Unrolled(1.0)})
    for share in (0.1, 1.0):
        found: dict[str, SpectralFilter] = {}
        for name in (target, last):
            factors = subject.pool.stages.factors(name)
            mean = torch.cat([factors[m].eigenvalues.flatten() for m in factors.maps]).mean()
            found[name] = Damped(share * float(mean), relative=False)
        yield f"one damping for all maps, {share:g} of their mean", subsets.lds(found)


def cheap_ideas(subject: Subject) -> Iterator[Idea]:
    """Filters that need less than a number for each coordinate."""
    for name, spectral in (
        ("filter's rank-one fit at both stages", Averaged((), both=True)),
        ("filter of inputs alone at both stages", Averaged((-2,))),
        ("filter of outputs alone at both stages", Averaged((-1,))),
    ):
        yield name, subject.subsets.lds(dict.fromkeys((subject.pool.target, subject.pool.last), spectral))


def map_ideas(subject: Subject) -> Iterator[Idea]:
    """Maps left out."""
    parts = subject.subsets.predicted(subject.filters)
    head = [name for name in parts if name in ("lm_head", "embed_out")]
    groups = {
        "the unembedding": head,
        "the attention maps": [name for name in parts if ".attention." in name],
        "the MLP maps": [name for name in parts if ".mlp." in name],
    }
    for name, inside in groups.items():
        rest = [part for other, part in parts.items() if other not in inside]
        yield f"without {name}", subject.subsets.score(np.sum(rest, axis=0))
        yield f"{name} alone", subject.subsets.score(np.sum([parts[other] for other in inside], axis=0))
