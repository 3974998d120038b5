"""More than one model: checkpoints on the way, other fine-tunings, other starts; other blocks of the fused maps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.accuracy import DEFAULT
from benchmarks.ideas.documents import unit_weights
from benchmarks.ideas.embedding import embedding_part
from benchmarks.ideas.geometry import bases, corrected, covariances
from benchmarks.ideas.subject import Idea, Subject
from benchmarks.ideas.training import Trace
from msif_core import scoring
from msif_core.curvature.filters import Damped, SpectralFilter
from msif_core.evaluation.methods import Gradients, Pool
from msif_core.evaluation.retraining import recipe
from msif_core.models import load_model
from msif_core.training import train_stage

MORE_SEEDS = (2, 3)
"""Reference models trained from other starts; the subsets were trained with 0 and 1."""

MORE_FINE_TUNINGS = (11, 12, 13)


def gradients_of(subject: Subject, model: torch.nn.Module, queries: bool) -> Gradients:
    """Gradients of the queries, or of the pool's documents, at any model."""
    sequences = subject.pool.queries.sequences if queries else subject.pool.sequences
    batch_tokens = subject.pool.stages.batch_tokens
    return scoring.query_gradients(model, subject.maps, sequences, batch_tokens, task="causal_lm")


def checkpoint_ideas(subject: Subject, trace: Trace) -> Iterator[Idea]:
    """The attributed stage seen at several checkpoints of its one training."""
    pool, score = subject.pool, subject.subsets.score
    final = pool.stages.model(pool.target)
    models = []
    for parameters in trace.checkpoints:
        models.append(copy.deepcopy(final))
        models[-1].load_state_dict(parameters)
    documents = subject.sequences(pool.target)
    seeded = [(model, 0) for model in (*models, final)]
    averaged = corrected(
        seeded, subject.maps, bases(subject.maps, covariances(seeded, subject.maps, documents)), documents
    )
    yield f"factors averaged over {len(seeded)} checkpoints", score(subject.chained(averaged))
    total = subject.subsets.total(subject.filters)
    for number, model in enumerate(reversed(models), 2):
        found = bases(subject.maps, covariances([(model, 0)], subject.maps, documents))
        found = corrected([(model, 0)], subject.maps, found, documents)
        total = total + subject.chained(found, subsets=subject.summed(gradients_of(subject, model, queries=False)))
        yield f"scores of the last {number} of {len(seeded)} checkpoints added", score(total)


def fine_tuning_ideas(subject: Subject) -> Iterator[Idea]:
    """The last stage trained again in other orders, from the same pre-trained model: queries' gradients averaged."""
    pool, retraining = subject.pool, subject.retraining
    stage = retraining.config.stages[-1]
    total = pool.query_gradients(pool.last)
    for count, seed in enumerate(MORE_FINE_TUNINGS, 2):
        out = retraining.folder / f"fine-tuning-{seed}"
        start = pool.stages.config.stage(pool.target).model
        train_stage(Path(start), retraining.sequences(stage), out, recipe(stage, seed), retraining.tokenizer)
        more = gradients_of(subject, load_model(str(out)), queries=True)
        total = {name: value + more[name] for name, value in total.items()}
        yield (
            f"query's gradients of {count} fine-tunings averaged",
            subject.subsets.score(subject.chained(queries=total)),
        )


def seed_ideas(subject: Subject) -> Iterator[Idea]:
    """Both stages trained from other starts: alone, their scores added up, and with what else wins."""
    score = subject.subsets.score
    pools = [subject.pool]
    single: dict[str, SpectralFilter] = {subject.pool.target: Damped(DEFAULT)}
    total, alone = subject.subsets.total(subject.filters), subject.subsets.total(single)
    for count, seed in enumerate(MORE_SEEDS, 2):
        pools.append(Pool(subject.retraining.reference(seed), subject.pool.queries))
        other = subject.of_pool(pools[-1])
        found = other.total(subject.filters)
        alone, total = alone + other.total(single), total + found
        yield f"another start (seed {seed})", score(found)
        yield f"scores of {count} starts added", score(total)
    yield f"EK-FAC, query at the last stage, {len(pools)} starts added", score(alone)
    filters: dict[str, SpectralFilter] = {subject.pool.target: Damped(0.01), subject.pool.last: Damped(DEFAULT)}
    together = 0.0
    for count, pool in enumerate(pools, 1):
        weights = unit_weights(pool)
        together = together + subject.of_pool(pool, weights).total(filters) + embedding_part(subject, pool, weights)
        if count in (1, len(pools)):
            starts = f", {count} starts" if count > 1 else ""
            yield f"together: unit norm, damping 0.01, embedding{starts}", score(together)


def block_ideas(subject: Subject) -> Iterator[Idea]:
    """Other blocks of the output rows: the factors are fitted anew."""
    base = subject.pool.stages.config
    width = subject.retraining.architecture.hidden
    variants: dict[str, dict[str, str | int]] = {
        "query-key-value blocks: none": {"qkv_split": "none"},
        "query-key-value blocks: head": {"qkv_split": "head"},
        "block_size of the hidden width": {"block_size": width},
        "block_size of half of it": {"block_size": width // 2},
        "by head, block_size of half of it": {"qkv_split": "head", "block_size": width // 2},
    }
    for number, (name, update) in enumerate(variants.items()):
        curvature = base.curvature.model_copy(update=update)
        workspace = base.workspace.with_name(f"{base.workspace.name}-blocks-{number}")
        config = base.model_copy(update={"curvature": curvature, "workspace": workspace})
        yield name, subject.of_pool(Pool(config, subject.pool.queries)).lds(subject.filters)
