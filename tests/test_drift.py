"""The noise that drift is held against: halves of a sample, and what is expected of sums that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from msif_core import drift
from msif_core.batching import Sequences


def sequences_of(fingerprints: list[str]) -> Sequences:
    rows = [np.array([1], np.int32)] * len(fingerprints)
    return Sequences(rows, rows, fingerprints, fingerprints, np.arange(len(fingerprints)))


def draw(copies: list[int], generator: np.random.Generator) -> tuple[Sequences, torch.Tensor]:
    """Sequences of which each stands as often as said, and a normal value of each; copies share theirs."""
    names = [f"{word:016x}" for word in generator.integers(1 << 60, size=len(copies))]
    repeated = np.repeat(np.arange(len(copies)), copies)
    values = torch.from_numpy(generator.normal(size=(len(copies), 400)))
    return sequences_of([names[row] for row in repeated]), values[repeated]


@pytest.mark.parametrize("copies", [[1] * 64, [1] * 61 + [40], [2] * 30 + [7, 9]])
def test_noise_is_the_error_of_the_difference_of_two_means(copies: list[int]) -> None:
    generator = np.random.default_rng(0)
    noise, difference = [], []
    for _ in range(60):
        (sequences, values), (_, pinned) = draw(copies, generator), draw(copies, generator)
        value = dict(zip(sequences.fingerprints, values, strict=True))
        blocks = [block.fingerprints for block in drift._blocks(sequences)]
        sums = [torch.stack([value[name] for name in block]).sum(dim=0) for block in blocks]
        splits = drift._splits(blocks, len(pinned))
        noise.append(np.mean([float(drift._weighted(row, sums)) for row in splits]))
        difference.append(float((values.mean(dim=0) - pinned.mean(dim=0)).abs().sum()))
    assert np.mean(noise) == pytest.approx(np.mean(difference), rel=0.04)


def test_copies_share_a_block_and_every_split_has_two_halves() -> None:
    names = [f"{row % 11:016x}" for row in range(40)]
    blocks = drift._blocks(sequences_of(names))
    assert len(blocks) == drift.BLOCKS
    assert sorted(name for block in blocks for name in set(block.fingerprints)) == sorted(set(names))
    for count in range(2, 9):
        splits = drift._splits([[f"{row:016x}"] for row in range(count)], 10)
        assert ((splits > 0).any(axis=1) & (splits < 0).any(axis=1)).all()


def test_copies_have_numbers_of_their_own() -> None:
    assert len(set(drift.keys(["a", "a", "b"], ["one", "two", "one"]))) == 3
    assert drift.keys(["a"], ["one"]) == drift.keys(["b", "a"], ["one", "one"])[1:]
