"""Sums of target losses: with the given labels, or with labels drawn from the model's own softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from msif_core.batching import IGNORED, Batch
from msif_core.randomness import uniforms

CHUNK_ENTRIES = 1 << 24
"""Softmax entries of which copies are held at one time."""

CACHED_ENTRIES = 1 << 18
"""The same on a CPU, where they stay in its cache: labels are drawn in a quarter of the time."""

Loss = Callable[[Any, Batch], torch.Tensor]


def logits_and_targets(outputs: Any, batch: Batch, task: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, P, V] paired with targets [N, P].

    A causal model's logits at position t pair with the label at t + 1 (the last position with none: moving
    the small labels leaves the large logits uncopied); a classifier has one position, whose label is the
    first of its row.
    """
    if task == "classification":
        return outputs.logits[:, None], batch.labels[:, :1]
    return outputs.logits, torch.nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)


def negative_log_likelihoods(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p of each target [N, P] under logits [N, P, V], in float32 or better; 0 where ignored.

    The backward spoils the logits: their gradient takes their place.
    """
    flat: torch.Tensor = _CrossEntropy.apply(logits.flatten(0, 1), targets.flatten())  # type: ignore[no-untyped-call]
    return flat.view_as(targets)


class _CrossEntropy(torch.autograd.Function):
    """-log p of each target [R] under logits [R, V].

    In blocks, and the gradient where the logits were: no other tensor of their size is held. torch's own function
    keeps the log-probabilities and the gradient too, and of a bfloat16 model float32 copies of all three.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        tops, norms = logits.amax(dim=1).to(wide), logits.new_empty(len(logits), dtype=wide)
        parts = (x.split(block_rows(logits)) for x in (logits, tops[:, None], norms))
        for own, top, norm in zip(*parts, strict=True):
            torch.sum((own - top).exp_(), dim=1, out=norm).log_()
        ctx.save_for_backward(logits, targets, tops, norms)
        chosen = logits.gather(1, targets.clamp_min(0)[:, None])[:, 0]
        return torch.where(targets == IGNORED, 0, norms - (chosen - tops))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, tops, norms = ctx.saved_tensors
        scale = gradient.where(targets != IGNORED, 0)
        by_row = (x[:, None] for x in (targets.clamp_min(0), tops, norms, scale))
        parts = (x.split(block_rows(logits)) for x in (logits, *by_row))
        for own, target, top, norm, g in zip(*parts, strict=True):
            p = (own - top).sub_(norm).exp_().mul_(g)
            own.copy_(p.scatter_add_(1, target, -g))
        return logits, None


def block_rows(logits: torch.Tensor) -> int:
    """How many rows of logits [..., V] are copied at one time."""
    return max(1, (CACHED_ENTRIES if logits.device.type == "cpu" else CHUNK_ENTRIES) // logits.shape[-1])


def target_losses(outputs: Any, batch: Batch, task: str) -> torch.Tensor:
    """Summed negative log-likelihood of each sequence's targets: [N]."""
    logits, targets = logits_and_targets(outputs, batch, task)
    return negative_log_likelihoods(logits, targets).sum(dim=1)


def target_loss(task: str) -> Loss:
    """The loss that training minimised, summed over the batch."""
    return lambda outputs, batch: target_losses(outputs, batch, task).sum()


def sampled_loss(task: str, seed: int) -> Loss:
    """The loss on labels sampled from the model's softmax: its gradients have the true Fisher as covariance.

    A position whose label is -100 keeps no label.
    """

    def loss(outputs: Any, batch: Batch) -> torch.Tensor:
        logits, targets = logits_and_targets(outputs, batch, task)
        u = torch.from_numpy(uniforms(batch.fingerprints, targets.shape[1], seed)).to(logits.device)
        drawn = draw_labels(logits.detach(), targets, u)
        return negative_log_likelihoods(logits, drawn).sum()

    return loss


def draw_labels(logits: torch.Tensor, targets: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Labels [N, P] from the softmax of logits [N, P, V] by the inverse of its distribution function at u [N, P].

    Only positions with a target are drawn for; the others stay ignored.
    """
    drawn = targets.clone()
    places = torch.nonzero(targets != IGNORED)
    for some in places.split(block_rows(logits)):
        at = some.unbind(dim=1)
        cumulative = logits[at].softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
        label = torch.searchsorted(cumulative, u[at][:, None], right=True).squeeze(-1)
        drawn[at] = label.clamp_(max=logits.shape[-1] - 1)
    return drawn
