"""The facade: build the index of the attributed stage's documents, ask it, score without it.

`Pipeline.run` calls the steps in order in this process; the Prefect flows map the same steps over shards.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msif_core import answering, catalog, corpus, index, records, storage
from msif_core.attribution import Attribution
from msif_core.batching import Sequences
from msif_core.errors import InputError
from msif_core.evaluation.recall import recall_at_k
from msif_core.lexical import LexicalIndex
from msif_core.retrieval import FloatArray
from msif_core.sketch import Sketcher
from msif_core.stages import Stages


class Pipeline(Stages):
    """One configuration: from documents to stored, ranked, exactly scored attributions."""

    @property
    def target(self) -> str:
        """Name of the attributed stage."""
        return self.config.attribute_to

    @property
    def last(self) -> str:
        """Name of the last stage, whose model answers."""
        return self.config.stages[-1].name

    # -- index ------------------------------------------------------------------------------------

    def sketcher(self) -> Sketcher:
        """Sketches of the attributed stage's documents."""
        task = self.config.stage(self.target).task
        spectral = self.curvature(self.target).filter
        return Sketcher(self.maps(self.target), self.factors(self.target), spectral, self.config.sketch, task)

    def document_sketches(self, sequences: Sequences) -> FloatArray:
        """Phi of sequences of the attributed stage, float32 [N, dimensions]."""
        budget = self.config.curvature.memory_budget_gb
        return self.sketcher().documents(self.model(self.target), sequences, self.batch_tokens, budget)

    def query_sketches(self, queries: Sequences) -> FloatArray:
        """Psi of the queries, float32 [Q, dimensions]: sketches are linear, so those of some maps add up."""
        sketcher, chain = self.sketcher(), self.chain()
        psi = np.zeros((len(queries), self.config.sketch.dimensions), dtype=np.float32)
        for rows, gradients in self.query_gradients(queries):
            psi[rows] += sketcher.queries(gradients, chain)
        return psi

    def codes_folder(self) -> Path:
        """Folder of the codes that these factors, this filter and this sketch give."""
        key = storage.fingerprint(
            self.factors_fingerprint(self.target),
            self.config.stage(self.target).filter.model_dump(),
            self.config.sketch.model_dump(),
            self.config.index.model_dump(include={"kind", "bits"}),
        )
        return self.workspace.root / "codes" / key

    def train_index(self) -> Path:
        """Train the index on the first shard's sketches; pinned until the codes' settings change."""
        folder = self.codes_folder()
        self.sketcher().check_or_write(folder / "sketch.json")

        def build(path: Path) -> None:
            sample = corpus.read_shard(self.shards(self.target)[0]).take(np.arange(512))
            phi = self.document_sketches(sample)
            index.train(phi, self.config.index, self.sequence_count(self.target), path)

        return storage.build_once(folder / "trained.faiss", build)

    def index_shard(self, shard: int) -> Path:
        """Codes of one shard's sequences, addressed by the shard's content and so reused while it stays."""
        source = self.shards(self.target)[shard]
        folder = self.codes_folder()

        def build(path: Path) -> None:
            sequences = corpus.read_shard(source)
            phi = self.document_sketches(sequences)
            finite = np.isfinite(phi).all(axis=1)
            bad = [sequences.document_ids[row] for row in np.flatnonzero(~finite)]
            corpus.quarantine(source.parent, f"gradients-{source.stem}", bad, "the gradient is not finite")
            index.build_shard(folder / "trained.faiss", phi[finite], sequences.sequence_ids[finite], path)

        digest = storage.file_digest(source)[:12]
        return storage.build_once(folder / f"{source.stem}-{digest}.faiss", build)

    def build_lexical(self) -> Path:
        """The BM25 index over the documents' words."""
        manifest = self.corpus_manifest(self.target)
        folder = self.workspace.root / "lexical" / str(manifest["fingerprint"])
        if not folder.exists():
            documents = corpus.read_documents(self.workspace.corpus(self.target))
            temporary = folder.with_name(f".tmp-{folder.name}")
            shutil.rmtree(temporary, ignore_errors=True)
            LexicalIndex.build(documents["document_id"].to_pylist(), documents["text"].to_pylist()).save(temporary)
            temporary.rename(folder)
        return folder

    # -- recall -----------------------------------------------------------------------------------

    def recall_shards(self) -> list[int]:
        """Shards whose sequences are scored exactly to measure recall."""
        counts = [entry["n_sequences"] for entry in self.corpus_manifest(self.target)["shards"]]
        within = int(np.searchsorted(np.cumsum(counts), self.config.index.recall_sample, side="right"))
        return list(range(max(1, within)))

    def held_out(self) -> corpus.Queries | None:
        """The queries that measure recall, None where the configuration names none."""
        if self.config.queries is None or self.config.index.recall_queries == 0:
            return None
        queries = self.read_queries(Path(self.config.queries))
        return queries.take(np.arange(min(len(queries), self.config.index.recall_queries)))

    def exact_shard(self, shard: int) -> Path:
        """Exact scores of the held-out queries on one shard's sequences, float32 [2, Q, N], as .npy.

        The first is the multi-stage score, the second the gradient dot product: a baseline that costs
        next to nothing in the same pass.
        """
        queries = self.held_out()
        assert queries is not None, "exact_shard is called only where held-out queries are configured"
        source = self.shards(self.target)[shard]
        chain_key = [self.factors_fingerprint(stage.name) for stage in self.config.stages]
        filters = [stage.filter.model_dump() for stage in self.config.stages]
        key = storage.fingerprint(queries.sequences.fingerprints, chain_key, filters, storage.file_digest(source))

        def build(path: Path) -> None:
            documents = corpus.read_shard(source)
            scores = np.zeros((2, len(queries), len(documents)))
            for rows, raw in self.query_gradients(queries.sequences):
                filtered = self.chain().filter_all(raw)
                both = {name: torch.cat([v, raw[name].to(v.dtype)]) for name, v in filtered.items()}
                scores[:, rows] += self.exact_scores(both, documents).reshape(2, -1, len(documents))
            with open(path, "wb") as handle:
                # A sequence whose gradient is not finite is in quarantine: it ranks last.
                np.save(handle, np.where(np.isfinite(scores), scores, -np.inf).astype(np.float32))

        return storage.build_once(self.workspace.root / "exact" / f"{source.stem}-{key}.npy", build)

    def measure_recall(self) -> dict[str, Any]:
        """Recall@10 of the exact top ten among the retrieved 0.5% to 10%, over the held-out queries."""
        queries = self.held_out()
        if queries is None:
            return {}
        shards = self.recall_shards()
        exact = np.concatenate([np.load(self.exact_shard(shard))[0] for shard in shards], axis=1)
        ids = np.concatenate([corpus.read_shard(self.shards(self.target)[s]).sequence_ids for s in shards])
        found = index.Index([self.index_shard(shard) for shard in shards], self.config.index)
        psi = self.query_sketches(queries.sequences)
        shares = (0.005, 0.01, 0.02, 0.05, 0.1)
        _, retrieved = found.search(psi, max(10, int(len(ids) * shares[-1])))
        return {
            "queries": len(queries),
            "sequences": len(ids),
            "bytes_per_sequence": found.bytes_per_vector,
            "recall_at_10": {
                f"{share:g}": recall_at_k(exact, ids, retrieved[:, : max(10, int(len(ids) * share))], 10)
                for share in shares
            },
        }

    # -- generation -------------------------------------------------------------------------------

    def generation_id(self) -> str:
        """Address of the generation that the corpus, the codes' settings and the chain give."""
        return storage.fingerprint(
            str(self.codes_folder().name),
            self.corpus_manifest(self.target)["fingerprint"],
            self.config.index.model_dump(),
        )

    def publish_generation(self) -> Path:
        """Write the generation's manifest and move the pointer to it."""
        folder = self.workspace.generations / self.generation_id()
        if not (folder / "manifest.json").exists():
            started = time.perf_counter()
            shards = [self.index_shard(shard) for shard in range(len(self.shards(self.target)))]
            manifest = {
                "generation": folder.name,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "parent": self.workspace.published(),
                "corpus": self.corpus_manifest(self.target)["fingerprint"],
                "factors": {stage.name: self.factors_fingerprint(stage.name) for stage in self.config.stages},
                "codes_key": self.codes_folder().name,
                "codes": [str(path.relative_to(self.workspace.root)) for path in shards],
                "lexical": str(self.build_lexical().relative_to(self.workspace.root)),
                "n_sequences": self.sequence_count(self.target),
                "index_bytes": sum(path.stat().st_size for path in shards),
                "recall": self.measure_recall(),
                "settings": self.config.model_dump(mode="json"),
            }
            manifest["seconds"] = round(time.perf_counter() - started, 1)
            storage.write_json(folder / "manifest.json", manifest)
        self.workspace.publish(folder.name)
        return folder

    def check_generation(self, manifest: dict[str, Any]) -> None:
        """Refuse a generation that belongs to another model, other data or other settings.

        Raises:
            InputError: names the stage whose factors differ.
        """
        for stage in self.config.stages:
            if manifest["factors"].get(stage.name) != self.factors_fingerprint(stage.name):
                raise InputError(
                    f"generation {manifest['generation']} was built with other factors of stage {stage.name!r} "
                    "(another model, other curvature settings); run `msif run CONFIG` first"
                )
        if manifest["codes_key"] != self.codes_folder().name:
            raise InputError(
                f"generation {manifest['generation']} was built with another filter or sketch; "
                "run `msif run CONFIG` first"
            )

    def publish_catalog(self) -> Path:
        """Build a new catalog over all that is there and move the pointer to it."""
        return catalog.publish(self.workspace.root)

    # -- whole jobs -------------------------------------------------------------------------------

    def run(self) -> Path:
        """Tokenize, fit and index; a second call finds everything in place. Returns the generation."""
        for stage in (stage.name for stage in self.config.stages):
            self.tokenize(stage)
            if self.fitted(stage):
                continue
            parts = len(self.fit_parts(stage))
            for step, finish in (
                (self.covariance_part, self.combine_covariances),
                (self.eigenvalue_part, self.combine_eigenvalues),
            ):
                for part in range(parts):
                    step(stage, part)
                    self.progress(f"{step.__name__} {stage}", part + 1, parts)
                finish(stage)
        self.train_index()
        count = len(self.shards(self.target))
        for shard in range(count):
            self.index_shard(shard)
            self.progress("index_shard", shard + 1, count)
        folder = self.publish_generation()
        self.publish_catalog()
        return folder

    def attribute(self, queries: Path | Sequence[dict[str, Any]], top_k: int | None = None) -> Attribution:
        """Rank the attributed stage's documents for each query, with exact scores."""
        folder = answering.answer(self, self.read_queries(queries), top_k or self.config.retrieval.top_k)
        return Attribution.open(folder)

    def score(self, queries: Path | Sequence[dict[str, Any]], documents: Path | Sequence[dict[str, Any]]) -> FloatArray:
        """Exact scores of given documents, float32 [n_queries, n_documents], in the records' order."""
        asked = self.read_queries(queries).sequences
        target = self.config.stage(self.target)
        found = records.read_list(documents)
        sequences, rows = corpus.encode_list(
            found, self.tokenizer(self.target), self.max_length(self.target), target.task
        )
        scores = self.scores(asked, sequences)
        total = np.zeros((len(scores), len(found)), dtype=np.float64)
        np.add.at(total.T, rows, scores.T)
        return total.astype(np.float32)
