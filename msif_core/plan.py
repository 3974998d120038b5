"""What a configuration will take, before anything runs: parameters, bytes, operations and hours of each step.

The models are built on the meta device: their shapes are there, their weights are not. Operations are those that
the code does (METHOD section 6), one multiply-add counted as two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from msif_core import records, storage
from msif_core.config import Config, HubDataset, Stage
from msif_core.curvature.fit import partitions
from msif_core.devices import EIGH_FLOPS, Rates, rates
from msif_core.errors import InputError
from msif_core.index import kind_for
from msif_core.models import TrackedMap, coverage, tracked_maps
from msif_core.scoring import query_groups
from msif_core.workspace import Workspace

CHARACTERS_PER_TOKEN = 4.0
"""Of English text; used until a stage is tokenized."""

_PYTHIA = {"model_type": "gpt_neox", "rotary_pct": 0.25, "max_position_embeddings": 2048, "use_parallel_residual": True}
_BLOOM = {"model_type": "bloom", "vocab_size": 250880, "hidden_size": 1024, "n_layer": 24, "n_head": 16}
KNOWN: dict[str, dict[str, Any]] = {
    "EleutherAI/pythia-2.8b": _PYTHIA
    | {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 10240}
    | {"vocab_size": 50304},
    "EleutherAI/pythia-12b": _PYTHIA
    | {"hidden_size": 5120, "num_hidden_layers": 36, "num_attention_heads": 40, "intermediate_size": 20480}
    | {"vocab_size": 50688},
    "databricks/dolly-v2-3b": _PYTHIA
    | {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 10240}
    | {"vocab_size": 50280},
    "bigscience/bloom-560m": _BLOOM,
    "bigscience/bloomz-560m": _BLOOM,
}
"""Configurations of hub models that are planned for without the hub."""


@dataclass(frozen=True)
class StagePlan:
    """A stage's size; `assumed` says what of its corpus is not known yet, empty where it is tokenized."""

    name: str
    parameters: int
    tracked: int
    maps: int
    sequences: int
    tokens: int
    shards: int
    parts: int
    passes: int
    factor_bytes: int
    partial_bytes: int
    model_bytes: int
    assumed: str


@dataclass(frozen=True)
class Step:
    """One step's operations: at the model's dtype, in float32, and in float64 on the CPU."""

    name: str
    stage: str
    model_flops: float
    statistics_flops: float = 0.0
    eigenbasis_flops: float = 0.0
    hours: float = 0.0


@dataclass(frozen=True)
class Plan:
    """All of it; `index_bytes` are the published codes, `recall_sweeps` the passes over the sample of recall."""

    rates: Rates
    stages: tuple[StagePlan, ...]
    steps: tuple[Step, ...]
    index_kind: str
    index_bytes: int
    recall_sweeps: int

    @property
    def hours(self) -> float:
        """Of all steps, one after the other."""
        return sum(step.hours for step in self.steps)


def make_plan(config: Config, device: str = "measure", sequences: Mapping[str, int] | None = None) -> Plan:
    """Plan for `config`.

    Args:
        config: the configuration; nothing of it has to be built.
        device: a name in `PEAKS`, or `measure` for the configured device of this machine.
        sequences: number of sequences of stages whose corpus is not at hand.

    Raises:
        InputError: a model's configuration cannot be read, or `device` is not known.
    """
    given = dict(sequences or {})
    if unknown := set(given) - {stage.name for stage in config.stages}:
        raise InputError(f"--sequences names no stage: {sorted(unknown)}")
    speed = rates(config, device)
    stages, steps, works = [], [], {}
    for stage in config.stages:
        model = meta_model(config, stage)
        maps = tracked_maps(model, config.curvature)
        size = stage_plan(config, stage, model, maps, given.get(stage.name))
        works[stage.name] = (_Work(model, maps, size.tokens / max(1, size.sequences), _hadamard(config)), size)
        stages.append(size)
        steps += fit_steps(config, *works[stage.name])
    target, goal = works[config.attribute_to]
    last, _ = works[config.stages[-1].name]
    sweeps = query_sweeps(config, last, config.index.recall_queries if config.queries else 0)
    steps += index_steps(config, target, goal, sweeps)
    steps.append(attribute_step(config, last, target, goal))
    kind = kind_for(config.index, goal.sequences)
    return Plan(
        rates=speed,
        stages=tuple(stages),
        steps=tuple(_timed(step, speed) for step in steps),
        index_kind=kind,
        index_bytes=goal.sequences * code_bytes(config, kind),
        recall_sweeps=sweeps,
    )


