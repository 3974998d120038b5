"""Tokens and labels that a model lacks: named here, before a pass meets them, on a GPU without any name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from msif_core import corpus, tracking
from msif_core.batching import Sequences
from msif_core.errors import InputError


def sizes(model: Any, task: str) -> tuple[int, int]:
    """How many tokens a model reads, and how many labels it gives a probability to."""
    embedding = tracking.input_embedding(model)
    tokens = int(tracking.text_config(model).vocab_size if embedding is None else embedding.weight.shape[0])
    return tokens, int(model.config.num_labels) if task == "classification" else tokens


def check_sequences(sequences: Sequences, model: Any, task: str, stage: str) -> None:
    """Refuse sequences that the stage's model cannot read.

    Raises:
        InputError: names the first record with a token or a label that the model lacks.
    """
    tokens, labels = sizes(model, task)
    for name, *values in zip(sequences.document_ids, sequences.input_ids, sequences.labels, strict=True):
        for what, found, known in (("token", values[0], tokens), ("label", values[1], labels)):
            if found.max(initial=0) >= known:
                raise InputError(
                    f"record {name!r}: {what} {found.max()}, but the model of stage {stage!r} knows 0 to {known - 1}; "
                    "mend the record, or name the model that it was made for"
                )


def check_shard(path: Path, model: Any, task: str, stage: str) -> None:
    """The same of a shard file, by its columns' statistics: its sequences are read only to name one."""
    groups = pq.read_metadata(path)
    columns = [groups.row_group(g).column(c) for g in range(groups.num_row_groups) for c in range(groups.num_columns)]
    known = dict(zip(("input_ids", "labels"), sizes(model, task), strict=True))
    for column in columns:
        name = column.path_in_schema.partition(".")[0]
        found = column.statistics  # none of a shard without a sequence
        if name in known and found is not None and found.has_min_max and found.max >= known[name]:
            check_sequences(corpus.read_shard(path), model, task, stage)
