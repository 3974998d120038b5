"""Captured gradients against brute force: autograd's gradients of every parameter of a model of any class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from msif_core import experts
from msif_core.batching import IGNORED, Batch, Sequences, batches, sequence_fingerprint
from msif_core.forward import forward
from msif_core.losses import target_loss
from msif_core.models import freeze
from msif_core.module_calls import is_linear
from msif_core.scoring import query_gradients
from msif_core.tracking import TrackedMap

ROOMY = 10_000


@dataclass(frozen=True)
class Comparison:
    """How far a small model's captured gradients are from autograd's.

    Attributes:
        maps: number of tracked maps.
        unreached: maps without a gradient.
        logits: of the model with msif's code for experts beside its own, relative to the largest.
        gradients: of each sequence's gradient, captured in a padded batch, beside autograd's of the sequence alone,
            relative to the largest entry of the map's; the worst map.
        later: of logits when a later token changes; not zero where the model is not causal.
        missing: linear maps with a gradient that are not tracked.
    """

    maps: int
    unreached: int
    logits: float
    gradients: float
    later: float
    missing: tuple[str, ...]


def compare(model: Any, maps: list[TrackedMap], sequences: Sequences, batch_tokens: int = ROOMY) -> Comparison:
    """Compare a model's captured gradients of a few sequences with autograd's; freezes the model."""
    (batch,) = batches(sequences, ROOMY)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    kept = batch.attention_mask.bool()
    with torch.no_grad():
        own = forward(model, batch).logits[kept]
        later = _later(model, batch)
        freeze(model)
        ours = forward(model, batch).logits[kept]
    single = [next(batches(sequences.take([i]), ROOMY)) for i in range(len(sequences))]
    alone = [parameter_gradients(model, one) for one in single]
    found = query_gradients(model, maps, sequences, batch_tokens, task="causal_lm")
    worst, unreached = 0.0, 0
    for m in maps:
        expected = torch.stack([map_gradient(model, m, gradients) for gradients in alone])
        scale = expected.abs().max()
        unreached += not scale
        worst = _worse(worst, float((found[m.name] - expected).abs().max() / scale.clamp_min(1e-30)))
    return Comparison(
        maps=len(maps),
        unreached=unreached,
        logits=float((own - ours).abs().max() / own.abs().max()),
        gradients=worst,
        later=later,
        missing=tuple(_missing(model, maps, alone[0])),
    )


def _worse(one: float, other: float) -> float:
    """The larger; not a number where one is none."""
    return other if other != other or other > one else one


def _later(model: Any, batch: Batch) -> float:
    """How far the first row's logits move when its last token changes, but for its own."""
    length = int(batch.attention_mask[0].sum())
    ids = batch.input_ids[:1, :length]
    changed = ids.clone()
    changed[0, -1] = changed[0, -1] % (int(model.get_input_embeddings().weight.shape[0]) - 2) + 1
    one = [Batch(x, x, torch.ones_like(x), batch.fingerprints[:1], batch.rows[:1]) for x in (ids, changed)]
    before, after = (forward(model, b).logits[0, : length - 1] for b in one)
    return float((before - after).abs().max() / before.abs().max())


def parameter_gradients(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """Autograd's gradient of the summed loss by every parameter, zero where there is none."""
    named = dict(model.named_parameters(remove_duplicate=False))
    for parameter in named.values():
        parameter.requires_grad_(True)
    loss = target_loss("causal_lm")(forward(model, batch), batch)
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    for parameter in named.values():
        parameter.requires_grad_(False)
    pairs = zip(named.items(), gradients, strict=True)
    return {name: torch.zeros_like(p) if gradient is None else gradient for (name, p), gradient in pairs}


def map_gradient(model: nn.Module, m: TrackedMap, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    """The map's part of the gradients of all parameters, as [G, b, d_in]."""
    if m.expert is None:
        weight, bias = gradients[f"{m.name}.weight"], gradients.get(f"{m.name}.bias")
        weight = weight.mT if isinstance(model.get_submodule(m.name), Conv1D) else weight
    else:
        stacks = experts.stacks_of(model.get_submodule(m.expert.module))
        stack = next(s for s in stacks if s.parameter == m.expert.parameter)
        weight = gradients[f"{m.expert.module}.{stack.parameter}"]
        weight = weight.view(stack.count, -1, weight.shape[1]) if weight.ndim == 2 else weight
        weight = weight[m.expert.number].mT if stack.transposed else weight[m.expert.number]
        bias = gradients[f"{m.expert.module}.{stack.bias}"][m.expert.number] if stack.bias else None
    full = weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)
    return full[m.blocks(torch.arange(m.d_out)).flatten()].reshape(m.shape)


def _missing(model: Any, maps: list[TrackedMap], gradients: dict[str, torch.Tensor]) -> list[str]:
    weights = {id(model.get_submodule(m.name).weight) for m in maps if m.expert is None}
    weights |= {id(p) for p in model.get_output_embeddings().parameters()}
    return [
        name
        for name, module in model.named_modules()
        if is_linear(module) and id(module.weight) not in weights and gradients[f"{name}.weight"].any()
    ]


def random_sequences(count: int, vocabulary: int, seed: int = 0) -> Sequences:
    """Random sequences of unequal lengths; the first two tokens and the last one carry no label."""
    generator = np.random.default_rng(seed)
    ids = [generator.integers(3, vocabulary, generator.integers(5, 11)).astype(np.int32) for _ in range(count)]
    labels = [np.concatenate([[IGNORED] * 2, x[2:-1], [IGNORED]]).astype(np.int32) for x in ids]
    fingerprints = [sequence_fingerprint(i, t) for i, t in zip(ids, labels, strict=True)]
    return Sequences(ids, labels, fingerprints, [f"doc{i}" for i in range(count)], np.arange(count, dtype=np.int64))
