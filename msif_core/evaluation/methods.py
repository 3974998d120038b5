"""Scores of a small pool of documents by many methods, each [queries, documents]; higher means more helpful.

The pool's gradients are formed once for each model and held in memory, so that a sweep over filters costs matrix
products only. For a corpus, `msif_core.scoring` streams instead.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import bm25s
import numpy as np
import numpy.typing as npt
import torch

from msif_core import corpus, scoring
from msif_core.batching import Sequences, batches
from msif_core.chain import Chain, FilteredStage
from msif_core.config import Config
from msif_core.curvature.filters import Damped, Identity, SpectralFilter, Unrolled, from_settings
from msif_core.fitting import Fitting
from msif_core.forward import forward
from msif_core.lexical import words
from msif_core.queries import Queries

FloatArray = npt.NDArray[np.float64]
Gradients = Mapping[str, torch.Tensor]


class Pool:
    """The attributed stage's documents, the queries, and their gradients at a configuration's models."""

    def __init__(self, config: Config, queries: Queries) -> None:
        self.stages = Fitting(config)
        self.target, self.last = config.attribute_to, config.stages[-1].name
        for stage in config.stages:
            self.stages.tokenize(stage.name)
            if not self.stages.fitted(stage.name):
                self.stages.fit_stage(stage.name)
        self.queries = queries
        parts = [corpus.read_shard(path) for path in self.stages.shards(self.target)]
        self.sequences = Sequences(
            [ids for part in parts for ids in part.input_ids],
            [labels for part in parts for labels in part.labels],
            [mark for part in parts for mark in part.fingerprints],
            [name for part in parts for name in part.document_ids],
            np.concatenate([part.sequence_ids for part in parts]),
        )
        table = corpus.read_documents(self.stages.workspace.corpus(self.target))
        texts = dict(zip(table["document_id"].to_pylist(), table["text"].to_pylist(), strict=True))
        self.documents = sorted(texts)
        self.texts = [texts[name] for name in self.documents]
        self._held: dict[tuple[str, str], Gradients] = {}

    @cached_property
    def column(self) -> npt.NDArray[np.int64]:
        """The document of each sequence, as a column of the scores."""
        places = {name: i for i, name in enumerate(self.documents)}
        return np.array([places[name] for name in self.sequences.document_ids])

    def by_document(self, scores: FloatArray) -> FloatArray:
        """Scores of sequences [Q, S], summed over each document's: [Q, N]."""
        total = np.zeros((len(scores), len(self.documents)))
        np.add.at(total.T, self.column, scores.T)
        return total

    # -- gradients --------------------------------------------------------------------------------

    def document_gradients(self, model: str) -> Gradients:
        """Gradients of the pool's sequences at the model of the named stage: map to [S, G, b, d_in]."""
        return self._gradients("documents", model, self.sequences)

    def query_gradients(self, model: str) -> Gradients:
        """Gradients of the queries at the model of the named stage: map to [Q, G, b, d_in]."""
        return self._gradients("queries", model, self.queries.sequences)

    def _gradients(self, kind: str, model: str, sequences: Sequences) -> Gradients:
        if (kind, model) not in self._held:
            stages = self.stages
            self._held[kind, model] = scoring.query_gradients(
                stages.model(model), stages.maps(model), sequences, stages.batch_tokens,
                task=stages.config.stage(model).task,
            )  # fmt: skip
        return self._held[kind, model]

    def influence(
        self, filters: Mapping[str, SpectralFilter], query_model: str | None = None, unit: bool = False
    ) -> FloatArray:
        """Scores through a chain.

        Args:
            filters: the filter of each stage of the chain, by name, in training order; the first is the attributed one.
            query_model: stage whose model the queries' gradients are taken at; the last by default.
            unit: divide each sequence's gradient by its norm.
        """
        links = [FilteredStage(self.stages.factors(name), spectral) for name, spectral in filters.items()]
        filtered = Chain(tuple(links)).filter_all(dict(self.query_gradients(query_model or self.last)))
        return self.product(filtered, self.document_gradients(self.target), unit)

    def product(self, left: Gradients, right: Gradients, unit: bool = False) -> FloatArray:
        """Inner products of queries' and sequences' gradients over all maps, summed by document."""
        total = sum((left[name].flatten(1) @ right[name].flatten(1).T).double() for name in left)
        scores = torch.as_tensor(total).cpu().numpy()
        return self.by_document(scores / norms(right)[None] if unit else scores)

    # -- methods ----------------------------------------------------------------------------------

    def cosine(self) -> FloatArray:
        """Cosine of the query's gradient at the last model and the document's at the attributed stage's."""
        left, right = self.query_gradients(self.last), self.document_gradients(self.target)
        return self.product(left, right, unit=True) / norms(left)[:, None]

    def embedding(self) -> FloatArray:
        """Cosine of mean last hidden states at the last stage's model."""
        left, right = (self._hidden(s) for s in (self.queries.sequences, self.sequences))
        return self.by_document(left @ right.T)

    @torch.no_grad()
    def _hidden(self, sequences: Sequences) -> FloatArray:
        model = self.stages.model(self.last)
        rows = []
        for batch in batches(sequences, self.stages.batch_tokens, self.stages.device):
            hidden = forward(model.base_model, batch)[0] * batch.attention_mask[..., None]
            rows.append((batch.rows, torch.nn.functional.normalize(hidden.sum(1), dim=1).double().cpu().numpy()))
        order = np.argsort(np.concatenate([row for row, _ in rows]))
        return np.concatenate([values for _, values in rows])[order]

    @cached_property
    def asked(self) -> list[str]:
        """The queries as text."""
        return [f"{p} {c}" for p, c in zip(self.queries.prompts, self.queries.completions, strict=True)]


