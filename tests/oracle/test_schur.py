"""A new head's Schur complement (benchmarks.schur) against the joint matrix of body and head, inverted whole."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks.families import label_losses, with_head
from benchmarks.new_head import fisher_rows
from benchmarks.schur import Curvature, Gradients, NewHead
from msif_core.config import CurvatureSettings
from msif_core.curvature.factors import MapFactors
from msif_core.models import freeze
from msif_core.tracking import tracked_maps
from tests.conftest import make_model, make_sequences
from tests.oracle import dense

SHAPES = {"first": (2, 2, 3), "second": (1, 3, 2)}
ROWS, COUNT, HEAD, QUERIES = 12, 4, 5, 3
DAMPING, HEAD_DAMPING = 0.3, 0.7
GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def orthogonal(*shape: int) -> torch.Tensor:
    return torch.linalg.qr(normal(*shape))[0]


def flat(found: Gradients) -> torch.Tensor:
    return torch.cat([value.flatten(1) for value in found.values()], 1)


@pytest.fixture(scope="module")
def head() -> NewHead:
    """Its head's rows depend on the body's, or there would be nothing to follow."""
    body = {name: normal(ROWS, *shape) for name, shape in SHAPES.items()}
    return NewHead(body, flat(body)[:, :HEAD] + normal(ROWS, HEAD), COUNT, DAMPING, HEAD_DAMPING)


@pytest.fixture(scope="module")
def curvature(head: NewHead) -> Curvature:
    """EK-FAC of the rows in some eigenbases."""
    found = {}
    for name, (groups, block, d_in) in SHAPES.items():
        Q_A, Q_S = orthogonal(d_in, d_in), orthogonal(groups, block, block)
        squares = MapFactors(Q_A, Q_S, torch.empty(0)).rotate(head.body[name]).square().sum(0) / COUNT
        found[name] = MapFactors(Q_A, Q_S, squares)
    return found


@pytest.fixture(scope="module")
def queries() -> tuple[Gradients, torch.Tensor]:
    return {name: normal(QUERIES, *shape) for name, shape in SHAPES.items()}, normal(QUERIES, HEAD)


def ek_fac(curvature: Curvature) -> torch.Tensor:
    """Its matrix over all maps."""
    return torch.block_diag(*(block for f in curvature.values() for block in dense.matrix(f)))


def springs(curvature: Curvature) -> torch.Tensor:
    """alpha of every coordinate of the body."""
    levels = [DAMPING * f.eigenvalues.mean((-2, -1)) for f in curvature.values()]
    return torch.cat(
        [level.repeat_interleave(f.eigenvalues[0].numel()) for level, f in zip(levels, curvature.values(), strict=True)]
    )


def joint(H_tt: torch.Tensor, head: NewHead, alpha: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """The body's part of A (H + A)^-1 V, all written out."""
    H_tp, H_pp = flat(head.body).T @ head.head / COUNT, head.head.T @ head.head / COUNT
    beta = HEAD_DAMPING * H_pp.trace() / HEAD
    H = torch.cat([torch.cat([H_tt, H_tp], 1), torch.cat([H_tp.T, H_pp], 1)])
    A = torch.cat([alpha, beta.expand(HEAD)])
    return torch.linalg.solve(H + A.diag(), V.T).T[:, : len(alpha)] * alpha


def test_the_whole_fisher_equals_the_joint_inverse(
    head: NewHead, curvature: Curvature, queries: tuple[Gradients, torch.Tensor]
) -> None:
    g_t, g_p = queries
    alpha, G = springs(curvature), flat(head.body)
    H_tt = G.T @ G / COUNT
    kept = joint(H_tt, head, alpha, torch.cat([flat(g_t), g_p], 1))
    torch.testing.assert_close(flat(head.exactly(curvature, g_t, g_p)), kept)
    dropped = alpha * torch.linalg.solve(H_tt + alpha.diag(), flat(g_t).T).T
    torch.testing.assert_close(flat(head.exactly(curvature, g_t, None)), dropped)
    assert (kept - dropped).norm() > 0.1 * dropped.norm()


