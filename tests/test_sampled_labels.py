"""Labels drawn from the model: by its softmax, and the same in every batch and process."""

from __future__ import annotations

import numpy as np
import torch

from msif_core.batching import IGNORED, batches
from msif_core.forward import forward
from msif_core.losses import draw_labels, sampled_loss
from msif_core.randomness import uniforms
from tests.conftest import make_model, make_sequences


def test_sampled_labels_follow_the_softmax() -> None:
    logits = torch.log(torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)).expand(1, 20_000, 3)
    targets = torch.zeros(1, 20_000, dtype=torch.long)
    targets[0, ::2] = IGNORED
    drawn = draw_labels(logits, targets, torch.from_numpy(uniforms(["00000000000000ff"], 20_000, 1)))
    assert (drawn[0, ::2] == IGNORED).all()
    counts = torch.bincount(drawn[0, 1::2], minlength=3) / 10_000
    torch.testing.assert_close(counts, torch.tensor([0.1, 0.2, 0.7]), atol=0.02, rtol=0)
    edge = draw_labels(logits[:, :3], targets[:, 1:2].expand(1, 3), torch.tensor([[0.0, 0.0999, 1 - 2**-53]]).double())
    assert edge.tolist() == [[0, 0, 2]]


def test_uniforms_are_keyed_by_seed_fingerprint_and_position() -> None:
    one = uniforms(["00000000000000ff", "ffffffffffffffff"], 50, 1)
    assert np.array_equal(uniforms(["ffffffffffffffff"], 20, 1)[0], one[1, :20])
    assert len(np.unique(np.concatenate([one.ravel(), uniforms(["00000000000000ff"], 50, 2).ravel()]))) == 150
    assert ((one >= 0) & (one < 1)).all()


def test_sampled_loss_is_repeatable() -> None:
    model = make_model("gpt_neox")
    batch = next(iter(batches(make_sequences(3), 10_000)))
    outputs = forward(model, batch)
    assert sampled_loss("causal_lm", 1)(outputs, batch) == sampled_loss("causal_lm", 1)(outputs, batch)
    assert sampled_loss("causal_lm", 1)(outputs, batch) != sampled_loss("causal_lm", 2)(outputs, batch)
