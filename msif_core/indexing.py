"""Codes of the attributed stage's documents, shard by shard, and how many of the exact top ten they find.

Every step writes a file that is named by all it was made from, and returns the one that stands.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from msif_core import corpus, dealing, directions, drift, generations, index, reuse, sketch, storage
from msif_core.batching import Sequences
from msif_core.evaluation import retrieval_quality
from msif_core.exact import ExactScores
from msif_core.lexical import LexicalIndex
from msif_core.queries import Queries
from msif_core.retrieval import FloatArray
from msif_core.sketch import Sketcher


class Indexing(ExactScores):
    """The stages of one configuration, and the index of the attributed one."""

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
        maps, spectral, settings = self.maps(self.target), self.curvature(self.target).filter, self.config.sketch
        kept = None if settings.whitening == "none" else directions.load(self.choose_directions())
        return Sketcher(maps, self.factors(self.target), spectral, settings, task, kept)

    def choose_directions(self) -> Path:
        """The eigendirections that sketches keep.

        Chosen when the index is first built, and pinned until the codes' settings change: another later stage is
        answered from the same codes, if with less recall.
        """

        def build(path: Path) -> None:
            settings, maps = self.config.sketch, self.maps(self.target)
            directions.save(path, directions.choose(maps, self.chain(), settings.directions, settings.dimensions))

        return storage.build_once(self.codes_folder() / "directions.safetensors", build)

    def document_sketches(self, sequences: Sequences) -> FloatArray:
        """Phi of sequences of the attributed stage, float32 [N, dimensions]."""
        budget = self.config.curvature.memory_budget_gb
        return self.sketcher().documents(self.model(self.target), sequences, self.batch_tokens, budget)

    def query_sketches(self, queries: Queries) -> FloatArray:
        """Psi of the queries, float32 [Q, dimensions]: sketches are linear, so those of some maps add up."""
        sketcher, chain = self.sketcher(), self.chain()
        psi = np.zeros((len(queries), self.config.sketch.dimensions), dtype=np.float32)
        for rows, gradients in self.query_gradients(queries):
            psi[rows] += sketcher.queries(gradients, chain, rotated=True)
        return psi

    def codes_folder(self) -> Path:
        """Folder of the codes that these factors, this filter and this sketch give."""
        key = storage.fingerprint(
            self.factors_fingerprint(self.target),
            self.config.stage(self.target).filter.model_dump(),
            [sketch.VERSION, self.config.sketch.model_dump()],
            self.config.index.model_dump(include={"kind", "bits"}),
        )
        return self.workspace.root / "codes" / key

    def train_index(self) -> Path:
        """Train the index on the first shard's sketches; pinned until the codes' settings change."""
        folder = self.codes_folder()
        self.sketcher().check_or_write(folder / "sketch.json")

        def build(path: Path) -> None:
            sample = corpus.read_shard(self.shard(self.target, 0)).take(np.arange(512))
            phi = self.document_sketches(sample)
            index.train(phi, self.config.index, self.sequence_count(self.target), path)

        return storage.build_once(folder / "trained.faiss", build)

    def index_shard(self, shard: int) -> Path:
        """Codes of one shard's sequences, named after the shard and so reused while it stays.

        Sequences that an earlier shard knows by their fingerprint keep its codes; only the others are sketched.
        """
        source = self.shard(self.target, shard)
        folder = self.codes_folder()
        trained = folder / "trained.faiss"

        def build(path: Path) -> None:
            sequences = corpus.read_shard(source)
            codes = np.zeros((len(sequences), index.code_bytes(trained)), dtype=np.uint8)
            known = reuse.copy_known(sequences.fingerprints, self._earlier_codes(shard), codes)
            fresh = np.flatnonzero(~known)
            phi = self.document_sketches(sequences.take(fresh))
            finite = np.isfinite(phi).all(axis=1)
            bad = [sequences.document_ids[row] for row in fresh[~finite]]
            corpus.quarantine(source.parent, f"gradients-{source.stem}", bad, "the gradient is not finite")
            codes[fresh[finite]] = index.encode(trained, phi[finite])
            kept = np.setdiff1d(np.arange(len(sequences)), fresh[~finite])
            receipt = {"parent": self.workspace.published(), "sketched": len(fresh), "reused": int(known.sum())}
            storage.write_json(folder / f"{source.stem}.json", receipt)
            index.write_shard(trained, codes[kept], sequences.sequence_ids[kept], path)

        return storage.build_once(folder / f"{source.stem}.faiss", build)

    def unsketched(self) -> list[int]:
        """Shards whose codes do not stand whole: what `index_shard` has left to do."""
        folder = self.codes_folder()
        return [
            number
            for number, source in enumerate(self.shards(self.target))
            if not storage.is_whole(folder / f"{source.stem}.faiss")
        ]

    def _earlier_codes(self, shard: int) -> Iterator[tuple[list[str], npt.NDArray[Any]]]:
        """Fingerprints and codes of earlier shards that this shard's sequences may be found in."""
        folder, trained = self.codes_folder(), self.codes_folder() / "trained.faiss"
        for source in self._earlier_shards(shard):
            path = folder / f"{source.stem}.faiss"
            if storage.is_whole(path) and (found := index.read_codes(trained, path)) is not None:
                ids, codes = found
                names = corpus.fingerprints(source)
                yield [names[row] for row in corpus.rows_of(ids)], codes

    def _earlier_shards(self, shard: int) -> Iterator[Path]:
        """Corpus shards of earlier versions that may hold the same documents, likeliest first.

        Those of the published version, then others of this number.
        """
        now, count = self.shard(self.target, shard), len(self.corpus_manifest(self.target)["shards"])
        published = generations.manifest_of(self.workspace, self.workspace.published())
        found: list[Path] = []
        if published is not None and published["settings"]["attribute_to"] == self.target:
            folder, entries = corpus.shard_entries(self.workspace.root / published["corpora"][self.target])
            related = dealing.related_shards(shard, count, len(entries))
            found = [folder / entries[number]["sequences"] for number in related]
        others = sorted(now.parent.glob(f"shard-{shard:05d}-*.parquet"))
        for path in dict.fromkeys([*found, *others]):
            if path != now and path.exists():
                yield path

    @property
    def lexical(self) -> bool:
        """Whether a generation has a BM25 index: where candidates come from it."""
        return self.config.retrieval.candidates != "gradient"

    def build_lexical(self) -> Path:
        """The BM25 index over the documents' words."""
        folder = self.workspace.root / "lexical" / str(self.corpus_manifest(self.target)["fingerprint"])
        if not folder.exists():
            with storage.atomic_folder(folder) as temporary:
                LexicalIndex.build(corpus.texts(self.corpus_version(self.target))).save(temporary)
        return folder

    # -- recall -----------------------------------------------------------------------------------

    def recall_shards(self) -> list[int]:
        """Shards whose sequences are scored exactly to measure recall."""
        counts = [entry["n_sequences"] for entry in self.corpus_manifest(self.target)["shards"]]
        within = int(np.searchsorted(np.cumsum(counts), self.config.index.recall_sample, side="right"))
        return list(range(max(1, within)))

    def held_out(self) -> Queries | None:
        """The queries that measure recall, None where the configuration names none."""
        if self.config.queries is None or self.config.index.recall_queries == 0:
            return None
        queries = self.read_queries(Path(self.config.queries))
        return queries.take(np.arange(min(len(queries), self.config.index.recall_queries)))

    def exact_folder(self, queries: Queries) -> Path:
        """Folder of the exact scores that these queries, factors and filters give."""
        chain_key = [self.factors_fingerprint(stage.name) for stage in self.config.stages]
        filters = [stage.filter.model_dump() for stage in self.config.stages]
        rank = self.config.index.recall_rank
        cut = [] if rank is None else [rank]
        return self.workspace.root / "exact" / storage.fingerprint(queries.fingerprint, chain_key, filters, *cut)

    def exact_shard(self, shard: int) -> Path:
        """Exact scores of the held-out queries on one shard's sequences, float32 [2, Q, N], as .npy.

        The first is the multi-stage score, the second the gradient dot product: a baseline that costs
        next to nothing in the same pass. Sequences that an earlier shard knows keep their scores.
        """
        queries = self.held_out()
        assert queries is not None, "exact_shard is called only where held-out queries are configured"
        source = self.shard(self.target, shard)
        folder = self.exact_folder(queries)

        def build(path: Path) -> None:
            sequences = corpus.read_shard(source)
            scores = np.zeros((len(sequences), 2, len(queries)), dtype=np.float32)
            known = reuse.copy_known(sequences.fingerprints, self._earlier_scores(shard, folder), scores)
            fresh = np.flatnonzero(~known)
            if len(fresh):
                rank, some = self.config.index.recall_rank, sequences.take(fresh)
                if rank is None:
                    both = self.both_scores(queries, some)
                else:
                    both, lost = self.cut_both_scores(queries, some, rank)
                    storage.write_json(folder / "cut.json", {"rank": rank, "relative_error": lost})
                # A sequence whose gradient is not finite is in quarantine: it ranks last.
                scores[fresh] = np.where(np.isfinite(both), both, -np.inf).transpose(2, 0, 1)
            with open(path, "wb") as handle:
                np.save(handle, np.ascontiguousarray(scores.transpose(1, 2, 0)))

        return storage.build_once(folder / f"{source.stem}.npy", build)

    def unscored(self) -> list[int]:
        """Shards of the recall sample whose exact scores do not stand whole: what `exact_shard` has left to do."""
        queries = self.held_out()
        if queries is None:
            return []
        folder, shards = self.exact_folder(queries), self.shards(self.target)
        return [n for n in self.recall_shards() if not storage.is_whole(folder / f"{shards[n].stem}.npy")]

    def _earlier_scores(self, shard: int, folder: Path) -> Iterator[tuple[list[str], npt.NDArray[Any]]]:
        """Fingerprints and exact scores [N, 2, Q] of earlier shards."""
        for source in self._earlier_shards(shard):
            path = folder / f"{source.stem}.npy"
            if storage.is_whole(path):
                yield corpus.fingerprints(source), np.load(path).transpose(2, 0, 1)

    def measure_recall(self) -> dict[str, Any]:
        """What the gradient index and BM25 find of the exactly scored best, over the held-out queries.

        At the usual shares of the sequences, and at the share that an answer takes from each (`answer_share`).
        """
        queries = self.held_out()
        if queries is None:
            return {}
        shards = self.recall_shards()
        exact = np.concatenate([np.load(self.exact_shard(shard))[0] for shard in shards], axis=1)
        names = ["sequence_id", "document_id"]
        sequences = pa.concat_tables([corpus.read_table(self.shard(self.target, shard), names) for shard in shards])
        documents, document = np.unique(sequences["document_id"].to_numpy(), return_inverse=True)
        found = index.Index([self.index_shard(shard) for shard in shards], self.config.index)
        gradient = found.estimates(self.query_sketches(queries), sequences["sequence_id"].to_numpy())
        words = None
        if self.lexical:
            words = LexicalIndex.load(self.build_lexical()).scores(queries.texts, documents.tolist())[:, document]
        count = self.sequence_count(self.target)
        share = self.config.retrieval.taken(count) / max(1, count)
        return {
            **retrieval_quality.measure(exact, document, gradient, words, (*retrieval_quality.SHARES, share)),
            "bytes_per_sequence": found.bytes_per_vector,
            "answer_share": min(1.0, share),
            **({"cut": storage.read_json(cut)} if (cut := self.exact_folder(queries) / "cut.json").exists() else {}),
        }

    def measure_drift(self) -> dict[str, Any]:
        """How far the attributed stage's pinned factors have drifted from its corpus, on a sample."""
        drawn: list[tuple[str, Path, int]] = []
        for path in self.shards(self.target):  # no more is held than a shard and the sample so far
            found = drift.keys(*corpus.names(path))
            rows = ((key, path, row) for row, key in enumerate(found))
            drawn = heapq.nsmallest(self.config.index.drift_sample, chain(drawn, rows))
        if not drawn:
            return {}
        return drift.measure_drift(
            self.model(self.target),
            self.maps(self.target),
            self.factors(self.target),
            corpus.take_rows([(path, row) for _, path, row in drawn]),
            task=self.config.stage(self.target).task,
            seed=self.config.curvature.seed,
            batch_tokens=self.batch_tokens,
            budget_gb=self.config.curvature.memory_budget_gb,
        )