def meta_model(config: Config, stage: Stage) -> nn.Module:
    """The stage's model without weights.

    Raises:
        InputError: no configuration of it can be read here.
    """
    known = KNOWN.get(stage.model)
    try:
        if known is not None and not Path(stage.model).exists():
            kind = str(known["model_type"])
            settings = transformers.AutoConfig.for_model(kind, **{k: v for k, v in known.items() if k != "model_type"})
        else:
            settings = transformers.AutoConfig.from_pretrained(
                stage.model,
                revision=stage.revision or "main",
                trust_remote_code=config.compute.trust_remote_code,
            )
    except (OSError, ValueError) as error:
        raise InputError(
            f"stage {stage.name!r}: no configuration of {stage.model} can be read here ({str(error).splitlines()[0]}); "
            "give a folder with its config.json"
        ) from None
    auto = {
        "causal_lm": transformers.AutoModelForCausalLM,
        "classification": transformers.AutoModelForSequenceClassification,
    }[stage.task]
    with torch.device("meta"):
        return auto.from_config(settings, trust_remote_code=config.compute.trust_remote_code)


def stage_plan(config: Config, stage: Stage, model: nn.Module, maps: list[TrackedMap], given: int | None) -> StagePlan:
    """Size of one stage's model, corpus and factors."""
    tracked, total = coverage(model, maps)
    window = config.corpus.max_length or getattr(model.config, "max_position_embeddings", None) or 1024
    count, tokens, shards, assumed = corpus_size(config, stage, int(window), given)
    inputs = {m.input_group: m.d_in for m in maps}
    covariances = sum(d * d for d in inputs.values()) + sum(m.groups * _block(m) ** 2 for m in maps)
    width = _width(config)
    parts = math.ceil(min(config.curvature.max_sequences, count) / config.curvature.part_sequences)
    return StagePlan(
        name=stage.name,
        parameters=total,
        tracked=tracked,
        maps=len(maps),
        sequences=count,
        tokens=tokens,
        shards=shards,
        parts=parts,
        passes=len(list(partitions(maps, config.curvature.memory_budget_gb))),
        factor_bytes=(covariances + tracked) * width,
        partial_bytes=parts * (covariances + tracked) * width,
        model_bytes=total * getattr(torch, config.compute.dtype).itemsize,
        assumed=assumed,
    )


def corpus_size(config: Config, stage: Stage, window: int, given: int | None) -> tuple[int, int, int, str]:
    """Sequences, tokens, shards, and how they are known: counted, given, estimated from the files, or assumed."""
    per_shard = config.corpus.shard_sequences
    if given is not None:
        return given, given * window, math.ceil(given / per_shard), f"{given:,} sequences of {window} tokens as given"
    folder = Workspace(config.workspace.resolve()).corpus(stage.name)
    if (folder / "manifest.json").exists():
        shards = storage.read_json(folder / "manifest.json")["shards"]
        columns = (pq.read_table(folder / s["documents"], columns=["n_tokens"])["n_tokens"] for s in shards)
        tokens = sum(int(column.to_numpy().sum()) for column in columns)
        return sum(s["n_sequences"] for s in shards), tokens, len(shards), ""
    sources = stage.documents if isinstance(stage.documents, list) else [stage.documents]
    try:
        found = [_estimate(source, window) for source in sources]
    except (InputError, LookupError):
        count = config.curvature.max_sequences
        note = f"its documents are not here: {count:,} sequences of {window} tokens assumed, see --sequences"
        return count, count * window, math.ceil(count / per_shard), note
    documents, count, tokens = (sum(column) for column in zip(*found, strict=True))
    return count, tokens, math.ceil(documents / per_shard), "estimated from the size of its files"


def _estimate(source: str | HubDataset, window: int, sample: int = 500) -> tuple[int, int, int]:
    """Documents, sequences and tokens of a glob, from its first records and the files' sizes."""
    if isinstance(source, HubDataset):
        raise LookupError(source.dataset)
    documents, counts, lengths, read = 0.0, 0, 0, 0
    for path in records.files_of(source):
        texts, stored = [], 0
        for record in records.read_records(str(path), records.Skipped(), skip=True):
            texts.append(record.get("input_ids") or records.text_of(record))
            stored += len(str(record).encode())
            if len(texts) == sample:
                break
        if path.suffix == ".parquet":
            documents += pq.ParquetFile(path).metadata.num_rows
        else:
            documents += path.stat().st_size / max(1.0, stored / max(1, len(texts)))
        tokens = [math.ceil(len(t) / (CHARACTERS_PER_TOKEN if isinstance(t, str) else 1)) for t in texts]
        counts += sum(math.ceil(n / window) for n in tokens)
        lengths += sum(tokens)
        read += len(texts)
    scale = documents / max(1, read)
    return round(documents), round(counts * scale), round(lengths * scale)


