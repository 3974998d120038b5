"""A stage's model without weights, from its configuration; those of some hub models are known without the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from msif_core.checkpoint_cache import while_files_stay
from msif_core.config import Config, Stage
from msif_core.errors import InputError
from msif_core.models import AUTO, adapter_to_merge, attention_option, needs_package, read_configuration
from msif_core.tracking import text_config

_PYTHIA = {"model_type": "gpt_neox", "rotary_pct": 0.25, "max_position_embeddings": 2048, "use_parallel_residual": True}
_PYTHIA_3B = {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 10240}
_PYTHIA_7B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 16384}
_PYTHIA_12B = {"hidden_size": 5120, "num_hidden_layers": 36, "num_attention_heads": 40, "intermediate_size": 20480}
_BLOOM = {"model_type": "bloom", "vocab_size": 250880, "hidden_size": 1024, "n_layer": 24, "n_head": 16}
KNOWN: dict[str, dict[str, Any]] = {
    "EleutherAI/pythia-2.8b": _PYTHIA | _PYTHIA_3B | {"vocab_size": 50304},
    "EleutherAI/pythia-6.9b": _PYTHIA | _PYTHIA_7B | {"vocab_size": 50432},
    "EleutherAI/pythia-12b": _PYTHIA | _PYTHIA_12B | {"vocab_size": 50688},
    "databricks/dolly-v2-12b": _PYTHIA | _PYTHIA_12B | {"vocab_size": 50280},
    "databricks/dolly-v2-3b": _PYTHIA | _PYTHIA_3B | {"vocab_size": 50280},
    "bigscience/bloom-560m": _BLOOM,
    "bigscience/bloomz-560m": _BLOOM,
}
"""Configurations of hub models that are planned for without the hub."""


def meta_model(config: Config, stage: Stage) -> nn.Module:
    """The stage's model without weights; an adapter's is its base model's.

    Raises:
        InputError: no configuration of it can be read here, or it is an adapter and to be refused.
    """
    compute = config.compute
    options = (stage.revision, stage.task, stage.adapter, compute.trust_remote_code, compute.attention)
    return _meta_model(stage.model, *options)


LONGEST_WINDOW = 2048
"""Tokens of a document's window where none is configured, whatever the model's context: see `corpus.max_length`."""


def window(config: Config, stage: str, model: nn.Module) -> int | None:
    """Window length in tokens: as configured, or else the positions of the stage's model up to `LONGEST_WINDOW`.

    None where neither is named.

    Raises:
        InputError: the model has fewer positions than are configured.
    """
    configured = config.corpus.max_length
    positions = getattr(text_config(model), "max_position_embeddings", None)
    if configured and positions and configured > positions:
        raise InputError(
            f"corpus.max_length is {configured}, but the model of stage {stage!r} has {positions} positions; "
            f"set it to {positions} or less"
        )
    return configured or (min(positions, LONGEST_WINDOW) if positions else None)


@while_files_stay(4)
def _meta_model(
    source: str, revision: str | None, task: str, adapter: str, trust_remote_code: bool, attention: str
) -> nn.Module:
    settings = _settings(source, revision, task, adapter, trust_remote_code)
    try:
        with torch.device("meta"):
            return AUTO[task].from_config(settings, trust_remote_code=trust_remote_code, **attention_option(attention))
    except ImportError as error:
        raise needs_package(source, error) from None


def _settings(source: str, revision: str | None, task: str, adapter: str, trust_remote_code: bool) -> Any:
    if source in KNOWN and not Path(source).exists():
        return transformers.AutoConfig.for_model(**KNOWN[source])
    if (merged := adapter_to_merge(source, revision, adapter)) is not None:
        return _settings(merged["base_model_name_or_path"], merged.get("revision"), task, "refuse", trust_remote_code)
    return read_configuration(source, revision, task, trust_remote_code)
