"""Train a stage: the demo's tokenizer and model, and the full-parameter loop that retraining uses too.

The objective is the mean loss per target token of a batch of sequences. Batches, order and
initialisation depend on the seed alone. A checkpoint is a folder that stands whole or not at all;
`training.json` in it says how it was made.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from msif_core import storage
from msif_core.batching import IGNORED, Batch, Sequences, batches
from msif_core.config import Training
from msif_core.errors import InputError
from msif_core.losses import target_losses

END, PAD = "<|endoftext|>", "<|pad|>"
RECORD = "training.json"
BUCKET = 32
"""Batches whose sequences are sorted by length together: less padding, still a random order."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Architecture:
    """Size of a GPT-NeoX trained from nothing."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    positions: int = 256


def _silent(done: int, total: int) -> None:
    """The progress callback of those who want none."""


def train_tokenizer(texts: Iterable[str], vocabulary: int = 4096) -> Any:
    """A byte-level BPE tokenizer (it encodes every text) with an end and a padding token."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=PAD)


def new_model(tokenizer: Any, architecture: Architecture | None = None, seed: int = 0) -> torch.nn.Module:
    """A freshly initialised GPT-NeoX with an untied head; leaves torch's global generator as it was."""
    size = architecture or Architecture()
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden,
        max_position_embeddings=size.positions,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPTNeoXForCausalLM(config)


def learning_rates(settings: Training, steps: int) -> list[float]:
    """Linear warm-up, then a cosine down to a tenth of the peak: one rate a step."""
    warmup = max(1, round(settings.warmup * steps))
    rates = []
    for step in range(steps):
        if step < warmup:
            share = (step + 1) / warmup
        else:
            share = 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
        rates.append(settings.learning_rate * share)
    return rates


def step_rows(lengths: np.ndarray, settings: Training) -> Iterator[np.ndarray]:
    """Rows of each optimizer step: every epoch a new random order, with like lengths side by side."""
    generator = np.random.default_rng(settings.seed)
    size, left = settings.batch_size, step_count(len(lengths), settings)
    while left:
        order = generator.permutation(len(lengths))
        steps = []
        for start in range(0, len(order), size * BUCKET):
            bucket = order[start : start + size * BUCKET]
            bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
            steps += [bucket[i : i + size] for i in range(0, len(bucket), size)]
        for index in generator.permutation(len(steps))[:left]:
            left -= 1
            yield steps[index]


def step_count(sequences: int, settings: Training) -> int:
    """Optimizer steps that the recipe takes."""
    return max(1, math.ceil(settings.epochs * math.ceil(sequences / settings.batch_size)))


def train_stage(
    init: str | Path | torch.nn.Module,
    sequences: Sequences,
    out: Path,
    settings: Training,
    tokenizer: Any = None,
    progress: Progress = _silent,
    device: str = "cpu",
) -> Path:
    """Train all parameters from `init` on `sequences` and save the checkpoint to the folder `out`.

    A checkpoint already made from the same start, data and recipe is kept.

    Args:
        init: a module (trained in place) or a checkpoint.
        sequences: tokens and labels; -100 is no loss.
        out: the checkpoint's folder, replaced whole.
        settings: the recipe.
        tokenizer: saved beside the weights.
        progress: called with (steps done, steps in all).
        device: where to train.

    Raises:
        InputError: there is nothing to train on, or the loss is not finite.
    """
    if not len(sequences):
        raise InputError(f"{out}: no sequence to train on")
    model = init if isinstance(init, torch.nn.Module) else _load(init)
    key = storage.fingerprint(weights_digest(model), sequences.fingerprints, settings.model_dump())
    record = out / RECORD
    if record.exists() and storage.read_json(record)["fingerprint"] == key:
        progress(1, 1)
        return out
    losses, rates = optimize(model.to(device), sequences, settings, progress)
    _save(model, tokenizer, out, {
        "fingerprint": key, "settings": settings.model_dump(), "steps": len(rates),
        "learning_rate_sum": sum(rates), "sequences": len(sequences), "losses": losses,
        "objective": "mean over target tokens", "per_token_mean": True,
    })  # fmt: skip
    return out


def mean_token_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Mean loss of the batch's target tokens; logits are computed at the positions that have one.

    Padding stands on the right, where a causal model never looks: no attention mask is needed.
    """
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False)[0]
    targets = batch.labels[:, 1:]
    kept = targets != IGNORED
    logits = model.get_output_embeddings()(hidden[:, :-1][kept])
    return torch.nn.functional.cross_entropy(logits.float(), targets[kept], reduction="sum") / max(1, int(kept.sum()))


def optimize(
    model: torch.nn.Module,
    sequences: Sequences,
    settings: Training,
    progress: Progress = _silent,
    batch_loss: Callable[[Any, Batch], torch.Tensor] = mean_token_loss,
) -> tuple[list[float], list[float]]:
    """Run the recipe on `model` in place; returns each step's loss (per token) and learning rate."""
    device = next(model.parameters()).device
    rates = learning_rates(settings, step_count(len(sequences), settings))
    optimizer = _optimizer(model, settings)
    reduced = reduced_precision(device)
    lengths = np.array([len(ids) for ids in sequences.input_ids])
    losses: list[float] = []
    model.train().requires_grad_(True)
    for step, rows in enumerate(step_rows(lengths, settings)):
        (batch,) = batches(sequences.take(rows), 2**62, device)
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=reduced):
            loss = batch_loss(model, batch)
        if not torch.isfinite(loss):
            raise InputError(f"training: the loss of step {step} is {loss.item()}; lower learning_rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(round(loss.item(), 5))
        progress(step + 1, len(rates))
    model.eval()
    return losses, rates


@torch.no_grad()
def sequence_losses(
    model: torch.nn.Module, sequences: Sequences, batch_tokens: int = 4096
) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss and number of target tokens of each sequence: float64 [N], int64 [N]."""
    device = next(model.parameters()).device
    sums, counts = np.zeros(len(sequences)), np.zeros(len(sequences), dtype=np.int64)
    for batch in batches(sequences, batch_tokens, device):
        outputs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        sums[batch.rows] = target_losses(outputs, batch, "causal_lm").double().cpu().numpy()
        counts[batch.rows] = (batch.labels[:, 1:] >= 0).sum(1).cpu().numpy()
    return sums, counts


def reduced_precision(device: torch.device) -> bool:
    """Whether to autocast to bfloat16: on GPUs; on a CPU models of the demo's size are faster without."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def weights_digest(model: torch.nn.Module) -> str:
    """16 hex digits over names and values of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _optimizer(model: torch.nn.Module, settings: Training) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)


def _load(source: str | Path) -> torch.nn.Module:
    """A private copy, in float32, of a checkpoint in safetensors."""
    return AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.float32, use_safetensors=True)


def _save(model: Any, tokenizer: Any, out: Path, record: dict[str, Any]) -> None:
    """Write the folder whole, then let it take the place of the one before."""
    replacement = out.with_name(f".tmp-{os.getpid()}-new-{out.name}")
    shutil.rmtree(replacement, ignore_errors=True)  # of a process with this number that was killed
    with storage.atomic_folder(replacement) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        storage.write_json(temporary / RECORD, record)
    if out.exists():
        old = out.with_name(f".tmp-{os.getpid()}-old-{out.name}")
        os.replace(out, old)
        shutil.rmtree(old, ignore_errors=True)
    os.replace(replacement, out)
