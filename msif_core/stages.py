"""The stages of a configuration: their models and corpora.

A step takes names and returns paths. It writes files that are whole or absent and skips what already
stands, so each can be killed and called again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import torch

from msif_core import corpus, models, storage, tokenizers, tracking, vocabulary
from msif_core.config import Config
from msif_core.errors import InputError, NoTokenizerError
from msif_core.meta_models import LONGEST_WINDOW, meta_model, window
from msif_core.tokenizers import VOCABULARIES
from msif_core.workspace import Workspace

Progress = Callable[[str, int, int], None]


def _silent(step: str, done: int, total: int) -> None:
    """The progress callback of those who want none."""


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

    def holding(self, factors: dict[str, str]) -> Self:
        """The same configuration with these factors (stage to fingerprint), whatever is pinned meanwhile.

        And with each corpus as it is when first asked for, whatever is tokenized meanwhile.
        """
        held = type(self)(self.config, self.progress)
        held._factors, held._corpora = dict(factors), dict(self._corpora or {})
        return held

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
            attention=self.config.compute.attention,
        )

    def tokenizer(self, stage: str) -> Any:
        """The stage's tokenizer, or None where the checkpoint has none.

        Raises:
            InputError: it cannot be loaded, or is not that of the stage's model.
        """
        settings, trusted = self.config.stage(stage), self.config.compute.trust_remote_code
        found = tokenizers.load_tokenizer(settings.model, revision=settings.revision, trust_remote_code=trusted)
        tokenizers.check_size(found, vocabulary.sizes(self.structure(stage), settings.task)[0], settings.model)
        return found

    @contextmanager
    def reading(self, stage: str) -> Iterator[None]:
        """Names the stage and its model's folder where a record needs the tokenizer that is not there.

        Raises:
            InputError: so it is.
        """
        try:
            yield
        except NoTokenizerError as error:
            model, looked_for = self.config.stage(stage).model, ", no ".join(VOCABULARIES)
            raise InputError(
                f"stage {stage!r}: {model} has no tokenizer (no {looked_for}), "
                f"and record {error.record!r} is text; put the files of the model's tokenizer there, or give input_ids"
            ) from None

    def structure(self, stage: str) -> torch.nn.Module:
        """The stage's model without weights."""
        return meta_model(self.config, self.config.stage(stage))

    def maps(self, stage: str) -> list[tracking.TrackedMap]:
        """The stage's tracked maps."""
        return tracking.tracked_maps(self.structure(stage), self.config.curvature)

    def context(self, stage: str) -> int:
        """Tokens that the stage's model takes, and its tokenizer says that it takes.

        The latter is less where positions start after the padding token's (RoBERTa), and huge where it is not known.
        """
        positions = getattr(tracking.text_config(self.structure(stage)), "max_position_embeddings", None) or 1024
        return min(positions, getattr(self.tokenizer(stage), "model_max_length", positions))

    def max_length(self, stage: str) -> int:
        """Window length of the stage's documents in tokens: as configured, or the model's context up to a limit.

        Raises:
            InputError: the model has fewer positions than are configured.
        """
        window(self.config, stage, self.structure(stage))  # refuses what is too long
        return self.config.corpus.max_length or min(self.context(stage), LONGEST_WINDOW)

    def query_length(self) -> int:
        """Longest query in tokens: what the last stage's model takes, however short the documents' windows are."""
        last = self.config.stages[-1].name
        return max(self.context(last), self.max_length(last))

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
        with self.reading(stage), storage.locked(self.workspace.corpus(stage)):
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
