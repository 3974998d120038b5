"""The stages of a configuration: their models, corpora, EK-FAC factors, and the chain they form.

A step takes names and returns paths. It writes files that are whole or absent and skips what already
stands, so each can be killed and called again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from msif_core import corpus, low_rank, models, scoring, storage, vocabulary
from msif_core.batching import Sequences
from msif_core.chain import Chain, FilteredStage
from msif_core.config import Config
from msif_core.curvature import filters, fit
from msif_core.curvature.factors import VERSION, Factors
from msif_core.curvature.steps import Fit
from msif_core.errors import InputError
from msif_core.generating import complete
from msif_core.meta_models import meta_model
from msif_core.queries import Queries, load_queries
from msif_core.retrieval import FloatArray
from msif_core.scoring import Gradients
from msif_core.workspace import Workspace

Progress = Callable[[str, int, int], None]


def _silent(step: str, done: int, total: int) -> None:
    """The progress callback of those who want none."""


def _check_shared(maps: int) -> None:
    """Refuse to score by no map at all."""
    if not maps:
        raise InputError("no tracked map of the last stage is found in every stage below it: nothing to score with")


class Stages:
    """One configuration and its workspace."""

    def __init__(self, config: Config, progress: Progress = _silent) -> None:
        self.config = config
        self.workspace = Workspace(config.workspace.resolve())
        self.progress = progress
        self._factors: dict[str, str] = {}
        self._corpora: dict[str, dict[str, Any]] | None = None

    @classmethod
    def from_config(cls, path: str | Path, progress: Progress = _silent) -> Self:
        """Of a YAML file.

        Raises:
            InputError: the file or a value in it is wrong.
        """
        return cls(Config.load(path), progress)

    # -- what a stage is made of ------------------------------------------------------------------

    @cached_property
    def device(self) -> torch.device:
        """The configured device; `auto` takes CUDA where there is one.

        Raises:
            InputError: CUDA is configured and not there.
        """
        name = self.config.compute.device
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise InputError(f"compute.device is {name}, but torch finds no CUDA here; set it to auto or cpu")
        return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)

    def model(self, stage: str) -> torch.nn.Module:
        """The stage's frozen model (kept in this process while its files stay as they are)."""
        settings = self.config.stage(stage)
        return models.load_model(
            settings.model,
            device=str(self.device),
            dtype=self.config.compute.dtype,
            task=settings.task,
            revision=settings.revision,
            trust_remote_code=self.config.compute.trust_remote_code,
            adapter=settings.adapter,
            tf32=self.config.compute.tf32,
        )

    def tokenizer(self, stage: str) -> Any:
        """The stage's tokenizer, or None where the checkpoint has none."""
        settings = self.config.stage(stage)
        trusted = self.config.compute.trust_remote_code
        return models.load_tokenizer(settings.model, revision=settings.revision, trust_remote_code=trusted)

    def structure(self, stage: str) -> torch.nn.Module:
        """The stage's model without weights."""
        return meta_model(self.config, self.config.stage(stage))

    def maps(self, stage: str) -> list[models.TrackedMap]:
        """The stage's tracked maps."""
        return models.tracked_maps(self.structure(stage), self.config.curvature)

    def context(self, stage: str) -> int:
        """Tokens that the stage's model takes, and its tokenizer says that it takes.

        The latter is less where positions start after the padding token's (RoBERTa), and huge where it is not known.
        """
        positions = self._positions(stage) or 1024
        return min(positions, getattr(self.tokenizer(stage), "model_max_length", positions))

    def max_length(self, stage: str) -> int:
        """Window length of the stage's documents in tokens: as configured, or the model's context.

        Raises:
            InputError: the model has fewer positions than are configured.
        """
        configured, positions = self.config.corpus.max_length, self._positions(stage)
        if configured and positions and configured > positions:
            raise InputError(
                f"corpus.max_length is {configured}, but the model of stage {stage!r} has {positions} positions; "
                f"set it to {positions} or less"
            )
        return configured or self.context(stage)

    def query_length(self) -> int:
        """Longest query in tokens: what the last stage's model takes, however short the documents' windows are."""
        last = self.config.stages[-1].name
        return max(self.context(last), self.max_length(last))

    def _positions(self, stage: str) -> int | None:
        """Positions of the stage's model, None where it names none (BLOOM)."""
        positions: int | None = getattr(self.structure(stage).config, "max_position_embeddings", None)
        return positions

    @property
    def batch_tokens(self) -> int:
        """Padded tokens in a batch."""
        return self.config.compute.batch_tokens

    # -- corpus -----------------------------------------------------------------------------------

    def tokenize(self, stage: str) -> Path:
        """Write the stage's documents as shards of token sequences; returns the manifest's path.

        Raises:
            InputError: a record is malformed, or has tokens or labels that the stage's model lacks.
        """
        settings, model = self.config.stage(stage), self.structure(stage)
        with storage.locked(self.workspace.corpus(stage)):
            path = corpus.tokenize(
                settings.documents,
                self.workspace.corpus(stage),
                tokenizer=self.tokenizer(stage),
                max_length=self.max_length(stage),
                settings=self.config.corpus,
                task=settings.task,
                progress=partial(self.progress, f"tokenize {stage}"),
            )
        for shard in self.shards(stage):
            vocabulary.check_shard(shard, model, settings.task, stage)
        return path

    def corpus_manifest(self, stage: str) -> dict[str, Any]:
        """What `tokenize` wrote of the stage; read once where it is held (`holding`).

        Raises:
            InputError: the stage is not tokenized.
        """
        held, path = {} if self._corpora is None else self._corpora, self.workspace.corpus(stage) / "manifest.json"
        if stage not in held:
            if not path.exists():
                raise InputError(f"{path}: stage {stage!r} is not tokenized; run `msif run CONFIG` first")
            held[stage] = storage.read_json(path)
        return held[stage]

    def corpus_version(self, stage: str) -> Path:
        """Manifest that stays, of that version of the stage's corpus."""
        return corpus.version_path(self.workspace.corpus(stage), self.corpus_manifest(stage))

    def shards(self, stage: str) -> list[Path]:
        """Sequence shards of a tokenized stage, in order."""
        folder = self.workspace.corpus(stage)
        return [folder / shard["sequences"] for shard in self.corpus_manifest(stage)["shards"]]

    def shard(self, stage: str, number: int) -> Path:
        """One of them."""
        return self.workspace.corpus(stage) / str(self.corpus_manifest(stage)["shards"][number]["sequences"])

    def sequence_count(self, stage: str) -> int:
        """Number of sequences of a tokenized stage."""
        return sum(entry["n_sequences"] for entry in self.corpus_manifest(stage)["shards"])

    # -- curvature --------------------------------------------------------------------------------

    def recipe(self, stage: str) -> str:
        """What the stage's factors depend on beside its documents: model weights and settings, their windows too."""
        settings = self.config.stage(stage)
        return storage.fingerprint(
            VERSION,
            models.model_fingerprint(settings.model, revision=settings.revision),
            self.config.curvature.model_dump(exclude={"memory_budget_gb"}, exclude_none=True),
            self.config.compute.dtype,
            self.config.corpus.max_length,
            *(["tf32"] if self.config.compute.tf32 else []),
        )

    def factors_fingerprint(self, stage: str) -> str:
        """Address of the stage's factors: its recipe, and the data they were fitted on.

        The data is that of the last full build: the pin keeps finished factors while documents come and go.
        A fit that did not finish before its documents changed starts again on the new ones.
        """
        if stage in self._factors:
            return self._factors[stage]
        recipe = self.recipe(stage)
        path = self.workspace.root / "pins" / f"{stage}.json"
        pin = storage.read_json(path) if path.exists() else None
        if pin is not None and pin["recipe"] == recipe and self._finished(pin["factors"]):
            return str(pin["factors"])
        fresh = storage.fingerprint(recipe, self.corpus_manifest(stage)["fingerprint"])
        if pin != {"recipe": recipe, "factors": fresh}:
            storage.write_json(path, {"recipe": recipe, "factors": fresh})
        return fresh

    def holding(self, factors: dict[str, str]) -> Self:
        """The same configuration with these factors (stage to fingerprint), whatever is pinned meanwhile.

        And with each corpus as it is when first asked for, whatever is tokenized meanwhile.
        """
        held = type(self)(self.config, self.progress)
        held._factors, held._corpora = dict(factors), dict(self._corpora or {})
        return held

    def as_it_stands(self) -> Self:
        """The same configuration with the factors and the corpora of now, which a build is to be of throughout."""
        return self.holding({stage.name: self.factors_fingerprint(stage.name) for stage in self.config.stages})

    def unpin(self) -> None:
        """Forget the pinned factors: the next build fits them on the corpus as it is."""
        for stage in self.config.stages:
            (self.workspace.root / "pins" / f"{stage.name}.json").unlink(missing_ok=True)

    def factors_folder(self, stage: str) -> Path:
        """Folder of the stage's factors."""
        return self.workspace.factors(self.factors_fingerprint(stage))

    def fit_parts(self, stage: str) -> list[list[Path]]:
        """The shards, in runs that hold about `curvature.part_sequences` sequences of the fit's sample each."""
        entries = self.corpus_manifest(stage)["shards"]
        share = self.fit_share(stage)
        before = np.cumsum([0, *(share * entry["n_sequences"] for entry in entries)])[:-1]
        part = (before // self.config.curvature.part_sequences).astype(int)
        shards = self.shards(stage)
        return [[shards[row] for row in np.flatnonzero(part == number)] for number in np.unique(part)]

    def fit_share(self, stage: str) -> float:
        """Share of the stage's sequences that the fit uses."""
        return min(1.0, self.config.curvature.max_sequences / max(1, self.sequence_count(stage)))

    def fit_sample(self, stage: str, part: int) -> Sequences:
        """One part of the random sample that the fit uses."""
        share, seed = self.fit_share(stage), self.config.curvature.seed
        return corpus.read_rows(self.fit_parts(stage)[part], lambda names: fit.sample_rows(names, share, seed))

    def covariance_part(self, stage: str, part: int) -> list[Path]:
        """Sum a a^T and d d^T over one part of the sample; nothing where another process has finished the fit."""
        if self.fitted(stage):
            return []
        return self.fit(stage, self.model(stage)).covariances(part, self.fit_sample(stage, part))

    def eigenbasis_part(self, stage: str, part: int) -> list[Path]:
        """Diagonalise one part's share of the covariances; nothing where another process has finished the fit."""
        if self.fitted(stage):
            return []
        return self.fit(stage, self.structure(stage)).eigenbases(part, len(self.fit_parts(stage)), self.device)

    def eigenvalue_part(self, stage: str, part: int) -> list[Path]:
        """Sum the squared rotated gradients of one part; nothing where another process has finished the fit."""
        if self.fitted(stage):
            return []
        return self.fit(stage, self.model(stage)).eigenvalues(part, self.fit_sample(stage, part))

    def combine_eigenvalues(self, stage: str) -> Path:
        """Add the parts' sums into the corrected eigenvalues; returns the finished factors' folder."""
        with storage.locked(self.factors_folder(stage) / "factors.json"):
            if self.fitted(stage):
                return self.factors_folder(stage)
            return self.fit(stage, self.structure(stage)).finish(len(self.fit_parts(stage)))

    def fit_stage(self, stage: str) -> Path:
        """The whole fit, step by step; returns the finished factors' folder."""
        parts = len(self.fit_parts(stage))
        for step in (self.covariance_part, self.eigenbasis_part, self.eigenvalue_part):
            run = self.reporting(f"{step.__name__} {stage}", partial(step, stage), parts)
            storage.free_first(range(parts), run)
        return self.combine_eigenvalues(stage)

    def reporting(self, name: str, step: Callable[[int], object], count: int) -> Callable[[int], None]:
        """The step, which tells `progress` each time how many of its parts are done."""
        done = 0

        def run(part: int) -> None:
            nonlocal done
            step(part)
            done += 1
            self.progress(name, done, count)

        return run

    def remove_sums(self, stage: str) -> None:
        """Remove the parts' sums: of no more use when the factors are finished, and many times their size."""
        for sums in self.factors_folder(stage).glob("partial-*"):
            shutil.rmtree(sums, ignore_errors=True)  # another process may be at it too

    def fit(self, stage: str, model: torch.nn.Module) -> Fit:
        """The stage's fit, by its structure where no pass is run.

        Documents whose gradients are not finite go into the corpus's quarantine.
        """
        folder, factors = self.workspace.corpus(stage), self.factors_fingerprint(stage)

        def quarantine(part: int, documents: list[str]) -> None:
            corpus.quarantine(folder, f"fit-{factors}-{part:05d}", documents, "the gradient is not finite")

        return Fit(
            model,
            self.maps(stage),
            self.factors_folder(stage),
            self.config.stage(stage).task,
            self.config.curvature.seed,
            self.config.compute.batch_tokens,
            self.config.curvature.memory_budget_gb,
            quarantine,
        )

    def fitted(self, stage: str) -> bool:
        """Whether the stage's factors are finished (and, being pinned, stay as they are)."""
        return self._finished(self.factors_fingerprint(stage))

    def _finished(self, factors: str) -> bool:
        return (self.workspace.factors(factors) / "factors.json").exists()

    def factors(self, stage: str) -> Factors:
        """The stage's finished factors, memory-mapped."""
        return Factors.open(self.factors_folder(stage), device=str(self.device))

    def curvature(self, stage: str) -> FilteredStage:
        """The stage's factors with its filter."""
        factors = self.factors(stage)
        return FilteredStage(factors, filters.from_settings(self.config.stage(stage).filter, factors.mean_targets))

    def chain(self) -> Chain:
        """Every stage's curvature and filter, from the attributed stage's point of view."""
        stages = tuple(self.curvature(stage.name) for stage in self.config.stages)
        return Chain(stages, self.config.attributed_index)

    # -- queries and exact scores -----------------------------------------------------------------

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
                end=tokenizer.eos_token_id,
            )

        generates = answers if last.task == "causal_lm" else None
        found = load_queries(source, tokenizer, self.query_length(), last.task, generates)
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
