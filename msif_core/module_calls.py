"""What each linear module reads when a model runs: how its rows belong to sequences, and who reads the same tensor.

Two short runs of different sizes tell. On a model without weights they compute shapes alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.fx.experimental import _config as meta
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from msif_core import experts
from msif_core.batching import whole_batch
from msif_core.forward import forward

ASKING = {getattr(torch.Tensor, f"__{name}__") for name in ("bool", "int", "float", "index")}
ASKING |= {torch.Tensor.item, torch.Tensor.tolist}
"""Functions of a tensor whose results are values."""

Layout = tuple[str | int, ...]
"""The axes of a module's input but for the last: "N" sequences, "T" tokens, "NT" both in one, or a fixed number."""

TOKENS: Layout = ("N", "T")

SIZES = ((2, 5), (3, 7))
"""Sequences and tokens of the two runs; no size of one is the other's, nor their product."""


@dataclass(frozen=True)
class Calls:
    """A module's calls in one run.

    Attributes:
        layout: the axes of its input, the same in every call; None where they are not known.
        inputs: a number for the tensor of each call: those of one tensor have one number.
    """

    layout: Layout | None
    inputs: tuple[int, ...]


ModuleCalls = dict[str, Calls]
"""By name, the linear modules that are called."""

_known: WeakKeyDictionary[nn.Module, ModuleCalls | None] = WeakKeyDictionary()


def module_calls(model: Any) -> ModuleCalls | None:
    """The calls of the model's linear modules on a text; None where it cannot be run on such a short one."""
    if model not in _known:
        _known[model] = _observe(model)
    return _known[model]


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes W x + b, and no more.

    A class made from `nn.Linear` may do something else (a router that chooses, weights that are rounded): it is tried.
    """
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    tried = copy.copy(module)
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*shape, generator=generator) for shape in ((3, 2), (3,), (4, 2)))
    tried._parameters = {"weight": nn.Parameter(weight), "bias": None if module.bias is None else nn.Parameter(bias)}
    expected = nn.functional.linear(x, weight, None if module.bias is None else bias)
    try:
        with torch.no_grad():
            return torch.allclose(tried(x), expected)
    except Exception:  # of many kinds: it is no such map
        return False


def _observe(model: Any) -> ModuleCalls | None:
    experts.install(model)
    try:
        first, second = (run(model, count, length) for count, length in SIZES)
    except Exception:  # a model's own code raises what it likes, and then nothing is known of its calls
        return None
    found = {}
    for name, calls in first.items():
        other = second.get(name, [])
        layouts = {_layout(a, b) for (a, _), (b, _) in zip(calls, other, strict=False)} or {None}
        same = len(calls) == len(other) and len(layouts) == 1
        found[name] = Calls(layouts.pop() if same else None, tuple(tensor for _, tensor in calls))
    return found


def run(model: Any, count: int, length: int) -> dict[str, list[tuple[torch.Size, int]]]:
    """Shape and tensor of every call of each linear module, in a run on `count` texts of `length` tokens."""
    found: dict[str, list[tuple[torch.Size, int]]] = {}
    kept: list[torch.Tensor] = []  # a tensor that is gone could lend its place to another

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], _output: Any) -> None:
            kept.append(args[0])
            found.setdefault(name, []).append((args[0].shape[:-1], id(args[0])))

        return hook

    linear = [(name, m) for name, m in model.named_modules() if is_linear(m)]
    hooks = [module.register_forward_hook(note(name)) for name, module in linear]
    device = next(model.parameters()).device
    ids = torch.ones(count, length, dtype=torch.int64, device=device)
    batch = whole_batch(ids)
    training = model.training
    model.eval()  # as passes are
    try:
        with torch.no_grad(), _Answers(), meta.patch(meta_nonzero_assume_all_nonzero=True):  # type: ignore[attr-defined]
            forward(model, batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return found


class _Answers(TorchFunctionMode):
    """Ones for the values of tensors without any: most models ask whether their attention mask is set everywhere.

    The same for places that are not zero is a setting of torch.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ASKING and args[0].is_meta:
            ones: Any = torch.ones(args[0].shape, dtype=args[0].dtype, device="cpu")
            return func(ones)
        return func(*args, **(kwargs or {}))


def _layout(first: torch.Size, second: torch.Size) -> Layout | None:
    """The axes that have these sizes in the two runs."""
    if len(first) != len(second):
        return None
    axes = tuple(_axis(a, b) for a, b in zip(first, second, strict=True))
    belongs = [axis for axis in axes if axis in ("N", "NT")]
    return axes if None not in axes and len(belongs) == 1 else None  # type: ignore[return-value]


def _axis(first: int, second: int) -> str | int | None:
    (n, t), (m, s) = SIZES
    named = {(n, m): "N", (t, s): "T", (n * t, m * s): "NT"}
    return named.get((first, second), first if first == second else None)
