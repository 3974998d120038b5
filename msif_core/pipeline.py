"""The facade: build the index of the attributed stage's documents, ask it, score without it.

`Pipeline.run` calls the steps in order in this process; the Prefect flows map the same steps over shards.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np

from msif_core import answering, catalog, corpus, generations, records, storage
from msif_core.attribution import Attribution
from msif_core.errors import InputError
from msif_core.evaluation import retrieval_quality
from msif_core.indexing import Indexing
from msif_core.retrieval import FloatArray
from msif_core.token_view import Seen, seen_documents, seen_queries
from msif_core.vocabulary import check_sequences


class Pipeline(Indexing):
    """One configuration: from documents to stored, ranked, exactly scored attributions."""

    # -- generation -------------------------------------------------------------------------------

    def content(self) -> str:
        """Fingerprint of what a generation is built from: the corpus, the codes' settings, the chain, the queries."""
        queries = self.held_out()
        return storage.fingerprint(
            self.codes_folder().name,
            self.corpus_manifest(self.target)["fingerprint"],
            [(stage.filter.model_dump(), self.factors_fingerprint(stage.name)) for stage in self.config.stages],
            self.config.index.model_dump(exclude={"min_recall"}),
            self.lexical,
            (retrieval_quality.VERSION, queries.fingerprint) if queries is not None else None,
        )

    def publish_generation(self) -> Path:
        """Build the generation that the corpora as they stand and the settings give, and publish it.

        Returns its folder. What is published already stays. A generation whose recall is below `index.min_recall`, or
        that was rolled back, is kept, but the pointer does not move to it (`generations.withheld` says why).
        """
        now = self.as_it_stands()
        parent = generations.manifest_of(self.workspace, self.workspace.published())
        content = now.content()
        if parent is not None and parent.get("content") == content:
            return self.workspace.generations / str(parent["generation"])
        folder = self.workspace.generations / storage.fingerprint(content, parent and parent["generation"])
        if not (folder / "manifest.json").exists():
            storage.write_json(folder / "manifest.json", now._describe(folder.name, content, parent))
        if generations.withheld(folder, self.config.index) is None:
            self.workspace.publish(folder.name)
        return folder

    def _describe(self, name: str, content: str, parent: dict[str, Any] | None) -> dict[str, Any]:
        """The manifest of a generation; builds what of it does not stand yet."""
        started = time.perf_counter()
        root, own, queries = self.workspace.root, self.corpus_manifest(self.target), self.held_out()
        shards = [self.index_shard(shard) for shard in range(len(own["shards"]))]
        codes = [str(path.relative_to(root)) for path in shards]
        documents = [self.workspace.corpus(self.target) / entry["documents"] for entry in own["shards"]]
        manifest = {
            "generation": name,
            "content": content,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "parent": parent and parent["generation"],
            "corpus": own["fingerprint"],
            "corpora": {s.name: str(self.corpus_version(s.name).relative_to(root)) for s in self.config.stages},
            "tokens": {stage.name: self._tokens_of(stage.name) for stage in self.config.stages},
            "recipes": {stage.name: self.recipe(stage.name) for stage in self.config.stages},
            "factors": {stage.name: self.factors_fingerprint(stage.name) for stage in self.config.stages},
            "codes_key": self.codes_folder().name,
            "codes": codes,
            "lexical": str(self.build_lexical().relative_to(root)) if self.lexical else None,
            "exact": str(self.exact_folder(queries).relative_to(root)) if queries is not None else None,
            "n_sequences": self.sequence_count(self.target),
            "index_bytes": sum(path.stat().st_size for path in shards),
            "changes": generations.changes(root, parent, self.shards(self.target), documents, codes),
            "recall": self.measure_recall(),
            "drift": self.measure_drift(),
            "settings": self.config.model_dump(mode="json"),
        }
        return manifest | {"seconds": round(time.perf_counter() - started, 1)}

    def _tokens_of(self, stage: str) -> dict[str, Any]:
        """How a stage's documents were encoded."""
        manifest = self.corpus_manifest(stage)
        return {key: manifest.get(key) for key in ("max_length", "unknown")}

    def check_generation(self, manifest: dict[str, Any]) -> None:
        """Refuse a generation that belongs to another model or other settings.

        Raises:
            InputError: names the stage whose factors differ, and the command that mends it.
        """
        difference = self._difference(manifest)
        if difference is None:
            return
        same = [found for found in generations.rolled_back(self.workspace) if self._difference(found) is None]
        mend = "run `msif run CONFIG` first"
        if same:
            mend = f"`msif rollback CONFIG --to {same[-1]['generation']}` publishes one of these, which was rolled back"
        raise InputError(f"generation {manifest['generation']} was built with {difference}; {mend}")

    def _difference(self, manifest: dict[str, Any]) -> str | None:
        """What a generation was built with that this configuration has not, None where it can answer."""
        for stage in self.config.stages:
            if manifest.get("recipes", {}).get(stage.name) != self.recipe(stage.name):
                return (
                    f"other factors of stage {stage.name!r} (another model, other windows, another start of texts, or "
                    "other curvature settings)"
                )
        same = manifest["codes_key"] == self.holding(manifest["factors"]).codes_folder().name
        return None if same else "another filter or sketch"

    def publish_catalog(self) -> Path:
        """Build a new catalog over all that is there and move the pointer to it."""
        return catalog.publish(self.workspace.root)

    # -- whole jobs -------------------------------------------------------------------------------

    def run(self) -> Path:
        """Tokenize, fit and index; a second call finds everything in place. Returns the generation."""
        for stage in (stage.name for stage in self.config.stages):
            self.tokenize(stage)
            if not self.fitted(stage):
                self.fit_stage(stage)
            self.remove_sums(stage)
        now = self.as_it_stands()
        now.train_index()
        left = now.unsketched()
        storage.free_first(left, self.reporting("index_shard", now.index_shard, len(left)))
        folder = now.publish_generation()
        self.publish_catalog()
        return folder

    def attribute(self, queries: Path | Sequence[dict[str, Any]], top_k: int | None = None) -> Attribution:
        """Rank the attributed stage's documents for each query, with exact scores.

        Raises:
            InputError: no whole index is published, a query is malformed, or `top_k` is less than one.
        """
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k is {top_k}; ask for one document at least")
        folder = answering.answer(self, self.read_queries(queries), top_k or self.config.retrieval.top_k)
        return Attribution.open(folder)

    def tokens(
        self, stage: str = "", queries: Path | Sequence[dict[str, Any]] | None = None, count: int = 3
    ) -> list[Seen]:
        """The first records of a stage, and after them the first queries, as their models will see them.

        Without a stage: queries alone where there are some, else the attributed stage's records.

        Raises:
            InputError: there is no such stage, or a record is malformed or cannot be encoded.
        """
        if (name := stage or self.target) not in [own.name for own in self.config.stages]:
            raise InputError(f"no stage {name!r}; stages are {[own.name for own in self.config.stages]}")
        documents = seen_documents(self, name, count) if stage or queries is None else []
        return documents + ([] if queries is None else seen_queries(self, queries, count))

    def as_published(self) -> Self:
        """With the published generation's factors, where it is of these models and settings: a fit may be under way."""
        manifest = generations.manifest_of(self.workspace, self.workspace.published())
        same = manifest and manifest["recipes"] == {stage.name: self.recipe(stage.name) for stage in self.config.stages}
        return self.holding(manifest["factors"]) if manifest and same else self

    def score(self, queries: Path | Sequence[dict[str, Any]], documents: Path | Sequence[dict[str, Any]]) -> FloatArray:
        """Exact scores of given documents, float32 [n_queries, n_documents], in the records' order.

        Sets that the queries name follow them, in order of first mention.
        """
        asked = self.read_queries(queries)
        target = self.config.stage(self.target)
        found = records.read_list(documents)
        with self.reading(self.target):
            sequences, rows = corpus.encode_list(
                found, self.tokenizer(self.target), self.max_length(self.target), target.task, self.config.corpus.start
            )
        check_sequences(sequences, self.structure(self.target), target.task, self.target)
        scores = self.as_published().scores(asked, sequences)
        total = np.zeros((len(scores), len(found)), dtype=np.float64)
        np.add.at(total.T, rows, scores.T)
        return total.astype(np.float32)
