"""Tail-patch: does one more gradient step on the retrieved documents lower the query's loss?

After TrackStar (arXiv 2410.17413). It compares methods by what their documents do to the model, with no
gold labels; only the documents differ between methods, not the step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many

import numpy as np
import numpy.typing as npt
import torch

from msif_core.batching import Sequences, batches
from msif_core.errors import InputError
from msif_core.losses import target_losses

FloatArray = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]


def _silent(done: int, total: int) -> None:
    """The progress callback of those who want none."""


def tail_patch(
    model: torch.nn.Module,
    queries: Sequences,
    retrieved: Mapping[str, Many[Sequences]],
    learning_rate: float,
    batch_tokens: int = 4096,
    task: str = "causal_lm",
    progress: Progress = _silent,
) -> dict[str, FloatArray]:
    """Change of each query's summed loss after one step of gradient descent on its documents.

    The step is taken on the mean loss per target token of the query's documents, in all parameters, on a
    copy of `model`, which is put back exactly before the next; `model` itself is not touched.

    Args:
        model: the last stage's model.
        queries: the Q queries, in its tokens.
        retrieved: method to the documents it ranks first (ten of them, say) for each of the Q queries.
        learning_rate: of the one step.
        batch_tokens: padded tokens in a batch.
        task: causal_lm or classification.
        progress: called with (steps done, steps in all).

    Returns:
        Method to changes [Q]; below zero, the documents taught the model the query. NaN where a method
        retrieved nothing.

    Raises:
        InputError: a method does not answer every query.
    """
    for method, documents in retrieved.items():
        if len(documents) != len(queries):
            raise InputError(f"tail-patch: {method} has documents for {len(documents)} of {len(queries)} queries")
    patched = copy.deepcopy(model).requires_grad_(True).eval()
    before = [summed_loss(model, queries.take([row]), batch_tokens, task) for row in range(len(queries))]
    changes = {method: np.full(len(queries), np.nan) for method in retrieved}
    done, total = 0, len(queries) * len(retrieved)
    for method, documents in retrieved.items():
        for row, sequences in enumerate(documents):
            if len(sequences):
                descend(patched, sequences, learning_rate, batch_tokens, task)
                changes[method][row] = summed_loss(patched, queries.take([row]), batch_tokens, task) - before[row]
                restore(patched, model)
            done += 1
            progress(done, total)
    return changes


def descend(model: torch.nn.Module, sequences: Sequences, learning_rate: float, batch_tokens: int, task: str) -> None:
    """One step of gradient descent, in place, on the mean loss per target token."""
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    skipped = 0 if task == "classification" else 1
    targets = sum(int((labels[skipped:] >= 0).sum()) for labels in sequences.labels)
    for batch in batches(sequences, batch_tokens, parameters[0].device):
        outputs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        loss = target_losses(outputs, batch, task).sum()
        for sum_, gradient in zip(total, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if gradient is not None:
                sum_.add_(gradient)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, total, strict=True):
            parameter.sub_(gradient, alpha=learning_rate / max(1, targets))


@torch.no_grad()
def restore(patched: torch.nn.Module, model: torch.nn.Module) -> None:
    """Give `patched` the exact values of `model`."""
    for mine, original in zip(patched.parameters(), model.parameters(), strict=True):
        mine.copy_(original)


@torch.no_grad()
def summed_loss(model: torch.nn.Module, sequences: Sequences, batch_tokens: int, task: str) -> float:
    """Summed loss of all targets."""
    device = next(model.parameters()).device
    return sum(
        float(target_losses(model(input_ids=b.input_ids, attention_mask=b.attention_mask), b, task).sum())
        for b in batches(sequences, batch_tokens, device)
    )
