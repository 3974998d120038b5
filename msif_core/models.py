"""A stage's model: read from its checkpoint, and refused by name where it cannot be attributed with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.utils import cached_file, find_adapter_config_file

from msif_core import experts, storage, tracking
from msif_core.batching import whole_batch
from msif_core.checkpoint_cache import while_files_stay
from msif_core.errors import InputError
from msif_core.forward import forward

LOOKS_AHEAD = 1e-5
"""A dependence on later tokens that is more than rounding."""

AUTO = {
    "causal_lm": transformers.AutoModelForCausalLM,
    "classification": transformers.AutoModelForSequenceClassification,
}
"""The class that makes a model, by task."""


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
    attention: str = "auto",
) -> nn.Module:
    """The frozen model in evaluation mode; weights come from safetensors only.

    An adapter (PEFT) is merged into its base model with `adapter` "merge". `tf32` is how its passes multiply
    (`capture.precision`).

    Raises:
        InputError: there is no such checkpoint, or it has no safetensors, lacks weights, is quantized, is no causal
            language model where the task needs one, or is an adapter that is not to be merged, or cannot be.
    """
    model = freeze(_merged(source, revision, adapter, (dtype, task, trust_remote_code, attention)).to(device), tf32)
    if task == "causal_lm":
        check_causal(model, source)
    return model


def _merged(source: str, revision: str | None, adapter: str, options: tuple[str, str, bool, str]) -> Any:
    """A checkpoint's model, an adapter's merged into its base model."""
    settings = adapter_to_merge(source, revision, adapter)
    if settings is None:
        return _read_checkpoint(source, revision, *options)
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
    return merged


def check_causal(model: Any, source: str) -> None:
    """Refuse a model whose logits at a position depend on later tokens, or that cannot be run on a text.

    Raises:
        InputError: says which.
    """
    try:
        later = _looks_ahead(model)
    except Exception as error:  # a model's own code raises what it likes
        raise InputError(f"{source}: {type(model).__name__} cannot be run on a text alone: {error}") from error
    if later > LOOKS_AHEAD:
        raise InputError(
            f"{source}: {type(model).__name__} reads later tokens too, so it is no causal language model; if it was "
            "trained as one, set is_decoder to true in its config.json"
        )


def _looks_ahead(model: Any) -> float:
    """How much the logits of a text's first half depend on the embeddings of its second half, relative to the first.

    By gradients, which masked positions do not have at all. Where a model embeds something else than its tokens, by
    what another last token changes.
    """
    embedding, seen = tracking.input_embedding(model), []

    def watch(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1].clone()

    tokens = tracking.text_config(model).vocab_size
    ids = torch.arange(8, device=next(model.parameters()).device)[None] % tokens
    hook = None if embedding is None else embedding.register_forward_hook(watch)
    try:
        with torch.enable_grad():
            first_half = forward(model, whole_batch(ids)).logits[:, :4].float()
    finally:
        if hook is not None:
            hook.remove()
    if len(seen) == 1 and seen[0].shape[:2] == ids.shape:
        asked = first_half * torch.linspace(-1, 1, first_half.shape[-1], device=ids.device)
        (gradient,) = torch.autograd.grad(asked.sum(), seen)
        moved, scale = gradient[:, 4:], gradient[:, :4]
    else:
        others = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % tokens], dim=1)
        with torch.no_grad():
            moved, scale = forward(model, whole_batch(others)).logits[:, :4].float() - first_half, first_half
    return float(moved.abs().max() / scale.abs().max().clamp_min(torch.finfo(torch.float32).tiny))


def adapter_to_merge(source: str, revision: str | None, adapter: str) -> dict[str, Any] | None:
    """`adapter_settings`, where `adapter` is "merge".

    Raises:
        InputError: it is an adapter, and to be refused.
    """
    check_source(source)
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


def _read_checkpoint(
    source: str, revision: str | None, dtype: str, task: str, trust_remote_code: bool, attention: str
) -> Any:
    settings = read_configuration(source, revision, task, trust_remote_code)
    try:
        model, loaded = AUTO[task].from_pretrained(
            source, config=settings, revision=revision or "main", dtype=getattr(torch, dtype), use_safetensors=True,
            trust_remote_code=trust_remote_code, output_loading_info=True, **attention_option(attention),
        )  # fmt: skip
    except SafetensorError as error:
        raise _damaged(source, error) from None
    except ImportError as error:
        raise needs_package(source, error) from None
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{source}: no model can be loaded from it: {error}") from None
    if loaded["missing_keys"]:
        raise InputError(
            f"{source}: the checkpoint has no weights for {sorted(loaded['missing_keys'])}, which would be random; "
            f"is its task {task}?"
        )
    return model


def attention_option(attention: str) -> dict[str, str]:
    """What `compute.attention` says to transformers."""
    return {} if attention == "auto" else {"attn_implementation": attention}


def needs_package(source: str, error: ImportError) -> InputError:
    """What is told of a model that asks for a package that is not installed, often one for its attention."""
    reason = " ".join(str(error).split())
    return InputError(
        f"{source}: it asks for a package that is not installed ({reason}); install it, or, if it is for the "
        "attention, choose another with compute.attention: sdpa (or eager)"
    )


def check_source(source: str) -> None:
    """Refuse what is meant as a folder and is none, before a hub is asked for it.

    Raises:
        InputError: the path is absolute, leads through folders that are there, or has too many parts for a hub's id.
    """
    path = Path(source)
    through = path.parent != Path(".") and path.parent.is_dir()
    if not path.exists() and (path.is_absolute() or source.startswith(".") or source.count("/") > 1 or through):
        raise InputError(f"{source}: no such folder; name a checkpoint's folder, or a model of the hub (owner/name)")


def read_configuration(source: str, revision: str | None, task: str, trust_remote_code: bool) -> Any:
    """A checkpoint's configuration.

    Raises:
        InputError: there is none, it needs code of its own that is not to be run, its weights are quantized, or it is
            of an encoder-decoder, or of no model for the task.
    """
    check_source(source)
    try:
        settings = transformers.AutoConfig.from_pretrained(
            source, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except Exception as error:  # of many kinds, as a file contradicts itself
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{source}: the model is defined by code that comes with it (auto_map in config.json); read that code, "
                "then set compute.trust_remote_code: true to run it"
            ) from None
        raise InputError(
            f"{source}: no configuration of a model can be read here ({' '.join(str(error).split())}); "
            "give a folder with its config.json"
        ) from None
    if (quantized := getattr(settings, "quantization_config", None)) is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
        name = getattr(method, "value", method)
        raise InputError(
            f"{source}: its weights are quantized ({name}), and influence is computed with whole ones; name the "
            "checkpoint that it was made from, or save it dequantized"
        )
    if settings.is_encoder_decoder:
        raise InputError(
            f"{source}: {settings.model_type} is an encoder-decoder; msif takes decoders, which continue a text, and "
            "classifiers that are one stack of layers"
        )
    mapped = type(settings) in AUTO[task]._model_mapping
    if not mapped and not (trust_remote_code and hasattr(settings, "auto_map")):
        kind = "language model that continues a text" if task == "causal_lm" else "classifier of texts"
        raise InputError(f"{source}: transformers has no {kind} of type {settings.model_type!r}; name another model")
    return settings


def _damaged(source: str, error: SafetensorError) -> InputError:
    return InputError(f"{source}: its weights are damaged ({error}); copy or save them again")


def freeze(model: nn.Module, tf32: bool = False) -> nn.Module:
    """Evaluation mode, and no parameter asks for a gradient: weight gradients are never formed.

    `tf32` stays with the model, as its device and dtype do, and says how its passes multiply.
    """
    model.tf32 = tf32  # type: ignore[assignment]
    experts.install(model)
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
