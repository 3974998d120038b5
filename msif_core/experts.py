"""The experts of a mixture: linear maps that share one parameter, each applied to the tokens routed to it.

No hook of torch sees what one expert reads. So the modules run the code below, which hands every expert's inputs and
outputs to whoever watches them (`capture`); a token reaches an expert's row by its number in the batch, sequence after
sequence. It is the computation of the modules' own code, expert by expert, in any dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "msif"
"""Under which transformers knows `run_experts`."""

Watch = Callable[[str, int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(parameter, expert, inputs [n, d_in], tokens [n], outputs [n, d_out]) to the outputs that go on."""


@dataclass(frozen=True)
class Stack:
    """The experts' maps in one parameter of a module.

    Attributes:
        parameter: its name in the module, [count, d_out, d_in], or [count, d_in, d_out] where `transposed`; a matrix
            of two axes holds the experts one below the other.
        bias: name of the parameter [count, d_out], None without.
        reads: name shared by the stacks of a module that read the same inputs.
    """

    parameter: str
    count: int
    d_in: int
    d_out: int
    transposed: bool
    bias: str | None
    reads: str


def stacks_of(module: nn.Module) -> list[Stack]:
    """The stacks of a module that holds experts; none of any other module."""
    kind = type(module).__name__
    if kind == "JetMoeParallelExperts":
        return [_stack(module, "weight", module.num_experts, False)]  # type: ignore[arg-type]
    if kind == "DbrxExperts":
        return [_dbrx_stack(module, name) for name in ("mlp.w1", "mlp.v1", "mlp.w2")]
    if kind == "LongcatFlashExperts":
        names = ("gate_up_proj", "down_proj") if module.num_routed_experts else ()
        return [_stack(module, name, module.num_routed_experts, False) for name in names]  # type: ignore[arg-type]
    if kind == "Llama4TextExperts":
        return [_stack(module, name, module.num_experts, True) for name in ("gate_up_proj", "down_proj")]  # type: ignore[arg-type]
    if not _dispatched(module):
        return []
    transposed: bool = module.is_transposed  # type: ignore[assignment]
    return [_stack(module, name, module.num_experts, transposed) for name in (_first(module), "down_proj")]  # type: ignore[arg-type]


def _dispatched(module: nn.Module) -> bool:
    """Whether transformers lets the module's computation be replaced (`use_experts_implementation`)."""
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "_apply_gate", "num_experts"))


def _first(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _stack(module: nn.Module, name: str, count: int, transposed: bool) -> Stack:
    d_out, d_in = attrgetter(name)(module).shape[1:]
    if transposed:
        d_out, d_in = d_in, d_out
    bias = f"{name}_bias" if getattr(module, "has_bias", False) else None
    return Stack(name, count, int(d_in), int(d_out), transposed, bias, name)


def _dbrx_stack(module: Any, name: str) -> Stack:
    width, hidden = module.ffn_hidden_size, module.hidden_size
    down = name == "mlp.w2"
    d_in, d_out = (width, hidden) if down else (hidden, width)
    return Stack(name, module.num_experts, d_in, d_out, down, None, name if down else "mlp.w1+v1")


def routed_share(config: Any, count: int) -> float:
    """Share of the tokens that one of `count` experts gets, if all get as many; 1 where it is not known."""
    names = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_selected_experts")
    chosen = next((getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)), count)
    return min(1.0, chosen / count)


def install(model: nn.Module) -> None:
    """Let the model's experts run by the code below; a second call changes nothing.

    It sets the experts' implementation in the configuration that the modules hold, or replaces their `forward`.
    """
    for module in model.modules():
        kind = type(module).__name__
        if kind in OWN:
            module.forward = MethodType(OWN[kind], module)
        elif kind == "JetMoeTopKGating":
            module.forward = MethodType(_jetmoe_router, module)
        elif _dispatched(module):
            module.config._experts_implementation = NAME  # type: ignore[union-attr]
    for parent in model.modules():
        if type(parent).__name__ in ("JetMoeMoE", "JetMoeMoA"):
            for stack in (parent.input_linear, parent.output_linear):
                object.__setattr__(stack, "router", parent.router)  # no submodule: it is its parent's


def watch(module: nn.Module, watched: Watch | None) -> None:
    """Hand the module's rows to `watched` from now on; None ends it."""
    module.__dict__["_watched"] = watched


def weight_of(module: nn.Module, stack: Stack, expert: int) -> torch.Tensor:
    """The expert's weight, [d_out, d_in]."""
    parameter: torch.Tensor = attrgetter(stack.parameter)(module)
    if parameter.ndim == 2:
        parameter = parameter.view(stack.count, -1, parameter.shape[1])
    return parameter[expert].mT if stack.transposed else parameter[expert]