@dataclass(frozen=True)
class _Work:
    """Operations of one stage's passes, for a sequence of `tokens` tokens."""

    model: nn.Module
    maps: list[TrackedMap]
    tokens: float
    hadamard: float

    def forward_backward(self) -> float:
        """4 N T over all linear maps (the head too), and attention's products of tokens with tokens."""
        linear = sum(m.weight.numel() for m in self.model.modules() if isinstance(m, nn.Linear | Conv1D))
        config: Any = self.model.config
        attention = 12.0 * config.num_hidden_layers * config.hidden_size * self.tokens**2
        return 4.0 * linear * self.tokens + attention

    def covariance(self) -> float:
        """Sums of a a^T and d d^T."""
        inputs = {m.input_group: m.d_in for m in self.maps}
        outputs = sum(m.groups * _block(m) ** 2 for m in self.maps)
        return 2.0 * self.tokens * (sum(d * d for d in inputs.values()) + outputs)

    def gradients(self) -> float:
        """Per-sequence gradients, formed from the tokens."""
        return 2.0 * self.tokens * self.tracked()

    def rotation(self) -> float:
        """Into the eigenbasis: of the tokens or of the gradient, whichever is cheaper, as the code does."""
        return 2.0 * sum(
            min(
                self.tokens * (m.d_in**2 + m.groups * _block(m) ** 2),
                m.size * (_block(m) + m.d_in),
            )
            for m in self.maps
        )

    def eigenbases(self) -> float:
        """Of every A and S."""
        inputs = {m.input_group: m.d_in for m in self.maps}
        return EIGH_FLOPS * (sum(d**3 for d in inputs.values()) + sum(m.groups * _block(m) ** 3 for m in self.maps))

    def filtering(self, stages: int) -> float:
        """One gradient through the filters of `stages` stages: four products a map and stage."""
        return 4.0 * stages * sum(m.size * (_block(m) + m.d_in) for m in self.maps)

    def tracked(self) -> int:
        """Tracked parameters."""
        return sum(m.size for m in self.maps)


def fit_steps(config: Config, work: _Work, size: StagePlan) -> list[Step]:
    """The EK-FAC fit of one stage."""
    fitted = min(config.curvature.max_sequences, size.sequences)
    sweep = fitted * size.passes * work.forward_backward()
    corrected = fitted * (work.rotation() + work.gradients() + 2.0 * work.tracked())
    return [
        Step("covariances", size.name, sweep, fitted * work.covariance()),
        Step("eigenbases", size.name, 0.0, 0.0, work.eigenbases()),
        Step("eigenvalues", size.name, sweep, corrected),
    ]


def query_sweeps(config: Config, last: _Work, queries: int) -> int:
    """Passes over the documents that scoring `queries` takes: their gradients stream through the memory budget."""
    return len(list(query_groups(last.maps, queries, config.curvature.memory_budget_gb)))


def index_steps(config: Config, work: _Work, size: StagePlan, sweeps: int) -> list[Step]:
    """Sketches of the attributed stage, and the exact scores that measure recall."""
    sketch = work.rotation() + work.gradients() + 3.0 * work.tracked() + work.hadamard
    steps = [
        Step("sketches", size.name, size.sequences * size.passes * work.forward_backward(), size.sequences * sketch)
    ]
    if sweeps:
        count = min(config.index.recall_sample, size.sequences)
        scoring = work.gradients() + 2.0 * config.index.recall_queries * work.tracked()
        steps.append(Step("recall", size.name, count * sweeps * work.forward_backward(), count * scoring))
    return steps


def attribute_step(config: Config, last: _Work, target: _Work, size: StagePlan) -> Step:
    """One query: its gradient, the chain, and exact scores of its candidates and of the random sample."""
    settings = config.retrieval
    wanted = max(settings.rerank_min, round(settings.rerank_fraction * size.sequences))
    sources = 2 if settings.candidates == "both" else 1
    count = min(size.sequences, sources * min(settings.rerank_max, wanted) + settings.random_sample)
    chain = last.filtering(len(config.stages) - config.attributed_index)
    return Step(
        "one query",
        size.name,
        last.forward_backward() + count * query_sweeps(config, last, 1) * target.forward_backward(),
        last.gradients() + chain + count * (target.gradients() + 2.0 * target.tracked()),
    )


def code_bytes(config: Config, kind: str) -> int:
    """Stored bytes of a sequence's code: float32, or RaBitQ's bits, norms and id."""
    dimensions, bits = config.sketch.dimensions, config.index.bits
    return 8 + (4 * dimensions if kind == "flat" else dimensions * bits // 8 + (8 if bits == 1 else 20))


def _hadamard(config: Config) -> float:
    m = config.sketch.dimensions
    return 2.0 * m * math.log2(m)


def _timed(step: Step, speed: Rates) -> Step:
    seconds = (
        step.model_flops / speed.model
        + step.statistics_flops / speed.statistics
        + step.eigenbasis_flops / speed.eigenbases
    )
    return Step(**{**step.__dict__, "hours": seconds / 3600})


def _block(m: TrackedMap) -> int:
    return m.shape[1]


def _width(config: Config) -> int:
    """Bytes of a statistic's entry."""
    return 8 if config.compute.dtype == "float64" else 4
