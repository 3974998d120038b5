"""The small models and sequences that the tests share, built once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from msif_core.batching import IGNORED, Sequences, sequence_fingerprint
from msif_core.models import freeze
from tests.tiny_project import documents, write_project, write_records

VOCAB = 13
SMALL = {"vocab_size": VOCAB, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL, intermediate_size=12, max_position_embeddings=32),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=8, n_layer=2, n_head=2, n_inner=12, n_positions=32,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    ),
    "bloom": lambda: transformers.BloomConfig(vocab_size=VOCAB, hidden_size=8, n_layer=2, n_head=2),
    "llama": lambda: transformers.LlamaConfig(
        **SMALL, intermediate_size=12, num_key_value_heads=1, max_position_embeddings=32
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCAB, hidden_size=8, num_hidden_layers=2, ffn_dim=12, num_attention_heads=2, word_embed_proj_dim=8,
        max_position_embeddings=32, dropout=0,
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **SMALL, intermediate_size=12, num_key_value_heads=1, max_position_embeddings=32, num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "bert": lambda: transformers.BertConfig(
        **SMALL, intermediate_size=12, max_position_embeddings=32, num_labels=3,
        hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    ),
}  # fmt: skip
DECODERS = ["gpt_neox", "gpt2", "bloom", "llama", "opt", "mixtral"]
ARCHITECTURES = [*DECODERS, "bert"]


def task_of(architecture: str) -> str:
    return "classification" if architecture == "bert" else "causal_lm"


def tolerance(architecture: str, rtol: float = 1e-9, atol: float = 1e-12) -> dict[str, float]:
    """Of one gradient taken in two batches: BLOOM's softmax is in float32 in its own code, whatever its weights."""
    return {"rtol": 1e-6, "atol": 1e-6} if architecture == "bloom" else {"rtol": rtol, "atol": atol}


def make_model(architecture: str, seed: int = 0, task: str | None = None, dtype: torch.dtype = torch.float64) -> Any:
    """A random, frozen model; every parameter (biases and norms too) is drawn, so that nothing is zero by luck."""
    torch.manual_seed(seed)
    config = CONFIGS[architecture]()
    config.pad_token_id = 0
    if (task or task_of(architecture)) == "classification":
        config.num_labels = 3
        model: nn.Module = transformers.AutoModelForSequenceClassification.from_config(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(centre + 0.4 * torch.randn_like(parameter))
    return freeze(model.to(dtype))


def make_sequences(
    count: int, seed: int = 0, task: str = "causal_lm", lengths: tuple[int, int] = (4, 9), prompt: int = 2
) -> Sequences:
    """Random sequences of unequal lengths; the first `prompt` tokens and the last one carry no label."""
    generator = np.random.default_rng(seed)
    input_ids, labels = [], []
    for _ in range(count):
        ids = generator.integers(1, VOCAB, generator.integers(*lengths)).astype(np.int32)
        if task == "classification":
            target = np.full(len(ids), IGNORED, np.int32)
            target[0] = generator.integers(3)
        else:
            target = ids.copy()
            target[:prompt] = IGNORED
            if len(ids) > prompt + 1:
                target[-1] = IGNORED
        input_ids.append(ids)
        labels.append(target)
    return Sequences(
        input_ids,
        labels,
        [sequence_fingerprint(i, t) for i, t in zip(input_ids, labels, strict=True)],
        [f"doc{i}" for i in range(count)],
        np.arange(count, dtype=np.int64),
    )


@pytest.fixture(scope="session", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session", params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def small_models() -> dict[str, Any]:
    """One float64 model of each architecture."""
    return {name: make_model(name) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def trained_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def project(trained_project: Path, tmp_path: Path) -> Path:
    """The tiny project with documents and a workspace of its own."""
    settings = json.loads(trained_project.read_text()) | {"workspace": str(tmp_path / "workspace")}
    settings["stages"][0]["documents"] = write_records(tmp_path / "documents.jsonl", documents())
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(settings))
    return path
