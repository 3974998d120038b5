"""Ground truth: every stage trained anew on random subsets of the attributed stage's documents.

A pool of documents is fixed, random subsets of it are drawn, and for each subset the stages are trained one after
the other: the attributed stage on the subset, the others on all of their data. The queries' losses after each
stage are what scores are held against (linear datamodeling score; Park et al. 2023, arXiv 2303.14186). One Parquet
file a training; a training that has its file is not done again, and done again it gives the same bits.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from msif_core import corpus, records, storage
from msif_core.batching import Sequences
from msif_core.config import Config, Stage
from msif_core.dealing import canonical_json
from msif_core.demo import read
from msif_core.errors import InputError
from msif_core.queries import Queries, check_single, load_queries
from msif_core.tokenizers import load_tokenizer
from msif_core.training import Architecture, new_model, optimize, sequence_losses, train_stage, train_tokenizer
from msif_core.workspace import Workspace

LOSSES = pa.schema([
    ("ground_truth", pa.string()), ("run", pa.string()), ("kind", pa.string()), ("subset", pa.int32()),
    ("seed", pa.int32()), ("stage", pa.string()), ("query_id", pa.string()), ("loss", pa.float64()),
    ("targets", pa.int32()), ("n_documents", pa.int32()), ("steps", pa.int32()), ("seconds", pa.float64()),
])  # fmt: skip
MASKS = pa.schema([("ground_truth", pa.string()), ("subset", pa.int32()), ("document_id", pa.string())])
LEFT_OUT = pa.schema([
    ("ground_truth", pa.string()), ("run", pa.string()), ("method", pa.string()), ("query_id", pa.string()),
    ("document_ids", pa.list_(pa.string())),
])  # fmt: skip

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """One training of all stages.

    Attributes:
        name: names the file of its losses.
        kind: subset, or left_out (the pool without some documents).
        subset: number of the subset; -1 for left_out.
        seed: added to every stage's seed: another initialisation, another order.
        without: documents of the pool that a left_out training leaves out.
    """

    name: str
    kind: str
    subset: int
    seed: int
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Losses:
    """Losses of the queries after one stage of the subsets' trainings.

    Attributes:
        masks: [M, N], which of the pool's documents were in each subset.
        values: [M, Q], summed loss; over a subset's seeds, the mean.
        first: [R, Q] of the repeated subsets, with the first seed.
        second: [R, Q] of the same subsets, with the second seed.
    """

    masks: BoolArray
    values: FloatArray
    first: FloatArray
    second: FloatArray


class Retraining:
    """The ground truth of one configuration, in a folder addressed by all that decides its numbers."""

    def __init__(self, config: Config) -> None:
        if config.queries is None:
            raise InputError("retraining needs held-out queries: set `queries` to a jsonl file")
        for stage in config.stages:
            if stage.training is None:
                raise InputError(f"stage {stage.name}: no `training` recipe; add one to retrain it")
            if stage.task != "causal_lm":
                raise InputError(f"stage {stage.name}: only causal_lm stages can be retrained")
        self.config = config
        self.settings = config.retraining
        self.workspace = Workspace(config.workspace.resolve())

    # -- what is trained on -----------------------------------------------------------------------

    @cached_property
    def key(self) -> str:
        """Address of the ground truth: data, recipes and settings."""
        settings = self.settings.model_dump(exclude={"subsets", "repeats", "left_out", "left_out_queries"})
        stages = [(s.name, records.source_fingerprint(s.documents), s.training) for s in self.config.stages]
        recipes = [(name, data, training.model_dump() if training else None) for name, data, training in stages]
        queries = records.source_fingerprint(str(self.config.queries))
        return storage.fingerprint(
            settings, recipes, queries, self.config.attribute_to, self.window, self.config.corpus.start
        )

    @property
    def folder(self) -> Path:
        """Folder of the ground truth."""
        return self.workspace.evaluations / "retraining" / self.key

    @property
    def window(self) -> int:
        """Window length in tokens."""
        return self.config.corpus.max_length or 96

    @property
    def architecture(self) -> Architecture:
        """Size of the retrained model."""
        size = self.settings
        return Architecture(size.hidden, size.layers, size.heads, self.window)

    @cached_property
    def pool(self) -> list[records.Record]:
        """The pool: the queries' gold documents, then a random sample of the rest, `pool` in all."""
        found = read(self.config, self.config.stage(self.config.attribute_to))
        queries = records.read_list(Path(str(self.config.queries)))
        gold = {name for query in queries for name in query.get("gold_doc_ids", [])}
        order = np.random.default_rng(self.settings.seed).permutation(len(found))
        chosen = sorted((int(i) for i in order), key=lambda i: found[i]["id"] not in gold)[: self.settings.pool]
        if len(chosen) < self.settings.pool:
            raise InputError(
                f"retraining.pool is {self.settings.pool}, but there are {len(found)} documents; set retraining.pool "
                f"to {len(found)} or less"
            )
        return [found[i] for i in sorted(chosen)]

    @cached_property
    def pool_ids(self) -> list[str]:
        """Ids of the pool's documents, in its order."""
        return [str(record["id"]) for record in self.pool]

    def mask(self, subset: int) -> BoolArray:
        """Which documents of the pool are in a subset, a function of (seed, subset) alone: [N]."""
        count = len(self.pool)
        drawn = np.random.default_rng([self.settings.seed, 1, subset]).permutation(count)
        mask = np.zeros(count, dtype=np.bool_)
        mask[drawn[: round(count * self.settings.fraction)]] = True
        return mask

    def prepare(self) -> Path:
        """Write what all trainings share: the pool, the masks, the settings, the tokenizer. Returns the folder."""
        lines = [canonical_json(record) for record in self.pool]
        storage.write_text(self.folder / "pool.jsonl", "\n".join(lines) + "\n")
        storage.write_json(self.folder / "settings.json", self.config.model_dump(mode="json"))
        rows = [
            (self.key, subset, name)
            for subset in range(self.settings.subsets)
            for name, inside in zip(self.pool_ids, self.mask(subset), strict=True)
            if inside
        ]
        write_rows(self.folder / "masks.parquet", rows, MASKS)
        if not (self.folder / "tokenizer").exists():
            tokenizer = train_tokenizer((records.text_of(record) for record in self.pool), self.settings.vocabulary)
            temporary = self.folder / ".tmp-tokenizer"
            tokenizer.save_pretrained(temporary)
            temporary.rename(self.folder / "tokenizer")
        return self.folder

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of all trainings."""
        return load_tokenizer(str(self.folder / "tokenizer"))

    @cached_property
    def queries(self) -> Queries:
        """The held-out queries, in the ground truth's tokens, cut as the records that its models are trained on.

        Raises:
            InputError: a query is more than the loss of one completion.
        """
        source = Path(str(self.config.queries))
        start = self.config.corpus.start
        found = load_queries(source, self.tokenizer, self.window, "causal_lm", cut=True, start=start)
        check_single(found, str(source), "retraining")
        return found

    def sequences(self, stage: Stage) -> Sequences:
        """Sequences of a stage: of the pool, or all of its documents."""
        found = self.pool if stage.name == self.config.attribute_to else read(self.config, stage)
        return corpus.encode_list(found, self.tokenizer, self.window, stage.task, self.config.corpus.start)[0]

    # -- training ---------------------------------------------------------------------------------

    def subset_runs(self) -> list[Run]:
        """The subsets' trainings: first seeds first, then the repeats."""
        size = self.settings
        plan = [(i, 0) for i in range(size.subsets)] + [(i, 1) for i in range(min(size.repeats, size.subsets))]
        return [Run(f"subset-{i:04d}-seed-{seed}", "subset", i, seed) for i, seed in plan]

    def losses_file(self, run: Run) -> Path:
        """File of a training's losses."""
        return self.folder / f"losses-{run.name}.parquet"

    def missing(self, runs: list[Run]) -> list[Run]:
        """Those that have no whole file yet: what a restart has left to do."""
        return [run for run in runs if not storage.is_whole(self.losses_file(run))]

    def train(self, run: Run) -> Path:
        """Train all stages and write the queries' losses after each; kept if its file stands whole."""

        def build(temporary: Path) -> None:
            kept = self.kept_documents(run)
            queries = self.queries
            model = new_model(self.tokenizer, self.architecture, self.config.stages[0].training.seed + run.seed)  # type: ignore[union-attr]
            rows: list[tuple[Any, ...]] = []
            for stage in self.config.stages:
                sequences = self.sequences(stage)
                if stage.name == self.config.attribute_to:
                    sequences = sequences.take([i for i, d in enumerate(sequences.document_ids) if d in kept])
                started = time.perf_counter()
                _, rates = optimize(model, sequences, recipe(stage, run.seed))
                seconds = round(time.perf_counter() - started, 3)
                sums, counts = sequence_losses(model, queries.sequences)
                shared = (len(set(sequences.document_ids)), len(rates), seconds)
                rows += [
                    (self.key, run.name, run.kind, run.subset, run.seed, stage.name, name, loss, int(count), *shared)
                    for name, loss, count in zip(queries.ids, sums.tolist(), counts, strict=True)
                ]
            pq.write_table(as_table(rows, LOSSES), temporary)

        return storage.build_once(self.losses_file(run), build)

    def kept_documents(self, run: Run) -> set[str]:
        """The pool's documents that a training sees."""
        if run.kind == "subset":
            return {name for name, inside in zip(self.pool_ids, self.mask(run.subset), strict=True) if inside}
        return set(self.pool_ids) - set(run.without)

    def reference(self, seed: int = 0) -> Config:
        """Train the stages on the whole pool; returns the configuration of these models, whose scores are judged."""
        root = self.folder / f"reference-{seed}"
        built: list[Stage] = []
        init: str | torch.nn.Module = new_model(
            self.tokenizer, self.architecture, self.config.stages[0].training.seed + seed  # type: ignore[union-attr]
        )  # fmt: skip
        for stage in self.config.stages:
            out = train_stage(
                init, self.sequences(stage), root / "models" / stage.name, recipe(stage, seed), self.tokenizer
            )
            documents = str(self.folder / "pool.jsonl") if stage.name == self.config.attribute_to else stage.documents
            built.append(stage.model_copy(update={"model": str(out), "documents": documents}))
            init = str(out)
        return self.config.model_copy(
            update={
                "workspace": root,
                "stages": tuple(built),
                "corpus": self.config.corpus.model_copy(update={"max_length": self.window}),
            }
        )

    # -- reading ----------------------------------------------------------------------------------

    def read_losses(self, stage: str, query_ids: list[str]) -> Losses:
        """The subsets' losses after `stage`, columns in the order of `query_ids`.

        Where a subset was trained with two seeds its loss is their mean, after the second seed's offset from the
        first (per query, over the repeated subsets) is taken away: seeds shift all subsets alike.

        Raises:
            InputError: fewer than two subsets have been trained.
        """
        runs = [run for run in self.subset_runs() if self.losses_file(run).exists()]
        found = {(run.subset, run.seed): self._losses(run, stage, query_ids) for run in runs}
        subsets = sorted(subset for subset, seed in found if seed == 0)
        if len(subsets) < 2:
            raise InputError(f"{self.folder}: {len(subsets)} subsets are trained; run `msif evaluate CONFIG --retrain`")
        repeated = [subset for subset in subsets if (subset, 1) in found]
        empty = np.zeros((0, len(query_ids)))
        first = np.stack([found[s, 0] for s in repeated]) if repeated else empty
        second = np.stack([found[s, 1] for s in repeated]) if repeated else empty
        values = np.stack([found[s, 0] for s in subsets])
        if repeated:
            offset = (second - first).mean(axis=0)
            values[[subsets.index(s) for s in repeated]] = (first + second - offset) / 2
        return Losses(np.stack([self.mask(s) for s in subsets]), values, first, second)

    def read_run(self, run: Run, stage: str, query_ids: list[str]) -> FloatArray:
        """One training's losses after `stage`: [Q]."""
        return self._losses(run, stage, query_ids)

    def _losses(self, run: Run, stage: str, query_ids: list[str]) -> FloatArray:
        table = corpus.read_table(self.losses_file(run))
        rows = zip(table["stage"].to_pylist(), table["query_id"].to_pylist(), table["loss"].to_pylist(), strict=True)
        by_query = {query: loss for name, query, loss in rows if name == stage}
        return np.array([by_query[name] for name in query_ids])


def recipe(stage: Stage, seed: int) -> Any:
    """A stage's recipe under another seed."""
    assert stage.training is not None, "Retraining checks that every stage has a recipe"
    return stage.training.model_copy(update={"seed": stage.training.seed + seed})


def as_table(rows: list[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    """Rows, in the order of the schema's columns, as a table."""
    return pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema=schema)


def write_rows(path: Path, rows: list[tuple[Any, ...]], schema: pa.Schema) -> Path:
    """Write rows to a Parquet file, atomically."""
    with storage.atomic_path(path) as temporary:
        pq.write_table(as_table(rows, schema), temporary, compression="zstd")
    return path
