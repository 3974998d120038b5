"""What a configuration will take, before anything runs: parameters, bytes, operations and hours of each step.

The models are built on the meta device: their shapes are there, their weights are not. Times of this machine are
those of models of few layers (`probe`); of a named device, operations over a share of its peak rate.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from msif_core import footprint, probe
from msif_core.config import Config, Stage
from msif_core.corpus_size import corpus_size
from msif_core.coverage import coverage_of
from msif_core.curvature.fit import partitions, statistics
from msif_core.devices import Rates, rates
from msif_core.errors import InputError
from msif_core.index import cells, kind_for
from msif_core.meta_models import meta_model, window
from msif_core.probe import PassTime
from msif_core.scoring import COPIES, query_groups
from msif_core.tracking import TrackedMap, text_config, tracked_maps
from msif_core.work import Work

QUERY_STEPS = ("search", "one query")
"""Steps of a question; the others build."""

SEARCH_RATE = 3.5e9
"""Bytes of codes that one thread searches in a second (docs/performance.md); as many threads, as many times that."""

TRAINING_SAMPLE = 512
"""Sequences that the index is trained on, sketched once more."""

UNLIKE, TOO_LARGE = "its layers are not alike", "a few of its layers take too long or too much memory to try here"
"""Why a stage's passes are not timed."""


@dataclass(frozen=True)
class StagePlan:
    """A stage's size.

    `assumed` says what of its corpus is not known yet, empty where it is tokenized; `coverage` what is tracked;
    `counted` why its passes could not be timed on this machine, empty where they were or nothing was. A document's
    window is of `window` tokens at most, which its model has `positions` of (None: it names none). A sequence has
    `padded` tokens with the padding of its batch, which take as long as others.
    """

    name: str
    window: int
    positions: int | None
    parameters: int
    tracked: int
    maps: int
    sequences: int
    tokens: int
    padded: float
    shards: int
    parts: int
    passes: int
    factor_bytes: int
    partial_bytes: int
    model_bytes: int
    assumed: str
    coverage: str
    counted: str = ""


@dataclass(frozen=True)
class Step:
    """One step: operations, seconds on one device, into how many tasks it is cut, and its peak memory in bytes.

    `measured` says that the seconds come from passes of a small model here, not from operations and a rate.
    """

    name: str
    stage: str
    operations: float
    seconds: float
    tasks: int = 1
    memory: float = 0.0
    measured: bool = False

    def hours(self, devices: int = 1) -> float:
        """On so many devices: whole tasks, so that more devices than tasks are of no use."""
        return self.seconds / 3600 * math.ceil(self.tasks / devices) / self.tasks


@dataclass(frozen=True)
class Plan:
    """All of it; `index_bytes` are codes and each shard's centres, `recall_sweeps` the passes over recall's sample."""

    rates: Rates
    devices: int
    stages: tuple[StagePlan, ...]
    steps: tuple[Step, ...]
    index_kind: str
    index_bytes: int
    recall_sweeps: int

    @property
    def hours(self) -> float:
        """Of the build: all steps but a query, one after the other, each over the devices."""
        return sum(step.hours(self.devices) for step in self.steps if step.name not in QUERY_STEPS)


@dataclass(frozen=True)
class _Planned:
    """What the steps of one stage are computed from; `times` are measured passes, None where there are none."""

    stage: Stage
    work: Work
    size: StagePlan
    times: dict[str, PassTime] | None


def make_plan(
    config: Config, device: str = "measure", sequences: Mapping[str, int] | None = None, devices: int = 1
) -> Plan:
    """Plan for `config`.

    Args:
        config: the configuration; nothing of it has to be built.
        device: a name in `PEAKS`, or `measure` for the configured device of this machine.
        sequences: number of sequences of stages whose corpus is not at hand.
        devices: accelerators (or machines) that share the tasks of a step.

    Raises:
        InputError: a model's configuration cannot be read, or `device` is not known.
    """
    given = dict(sequences or {})
    names = [stage.name for stage in config.stages]
    if unknown := set(given) - set(names):
        raise InputError(f"--sequences names no stage: {sorted(unknown)}; stages are {names}")
    if empty := sorted(name for name, count in given.items() if count < 1):
        raise InputError(f"--sequences {empty[0]}={given[empty[0]]}: a stage has one sequence at least")
    found = {}
    for stage in config.stages:
        model = meta_model(config, stage)
        maps = tracked_maps(model, config.curvature)
        size = stage_plan(config, stage, model, maps, given.get(stage.name))
        found[stage.name] = _Planned(stage, Work(model, maps, size.padded, size.window), size, None)
    widths: Counter[int] = Counter()
    for planned in found.values():
        widths.update(planned.work.eigenbasis_widths)
    speed = rates(config, device, widths)
    if device == "measure":
        found = {name: _measured(config, planned, speed, len(found)) for name, planned in found.items()}
    last, target = found[config.stages[-1].name], found[config.attribute_to]
    sweeps = query_sweeps(config, last.work, config.index.recall_queries) if config.queries else []
    sweeps = [last.work.maps] if sweeps and config.index.recall_rank else sweeps
    kind = kind_for(config.index, target.size.sequences)
    centres = 1 + (cells(TRAINING_SAMPLE, target.size.sequences) if kind == "ivf" else 0)
    index_bytes = target.size.sequences * code_bytes(config, kind)
    index_bytes += target.size.shards * centres * 4 * config.sketch.dimensions
    steps = [step for planned in found.values() for step in fit_steps(config, planned, speed)]
    steps += index_steps(config, target, sweeps, speed)
    steps += query_steps(config, last, target, speed, index_bytes / 4 if kind == "ivf" else index_bytes)
    return Plan(
        rates=speed,
        devices=devices,
        stages=tuple(planned.size for planned in found.values()),
        steps=tuple(steps),
        index_kind=kind,
        index_bytes=index_bytes,
        recall_sweeps=len(sweeps),
    )


