"""A tracked map's weight among a model's parameters, whatever module or mixture of experts holds it."""

from __future__ import annotations

from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from msif_core import experts
from msif_core.tracking import TrackedMap


def names_of(model: Any, m: TrackedMap) -> list[str]:
    """Names of the parameters that hold the map's weight and, where it has one, its bias."""
    if m.expert is None:
        return [f"{m.name}.weight"] + [f"{m.name}.bias"] * m.bias
    stack = _stack(model, m)
    return [f"{m.expert.module}.{name}" for name in (stack.parameter, stack.bias) if name]


def of_map(model: Any, m: TrackedMap, tensors: list[torch.Tensor]) -> torch.Tensor:
    """The map's own part of its parameters, or of what has their shapes, with its rows in blocks: [G, b, d_in]."""
    weight, *bias = tensors
    if m.expert is not None:
        weight = weight.view(_stack(model, m).count, -1, weight.shape[-1])[m.expert.number]
        bias = [b[m.expert.number] for b in bias]
    if _transposed(model, m):
        weight = weight.mT
    full = torch.cat([weight, bias[0][:, None]], dim=1) if m.bias else weight
    return full[m.blocks(torch.arange(m.d_out)).flatten()].reshape(m.shape)


def put(model: Any, m: TrackedMap, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    """The model's parameters, by name, with the map's weight replaced by `matrix` [G, b, d_in]."""
    rows = matrix.reshape(m.d_out, m.d_in)
    plain = torch.empty_like(rows).index_copy(0, m.blocks(torch.arange(m.d_out)).flatten(), rows)
    weight, bias = plain[:, : m.d_in - m.bias], plain[:, -1]
    found = [weight.mT if _transposed(model, m) else weight] + [bias] * m.bias
    names = names_of(model, m)
    if m.expert is None:
        return dict(zip(names, found, strict=True))
    whole = {name: model.get_parameter(name) for name in names}
    number = torch.tensor([m.expert.number])
    return {name: whole[name].index_copy(0, number, own[None]) for name, own in zip(names, found, strict=True)}


def _stack(model: Any, m: TrackedMap) -> experts.Stack:
    assert m.expert is not None
    stacks = experts.stacks_of(model.get_submodule(m.expert.module))
    return next(stack for stack in stacks if stack.parameter == m.expert.parameter)


def _transposed(model: Any, m: TrackedMap) -> bool:
    if m.expert is not None:
        return _stack(model, m).transposed
    return isinstance(model.get_submodule(m.name), Conv1D)