def _apply(module: Any, stack: Stack, expert: int, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """One expert's map of its rows [n, d_in], which are those of `tokens` [n]: [n, d_out]."""
    bias = getattr(module, stack.bias)[expert] if stack.bias else None
    outputs = nn.functional.linear(rows, weight_of(module, stack, expert), bias)
    watched: Watch | None = module.__dict__.get("_watched")
    return outputs if watched is None else watched(stack.parameter, expert, rows, tokens, outputs)


def _routed(chosen: torch.Tensor, count: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Each expert that is chosen [tokens, k], with the places of its choices among all of them, in their order."""
    flat = chosen.reshape(-1)
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=count).cumsum(0).tolist()
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end > start:
            yield expert, order[start:end]


def _mixture(
    states: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    count: int,
    expert_of: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Sum of the chosen experts' outputs for states [tokens, d], each times its weight [tokens, k]."""
    result = torch.zeros_like(states)
    if states.is_meta:
        return result
    flat, k = weights.reshape(-1), chosen.shape[-1]
    for expert, places in _routed(chosen, count):
        tokens = places // k
        outputs = expert_of(expert, states[tokens], tokens) * flat[places, None]
        result.index_add_(0, tokens, outputs.to(result.dtype))
    return result


def run_experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Experts of the classes whose computation transformers lets be replaced."""
    up, down = stacks_of(self)

    def expert_of(expert: int, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        if expert >= self.num_experts:  # a choice that stands for no expert here
            return torch.zeros_like(rows)
        middle = _apply(self, up, expert, rows, tokens)
        middle = self._apply_gate(middle) if self.has_gate else self.act_fn(middle)
        outputs = _apply(self, down, expert, middle, tokens)
        return self.post_expert_norm(outputs) if self.has_post_expert_norm else outputs

    return _mixture(hidden_states, top_k_index, top_k_weights, self.num_experts, expert_of)


def _longcat(self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: Any) -> torch.Tensor:
    """Those of LongCat-Flash: choices beyond the experts leave a token as it is."""
    stacks = stacks_of(self)

    def expert_of(expert: int, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        if expert >= self.num_routed_experts:
            return rows
        gate, up = _apply(self, stacks[0], expert, rows, tokens).chunk(2, dim=-1)
        return _apply(self, stacks[1], expert, self.act_fn(gate) * up, tokens)

    return _mixture(hidden_states, top_k_index, top_k_weights, self.total_experts, expert_of)


def _dbrx(self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: Any) -> torch.Tensor:
    """Those of DBRX: three matrices, the experts one below the other."""
    gate, up, down = stacks_of(self)

    def expert_of(expert: int, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        middle = self.mlp.activation_fn(_apply(self, gate, expert, rows, tokens))
        return _apply(self, down, expert, middle * _apply(self, up, expert, rows, tokens), tokens)

    states = hidden_states.reshape(-1, self.hidden_size)
    found = _mixture(states, top_k_index, top_k_weights, self.num_experts, expert_of)
    return found.view(hidden_states.shape[0], -1, self.hidden_size)


def _llama4(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Those of Llama 4: every expert is given all tokens, zero where a token is not routed to it."""
    up, down = stacks_of(self)
    given = hidden_states.view(self.num_experts, -1, self.hidden_size)
    result = torch.zeros_like(given)
    if given.is_meta:
        return result.view_as(hidden_states)
    for expert, rows in enumerate(given):
        tokens = rows.any(dim=-1).nonzero().squeeze(-1)
        if len(tokens):
            first, second = _apply(self, up, expert, rows[tokens], tokens).chunk(2, dim=-1)
            outputs = _apply(self, down, expert, second * self.act_fn(first), tokens)
            result[expert].index_copy_(0, tokens, outputs)
    return result.view(-1, self.hidden_size)


def _jetmoe(self: Any, inputs: torch.Tensor, expert_size: list[int]) -> torch.Tensor:
    """Those of JetMoE: rows come sorted by expert; the router has noted their tokens."""
    (stack,) = stacks_of(self)
    if inputs.is_meta:
        return inputs.new_empty(len(inputs), stack.d_out)
    parts, tokens = inputs.split(expert_size), self.router.routed.split(expert_size)
    found = [
        _apply(self, stack, expert, rows, own)
        for expert, (rows, own) in enumerate(zip(parts, tokens, strict=True))
        if len(rows)
    ]
    return torch.cat(found)


def _jetmoe_router(self: Any, hidden_states: torch.Tensor) -> Any:
    """JetMoE's own router, which notes the token of each row that it routes."""
    found = type(self).forward(self, hidden_states)
    self.__dict__["routed"] = found[1]
    return found


OWN: dict[str, Callable[..., torch.Tensor]] = {
    "LongcatFlashExperts": _longcat,
    "DbrxExperts": _dbrx,
    "Llama4TextExperts": _llama4,
    "JetMoeParallelExperts": _jetmoe,
}
"""Classes that transformers does not let be replaced, and the code that stands in for theirs."""

ALL_EXPERTS_FUNCTIONS.register(NAME, run_experts)
