"""A stage's model and tokenizer, and the linear maps of it that are tracked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from msif_core import storage
from msif_core.config import CurvatureSettings
from msif_core.errors import InputError

SIBLINGS = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"query", "key", "value"})
"""Maps that read the same input, and so share A and Q_A."""


@dataclass(frozen=True)
class TrackedMap:
    """A linear map y = W a whose output rows are seen as G blocks of equal size b, each with its own S.

    Attributes:
        d_in: inputs, the homogeneous coordinate of a bias included.
        permutation: order of the output rows in which the blocks are contiguous; None where they are.
        input_group: name shared by the maps that read the same input.
    """

    name: str
    d_in: int
    d_out: int
    bias: bool
    groups: int
    permutation: tuple[int, ...] | None
    input_group: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """[G, b, d_in], the shape of the map's gradient."""
        return (self.groups, self.d_out // self.groups, self.d_in)

    @property
    def size(self) -> int:
        """Number of tracked parameters."""
        return self.d_in * self.d_out


@lru_cache(maxsize=4)
def load_model(
    source: str,
    device: str = "cpu",
    dtype: str = "float32",
    task: str = "causal_lm",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The frozen model in evaluation mode; weights come from safetensors only.

    Raises:
        InputError: there is no such checkpoint, or it has no safetensors, or it is an adapter.
    """  # fmt: skip
    if Path(source, "adapter_config.json").exists():
        raise InputError(f"{source}: a PEFT adapter; merge it into its base model (merge_and_unload) and save that")
    auto = {
        "causal_lm": transformers.AutoModelForCausalLM,
        "classification": transformers.AutoModelForSequenceClassification,
    }[task]
    try:
        model = auto.from_pretrained(
            source, revision=revision or "main", dtype=getattr(torch, dtype),
            use_safetensors=True, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise InputError(f"{source}: no model can be loaded from it: {error}") from None
    return freeze(model.to(device))


def freeze(model: nn.Module) -> nn.Module:
    """Evaluation mode, and no parameter asks for a gradient: weight gradients are never formed."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


@lru_cache(maxsize=4)
def load_tokenizer(source: str, revision: str | None = None) -> Any:
    """The checkpoint's tokenizer, None where it has none (records with input_ids need none)."""
    try:
        return transformers.AutoTokenizer.from_pretrained(source, revision=revision or "main")
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=16)
def model_fingerprint(source: str, revision: str | None = None) -> str:
    """Digest of a local checkpoint's weights and configuration; a hub model is its id and revision."""
    files = sorted(Path(source).glob("*.safetensors")) + sorted(Path(source).glob("config.json"))
    if not files:
        return storage.fingerprint(source, revision)
    return storage.fingerprint([(path.name, storage.file_digest(path)) for path in files])


def tracked_maps(model: Any, settings: CurvatureSettings) -> list[TrackedMap]:
    """The linear maps that `settings` ask for, in the model's order.

    Raises:
        InputError: none is left, or a tracked head is tied to the embedding.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embedding = model.get_input_embeddings().weight
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    found = []
    for name, module in linear.items():
        if not re.search(settings.include, name) or (module is head and not settings.track_unembedding):
            continue
        if module.weight is embedding:
            raise InputError(
                f"{name}: tied to the embedding, whose gradient is not tracked; set curvature.track_unembedding: false"
            )
        found.append(_describe(model, name, module, settings.qkv_split))
    if not found:
        raise InputError(f"curvature.include {settings.include!r} matches none of the linear maps: {sorted(linear)}")
    return found


def _describe(model: nn.Module, name: str, module: Any, split: str) -> TrackedMap:
    weight = module.weight
    d_in, d_out = weight.shape if isinstance(module, Conv1D) else reversed(weight.shape)
    groups, permutation = _blocks(model.config, name, int(d_out), split)
    parent, _, leaf = name.rpartition(".")
    siblings = next((s for s in SIBLINGS if leaf in s), None)
    group = f"{parent}.{'+'.join(sorted(siblings))}" if siblings else name
    has_bias = module.bias is not None
    return TrackedMap(name, int(d_in) + has_bias, int(d_out), has_bias, groups, permutation, group)


def _blocks(config: Any, name: str, d_out: int, split: str) -> tuple[int, tuple[int, ...] | None]:
    """Blocks of a query-key-value map, from each architecture's own layout of its output rows."""
    leaf = name.rpartition(".")[2]
    heads: int = getattr(config, "num_attention_heads", 0) or getattr(config, "n_head", 0)
    if leaf == "query_key_value" and split != "none":  # GPT-NeoX, BLOOM: rows are [head, 3, head_dim]
        rows = torch.arange(d_out).view(heads, 3, -1)
        if split == "head":
            return 3 * heads, None
        return 3, tuple(rows.transpose(0, 1).reshape(-1).tolist())
    if leaf == "c_attn" and split != "none":  # GPT-2: rows are [3, head, head_dim]
        return (3 if split == "projection" else 3 * heads), None
    if leaf in SIBLINGS[0] | SIBLINGS[2] and split == "head":  # separate maps, keys possibly grouped
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return d_out // head_dim, None
    return 1, None


def coverage(model: nn.Module, maps: list[TrackedMap]) -> tuple[int, int]:
    """(tracked parameters, all parameters), to be shown to the user."""
    return sum(m.size for m in maps), sum(p.numel() for p in model.parameters())