def _measured(config: Config, planned: _Planned, speed: Rates, stages: int) -> _Planned:
    """With times of its passes, where models of few of its layers run in this stage's share of the probes' budget."""
    work, tokens = planned.work, round(planned.work.tokens)
    depth, kept = getattr(text_config(work.model), "num_hidden_layers", 0), footprint.kept_share(config, work)
    if not probe.uniform(work.maps, depth):
        return replace(planned, size=replace(planned.size, counted=UNLIKE))
    rest = probe.PASSES * work.outside()
    operations = probe.PASSES * work.passes([work.maps]) - rest
    operations += work.covariance() + (1 + kept) * (work.rotation() + work.gradients())
    entries = (work.covariance_entries + work.tracked) // depth
    size = probe.Size(operations / depth, rest, entries, max(2, config.compute.batch_tokens // tokens))
    seconds = probe.BUDGET / stages
    if (counts := size.counts(seconds, speed.model)) is None:
        return replace(planned, size=replace(planned.size, counted=TOO_LARGE))
    times = probe.measure(config, planned.stage, work.model, tokens, speed.device, counts, kept, seconds)
    return replace(planned, times=times)


def stage_plan(config: Config, stage: Stage, model: nn.Module, maps: list[TrackedMap], given: int | None) -> StagePlan:
    """Size of one stage's model, corpus and factors."""
    tracked, total = sum(m.size for m in maps), sum(p.numel() for p in model.parameters())
    coverage = coverage_of(model, maps)
    longest = window(config, stage.name, model) or 1024
    corpus = corpus_size(config, stage, longest, given)
    fitted = min(config.curvature.max_sequences, corpus.sequences)
    inputs = {m.input_group: m.d_in for m in maps}
    covariances = sum(d * d for d in inputs.values()) + sum(m.s_entries for m in maps)
    width = _width(config)
    parts = min(corpus.shards, math.ceil(fitted / config.curvature.part_sequences))
    return StagePlan(
        name=stage.name,
        window=longest,
        positions=getattr(text_config(model), "max_position_embeddings", None),
        parameters=total,
        tracked=tracked,
        maps=len(maps),
        sequences=corpus.sequences,
        tokens=corpus.tokens,
        padded=corpus.padded(math.ceil(fitted / parts), config.compute.batch_tokens),
        shards=corpus.shards,
        parts=parts,
        passes=len(list(partitions(maps, config.curvature.memory_budget_gb))),
        factor_bytes=(covariances + tracked) * width,
        partial_bytes=parts * (covariances + tracked) * width,
        model_bytes=total * getattr(torch, config.compute.dtype).itemsize,
        assumed=corpus.assumed,
        coverage=coverage.told(),
    )


def fit_steps(config: Config, planned: _Planned, speed: Rates) -> list[Step]:
    """The EK-FAC fit of one stage."""
    work, size = planned.work, planned.size
    fitted = min(config.curvature.max_sequences, size.sequences)
    groups = list(partitions(work.maps, config.curvature.memory_budget_gb))
    memory = footprint.of_fit(config, work, size.model_bytes, size.parts, speed.accelerator)

    def step(name: str, products: float, outer: float = 0.0) -> Step:
        model = fitted * work.passes(groups)
        operations = model + products + outer
        seconds = _seconds(planned, name, size.parts, fitted, groups, products + outer)
        seconds = seconds or speed.seconds(model, products, outer)
        return Step(name, size.name, operations, seconds, size.parts, memory[name], planned.times is not None)

    bases = Step(
        "eigenbases",
        size.name,
        work.eigenbases(),
        speed.diagonalising(work.eigenbasis_widths),
        size.parts,
        memory["eigenbases"],
    )
    corrected = fitted * (work.rotation() + 2.0 * work.tracked)
    return [
        step("covariances", fitted * work.covariance()),
        bases,
        step("eigenvalues", corrected, fitted * work.gradients()),
    ]


def query_sweeps(config: Config, last: Work, queries: int) -> list[list[TrackedMap]]:
    """Maps of each pass over the documents that scoring `queries` takes: their gradients stream through the budget."""
    return [maps for _, maps in query_groups(last.maps, queries, config.curvature.memory_budget_gb)]


def index_steps(config: Config, planned: _Planned, sweeps: list[list[TrackedMap]], speed: Rates) -> list[Step]:
    """Sketches of the attributed stage (the index's training sample twice), and the scores that measure recall."""
    work, size = planned.work, planned.size
    count = size.sequences + min(TRAINING_SAMPLE, size.sequences // size.shards)
    m = config.sketch.dimensions
    kept = footprint.kept_share(config, work)
    rotation = 0.0 if config.sketch.whitening == "none" else work.rotation(kept)
    groups = list(partitions(work.maps, config.curvature.memory_budget_gb, lambda m: kept * statistics(m)))
    model, outer = count * work.passes(groups), count * work.gradients(kept)
    products = count * (rotation + 3.0 * kept * work.tracked + 2.0 * m * math.log2(m))
    seconds = _seconds(planned, "sketches", size.shards + 1, count, groups, products + outer)
    seconds = seconds or speed.seconds(model, products, outer)
    memory = footprint.of_sketches(config, work, size.model_bytes, size.sequences / size.shards, speed.accelerator)
    measured = planned.times is not None
    steps = [Step("sketches", size.name, model + products + outer, seconds, size.shards, memory, measured)]
    if sweeps:
        count = min(config.index.recall_sample, size.sequences)
        scored, rank = 2 * config.index.recall_queries, config.index.recall_rank
        ranked = sum(m.groups * (m.shape[1] + m.d_in) for m in work.maps) * (rank or 0)
        entries, products = (ranked, work.tokens * ranked) if rank else (work.tracked, work.tracked)  # of one query
        model, products = count * work.passes(sweeps), 2.0 * count * scored * products
        outer = 0.0 if rank else count * work.gradients()
        tasks = math.ceil(count * size.shards / size.sequences)
        seconds, held = speed.seconds(model, products, outer), 1e9 * config.curvature.memory_budget_gb
        held = 4.0 * scored * entries if rank else min(held, 2.0 * COPIES * scored * entries)
        memory = footprint.of_pass(config, work, size.model_bytes, speed.accelerator) + held
        steps.append(Step("recall", size.name, model + products + outer, seconds, tasks, memory))
    return steps


def query_steps(config: Config, last: _Planned, target: _Planned, speed: Rates, searched: float) -> list[Step]:
    """One query: the search of `searched` bytes of codes, its gradients, exact scores, and what they are made of."""
    settings, work, size = config.retrieval, target.work, target.size
    wanted = min(settings.rerank_max, max(settings.rerank_min, round(settings.rerank_fraction * size.sequences)))
    found = {"gradient": 1.25, "bm25": 1.0, "both": 2.25}[settings.candidates] * wanted
    count = min(size.sequences, round(found) + settings.random_sample)
    shown = settings.top_k + max(1, settings.top_k // 4)
    stages = len(config.stages) - config.attributed_index
    # The query's gradient is filtered for its scores and their parts, and for its sketch up to the last basis; the
    # shown documents' once, back. Of the rotations, two a stage, the first comes with the gradients, formed of rotated
    # tokens, and many gradients take one from stage to stage.
    filters = (3 * (2 * stages - 1) - 1) * last.work.unrotation() + shown * stages * work.unrotation()
    products = 3 * last.work.rotation() + shown * (work.gradients() + work.rotation())
    groups = query_sweeps(config, last.work, 1)
    passes = 4 * last.work.passes([last.work.maps]) + shown * work.passes([work.maps])
    scoring = count * work.passes(groups) + shown * work.passes([work.maps])
    dots = (count + shown) * work.gradients()
    seconds = _seconds(target, "scores", 1, count + shown, groups, dots)
    seconds = speed.seconds(passes, products, filters=filters) + (seconds or speed.seconds(scoring, dots))
    weights = size.model_bytes + (last.size.model_bytes if last is not target else 0)
    memory = footprint.of_query(config, last.work, work, weights, shown)
    operations = passes + products + filters + scoring + dots
    return [
        Step("search", size.name, 0.0, 2 * searched / SEARCH_RATE),  # for and against
        Step("one query", size.name, operations, seconds, 1, memory, target.times is not None),
    ]


def _seconds(
    planned: _Planned, name: str, calls: int, sequences: float, groups: list[list[TrackedMap]], other: float
) -> float | None:
    """Of the measured pass, longer by as much as its operations with one for each group; `other` come but once."""
    if planned.times is None:
        return None
    work = planned.work
    once, swept = (sequences * work.passes(cut) + other for cut in ([work.maps], groups))
    return planned.times[name].seconds(calls, sequences) * swept / once


def code_bytes(config: Config, kind: str) -> int:
    """Stored bytes of a sequence's code: float32, or RaBitQ's bits, norms and id."""
    dimensions, bits = config.sketch.dimensions, config.index.bits
    return 8 + (4 * dimensions if kind == "flat" else dimensions * bits // 8 + (8 if bits == 1 else 20))


def _width(config: Config) -> int:
    """Bytes of a statistic's entry."""
    return 8 if config.compute.dtype == "float64" else 4
