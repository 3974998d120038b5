"""Queries, and their exact scores of documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from msif_core import chats, low_rank, scoring, vocabulary
from msif_core.batching import Sequences
from msif_core.errors import InputError
from msif_core.fitting import Fitting
from msif_core.generating import complete
from msif_core.queries import Queries, load_queries
from msif_core.retrieval import FloatArray
from msif_core.scoring import Gradients


class ExactScores(Fitting):
    """The stages of one configuration, their curvature, and what queries score through it."""

    def read_queries(self, source: Path | Sequence[dict[str, Any]]) -> Queries:
        """Queries for the last stage's model, which answers those that are a prompt alone."""
        last = self.config.stages[-1]
        tokenizer = self.tokenizer(last.name)

        def answers(prompts: list[list[int]]) -> list[list[int]]:
            return complete(
                self.model(last.name),
                prompts,
                max_length=self.query_length(),
                max_new_tokens=self.config.completion.max_new_tokens,
                batch_tokens=self.batch_tokens,
                ends=[tokenizer.eos_token_id, chats.turn_end(tokenizer)],
            )

        generates = answers if last.task == "causal_lm" else None
        with self.reading(last.name):
            found = load_queries(
                source, tokenizer, self.query_length(), last.task, generates, start=self.config.corpus.start
            )
        vocabulary.check_sequences(found.sequences, self.structure(last.name), last.task, last.name)
        return found

    def query_gradients(self, queries: Queries, *, rotated: bool = True) -> Iterator[tuple[slice, Gradients]]:
        """Gradients of the queries' measurements at the last stage: some queries' and some maps' at a time.

        `rotated` ones are in the last stage's eigenbasis. Each item is the queries' slice and map name to
        [Q, G, b, d_in], within `curvature.memory_budget_gb` together with their filtered copies. One pass of those
        queries for each item.
        """
        last = self.config.stages[-1]
        model, maps = self.model(last.name), self.maps(last.name)
        for rows, group in scoring.query_groups(maps, len(queries), self.config.curvature.memory_budget_gb):
            some = queries.take(range(len(queries))[rows])
            yield (
                rows,
                scoring.query_gradients(
                    model,
                    group,
                    some.sequences,
                    self.batch_tokens,
                    task=last.task,
                    measurements=some.measurements,
                    factors=self.factors(last.name) if rotated else None,
                ),
            )

    def scores(self, queries: Queries, documents: Sequences) -> FloatArray:
        """Exact scores of the attributed stage's sequences, float32 [Q, N].

        Raises:
            InputError: the last stage and the attributed one share no map.
        """
        total = np.zeros((len(queries), len(documents)))
        chain, shared = self.chain(), 0
        for rows, gradients in self.query_gradients(queries):
            filtered = chain.filter_all(gradients, rotated=True)
            shared += len(filtered)
            total[rows] += self.exact_scores(filtered, documents) if filtered else 0.0
        _check_shared(shared)
        return total.astype(np.float32)

    def both_scores(self, queries: Queries, documents: Sequences) -> npt.NDArray[np.float64]:
        """Multi-stage scores and gradient dot products, [2, Q, N].

        Raises:
            InputError: the last stage and the attributed one share no map.
        """
        scores, chain, shared = np.zeros((2, len(queries), len(documents))), self.chain(), 0
        for rows, raw in self.query_gradients(queries, rotated=False):
            filtered = chain.filter_all(dict(raw))
            both = {name: torch.cat([filtered.pop(name), raw.pop(name)]) for name in list(filtered)}
            shared += len(both)
            scores[:, rows] += self.exact_scores(both, documents).reshape(2, -1, len(documents)) if both else 0.0
        _check_shared(shared)
        return scores

    def cut_both_scores(
        self, queries: Queries, documents: Sequences, rank: int
    ) -> tuple[npt.NDArray[np.float64], float]:
        """The same by gradients cut to `rank`, in one pass over the documents; and the share of norm lost."""
        filtered: dict[str, low_rank.LowRank] = {}
        raw: dict[str, low_rank.LowRank] = {}
        chain, target = self.chain(), self.config.stage(self.config.attribute_to)
        for _, gradients in self.query_gradients(queries, rotated=False):
            for name, v in chain.filter_all(dict(gradients)).items():
                filtered[name] = low_rank.joined(filtered.get(name), low_rank.cut(v, rank))
                raw[name] = low_rank.joined(raw.get(name), low_rank.cut(gradients[name], rank))
        _check_shared(len(filtered))
        both = {name: low_rank.joined(filtered[name], raw[name]) for name in filtered}
        scores = low_rank.score_low_rank(
            self.model(target.name), self.maps(target.name), both, documents, self.batch_tokens, task=target.task
        )
        return scores.reshape(2, len(queries), len(documents)), float(low_rank.relative_error(filtered).mean())

    def exact_scores(self, filtered: Gradients, sequences: Sequences) -> npt.NDArray[np.float64]:
        """The part of the exact scores of the attributed stage's sequences that these maps give, [Q, N]."""
        target = self.config.stage(self.config.attribute_to)
        return scoring.score_sequences(
            self.model(target.name),
            self.maps(target.name),
            filtered,
            sequences,
            self.batch_tokens,
            task=target.task,
        )


def _check_shared(maps: int) -> None:
    """Refuse to score by no map at all."""
    if not maps:
        raise InputError("no tracked map of the last stage is found in every stage below it: nothing to score with")