def norms(gradients: Gradients) -> FloatArray:
    """Norm of each sequence's gradient over all maps: [S]."""
    squares = sum(value.flatten(1).double().square().sum(1) for value in gradients.values())
    return torch.as_tensor(squares).sqrt().clamp_min(1e-30).cpu().numpy()


def bm25(queries: Sequence[str], texts: Sequence[str]) -> FloatArray:
    """BM25 scores over words."""
    index = bm25s.BM25()
    index.index([words(text) or [""] for text in texts], show_progress=False)
    known = [[word for word in words(query) if word in index.vocab_dict] for query in queries]
    return np.stack([index.get_scores(row) if row else np.zeros(len(texts)) for row in known]).astype(np.float64)


def tf_idf(queries: Sequence[str], texts: Sequence[str]) -> FloatArray:
    """Cosine of word counts weighted by (1 + log tf) log(N / df), vocabulary and df from the documents."""
    counts = [Counter(words(text)) for text in texts]
    df = Counter(word for row in counts for word in row)
    idf = {word: math.log(len(texts) / n) for word, n in df.items()}
    place = {word: i for i, word in enumerate(idf)}

    def vectors(rows: list[Counter[str]]) -> FloatArray:
        table = np.zeros((len(rows), len(place)))
        for i, row in enumerate(rows):
            for word, tf in row.items():
                if word in place:
                    table[i, place[word]] = (1 + math.log(tf)) * idf[word]
        return table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-30)

    return vectors([Counter(words(query)) for query in queries]) @ vectors(counts).T


def multi_stage(pool: Pool, kind: str, first: float, later: float) -> FloatArray:
    """Scores with one kind of filter at every stage, relative to the blocks' mean eigenvalues.

    Args:
        pool: documents, queries and models.
        kind: damped or unrolled.
        first: damping (or tau) of the attributed stage.
        later: damping alpha (or tau) of the stages above it.
    """
    makers: dict[str, Callable[[float], SpectralFilter]] = {"damped": Damped, "unrolled": Unrolled}
    make = makers[kind]
    above = [stage.name for stage in pool.stages.config.stages[pool.stages.config.attributed_index :]]
    return pool.influence({name: make(later if i else first) for i, name in enumerate(above)})


def configured(pool: Pool) -> FloatArray:
    """Scores with each stage's filter as its settings describe it."""
    stages = pool.stages.config.stages[pool.stages.config.attributed_index :]
    targets = {stage.name: pool.stages.factors(stage.name).mean_targets for stage in stages}
    return pool.influence({stage.name: from_settings(stage.filter, targets[stage.name]) for stage in stages})


def single_stage(config: Config) -> Config:
    """The last stage's model as if it had been trained on the attributed stage's documents alone."""
    target, last = config.stage(config.attribute_to), config.stages[-1]
    stage = target.model_copy(update={"model": last.model})
    return config.model_copy(
        update={"workspace": config.workspace.with_name(f"{config.workspace.name}-single"), "stages": (stage,)}
    )


def all_methods(pool: Pool, damping: float = 0.1, alpha: float = 0.1, tau: float = 1.0) -> dict[str, FloatArray]:
    """Every method of the comparison at one setting of its filters, all relative, and the filters as configured."""
    target = pool.target
    alone = Pool(single_stage(pool.stages.config), pool.queries)
    return {
        "random": np.random.default_rng(0).normal(size=(len(pool.queries), len(pool.documents))),
        "BM25": bm25(pool.asked, pool.texts),
        "TF-IDF": tf_idf(pool.asked, pool.texts),
        "embedding similarity": pool.embedding(),
        "gradient dot product": pool.influence({target: Identity()}),
        "gradient cosine": pool.cosine(),
        "EK-FAC, pre-trained model": pool.influence({target: Damped(damping)}, query_model=target),
        "EK-FAC, fine-tuned model": alone.influence({target: Damped(damping)}),
        "EK-FAC, query at the last stage": pool.influence({target: Damped(damping)}),
        "multi-stage, damped": multi_stage(pool, "damped", damping, alpha),
        "multi-stage, unrolled": multi_stage(pool, "unrolled", tau, tau),
        "multi-stage, as configured": configured(pool),
    }
