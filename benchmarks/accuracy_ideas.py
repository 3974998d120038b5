"""What each idea gives, one at a time: `python -m benchmarks.accuracy_ideas [CONFIG]`, after benchmarks.accuracy.

Every row changes one thing of multi-stage damped at the default settings; nothing is chosen on the numbers shown.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from rich.table import Table

from benchmarks.accuracy import CONFIG, DEFAULT, Subsets, console, open_subsets
from msif_core.batching import Sequences, batches
from msif_core.config import Config
from msif_core.curvature.filters import Damped, SpectralFilter, Unrolled, block_mean
from msif_core.evaluation.lds import FloatArray, mean_and_error, paired_difference
from msif_core.evaluation.methods import Pool, norms
from msif_core.evaluation.retraining import Retraining
from msif_core.losses import Loss, sampled_loss, target_loss

MORE_SEEDS = (2, 3)
"""Reference models trained from other starts; the subsets were trained with 0 and 1."""

Idea = tuple[str, FloatArray]


@dataclass(frozen=True)
class RootDamped:
    """1 / (Lambda + c sqrt(Lambda mean)): damping that grows with curvature, as Adam's second moments would have it."""

    c: float

    def attributed(self, eigenvalues: torch.Tensor) -> torch.Tensor:
        mean = block_mean(eigenvalues)
        return 1 / (eigenvalues + self.c * (eigenvalues * mean).sqrt() + 1e-3 * mean)

    def passing(self, eigenvalues: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Levelled:
    """Damping relative to the mean eigenvalue of all maps together, not of each block."""

    level: float

    def attributed(self, eigenvalues: torch.Tensor) -> torch.Tensor:
        return Damped(self.level, relative=False).attributed(eigenvalues)

    def passing(self, eigenvalues: torch.Tensor) -> torch.Tensor:
        return Damped(self.level, relative=False).passing(eigenvalues)


def filters_of(subsets: Subsets) -> dict[str, SpectralFilter]:
    return {subsets.pool.target: Damped(DEFAULT), subsets.pool.last: Damped(DEFAULT)}


def filter_ideas(subsets: Subsets) -> Iterator[Idea]:
    """Other spectral filters, and maps left out."""
    pool, base = subsets.pool, filters_of(subsets)
    target, last = pool.target, pool.last
    for tau in (1.0, 10.0, 100.0):
        yield f"unrolled, tau {tau:g} at both", subsets.lds({target: Unrolled(tau), last: Unrolled(tau)})
    yield "unrolled later stage only, tau 1", subsets.lds({target: Damped(DEFAULT), last: Unrolled(1.0)})
    for c in (0.3, 1.0):
        yield f"damping as Adam's root, c {c:g}", subsets.lds({target: RootDamped(c), last: Damped(DEFAULT)})
    levels = {}
    for name in (target, last):
        factors = pool.stages.factors(name)
        levels[name] = float(torch.cat([factors[m].eigenvalues.flatten() for m in factors.maps]).mean())
    for d in (0.1, 1.0):
        found: dict[str, SpectralFilter] = {name: Levelled(d * level) for name, level in levels.items()}
        yield f"one damping for all maps, {d:g} of their mean", subsets.lds(found)
    parts = subsets.predicted(base)
    head = [name for name in parts if name in ("lm_head", "embed_out")]
    rest = [part for name, part in parts.items() if name not in head]
    yield "without the unembedding", subsets.score(np.sum(rest, axis=0))
    yield "the unembedding alone", subsets.score(np.sum([parts[name] for name in head], axis=0))


def weight_ideas(subsets: Subsets, retraining: Retraining) -> Iterator[Idea]:
    """Documents' gradients scaled: by their norm, by their self-influence, by their length."""
    pool = subsets.pool
    gradients = pool.document_gradients(pool.target)
    norm = norms(gradients)
    factors = pool.stages.factors(pool.target)
    own = np.zeros(len(norm))
    for name, value in gradients.items():
        filtered = factors[name].apply(value, Damped(DEFAULT).attributed)
        own += (filtered * value).flatten(1).sum(1).double().numpy()
    lengths = np.array([len(ids) for ids in pool.sequences.input_ids], dtype=np.float64)
    weights = {
        "documents' gradients of unit norm": 1 / norm,
        "divided by the root of the norm": norm**-0.5,
        "divided by the root of self-influence": own**-0.5,
        "divided by self-influence": 1 / own,
        "divided by length": 1 / lengths,
    }
    for name, weight in weights.items():
        scaled = Subsets.of(pool, retraining, subsets.losses, subsets.gold, weight / weight.mean())
        yield name, scaled.lds(filters_of(subsets))


def embedding_idea(subsets: Subsets, retraining: Retraining) -> Iterator[Idea]:
    """The token embedding tracked too: a linear map of one-hot inputs, whose Q_A is the identity."""
    pool = subsets.pool
    models = [pool.stages.model(name) for name in (pool.target, pool.last)]
    data = [pool.sequences, retraining.sequences(retraining.config.stages[-1])]
    bases = []
    for model, sequences in zip(models, data, strict=True):
        _, covariance = embedding_gradients(model, sequences, sampled_loss("causal_lm", 0))
        Q = torch.linalg.eigh(covariance.double()).eigenvectors.float()
        fresh, _ = embedding_gradients(model, sequences, sampled_loss("causal_lm", 1))
        bases.append((Q, (fresh @ Q).square().mean(0)))
    asked, _ = embedding_gradients(models[1], pool.queries.sequences, target_loss("causal_lm"))
    documents, _ = embedding_gradients(models[0], pool.sequences, target_loss("causal_lm"))
    (Q1, L1), (Q2, L2) = bases
    passed = (asked @ Q2 * (DEFAULT * L2.mean() / (L2 + DEFAULT * L2.mean()))) @ Q2.T
    filtered = (passed @ Q1 / (L1 + DEFAULT * L1.mean())) @ Q1.T
    places = {name: i for i, name in enumerate(retraining.pool_ids)}
    masks = subsets.losses.masks[:, [places[name] for name in pool.sequences.document_ids]].astype(np.float32)
    part = (torch.from_numpy(masks) @ documents.flatten(1) @ filtered.flatten(1).T).double().numpy()
    yield "the token embedding tracked too", subsets.score(part + subsets.total(filters_of(subsets)))
    yield "the token embedding alone", subsets.score(part)


def embedding_gradients(model: torch.nn.Module, sequences: Sequences, loss: Loss) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients [S, vocabulary, width] of the embedding's rows, and the sum of d d^T over tokens."""
    embed = model.get_input_embeddings()  # type: ignore[operator]
    vocabulary, width = embed.weight.shape
    found, covariance = torch.zeros(len(sequences), vocabulary, width), torch.zeros(width, width)
    for batch in batches(sequences, 4096):
        inputs = embed(batch.input_ids).detach().requires_grad_()
        outputs = model(inputs_embeds=inputs, attention_mask=batch.attention_mask, use_cache=False)
        (d,) = torch.autograd.grad(loss(outputs, batch), inputs)
        covariance += d.flatten(0, 1).T @ d.flatten(0, 1)
        rows = torch.zeros(len(batch.rows), vocabulary, width)
        found[torch.from_numpy(batch.rows)] = rows.scatter_add_(1, batch.input_ids[..., None].expand_as(d), d)
    return found, covariance


def block_ideas(subsets: Subsets, retraining: Retraining) -> Iterator[Idea]:
    """Other blocks of the fused query-key-value map: the factors are fitted anew."""
    base = subsets.pool.stages.config
    for split in ("none", "head"):
        curvature = base.curvature.model_copy(update={"qkv_split": split})
        config = base.model_copy(
            update={"curvature": curvature, "workspace": base.workspace.with_name(f"{base.workspace.name}-{split}")}
        )
        other = Subsets.of(Pool(config, subsets.pool.queries), retraining, subsets.losses, subsets.gold)
        yield f"query-key-value blocks: {split}", other.lds(filters_of(subsets))


def seed_ideas(subsets: Subsets, retraining: Retraining) -> Iterator[Idea]:
    """Models trained from other starts: alone, and their scores added up."""
    filters = filters_of(subsets)
    single: dict[str, SpectralFilter] = {subsets.pool.target: Damped(DEFAULT)}
    total, alone = subsets.total(filters), subsets.total(single)
    queries = retraining.queries
    for count, seed in enumerate(MORE_SEEDS, 2):
        other = Subsets.of(Pool(retraining.reference(seed), queries), retraining, subsets.losses, subsets.gold)
        found = other.total(filters)
        alone, total = alone + other.total(single), total + found
        yield f"another start (seed {seed})", subsets.score(found)
        yield f"scores of {count} starts added", subsets.score(total)
    yield f"EK-FAC, query at the last stage, {len(MORE_SEEDS) + 1} starts added", subsets.score(alone)


def main() -> None:
    retraining = Retraining(Config.load(sys.argv[1] if len(sys.argv) > 1 else CONFIG))
    subsets = open_subsets(retraining)
    base = subsets.lds(filters_of(subsets))
    value, error = mean_and_error(base)
    gold = f"{base[subsets.gold].mean():.3f}" if subsets.gold.any() else "–"
    table = Table("one change", "LDS, all", "LDS, gold", "against the default", title="Ideas, one at a time")
    table.add_row("none: multi-stage, damped", f"{value:.3f} ± {error:.3f}", gold, "")
    groups: list[Callable[[], Iterator[Idea]]] = [
        lambda: filter_ideas(subsets),
        lambda: weight_ideas(subsets, retraining),
        lambda: embedding_idea(subsets, retraining),
        lambda: block_ideas(subsets, retraining),
        lambda: seed_ideas(subsets, retraining),
    ]
    for group in groups:
        for name, found in group():
            value, error = mean_and_error(found)
            difference, paired = paired_difference(found, base)
            gold = f"{found[subsets.gold].mean():.3f}" if subsets.gold.any() else "–"
            table.add_row(name, f"{value:.3f} ± {error:.3f}", gold, f"{difference:+.3f} ± {paired:.3f}")
            print(f"{name}: {value:.3f} ({difference:+.3f} ± {paired:.3f})", file=sys.stderr)
    console.print(table)


if __name__ == "__main__":
    main()
