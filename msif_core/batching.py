"""Token sequences, and how they are packed into padded batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

IGNORED = -100
"""Label of a position without a loss term, as in Hugging Face models."""

IntArray = npt.NDArray[np.int32]


def sequence_fingerprint(input_ids: Sequence[int] | IntArray, labels: Sequence[int] | IntArray) -> str:
    """16 hex digits over tokens and labels: the same sequence has the same one in every shard and run."""
    digest = hashlib.sha256(np.asarray(input_ids, np.int32).tobytes())
    digest.update(np.asarray(labels, np.int32).tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Sequences:
    """Sequences in memory, column by column; all columns have the same length."""

    input_ids: list[IntArray]
    labels: list[IntArray]
    fingerprints: list[str]
    document_ids: list[str]
    sequence_ids: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.input_ids)

    def take(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> Sequences:
        """The sequences at `rows`, in that order; rows past the end are left out."""
        kept = [int(row) for row in rows if row < len(self)]
        return Sequences(
            [self.input_ids[row] for row in kept],
            [self.labels[row] for row in kept],
            [self.fingerprints[row] for row in kept],
            [self.document_ids[row] for row in kept],
            self.sequence_ids[np.asarray(kept, dtype=np.int64)],
        )


@dataclass(frozen=True)
class Batch:
    """A right-padded batch of N sequences of at most T tokens.

    `rows` are the positions of its sequences in the `Sequences` that it was cut from.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor
    fingerprints: list[str]
    rows: npt.NDArray[np.int64]


def whole_batch(ids: torch.Tensor) -> Batch:
    """Texts of one length, ids [N, T], as a batch without padding; every token is a target."""
    return Batch(ids, ids, torch.ones_like(ids), [""] * len(ids), np.arange(len(ids)))


def batches(
    sequences: Sequences, batch_tokens: int, device: torch.device | str = "cpu", pad_id: int = 0
) -> Iterator[Batch]:
    """Batches of at most `batch_tokens` padded tokens, longest sequences first."""
    lengths = np.array([len(ids) for ids in sequences.input_ids], dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        width = int(lengths[order[start]])
        rows = order[start : start + max(1, batch_tokens // width)]
        start += len(rows)
        input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
        labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for i, row in enumerate(rows):
            input_ids[i, : lengths[row]] = sequences.input_ids[row]
            labels[i, : lengths[row]] = sequences.labels[row]
            mask[i, : lengths[row]] = 1
        yield Batch(
            torch.from_numpy(input_ids).to(device),
            torch.from_numpy(labels).to(device),
            torch.from_numpy(mask).to(device),
            [sequences.fingerprints[row] for row in rows],
            rows,
        )
