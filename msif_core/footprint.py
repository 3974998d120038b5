"""Peak memory of each step: the model, the statistics of a sweep, a batch's activations, what a shard holds.

On a CPU this is the process's resident size, the libraries and the mapped sums included; on an accelerator its own.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from msif_core import losses
from msif_core.config import Config
from msif_core.curvature.fit import partitions, statistics
from msif_core.curvature.gradients import CACHED_ENTRIES, CHUNK_ENTRIES, CPU_ROWS, CPU_SEQUENCES
from msif_core.tracking import TrackedMap, text_config
from msif_core.work import Work

PROCESS = 0.45e9
"""Bytes of a process with its libraries, or of an accelerator's context."""

EIGH_COPIES = 5
"""Float64 matrices held in an eigendecomposition: the sum, its copy that becomes the vectors, the solver's."""

MIXED_COPIES = 5
"""Of a shard's sketches, while they are mixed."""

FRAGMENTED = 0.4
"""Of a batch's activations, what a CPU process holds besides: freed tensors between live ones (docs/performance.md)."""

SIGN_BYTES = 12
"""Of an entry whose weight gets its random sign: both, and their product."""


def activations(config: Config, work: Work) -> float:
    """What a batch holds between its forward and its backward: the maps' inputs and outputs, and logits.

    Their gradient takes their place.
    """
    tokens = max(config.compute.batch_tokens, work.tokens, work.longest)
    width = getattr(torch, config.compute.dtype).itemsize
    settings = text_config(work.model)
    layers = sum(m.routed * (m.d_in + m.d_out) for m in work.maps if m.d_out < settings.vocab_size)
    return float(tokens * width * (layers + settings.vocab_size))


def sampling(config: Config, work: Work, accelerator: bool) -> float:
    """Float64 softmax and its sums, where labels are drawn."""
    settings = text_config(work.model)
    tokens = max(config.compute.batch_tokens, work.tokens, work.longest)
    most = losses.CHUNK_ENTRIES if accelerator else losses.CACHED_ENTRIES
    return 24.0 * min(most, tokens * int(settings.vocab_size))


def gradients(config: Config, work: Work, accelerator: bool) -> float:
    """Per-sequence gradients of one map for some of a batch, and two copies while they are rotated."""
    count = max(1.0, config.compute.batch_tokens / work.tokens)
    rows = CPU_SEQUENCES * CPU_ROWS

    def block(m: TrackedMap) -> float:
        return max(CHUNK_ENTRIES, m.size) if accelerator else max(CACHED_ENTRIES, m.size, rows * m.d_in)

    return 12.0 * max(min(count * m.size, block(m)) for m in work.maps)


def of_pass(config: Config, work: Work, model: float, accelerator: bool) -> float:
    """The process, the model and a batch after many others."""
    return PROCESS + model + (1.0 if accelerator else 1 + FRAGMENTED) * activations(config, work)


def of_fit(config: Config, work: Work, model: float, parts: int, accelerator: bool) -> dict[str, float]:
    """Bytes at the peak of covariances, eigenbases and eigenvalues."""
    covariances, values = _sweeps(config, work)
    n = max([*work.inputs, *(m.pieces[1] for m in work.maps)])
    held, drawn = of_pass(config, work, model, accelerator), sampling(config, work, accelerator)
    mapped = 0.0 if accelerator else parts * 4.0 * n * n
    return {
        "covariances": held + max(covariances) + drawn,
        "eigenbases": PROCESS + model + EIGH_COPIES * 8.0 * n * n + mapped,
        "eigenvalues": held
        + max(map(sum, zip(covariances, values, strict=True)))
        + max(drawn, gradients(config, work, accelerator)),
    }


def of_sketches(config: Config, work: Work, model: float, sequences: float, accelerator: bool) -> float:
    """Bytes at the peak of a shard of so many sequences, whose folded gradients stay on the CPU."""
    sweep = max(map(sum, zip(*_sweeps(config, work, kept_share(config, work)), strict=True)))
    shard = 0.0 if accelerator else 4.0 * config.sketch.dimensions * sequences
    passing = of_pass(config, work, model, accelerator) + gradients(config, work, accelerator)
    weighing = PROCESS + model + SIGN_BYTES * work.widest
    mixing = PROCESS + model + MIXED_COPIES * shard
    return max(sweep + shard + max(passing, weighing), mixing)


def kept_share(config: Config, work: Work) -> float:
    """Share of the eigendirections that sketches keep, and about that of the coordinates, as some maps keep most.

    At least as many coordinates as a sketch has dimensions.
    """
    if config.sketch.whitening == "none":
        return 1.0
    return min(1.0, max(config.sketch.directions, config.sketch.dimensions / work.tracked))


def _sweeps(config: Config, work: Work, share: float = 1.0) -> tuple[list[float], list[float]]:
    """Bytes of the covariances (or bases) and of the eigenvalues (or weights) of each sweep's maps, or that share."""
    width = share * (8.0 if config.compute.dtype == "float64" else 4.0)
    parts = partitions(work.maps, config.curvature.memory_budget_gb, lambda m: share * statistics(m))
    groups = [replace(work, maps=g) for g in parts]
    return [width * g.covariance_entries for g in groups], [width * g.tracked for g in groups]


def of_query(config: Config, last: Work, target: Work, models: float, shown: int) -> float:
    """Bytes at the peak of one query: gradients of the documents that it shows, within the budget."""
    held = 4.0 * shown * (2 * last.tracked + 3 * last.widest)
    products = 12.0 * min(CHUNK_ENTRIES, shown * last.tokens * max(m.d_out for m in last.maps))
    scratch = max(activations(config, target), products)
    return PROCESS + models + min(1e9 * config.curvature.memory_budget_gb, held) + scratch
