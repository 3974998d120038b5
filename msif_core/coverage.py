"""How much of a model its tracked maps are, and what the rest is."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from msif_core import experts
from msif_core.module_calls import SIZES, is_linear, module_calls, run
from msif_core.tracking import TrackedMap, output_embedding

UNREACHED = "no text reaches it"
LEFT_OUT = "left out by curvature.include"

LOW = 0.9
"""A share that is worth a warning."""


@dataclass(frozen=True)
class Untracked:
    """Parameters of one kind: their name with a star for each number, how many there are, and why they are left out."""

    name: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class Coverage:
    """The share of a model that is tracked.

    Attributes:
        tracked: parameters of the tracked maps, but for those of the head.
        parameters: all that a text reaches, outside embeddings and head.
        untracked: what is left out, embeddings and head aside, the largest first; what no text reaches too.
    """

    tracked: int
    parameters: int
    untracked: tuple[Untracked, ...]

    @property
    def share(self) -> float:
        """Tracked parameters among those that a text reaches."""
        return self.tracked / max(1, self.parameters)

    def told(self) -> str:
        """The share in one sentence, with the largest parts that are left out where it is low."""
        first = f"{self.tracked:,} of {self.parameters:,} parameters outside embeddings and head are tracked"
        if self.share >= LOW:
            return f"{first} ({self.share:.0%})"
        largest = [u for u in self.untracked if u.reason != UNREACHED][:3]
        rest = "; ".join(f"{u.name}, {u.parameters / self.parameters:.0%} ({u.reason})" for u in largest)
        return f"only {first} ({self.share:.0%}), and scores know nothing of the rest. Not tracked: {rest}"


def coverage_of(model: Any, maps: list[TrackedMap]) -> Coverage:
    """What `maps` are of the model. Embedding tables of any kind, and the head, are counted nowhere."""
    uses, calls, tracked, stacked = _uses(model), module_calls(model), _tracked(model, maps), _stacked(model)
    aside = _embeddings(model) | {number for number, use in (uses or {}).items() if use == "embedding"}
    left: Counter[tuple[str, str]] = Counter()
    covered = 0
    for name, parameter in model.named_parameters():
        if id(parameter) in aside:
            continue
        covered += tracked[id(parameter)]
        if rest := parameter.numel() - tracked[id(parameter)]:
            place = name.rpartition(".")[0]
            called, read = calls is None or place in calls, uses is None or id(parameter) in uses
            reason = _reason(parameter, model.get_submodule(place), called, read)
            if (all_experts := stacked.get(name)) is not None:
                reason = UNREACHED if tracked[id(parameter)] == all_experts else LEFT_OUT
            left[re.sub(r"\b\d+\b", "*", name), reason] += rest
    untracked = tuple(Untracked(name, count, reason) for (name, reason), count in left.most_common())
    return Coverage(covered, covered + sum(u.parameters for u in untracked if u.reason != UNREACHED), untracked)


def _tracked(model: nn.Module, maps: list[TrackedMap]) -> Counter[int]:
    """Tracked entries of each parameter, by its identity."""
    found: Counter[int] = Counter()
    for m in maps:
        if m.expert is None:
            weight, bias = f"{m.name}.weight", f"{m.name}.bias"
        else:
            weight = f"{m.expert.module}.{m.expert.parameter}"
            bias = f"{weight}_bias"
        found[id(model.get_parameter(weight))] += m.d_out * (m.d_in - m.bias)
        if m.bias:
            found[id(model.get_parameter(bias))] += m.d_out
    return found


def _stacked(model: nn.Module) -> dict[str, int]:
    """Entries of the experts in each parameter that holds some; without weights, no run tells that they are read."""
    found = {}
    for name, module in model.named_modules():
        for stack in experts.stacks_of(module):
            found[f"{name}.{stack.parameter}"] = stack.count * stack.d_out * stack.d_in
            if stack.bias:
                found[f"{name}.{stack.bias}"] = stack.count * stack.d_out
    return found


def _embeddings(model: Any) -> set[int]:
    """Identities of the parameters of embedding tables and of the head."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return {id(p) for module in (*tables, output_embedding(model)) if module is not None for p in module.parameters()}


def _reason(parameter: nn.Parameter, owner: nn.Module, called: bool, read: bool) -> str:
    if not read:
        return UNREACHED
    if isinstance(owner, nn.Linear | Conv1D) and called:
        return LEFT_OUT if is_linear(owner) else "does more than a linear map"
    if isinstance(owner, nn.modules.conv._ConvNd):
        return "convolution"
    return "norm, scale or bias" if parameter.ndim < 2 else "a matrix that no linear module applies"


def _uses(model: nn.Module) -> dict[int, str] | None:
    """The function of torch that first reads each parameter in a short run, by its identity; None without a run."""
    uses = _Uses()
    try:
        with uses:
            run(model, *SIZES[0])
    except Exception:  # of many kinds, as in `module_calls`
        return None
    return uses.found


class _Uses(TorchFunctionMode):
    """Notes the parameters that functions of torch are given."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ != "__get__":
            for x in (*args, *(kwargs or {}).values()):
                for y in x if isinstance(x, list | tuple) else (x,):
                    if isinstance(y, nn.Parameter):
                        self.found.setdefault(id(y), func.__name__)
        return func(*args, **(kwargs or {}))
