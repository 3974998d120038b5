"""Lambda with the label's expectation enumerated: exactly the diagonal of the dense Gauss-Newton matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd.functional import jacobian as jacobian_of
from torch.func import functional_call

from msif_core.batching import IGNORED, Sequences, batches
from msif_core.capture import capture
from msif_core.config import CurvatureSettings
from msif_core.curvature.factors import MapFactors
from msif_core.curvature.fit import covariance_sums
from msif_core.curvature.gradients import RotatedGradients
from msif_core.losses import target_loss
from msif_core.rows import Rows
from msif_core.tracking import TrackedMap, tracked_maps
from tests import weights
from tests.conftest import make_model, make_sequences, task_of


def positions_of(sequences: Sequences, task: str) -> list[int]:
    labels = sequences.labels[0]
    return [0] if task == "classification" else [t for t in range(1, len(labels)) if labels[t] != IGNORED]


def probabilities(model: Any, sequences: Sequences, task: str) -> torch.Tensor:
    """Softmax at each target, [P, classes], by the definition of the shift."""
    ids = torch.from_numpy(sequences.input_ids[0].astype(np.int64))[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    chosen = logits if task == "classification" else logits[0, [t - 1 for t in positions_of(sequences, task)]]
    return chosen.softmax(-1)


def dense_gauss_newton(model: Any, m: TrackedMap, sequences: Sequences, task: str) -> torch.Tensor:
    """sum_t J_t^T (diag p - p p^T) J_t with J the Jacobian of the logits by the map's weight: [G, b d_in, b d_in]."""
    ids = torch.from_numpy(sequences.input_ids[0].astype(np.int64))[None]
    rows = [t - 1 for t in positions_of(sequences, task)]

    def logits(weight: torch.Tensor) -> torch.Tensor:  # weight [d_out, d_in], rows in the blocks' order
        found = functional_call(model, weights.put(model, m, weight), kwargs={"input_ids": ids}).logits
        return found if task == "classification" else found[0, rows]

    own = [model.get_parameter(name) for name in weights.names_of(model, m)]
    full = weights.of_map(model, m, own).reshape(m.d_out, m.d_in)
    jacobian = jacobian_of(logits, full.clone())  # [P, classes, d_out, d_in]
    jacobian = jacobian.reshape(*jacobian.shape[:2], m.groups, -1).permute(2, 0, 1, 3)
    p = probabilities(model, sequences, task)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("gpci,pce,gpej->gij", jacobian, middle, jacobian)


def enumerated_eigenvalues(
    model: Any, maps: list[TrackedMap], factors: dict[str, MapFactors], sequences: Sequences, task: str
) -> dict[str, torch.Tensor]:
    """The product's own capture and rotation on every (position, label), weighted by the label's probability."""
    found = {m.name: torch.zeros(m.shape, dtype=torch.float64) for m in maps}
    ids = sequences.input_ids[0]
    for position, p in zip(positions_of(sequences, task), probabilities(model, sequences, task), strict=True):
        labels = [np.full(len(ids), IGNORED, np.int32) for _ in p]
        for label, row in enumerate(labels):
            row[position] = label
        many = Sequences([ids] * len(p), labels, ["0"] * len(p), ["d"] * len(p), np.arange(len(p)))
        (batch,) = batches(many, 10_000)

        def consume(m: TrackedMap, captured: Rows, p: torch.Tensor = p) -> None:
            total = found[m.name].flatten(0, 1)
            for part, rows, rotated in RotatedGradients(factors, torch.float64).blocks(m, captured.a, captured.d):
                total[rows] += (p[part, None, None] * rotated.square()).sum(0)

        capture(model, maps, batch, target_loss(task), consume)
    return found


def fitted_bases(model: Any, maps: list[TrackedMap], task: str) -> dict[str, MapFactors]:
    sums = covariance_sums(model, maps, make_sequences(8, 5, task), task=task, seed=0, batch_tokens=1000)
    return {
        m.name: MapFactors(
            torch.linalg.eigh(sums[f"A/{m.input_group}"])[1], torch.linalg.eigh(sums[f"S/{m.name}"])[1], torch.empty(0)
        )
        for m in maps
    }


@pytest.mark.parametrize("split", ["projection", "head"])
def test_lambda_is_the_diagonal_of_the_dense_gauss_newton(architecture: str, split: Any) -> None:
    task = task_of(architecture)
    model = make_model(architecture)
    maps = tracked_maps(model, CurvatureSettings(qkv_split=split))
    sequences = make_sequences(1, task=task, lengths=(6, 7))
    factors = fitted_bases(model, maps, task)
    found = enumerated_eigenvalues(model, maps, factors, sequences, task)
    single = architecture in ("bloom", "llama", "mixtral")  # softmax and RMSNorm are in float32 in the model's own code
    for m in maps[: len(maps) // 2 + 1] + maps[-1:]:
        dense = dense_gauss_newton(model, m, sequences, task)
        for g in range(m.groups):
            Q = torch.kron(factors[m.name].Q_S[g].contiguous(), factors[m.name].Q_A.contiguous())
            diagonal = (Q.mT @ dense[g] @ Q).diagonal().reshape(m.shape[1:])
            scale = float(diagonal.max())
            torch.testing.assert_close(
                found[m.name][g], diagonal, rtol=1e-5 if single else 1e-8, atol=(1e-5 if single else 1e-10) * scale
            )
            assert float(found[m.name][g].sum()) == pytest.approx(float(dense[g].trace()), rel=1e-5 if single else 1e-9)
