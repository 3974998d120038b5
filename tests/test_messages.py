"""What ranks tell one another, taken apart and put together without them; drills of test_sharded.py send it."""

from __future__ import annotations

import torch

from msif_core import messages
from msif_core.curvature.factors import MapFactors


def test_tensors_are_sent_once_and_beside_the_message() -> None:
    shared = torch.randn(300, 300)
    message = (
        "eigenvalue_sums",
        {"a": MapFactors(shared, torch.randn(1, 3, 3).mT, torch.empty(0)), "b": [shared, torch.tensor(2.5)]},
        {"narrow": torch.randn(4, 5).bfloat16(), "which": torch.tensor([True, False]), "seed": 3},
    )
    data, tensors = messages.pack(message)
    assert len(data) < 3_000
    assert len(tensors) == 6
    sent = iter([messages._bytes(tensor).clone() for tensor in tensors])
    name, factors, keywords = messages.unpack(data, lambda tensor: messages._bytes(tensor).copy_(next(sent)))
    assert next(sent, None) is None
    assert (name, keywords["seed"]) == ("eigenvalue_sums", 3)
    assert factors["a"].Q_A is factors["b"][0]
    for found, expected in (
        (factors["a"].Q_A, shared),
        (factors["a"].Q_S, message[1]["a"].Q_S),  # type: ignore[union-attr]
        (factors["b"][1], torch.tensor(2.5)),
        (keywords["narrow"], message[2]["narrow"]),
        (keywords["which"], message[2]["which"]),
    ):
        assert torch.equal(found, expected)
