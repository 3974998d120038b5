"""One forward and one activation backward; (a_t, d_t) of every tracked map, weight gradients never formed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import RLock
from typing import Any

import torch
from torch import nn

from msif_core import products
from msif_core.batching import IGNORED, Batch
from msif_core.errors import InputError
from msif_core.losses import Loss
from msif_core.models import TrackedMap

Consume = Callable[[TrackedMap, torch.Tensor, torch.Tensor], None]

PASS = RLock()
"""Held during a pass: threads of one process share a stage's model, and hooks would see each other's passes."""


def capture(model: Any, maps: list[TrackedMap], batch: Batch, loss: Loss, consume: Consume) -> None:
    """Run `batch` and hand each map's inputs and output gradients to `consume`, during the backward.

    `consume(map, a, d)` gets a [N, T, d_in] (with a final 1 for a bias; on an accelerator then zeros up to
    `products.width(d_in)`) and d [N, T, G, b], the gradient of the summed loss with respect to the map's
    output. Rows of `a` are zero at padding, and in a causal model at the positions from the last target on; d is zero
    there by itself, and wherever else no target depends on the map's output.
    Maps of one input group get the same tensor `a`. Both are freed when they have been consumed. A map that reads
    one vector a sequence (a pooler, a head) has T = 1. Products within, the consumer's too, are as `model.tf32` says.
    The graph starts at the first of `maps`: what comes before is run without one, and not gone back through.

    Raises:
        InputError: a map is called twice in one forward, so that its gradient is not one outer product, or on
            something else than [N, T, features] (the experts of a mixture), or does not reach the loss, or reads
            another tensor than the maps of its input group.
    """
    counted = counted_positions(model, batch)
    inputs: dict[str, torch.Tensor] = {}
    shared: dict[str, torch.Tensor] = {}
    waiting = Counter(m.input_group for m in maps)
    called: set[str] = set()
    read: dict[str, Any] = {}

    def forward_hook(tracked: TrackedMap) -> Callable[..., torch.Tensor]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            if tracked.name in called:
                raise InputError(f"{tracked.name}: called twice in one forward pass; leave it out of curvature.include")
            called.add(tracked.name)
            a = args[0].detach()
            a = a[:, None] if a.ndim == 2 else a
            if a.ndim != 3 or a.shape[0] != len(batch.rows) or a.shape[1] not in (1, batch.input_ids.shape[1]):
                raise InputError(
                    f"{tracked.name}: reads a tensor of shape {list(args[0].shape)}, not [sequences, tokens, features] "
                    f"of {list(batch.input_ids.shape)}; leave it out of curvature.include"
                )
            memory = (a.data_ptr(), a.shape, a.stride())  # not the tensor, which is freed when it is consumed
            if memory != read.setdefault(tracked.input_group, memory):
                raise InputError(
                    f"{tracked.name}: reads another input than the maps that it shares one with elsewhere; leave it "
                    "out of curvature.include"
                )
            inputs[tracked.name] = a
            if not output.requires_grad:  # all parameters are frozen; a copy, as a leaf may not be written to
                output = output.requires_grad_().clone()
            output.register_hook(lambda gradient: backward_hook(tracked, gradient))
            return output

        return hook

    def backward_hook(tracked: TrackedMap, gradient: torch.Tensor) -> None:
        a, group = inputs.pop(tracked.name), tracked.input_group
        if group not in shared:
            shared[group] = map_inputs(a, counted, tracked.bias)
        a = shared[group]
        waiting[group] -= 1
        if not waiting[group]:
            del shared[group]
        gradient = gradient[:, None] if gradient.ndim == 2 else gradient
        consume(tracked, a, tracked.blocks(gradient))

    with PASS, precision(getattr(model, "tf32", False)), ExitStack() as hooks, torch.enable_grad():
        for tracked in maps:
            hooks.callback(model.get_submodule(tracked.name).register_forward_hook(forward_hook(tracked)).remove)
        total = loss(forward(model, batch), batch)
        if total.requires_grad:
            total.backward()
        if inputs or len(called) < len(maps):
            lost = inputs or {m.name for m in maps} - called
            raise InputError(f"{next(iter(lost))}: does not reach the loss; leave it out of curvature.include")


@contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """Take float32 matrix products in TF32, where the device has it, or whole. torch has one setting for a process."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def forward(model: Any, batch: Batch) -> Any:
    """The model's outputs on a batch, without a cache of keys and values.

    A decoder with a classification head finds a sequence's last token by its own padding id: use that.

    Raises:
        InputError: such a decoder has no padding id, and the batch has more than one sequence.
    """
    config = model.config
    input_ids = batch.input_ids
    if is_classifier(model) and config.pad_token_id is not None:
        input_ids = input_ids.masked_fill(batch.attention_mask == 0, config.pad_token_id)
    elif is_classifier(model) and len(batch.rows) > 1:
        raise InputError(
            f"{config.name_or_path}: a classifier without a padding token; set pad_token_id in config.json"
        )
    options = {"use_cache": False} if getattr(config, "use_cache", None) is not None else {}
    with PASS:
        return model(input_ids=input_ids, attention_mask=batch.attention_mask, **options)


def counted_positions(model: nn.Module, batch: Batch) -> torch.Tensor | None:
    """[N, T, 1] mask of the positions that a target depends on; None where all count.

    Classifiers see every unpadded position, causal language models those before their last target.
    """
    if is_classifier(model):
        mask = batch.attention_mask.bool()
    else:
        position = torch.arange(batch.labels.shape[1], device=batch.labels.device)
        last = ((batch.labels != IGNORED) * position).amax(dim=1, keepdim=True)
        mask = batch.attention_mask.bool() & (position < last)
    return None if bool(mask.all()) else mask[..., None]


def map_inputs(a: torch.Tensor, counted: torch.Tensor | None, bias: bool) -> torch.Tensor:
    """Inputs [N, T, d], with a coordinate of one for a bias, that are zero where `counted` [N, T, 1] is not set.

    Of `products.width` columns.
    """
    d = a.shape[-1]
    mask = None if counted is None or a.shape[1] != counted.shape[1] else counted.to(a.dtype)
    width = products.width(d + bias, a.device)
    if width == d:
        return a if mask is None else a * mask
    mask = a.new_ones(1) if mask is None else mask
    out = a.new_empty(*a.shape[:-1], width)
    torch.mul(a, mask, out=out[..., :d])
    out[..., d:] = 0
    if bias:
        out[..., d : d + 1] = mask
    return out


def is_classifier(model: nn.Module) -> bool:
    """Whether the model has a sequence classification head."""
    return type(model).__name__.endswith("ForSequenceClassification")
