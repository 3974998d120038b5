"""Sums of target losses: with the given labels, or with labels drawn from the model's own softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from msif_core.batching import IGNORED, Batch
from msif_core.randomness import uniforms

CHUNK_ENTRIES = 1 << 24
"""Softmax entries held in float64 at one time."""

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
    """-log p of each target [N, P] under logits [N, P, V], in float32 or better; 0 where ignored."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    flat = torch.nn.functional.cross_entropy(
        wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view_as(targets)


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
    rows, columns = torch.nonzero(targets != IGNORED, as_tuple=True)
    for part in torch.arange(len(rows), device=rows.device).split(max(1, CHUNK_ENTRIES // logits.shape[-1])):
        at = rows[part], columns[part]
        cumulative = logits[at].softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
        label = torch.searchsorted(cumulative, u[at][:, None], right=True).squeeze(-1)
        drawn[at] = label.clamp_(max=logits.shape[-1] - 1)
    return drawn