def test_correction_and_woodbury_equal_the_joint_inverse(
    head: NewHead, curvature: Curvature, queries: tuple[Gradients, torch.Tensor]
) -> None:
    g_t, g_p = queries
    expected = joint(ek_fac(curvature), head, springs(curvature), torch.cat([flat(g_t), g_p], 1))
    found, _ = head.through(curvature, head.corrected(g_t, g_p), jointly=True)
    torch.testing.assert_close(flat(found), expected)


def test_each_map_alone_is_a_body_of_one_map(
    head: NewHead, curvature: Curvature, queries: tuple[Gradients, torch.Tensor]
) -> None:
    g_t, _ = queries
    found, least = head.through(curvature, g_t, jointly=False)
    least_of = []
    for name, f in curvature.items():
        one = dataclasses.replace(head, body={name: head.body[name]})
        expected = joint(
            ek_fac({name: f}), one, springs({name: f}),
            torch.cat([one.corrected({name: g_t[name]}, torch.zeros(QUERIES, HEAD).double())[name].flatten(1),
                       torch.zeros(QUERIES, HEAD).double()], 1),
        )  # fmt: skip
        torch.testing.assert_close(found[name].flatten(1), expected)
        D, C = ek_fac({name: f}) + springs({name: f}).diag(), one.cross[name].flatten(1)
        least_of.append(
            1 - torch.linalg.eigvals(torch.linalg.solve(head.head_curvature, C @ torch.linalg.solve(D, C.T))).real.max()
        )
    assert least == pytest.approx(float(min(least_of)))


def test_eigenvalues_less_what_the_head_takes(
    head: NewHead, curvature: Curvature, queries: tuple[Gradients, torch.Tensor]
) -> None:
    """The diagonal of Q^T (H_tt - C B^-1 C^T) Q, which is positive by itself where Lambda is of the same rows."""
    V, _ = queries
    found = head.in_eigenbasis(curvature, V)
    for name, f in curvature.items():
        for g in range(SHAPES[name][0]):
            rows, Q = head.body[name][:, g].flatten(1), torch.kron(f.Q_S[g].contiguous(), f.Q_A.contiguous())
            C = rows.T @ head.head / COUNT
            S = Q.T @ (rows.T @ rows / COUNT - C @ torch.linalg.solve(head.head_curvature, C.T)) @ Q
            assert float(S.diagonal().min()) > 0
            level = DAMPING * f.eigenvalues[g].mean()
            expected = V[name][:, g].flatten(1) @ Q @ (level / (S.diagonal() + level)).diag() @ Q.T
            torch.testing.assert_close(found[name][:, g].flatten(1), expected)


def test_rows_are_the_fisher_of_all_labels_and_a_head_is_put_on_a_body() -> None:
    language = make_model("gpt_neox")
    classifier = freeze(with_head(language, 3, 5).double())
    assert torch.equal(classifier.base_model.final_layer_norm.weight, language.base_model.final_layer_norm.weight)
    maps, sequences = tracked_maps(classifier, CurvatureSettings()), make_sequences(4, 3, "classification")
    found = fisher_rows(classifier, maps, sequences, 3)
    for row, ids in enumerate(sequences.input_ids):
        each = []
        for label in range(3):
            labels = np.full(len(ids), label)
            p = torch.exp(-dense.sequence_loss(classifier, ids, labels, "classification"))
            each.append(float(p) ** 0.5 * dense.gradients(classifier, maps, ids, labels, "classification")["score"])
        torch.testing.assert_close(found["score"][row::4], torch.stack(each), rtol=1e-5, atol=1e-7)
    relabelled = dataclasses.replace(sequences, labels=[np.full_like(row, 1) for row in sequences.labels])
    expected = [float(dense.sequence_loss(classifier, ids, [1], "classification")) for ids in sequences.input_ids]
    assert label_losses(classifier, relabelled) == pytest.approx(expected, rel=1e-6)
