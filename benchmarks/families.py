"""Ground truth for a new head: pre-train on half of a pool of definitions, fine-tune as a classifier of families.

A definition of the pool is read whole, "... A kind of city."; the classifier gets new ones that stop after "A kind
of", and tells which family the next word belongs to. Pre-training has taught to continue there, so its documents
matter to the classifier's loss. One npz file a training; one that stands is not done again.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPTNeoXForSequenceClassification

from msif_core import corpus, storage
from msif_core.batching import Batch, Sequences, batches
from msif_core.config import Training
from msif_core.evaluation.lds import FloatArray
from msif_core.forward import forward
from msif_core.losses import target_losses
from msif_core.models import freeze
from msif_core.training import Architecture, new_model, optimize, sequence_losses, train_tokenizer

SOURCE = Path(__file__).parents[1] / "data" / "pretrain" / "wordnet.jsonl"
FOLDER = Path(__file__).parents[1] / "runs" / "new-head"
MARK = " A kind of"
FAMILIES = {
    "taxon": "genus family order",
    "place": "city town country river capital area island district region lake",
    "plant": "herb tree shrub plant vine agaric fern grass fungus flower",
    "person": "person writer worker physicist general leader American philosopher statesman painter officer woman "
    "architect actor composer man poet singer astronomer chemist politician player official",
    "artifact": "device instrument fabric garment tool equipment room structure covering ship machine vehicle cloth "
    "container vessel building furniture",
}
"""Family to the last words of "A kind of"."""

TEXTS = {"pool": 120, "labelled": 32, "queries": 16}
"""Definitions of each family."""

PRETRAINING = Training(learning_rate=0.005, epochs=8, batch_size=16, seed=0)
FINE_TUNING = Training(learning_rate=0.003, epochs=4, batch_size=16, seed=0)
ARCHITECTURE = Architecture(hidden=64, layers=2, heads=4, positions=96)
VOCABULARY, BATCH_TOKENS = 1024, 4096
SUBSETS, REPEATS = 40, 10


def mean_label_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Mean loss of the batch's labels."""
    return target_losses(forward(model, batch), batch, "classification").mean()


@torch.no_grad()
def label_losses(model: Any, sequences: Sequences) -> FloatArray:
    """Loss of each sequence's label: float64 [N]."""
    found = np.zeros(len(sequences))
    for batch in batches(sequences, BATCH_TOKENS):
        found[batch.rows] = target_losses(forward(model, batch), batch, "classification").double().numpy()
    return found


def with_head(language: Any, classes: int, seed: int) -> Any:
    """A classifier on the language model's body; its head is drawn from the seed."""
    config = copy.deepcopy(language.config)
    config.num_labels = classes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPTNeoXForSequenceClassification(config)
    model.base_model.load_state_dict(language.base_model.state_dict())
    return model


@dataclass(frozen=True)
class Families:
    """The definitions of each use, as records with `id`, `text` and `label`."""

    pool: list[dict[str, Any]]
    labelled: list[dict[str, Any]]
    queries: list[dict[str, Any]]

    @classmethod
    def read(cls, source: Path = SOURCE) -> Families:
        """Deal each family's definitions out at random, the same at every call."""
        label_of = {word: label for label, words in enumerate(FAMILIES.values()) for word in words.split()}
        by_label: list[list[dict[str, Any]]] = [[] for _ in FAMILIES]
        for line in source.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            text, _, kind = record["text"].partition(MARK)
            words = kind.partition(".")[0].split()
            if words and words[-1] in label_of:
                label = label_of[words[-1]]
                by_label[label].append(
                    {"id": record["id"], "whole": record["text"], "text": text + MARK, "label": label}
                )
        dealt: dict[str, list[dict[str, Any]]] = {use: [] for use in TEXTS}
        for label, found in enumerate(by_label):
            rows = iter(np.random.default_rng([7, label]).permutation(len(found)))
            for use, count in TEXTS.items():
                dealt[use] += [found[next(rows)] for _ in range(count)]
        pool = [{"id": record["id"], "text": record["whole"]} for record in dealt["pool"]]
        return cls(pool, dealt["labelled"], dealt["queries"])


class GroundTruth:
    """The trainings and the queries' losses after them."""

    def __init__(self, learning_rate: float = FINE_TUNING.learning_rate) -> None:
        self.fine_tuning = FINE_TUNING.model_copy(update={"learning_rate": learning_rate})
        found = Families.read()
        self.tokenizer = train_tokenizer((record["text"] for record in found.pool), VOCABULARY)
        self.pool = self._encode(found.pool, "causal_lm")
        self.labelled = self._encode(found.labelled, "classification")
        self.queries = self._encode(found.queries, "classification")
        texts = [{"id": record["id"], "text": record["text"]} for record in found.queries]
        windows = self._encode(texts, "causal_lm")
        self.texts = windows.take(np.unique(windows.document_ids, return_index=True)[1])
        data = [s.fingerprints for s in (self.pool, self.labelled, self.queries, self.texts)]
        recipes = [PRETRAINING.model_dump(), self.fine_tuning.model_dump(), ARCHITECTURE.__dict__]
        self.folder = FOLDER / storage.fingerprint(data, recipes)

    def _encode(self, records: list[dict[str, Any]], task: str) -> Sequences:
        return corpus.encode_list(records, self.tokenizer, ARCHITECTURE.positions, task)[0]

    @cached_property
    def masks(self) -> torch.Tensor:
        """Which of the pool's sequences are in each subset: float32 [M, S]."""
        masks = torch.zeros(SUBSETS, len(self.pool))
        for subset in range(SUBSETS):
            drawn = np.random.default_rng([0, 1, subset]).permutation(len(self.pool))
            masks[subset, torch.from_numpy(drawn[: len(drawn) // 2])] = 1
        return masks

    def train(self, rows: np.ndarray, seed: int) -> tuple[torch.nn.Module, torch.nn.Module]:
        """The language model of these rows of the pool, and the classifier made from it."""
        language = new_model(self.tokenizer, ARCHITECTURE, seed)
        optimize(language, self.pool.take(rows), PRETRAINING.model_copy(update={"seed": seed}))
        classifier = with_head(language, len(FAMILIES), seed)
        recipe = self.fine_tuning.model_copy(update={"seed": seed})
        optimize(classifier, self.labelled, recipe, batch_loss=mean_label_loss)
        return freeze(language), freeze(classifier)

    def losses(self, subset: int, seed: int = 0) -> FloatArray:
        """Losses after training on a subset: of the queries' labels, of their texts before the head came: [2, Q]."""

        def build(temporary: Path) -> None:
            language, classifier = self.train(np.flatnonzero(self.masks[subset].numpy()), seed)
            with open(temporary, "wb") as file:
                np.savez(
                    file, losses=[label_losses(classifier, self.queries), sequence_losses(language, self.texts)[0]]
                )

        path = self.folder / f"losses-{subset:04d}-seed-{seed}.npz"
        return np.asarray(np.load(storage.build_once(path, build))["losses"])
