"""A model's outputs on a batch."""

from __future__ import annotations

from threading import RLock
from typing import Any

from torch import nn

from msif_core.batching import Batch
from msif_core.errors import InputError

PASS = RLock()
"""Held during a pass: threads of one process share a stage's model, and hooks would see each other's passes."""


def forward(model: Any, batch: Batch) -> Any:
    """The model's outputs on a batch, without a cache of keys and values.

    A decoder with a classification head finds a sequence's last token by its own padding id: use that.

    Raises:
        InputError: such a decoder has no padding id, and the batch has more than one sequence.
    """
    config = model.config
    input_ids = batch.input_ids
    if is_classifier(model) and config.pad_token_id is not None:
        input_ids = input_ids.masked_fill(batch.attention_mask == 0, config.pad_token_id)
    elif is_classifier(model) and len(batch.rows) > 1:
        raise InputError(
            f"{config.name_or_path}: a classifier without a padding token; set pad_token_id in config.json"
        )
    options = {"use_cache": False} if getattr(config, "use_cache", None) is not None else {}
    with PASS:
        return model(input_ids=input_ids, attention_mask=batch.attention_mask, **options)


def is_classifier(model: nn.Module) -> bool:
    """Whether the model has a sequence classification head."""
    return type(model).__name__.endswith("ForSequenceClassification")
