"""Tokens and labels that a model lacks are named before a pass meets them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msif_core import vocabulary
from msif_core.batching import IGNORED, Sequences
from msif_core.config import Config
from msif_core.errors import InputError
from msif_core.pipeline import Pipeline
from tests.conftest import VOCAB
from tests.tiny_project import write_records


def sequences(**labels: list[int]) -> Sequences:
    """A sequence of each label list, named by it, that reads tokens 1, 2, ..."""
    targets = [np.array(row, np.int32) for row in labels.values()]
    ids = [np.arange(1, len(row) + 1, dtype=np.int32) for row in targets]
    return Sequences(ids, targets, ["f"] * len(ids), [*labels], np.arange(len(ids)))


def test_the_last_token_is_known_and_the_next_is_not(small_models: dict[str, Any]) -> None:
    model = small_models["gpt_neox"]
    vocabulary.check_sequences(sequences(a=[IGNORED, VOCAB - 1]), model, "causal_lm", "pretrain")
    message = "record 'b': label 13, but the model of stage 'pretrain' knows 0 to 12; mend the record, or name the"
    with pytest.raises(InputError, match=message):
        vocabulary.check_sequences(sequences(a=[1], b=[2, VOCAB]), model, "causal_lm", "pretrain")
    with pytest.raises(InputError, match="record 'long': token 13, but the model of stage 'pretrain' knows 0 to 12"):
        vocabulary.check_sequences(sequences(long=[IGNORED] * VOCAB), model, "causal_lm", "pretrain")


def test_a_classification_knows_its_own_labels(small_models: dict[str, Any]) -> None:
    model = small_models["bert"]
    vocabulary.check_sequences(sequences(a=[2, IGNORED]), model, "classification", "sentiment")
    with pytest.raises(InputError, match="record 'a': label 3, but the model of stage 'sentiment' knows 0 to 2"):
        vocabulary.check_sequences(sequences(a=[3, IGNORED]), model, "classification", "sentiment")


def test_documents_and_queries_are_checked_when_they_are_encoded(trained_project: Path, tmp_path: Path) -> None:
    settings = json.loads(trained_project.read_text()) | {"workspace": str(tmp_path / "workspace")}
    strange = {"id": "strange", "input_ids": [1, 2, 4096]}
    settings["stages"][0]["documents"] = write_records(tmp_path / "a.jsonl", [{"id": "a", "text": "an oak"}, strange])
    pipeline = Pipeline(Config.model_validate(settings))
    message = re.escape("record 'strange': token 4096, but the model of stage 'pretrain' knows 0 to")
    for _ in range(2):  # the shards stand by the second time
        with pytest.raises(InputError, match=message):
            pipeline.tokenize("pretrain")
    with pytest.raises(InputError, match=message):
        pipeline.score([{"id": "q", "text": "a kite"}], [strange])
    with pytest.raises(InputError, match="record 'strange': token 4096, but the model of stage 'finetune'"):
        pipeline.read_queries([strange])
