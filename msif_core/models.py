"""A stage's model, and the linear maps of it that are tracked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.utils import cached_file, find_adapter_config_file

from msif_core import experts, storage
from msif_core.checkpoint_cache import while_files_stay
from msif_core.errors import InputError

if TYPE_CHECKING:
    pass


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
