"""Dense mathematics to check against: autograd's gradients, explicit matrices, explicit inverses."""

import torch

from msif_core.batching import IGNORED
from tests import weights


def sequence_loss(model, ids, labels, task):
    """Summed negative log-likelihood, written out position by position."""
    logits = model(input_ids=torch.tensor(ids)[None].long(), attention_mask=torch.ones(1, len(ids)).long()).logits
    if task == "classification":
        return -logits[0].log_softmax(-1)[int(labels[0])]
    total = logits.new_zeros(())
    for position in range(1, len(ids)):
        if labels[position] != IGNORED:
            total = total - logits[0, position - 1].log_softmax(-1)[int(labels[position])]
    return total


def gradients(model, maps, ids, labels, task):
    """Each map's weight gradient by autograd on the parameters, as [G, b, d_in]."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    sequence_loss(model, ids, labels, task).backward()
    found = {}
    for m in maps:
        own = [model.get_parameter(name).grad for name in weights.names_of(model, m)]
        found[m.name] = weights.of_map(model, m, own).clone() if own[0] is not None else torch.zeros(m.shape).double()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return found


def matrix(factors):
    """Q diag(Lambda) Q^T of each block, [G, b*d_in, b*d_in], for row-major vectorised gradients."""
    blocks = []
    for g in range(factors.Q_S.shape[0]):
        Q = torch.kron(factors.Q_S[g].contiguous(), factors.Q_A.contiguous())
        blocks.append(Q @ torch.diag(factors.eigenvalues[g].flatten()) @ Q.T)
    return torch.stack(blocks)


def damped_solve(H, V, damping, mean=None):
    """(H + damping mean I)^-1 V by a dense solve, and the damping used; V [Q, G, b, d_in].

    The mean eigenvalue is that of each block, or the one given.
    """
    flat = V.flatten(2)
    level = damping * (H.diagonal(dim1=-2, dim2=-1).mean(-1) if mean is None else mean.flatten())
    A = H + level[:, None, None] * torch.eye(H.shape[-1], dtype=H.dtype)
    solved = torch.linalg.solve(A, flat.permute(1, 2, 0)).permute(2, 0, 1)
    return solved.reshape(V.shape), level[None, :, None, None]
