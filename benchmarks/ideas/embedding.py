"""The token embedding tracked too: a linear map of one-hot inputs, whose Q_A is the identity."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.accuracy import DEFAULT
from benchmarks.ideas.subject import Idea, Subject
from msif_core.batching import Sequences, batches
from msif_core.evaluation.lds import FloatArray
from msif_core.evaluation.methods import Pool
from msif_core.losses import Loss, sampled_loss, target_loss


def embedding_ideas(subject: Subject) -> Iterator[Idea]:
    """Together with the other maps, and alone."""
    part = embedding_part(subject, subject.pool)
    yield "the token embedding tracked too", subject.subsets.score(part + subject.subsets.total(subject.filters))
    yield "the token embedding alone", subject.subsets.score(part)


def embedding_part(subject: Subject, pool: Pool, weights: FloatArray | None = None) -> FloatArray:
    """Its share of the summed influences, [M, Q], each sequence's multiplied by its weight."""
    models = [pool.stages.model(name) for name in (pool.target, pool.last)]
    bases = []
    for model, sequences in zip(models, map(subject.sequences, (pool.target, pool.last)), strict=True):
        _, covariance = embedding_gradients(model, sequences, sampled_loss("causal_lm", 0))
        Q = torch.linalg.eigh(covariance.double()).eigenvectors.float()
        fresh, _ = embedding_gradients(model, sequences, sampled_loss("causal_lm", 1))
        bases.append((Q, (fresh @ Q).square().mean(0)))
    asked, _ = embedding_gradients(models[1], pool.queries.sequences, target_loss("causal_lm"))
    documents, _ = embedding_gradients(models[0], pool.sequences, target_loss("causal_lm"))
    (Q1, L1), (Q2, L2) = bases
    passed = (asked @ Q2 * (DEFAULT * L2.mean() / (L2 + DEFAULT * L2.mean()))) @ Q2.T
    filtered = (passed @ Q1 / (L1 + DEFAULT * L1.mean())) @ Q1.T
    masks = subject.masks if weights is None else subject.masks * torch.from_numpy(weights).float()
    return (masks @ documents.flatten(1) @ filtered.flatten(1).T).double().numpy()


def embedding_gradients(model: torch.nn.Module, sequences: Sequences, loss: Loss) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients [S, vocabulary, width] of the embedding's rows, and the sum of d d^T over tokens."""
    embed = model.get_input_embeddings()  # type: ignore[operator]
    vocabulary, width = embed.weight.shape
    found, covariance = torch.zeros(len(sequences), vocabulary, width), torch.zeros(width, width)
    for batch in batches(sequences, 4096):
        inputs = embed(batch.input_ids).detach().requires_grad_()
        outputs = model(inputs_embeds=inputs, attention_mask=batch.attention_mask, use_cache=False)
        (d,) = torch.autograd.grad(loss(outputs, batch), inputs)
        covariance += d.flatten(0, 1).T @ d.flatten(0, 1)
        rows = torch.zeros(len(batch.rows), vocabulary, width)
        found[torch.from_numpy(batch.rows)] = rows.scatter_add_(1, batch.input_ids[..., None].expand_as(d), d)
    return found, covariance
