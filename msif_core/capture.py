"""One forward and one activation backward; (a_t, d_t) of every tracked map, weight gradients never formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from msif_core.batching import IGNORED, Batch
from msif_core.errors import InputError
from msif_core.losses import Loss
from msif_core.models import TrackedMap

Consume = Callable[[TrackedMap, torch.Tensor, torch.Tensor], None]


def capture(model: Any, maps: list[TrackedMap], batch: Batch, loss: Loss, consume: Consume) -> None:
    """Run `batch` and hand each map's inputs and output gradients to `consume`, during the backward.

    `consume(map, a, d)` gets a [N, T, d_in] (with a final 1 for a bias) and d [N, T, G, b], the gradient of
    the summed loss with respect to the map's output. Rows of `a` that no target depends on are zero:
    padding, and in a causal model the positions from the last target on; d is zero there by itself.
    Both are freed when `consume` returns.

    Raises:
        InputError: a map is called twice in one forward, so that its gradient is not one outer product.
    """
    counted = counted_positions(model, batch)
    inputs: dict[str, torch.Tensor] = {}
    handles = [model.get_input_embeddings().register_forward_hook(_require_grad)]

    def forward_hook(tracked: TrackedMap) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if tracked.name in inputs:
                raise InputError(f"{tracked.name}: called twice in one forward pass; leave it out of curvature.include")
            inputs[tracked.name] = args[0].detach()
            output.register_hook(lambda gradient: backward_hook(tracked, gradient))

        return hook

    def backward_hook(tracked: TrackedMap, gradient: torch.Tensor) -> None:
        a = inputs.pop(tracked.name)
        if tracked.bias:
            a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1)
        if counted is not None:
            a = a * counted.to(a.dtype)
        if tracked.permutation is not None:
            gradient = gradient[..., torch.as_tensor(tracked.permutation, device=gradient.device)]
        consume(tracked, a, gradient.unflatten(-1, tracked.shape[:2]))

    try:
        for tracked in maps:
            handles.append(model.get_submodule(tracked.name).register_forward_hook(forward_hook(tracked)))
        with torch.enable_grad():
            outputs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **no_cache(model))
            loss(outputs, batch).backward()
    finally:
        for handle in handles:
            handle.remove()


def no_cache(model: nn.Module) -> dict[str, bool]:
    """Arguments that keep a decoder from storing keys and values for generation."""
    return {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}


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


def is_classifier(model: nn.Module) -> bool:
    """Whether the model has a sequence classification head."""
    return type(model).__name__.endswith("ForSequenceClassification")


def _require_grad(_module: nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor:
    """The graph starts at the embedding's output: all parameters are frozen."""
    return output.requires_grad_()
