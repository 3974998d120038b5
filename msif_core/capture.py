"""One forward and one activation backward; (a_t, d_t) of every tracked map, weight gradients never formed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from msif_core import experts
from msif_core.batching import IGNORED, Batch, Sequences, batches
from msif_core.errors import InputError
from msif_core.forward import PASS, forward, is_classifier
from msif_core.losses import Loss
from msif_core.rows import Rows, arrange, map_inputs, pack, positions
from msif_core.tracking import Expert, TrackedMap

Consume = Callable[[TrackedMap, Rows], None]


def batches_of(model: nn.Module, maps: list[TrackedMap], sequences: Sequences, batch_tokens: int) -> Iterator[Batch]:
    """The batches of a pass; one sequence at a time where a map mixes the rows of several in an unknown order."""
    mixed = any(m.layout is None and m.expert is None for m in maps)
    return batches(sequences, 0 if mixed else batch_tokens, next(model.parameters()).device)


def capture(model: Any, maps: list[TrackedMap], batch: Batch, loss: Loss, consume: Consume) -> None:
    """Run `batch` and hand each map's inputs and output gradients to `consume`, during the backward.

    `consume(map, rows)` gets a [N, R, d_in] (with a final 1 for a bias; on an accelerator then zeros up to
    `products.width(d_in)`) and d [N, R, G, b], the gradient of the summed loss with respect to the map's
    output. Rows of `a` are zero at padding, and in a causal model at the positions from the last target on; d is zero
    there by itself, and wherever else no target depends on the map's output.
    Maps of one input group get the same tensor `a`. Both are freed when they have been consumed. A map of which no
    target depends, such as an expert that no token was routed to, is not consumed. Products within, the consumer's too,
    are as `model.tf32` says. The graph starts at the first of `maps`: what comes before is run without one, and not
    gone back through.

    Raises:
        InputError: a map reads a tensor whose rows cannot be told apart by sequence, or another tensor than the maps of
            its input group.
    """
    state = _Pass(maps, batch, counted_positions(model, batch), consume)
    with PASS, precision(getattr(model, "tf32", False)), ExitStack() as hooks, torch.enable_grad():
        for tracked in maps:
            for name in () if tracked.expert else (tracked.name, *tracked.also):
                module = model.get_submodule(name)
                hooks.callback(module.register_forward_hook(state.hook(tracked)).remove)
        for name in {m.expert.module for m in maps if m.expert}:
            module = model.get_submodule(name)
            experts.watch(module, state.watch(name))
            hooks.callback(experts.watch, module, None)
        total = loss(forward(model, batch), batch)
        if total.requires_grad:
            total.backward()
        state.finish()


@dataclass
class _Call:
    """One call of a map: its inputs, arranged by sequence, until its gradient comes."""

    a: torch.Tensor
    mask: torch.Tensor | None
    tokens: torch.Tensor
    d: torch.Tensor | None = None


@dataclass
class _Pass:
    """What a pass over one batch has seen of each map, and not handed out yet."""

    maps: list[TrackedMap]
    batch: Batch
    counted: torch.Tensor | None
    consume: Consume
    calls: dict[str, list[_Call]] = field(default_factory=dict)
    shared: dict[str, torch.Tensor] = field(default_factory=dict)
    read: dict[tuple[str, int], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.waiting = Counter(m.input_group for m in self.maps)
        self.experts = {m.expert: m for m in self.maps if m.expert}

    def hook(self, tracked: TrackedMap) -> Callable[..., torch.Tensor]:
        """A forward hook on the module of a map."""

        def called(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            n, t = self.batch.input_ids.shape
            x = args[0].detach()
            a = arrange(x, tracked.layout, n, t)
            if a is None:
                raise InputError(
                    f"{tracked.name}: reads a tensor of shape {list(x.shape)}, whose rows cannot be told apart by "
                    f"sequence in a batch of {[n, t]}; set compute.batch_tokens: 1 to take one sequence at a time, or "
                    "leave it out of curvature.include"
                )
            tokens = positions(tracked.layout, a, n, t)
            mask = self._mask(tokens)
            if tokens is None:
                tokens = torch.zeros(a.shape[:2], dtype=torch.int64, device=a.device)
            call = _Call(a, mask, tokens)
            return self._add(tracked, call, x, output, lambda d: arrange(d, tracked.layout, n, t))

        return called

    def watch(self, module: str) -> experts.Watch:
        """What sees the rows of a module's experts."""

        def seen(
            parameter: str, number: int, x: torch.Tensor, tokens: torch.Tensor, output: torch.Tensor
        ) -> torch.Tensor:
            tracked = self.experts.get(Expert(module, parameter, number))
            if tracked is None:
                return output
            n, t = self.batch.input_ids.shape
            sequences, places, found = pack(tokens, n, t)

            def packed(rows: torch.Tensor) -> torch.Tensor:
                out = rows.new_zeros(*found.shape, rows.shape[-1])
                out[sequences, places] = rows
                return out

            filled = packed(tokens.new_ones(len(tokens), 1)).bool()
            mask = self._mask(found)
            call = _Call(packed(x.detach()), filled if mask is None else filled & mask, found)
            return self._add(tracked, call, x, output, packed)

        return seen

    def _mask(self, tokens: torch.Tensor | None) -> torch.Tensor | None:
        """Which rows of these tokens count, [N, R, 1]; None where all do, or it is not known."""
        if tokens is None or self.counted is None:
            return None
        return self.counted.gather(1, tokens)[..., None]

    def _add(
        self,
        tracked: TrackedMap,
        call: _Call,
        x: torch.Tensor,
        output: torch.Tensor,
        arranged: Callable[[torch.Tensor], torch.Tensor | None],
    ) -> torch.Tensor:
        """Keep the call until the gradient of its output comes; returns the output that goes on."""
        if not torch.is_grad_enabled():  # the model's own code leaves this call out of its gradient
            return output
        calls = self.calls.setdefault(tracked.name, [])
        # A guard, and no proof: not the tensor itself, as that is to be freed when it is consumed.
        memory = (x.data_ptr(), x.shape, x.stride())
        if memory != self.read.setdefault((tracked.input_group, len(calls)), memory):
            raise InputError(
                f"{tracked.name}: reads another input than the maps that it shares one with elsewhere; leave it "
                "out of curvature.include"
            )
        calls.append(call)
        if not output.requires_grad:  # all parameters are frozen; a copy, as a leaf may not be written to
            output = output.requires_grad_().clone()

        def went_back(gradient: torch.Tensor) -> None:
            call.d = arranged(gradient)
            if all(c.d is not None for c in self.calls[tracked.name]):
                self._hand_out(tracked)

        output.register_hook(went_back)
        return output

    def _hand_out(self, tracked: TrackedMap) -> None:
        calls, group = self.calls.pop(tracked.name), tracked.input_group
        if len(calls) == 1:
            if group not in self.shared:
                self.shared[group] = map_inputs(calls[0].a, calls[0].mask, tracked.bias)
            a, d, tokens = self.shared[group], calls[0].d, calls[0].tokens
        else:
            a = torch.cat([map_inputs(call.a, call.mask, tracked.bias) for call in calls], dim=1)
            d = torch.cat([call.d for call in calls if call.d is not None], dim=1)
            tokens = torch.cat([call.tokens for call in calls], dim=1)
        self.waiting[group] -= 1
        if not self.waiting[group]:
            self.shared.pop(group, None)
        assert d is not None, "a map is handed out when its gradient is there"
        self.consume(tracked, Rows(a, tracked.blocks(d), tokens))

    def finish(self) -> None:
        """Hand out the maps of which only some calls reach the loss."""
        for tracked in self.maps:
            calls = [call for call in self.calls.get(tracked.name, []) if call.d is not None]
            if calls:
                self.calls[tracked.name] = calls
                self._hand_out(tracked)


@contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """Take float32 matrix products in TF32, where the device has it, or whole. torch has one setting for a process."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def counted_positions(model: nn.Module, batch: Batch) -> torch.Tensor | None:
    """[N, T] mask of the positions that a target depends on; None where all count.

    Classifiers see every unpadded position, causal language models those before their last target.
    """
    if is_classifier(model):
        mask = batch.attention_mask.bool()
    else:
        position = torch.arange(batch.labels.shape[1], device=batch.labels.device)
        last = ((batch.labels != IGNORED) * position).amax(dim=1, keepdim=True)
        mask = batch.attention_mask.bool() & (position < last)
    return None if bool(mask.all()) else mask
