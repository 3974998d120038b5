"""The corrected eigenvalues against a dense Gauss-Newton matrix; labels and masks."""

import numpy as np
import pytest
import torch

from msif_core import batching, losses, tracking
from msif_core.capture import capture
from msif_core.config import CurvatureSettings
from msif_core.curvature import fit
from msif_core.curvature.factors import MapFactors
from tests.conftest import VOCAB, make_model, make_sequences, task_of, tolerance
from tests.oracle import dense

COPIES = 4000


def enumerated(model, maps, factors, ids, labels, task):
    """Diagonal of the Gauss-Newton block in the eigenbasis: the label's expectation written out."""
    found = {m.name: torch.zeros(m.shape, dtype=torch.float64) for m in maps}
    positions = [0] if task == "classification" else [t for t in range(1, len(ids)) if labels[t] != batching.IGNORED]
    classes = 3 if task == "classification" else VOCAB
    for position in positions:
        for label in range(classes):
            only = np.full(len(ids), batching.IGNORED)
            only[position] = label
            with torch.no_grad():
                p = torch.exp(-dense.sequence_loss(model, ids, only, task))
            for name, G in dense.gradients(model, maps, ids, only, task).items():
                found[name] += p * factors[name].rotate(G) ** 2
    return found


def random_bases(maps):
    """Some orthonormal bases for each input group and each map."""

    def basis(*shape):
        return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64))[0]

    inputs = {m.input_group: basis(m.d_in, m.d_in) for m in maps}
    return {
        m.name: MapFactors(inputs[m.input_group], basis(m.groups, m.shape[1], m.shape[1]), torch.empty(0)) for m in maps
    }


def test_sampled_eigenvalues_converge_to_the_dense_gauss_newton(architecture):
    task = task_of(architecture)
    model = make_model(architecture)
    maps = tracking.tracked_maps(model, CurvatureSettings())
    factors = random_bases(maps)
    one = make_sequences(1, task=task)
    expected = enumerated(model, maps, factors, one.input_ids[0], one.labels[0], task)
    copies = batching.Sequences(
        one.input_ids * COPIES, one.labels * COPIES, [f"{i:016x}" for i in range(COPIES)],
        one.document_ids * COPIES, np.arange(COPIES),
    )  # fmt: skip
    sums = fit.eigenvalue_sums(model, maps, factors, copies, task=task, seed=0, batch_tokens=4096)
    for m in maps:
        mean = sums[m.name] / COPIES
        assert float(mean.sum()) == pytest.approx(float(expected[m.name].sum()), rel=0.06)
        large = expected[m.name] > expected[m.name].mean()
        if not large.any():  # an expert that no token was routed to
            continue
        torch.testing.assert_close(mean[large], expected[m.name][large], rtol=0.35, atol=0)
        assert float((mean[large] / expected[m.name][large]).mean()) == pytest.approx(1.0, abs=0.06)


def test_sampled_labels_do_not_depend_on_the_batch():
    model = make_model("gpt_neox")
    maps = tracking.tracked_maps(model, CurvatureSettings())
    sequences, factors = make_sequences(9), random_bases(maps)
    one = fit.eigenvalue_sums(model, maps, factors, sequences, task="causal_lm", seed=3, batch_tokens=1)
    many = fit.eigenvalue_sums(model, maps, factors, sequences, task="causal_lm", seed=3, batch_tokens=1000)
    turned = fit.eigenvalue_sums(
        model, maps, factors, sequences.take(list(range(8, -1, -1))), task="causal_lm", seed=3, batch_tokens=20
    )
    other = fit.eigenvalue_sums(model, maps, factors, sequences, task="causal_lm", seed=4, batch_tokens=1000)
    for name in one:
        torch.testing.assert_close(one[name], many[name])
        torch.testing.assert_close(one[name], turned[name])
        assert not torch.allclose(one[name], other[name], rtol=1e-3)


@pytest.mark.parametrize("split", ["none", "projection", "head"])
def test_covariances_equal_sums_over_real_tokens(architecture, split):
    """Padding and what follows the last target count nowhere, in whatever batch."""
    task = task_of(architecture)
    model = make_model(architecture)
    maps = tracking.tracked_maps(model, CurvatureSettings(qkv_split=split))
    sequences = make_sequences(7, task=task)
    one = fit.covariance_sums(model, maps, sequences, task=task, seed=0, batch_tokens=1)
    many = fit.covariance_sums(model, maps, sequences, task=task, seed=0, batch_tokens=1000)
    for key in one:
        torch.testing.assert_close(one[key], many[key], **tolerance(architecture, rtol=1e-7, atol=1e-7))
    bias = next((m for m in maps if m.bias and "pooler" not in m.name and "classifier" not in m.name), None)
    if bias is not None:  # the homogeneous coordinate counts the tokens
        last = [int(np.flatnonzero(row != batching.IGNORED)[-1]) for row in sequences.labels]
        tokens = sum(last) if task == "causal_lm" else sum(len(ids) for ids in sequences.input_ids)
        assert float(one[f"A/{bias.input_group}"][-1, -1]) == tokens


def test_covariances_count_the_tokens_whose_gradient_is_not_zero(architecture):
    """Behind the last attention a prompt's tokens reach no target; of maps that share an input, one reached will do."""
    task = task_of(architecture)
    model = make_model(architecture)
    maps = tracking.tracked_maps(model, CurvatureSettings())
    sequences = make_sequences(5, task=task, lengths=(8, 12), prompt=6)
    inputs, reached = {}, {}

    def consume(tracked, rows):
        group = tracked.input_group
        inputs[group] = rows.a[..., : tracked.d_in]
        reached[group] = reached.get(group, False) | (rows.d != 0).flatten(2).any(-1)

    capture(model, maps, next(batching.batches(sequences, 1000)), losses.sampled_loss(task, 0), consume)
    sums = fit.covariance_sums(model, maps, sequences, task=task, seed=0, batch_tokens=1000)
    for group, a in inputs.items():
        rows = a[reached[group]]
        torch.testing.assert_close(sums[f"A/{group}"], rows.T @ rows)
    per_token = [int(found.sum()) for found in reached.values() if found.shape[1] > 1]
    assert min(per_token) < max(per_token), "not every token reaches every map"


def test_a_position_without_label_keeps_none():
    model = make_model("gpt_neox")
    sequences = make_sequences(1, lengths=(7, 8), prompt=3)
    batch = next(batching.batches(sequences, 100))
    logits = torch.zeros(1, batch.input_ids.shape[1], VOCAB, dtype=torch.float64, requires_grad=True)
    losses.sampled_loss("causal_lm", 0)(type("O", (), {"logits": logits}), batch).backward()
    touched = logits.grad.abs().sum(-1)[0] > 0
    assert touched.tolist() == [False, False, True, True, True, False, False]
    assert model is not None


def test_blocks_of_the_fused_map_are_the_architectures_queries_keys_and_values():
    """GPT-NeoX and BLOOM interleave by head: reading [Q | K | V] would be wrong, and this would see it."""
    for architecture, heads in (("gpt_neox", 2), ("bloom", 2)):
        model = make_model(architecture)
        fused = next(m for m in tracking.tracked_maps(model, CurvatureSettings()) if "query_key_value" in m.name)
        rows = fused.blocks(torch.arange(fused.d_out)).view(3, heads, -1)
        assert rows[0, 0].tolist() == [0, 1, 2, 3]
        assert rows[1, 0].tolist() == [4, 5, 6, 7]
        assert rows[0, 1].tolist() == [12, 13, 14, 15]
