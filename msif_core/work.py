"""Operations of a stage's passes for one sequence, as the code does them: a multiply-add counts as two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from msif_core.models import TrackedMap

EIGH_FLOPS = 9.0
"""Operations of a symmetric eigendecomposition with vectors, divided by n^3."""


@dataclass(frozen=True)
class Work:
    """One stage's model and maps, and how long a sequence is."""

    model: nn.Module
    maps: list[TrackedMap]
    tokens: float

    @property
    def tracked(self) -> int:
        """Tracked parameters."""
        return sum(m.size for m in self.maps)

    @property
    def widest(self) -> int:
        """Parameters of the largest map."""
        return max(m.size for m in self.maps)

    @property
    def inputs(self) -> list[int]:
        """Width of every A."""
        return list({m.input_group: m.d_in for m in self.maps}.values())

    @property
    def covariance_entries(self) -> int:
        """Entries of all A and S, or of their eigenbases."""
        return sum(d * d for d in self.inputs) + sum(m.s_entries for m in self.maps)

    def linear(self) -> float:
        """Forward and activation backward of all linear maps (the head too): 4 N T."""
        entries = sum(m.weight.numel() for m in self.model.modules() if isinstance(m, nn.Linear | Conv1D))
        return 4.0 * entries * self.tokens

    def forward_backward(self) -> float:
        """The same, and attention's products of tokens with tokens."""
        config: Any = self.model.config
        return self.linear() + 12.0 * config.num_hidden_layers * config.hidden_size * self.tokens**2

    def covariance(self) -> float:
        """Sums of a a^T and d d^T."""
        return 2.0 * self.tokens * self.covariance_entries

    def gradients(self) -> float:
        """Per-sequence gradients, formed from the tokens."""
        return 2.0 * self.tokens * self.tracked

    def rotation(self) -> float:
        """Into the eigenbasis: of the tokens or of the gradient, whichever is cheaper, as the code does."""
        return 2.0 * sum(
            min(self.tokens * (m.d_in**2 + m.s_entries), m.size * (m.pieces[1] + m.d_in)) for m in self.maps
        )

    def eigenbases(self) -> float:
        """Of every A and S."""
        return EIGH_FLOPS * (sum(d**3 for d in self.inputs) + sum(m.s_entries * m.pieces[1] for m in self.maps))

    def unrotation(self) -> float:
        """One gradient out of the eigenbasis."""
        return 2.0 * sum(m.size * (m.pieces[1] + m.d_in) for m in self.maps)
