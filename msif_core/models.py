"""A stage's model, and the linear maps of it that are tracked."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file, find_adapter_config_file

from msif_core import storage
from msif_core.checkpoint_cache import while_files_stay
from msif_core.errors import InputError

if TYPE_CHECKING:
    from msif_core.config import CurvatureSettings

SIBLINGS = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"query", "key", "value"})
"""Maps that read the same input, and so share A and Q_A."""

ATTENDED = SIBLINGS[0] | SIBLINGS[2]
"""Of separate maps, those that make queries, keys and values."""

FUSED = {"query_key_value", "c_attn", "qkv_proj", "Wqkv", "W_pack", "in_proj"}
"""Names of maps that hold queries, keys and values in one matrix."""

LAYOUTS = {("gpt_neox", "query_key_value"): "head", ("bloom", "query_key_value"): "head", ("gpt2", "c_attn"): "qkv"}
"""Order of the output rows of fused maps: `head` is [head, 3, head_dim], `qkv` is [3, head, head_dim]."""

WIDEST_BLOCK = 4096
"""`curvature.block_size` of a tracked head, where none is set."""


@dataclass(frozen=True)
class TrackedMap:
    """A linear map y = W a whose output rows are seen as G blocks of equal size b, each with its own S.

    Attributes:
        d_in: inputs, the homogeneous coordinate of a bias included.
        groups: G.
        cuts: diagonal pieces that the S of each block is cut into (`curvature.block_size`); they share the block's mean
            eigenvalue, which relative damping refers to.
        heads: output rows lie as [heads, G, b / heads]; 1 where the blocks are contiguous.
        input_group: name shared by the maps that read the same input.
    """

    name: str
    d_in: int
    d_out: int
    bias: bool
    groups: int
    heads: int
    input_group: str
    cuts: int = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """[G, b, d_in], the shape of the map's gradient."""
        return (self.groups, self.d_out // self.groups, self.d_in)

    def blocks(self, rows: torch.Tensor) -> torch.Tensor:
        """Output rows [..., d_out] as the blocks that they form: [..., G, b]."""
        return rows.unflatten(-1, (self.heads, self.groups, -1)).transpose(-3, -2).flatten(-2)

    @property
    def pieces(self) -> tuple[int, int]:
        """Number and width of the pieces of S, [P, p]; P p is d_out."""
        return (self.groups * self.cuts, self.d_out // (self.groups * self.cuts))

    @property
    def s_entries(self) -> int:
        """Entries of all pieces of S."""
        return self.d_out * self.pieces[1]

    @property
    def size(self) -> int:
        """Number of tracked parameters."""
        return self.d_in * self.d_out


@while_files_stay(4)
def load_model(
    source: str,
    device: str = "cpu",
    dtype: str = "float32",
    task: str = "causal_lm",
    revision: str | None = None,
    trust_remote_code: bool = False,
    adapter: str = "refuse",
    tf32: bool = False,
) -> nn.Module:
    """The frozen model in evaluation mode; weights come from safetensors only.

    An adapter (PEFT) is merged into its base model with `adapter` "merge". `tf32` is how its passes multiply
    (`capture.precision`).

    Raises:
        InputError: there is no such checkpoint, or it has no safetensors, lacks weights, or is an adapter that is
            not to be merged, or cannot be.
    """  # fmt: skip
    options = (dtype, task, trust_remote_code)
    settings = adapter_to_merge(source, revision, adapter)
    if settings is None:
        return freeze(_read_checkpoint(source, revision, *options).to(device), tf32)
    # peft itself would fall back on a pickle.
    weights = cached_file(
        source, "adapter_model.safetensors", revision=revision, _raise_exceptions_for_missing_entries=False
    )
    if weights is None:
        raise InputError(f"{source}: the adapter has no adapter_model.safetensors; save it in that format")
    try:
        import peft
    except ImportError:
        raise InputError(f"{source}: to merge an adapter, peft is needed: pip install peft") from None
    base = _read_checkpoint(settings["base_model_name_or_path"], settings.get("revision"), *options)
    try:
        merged = peft.PeftModel.from_pretrained(base, source, revision=revision).merge_and_unload()
    except SafetensorError as error:
        raise _damaged(source, error) from None
    except (OSError, ValueError, RuntimeError) as error:
        name = settings["base_model_name_or_path"]
        raise InputError(f"{source}: the adapter cannot be merged into its base model {name}: {error}") from None
    return freeze(merged.to(device), tf32)


def adapter_to_merge(source: str, revision: str | None, adapter: str) -> dict[str, Any] | None:
    """`adapter_settings`, where `adapter` is "merge".

    Raises:
        InputError: it is an adapter, and to be refused.
    """
    settings = adapter_settings(source, revision)
    if settings is not None and adapter != "merge":
        raise InputError(
            f"{source}: a PEFT adapter of {settings['base_model_name_or_path']}, not a whole model; set "
            "`adapter: merge` on its stage, or merge it yourself (merge_and_unload) and name the saved folder"
        )
    return settings


def adapter_settings(source: str, revision: str | None = None) -> dict[str, Any] | None:
    """What adapter_config.json says of a folder or hub id; None of a whole model."""
    try:
        path = find_adapter_config_file(source, revision=revision)
    except (OSError, ValueError):  # no such folder or hub id: what reads the checkpoint says so
        return None
    return None if path is None else dict(json.loads(Path(path).read_text(encoding="utf-8")))


def _read_checkpoint(source: str, revision: str | None, dtype: str, task: str, trust_remote_code: bool) -> Any:
    auto = {
        "causal_lm": transformers.AutoModelForCausalLM,
        "classification": transformers.AutoModelForSequenceClassification,
    }[task]
    try:
        model, loaded = auto.from_pretrained(
            source, revision=revision or "main", dtype=getattr(torch, dtype),
            use_safetensors=True, trust_remote_code=trust_remote_code, output_loading_info=True,
        )  # fmt: skip
    except SafetensorError as error:
        raise _damaged(source, error) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{source}: no model can be loaded from it: {error}") from None
    if loaded["missing_keys"]:
        raise InputError(
            f"{source}: the checkpoint has no weights for {sorted(loaded['missing_keys'])}, which would be random; "
            f"is its task {task}?"
        )
    return model


def _damaged(source: str, error: SafetensorError) -> InputError:
    return InputError(f"{source}: its weights are damaged ({error}); copy or save them again")


def freeze(model: nn.Module, tf32: bool = False) -> nn.Module:
    """Evaluation mode, and no parameter asks for a gradient: weight gradients are never formed.

    `tf32` stays with the model, as its device and dtype do, and says how its passes multiply.
    """
    model.tf32 = tf32  # type: ignore[assignment]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


@while_files_stay(16)
def model_fingerprint(source: str, revision: str | None = None) -> str:
    """Digest of a local checkpoint's weights and configuration; a hub model is its id and revision.

    An adapter's is that of its own files and of its base model.
    """
    named = [Path(source, name) for name in ("config.json", "adapter_config.json")]
    files = sorted(Path(source).glob("*.safetensors")) + [path for path in named if path.exists()]
    if not files:
        return storage.fingerprint(source, revision)
    digests = [(path.name, storage.file_digest(path)) for path in files]
    if named[1].exists() and (adapter := adapter_settings(source)) is not None:
        base = model_fingerprint(adapter["base_model_name_or_path"], adapter.get("revision"))
        return storage.fingerprint(digests, base)
    return storage.fingerprint(digests)


def tracked_maps(model: Any, settings: CurvatureSettings) -> list[TrackedMap]:
    """The linear maps that `settings` ask for, in the model's order.

    Raises:
        InputError: none is left, a tracked head is tied to the embedding, the rows of a fused map are in an
            unknown order, or the model is an encoder-decoder.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"{type(model).__name__}: encoder-decoder models are not supported")
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
        found.append(_describe(model, name, module, settings, module is head))
    if not found:
        raise InputError(f"curvature.include {settings.include!r} matches none of the linear maps: {sorted(linear)}")
    return found


def _describe(model: nn.Module, name: str, module: Any, settings: CurvatureSettings, is_head: bool) -> TrackedMap:
    weight = module.weight
    d_in, d_out = weight.shape if isinstance(module, Conv1D) else reversed(weight.shape)
    groups, heads = (1, 1) if is_head else _blocks(model, name, int(d_out), settings.qkv_split)
    cuts = _cuts(int(d_out) // groups, settings.block_size or (WIDEST_BLOCK if is_head else int(d_out)))
    parent, _, leaf = name.rpartition(".")
    siblings = next((s for s in SIBLINGS if leaf in s), None)
    group = f"{parent}.{'+'.join(sorted(siblings))}" if siblings else name
    has_bias = module.bias is not None
    if siblings and has_bias:  # a sibling without a bias has another homogeneous input
        group += "+1"
    return TrackedMap(name, int(d_in) + has_bias, int(d_out), has_bias, groups, heads, group, cuts)


def _blocks(model: Any, name: str, d_out: int, split: str) -> tuple[int, int]:
    """Blocks of a query-key-value map, and heads that their rows are dealt out to: each architecture's own layout."""
    leaf = name.rpartition(".")[2]
    config = model.config
    if split == "none" or leaf not in FUSED | ATTENDED:
        return 1, 1
    heads: int = config.num_attention_heads
    if leaf not in FUSED:  # separate maps, keys and values possibly grouped
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return (d_out // head_dim if split == "head" else 1), 1
    layout = LAYOUTS.get((config.model_type, leaf))
    if layout is None:
        raise InputError(
            f"{name}: the order of its query, key and value rows is not known for {config.model_type} "
            f"(known: {sorted(LAYOUTS)}); set curvature.qkv_split: none, or add it to models.LAYOUTS"
        )
    if split == "head":
        return 3 * heads, 1
    return 3, heads if layout == "head" else 1


def _cuts(rows: int, widest: int) -> int:
    """Fewest equal pieces of `rows` output rows that are no larger than `widest`; a prime number has a diagonal S."""
    return next(g for g in range(1, rows + 1) if rows % g == 0 and rows // g <= widest)


def coverage(model: nn.Module, maps: list[TrackedMap]) -> tuple[int, int]:
    """(tracked parameters, all parameters), to be shown to the user."""
    return sum(m.size for m in maps), sum(p.numel() for p in model.parameters())
