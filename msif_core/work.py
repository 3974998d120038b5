"""Operations of a stage's passes for one sequence, as the code does them: a multiply-add counts as two."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import nn
from transformers.pytorch_utils import Conv1D

from msif_core import experts
from msif_core.tracking import TrackedMap, text_config

EIGH_FLOPS = 9.0
"""Operations of a symmetric eigendecomposition with vectors, divided by n^3."""


@dataclass(frozen=True)
class Work:
    """One stage's model and maps, how long a sequence is, and how long one may be: what memory is held for."""

    model: nn.Module
    maps: list[TrackedMap]
    tokens: float
    longest: int = 0

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

    @cached_property
    def weights(self) -> dict[str, float]:
        """Entries of every linear map that a token meets, tracked or not (the head too), in the model's order.

        Those of an expert count for the share of the tokens that reach it.
        """
        found: dict[str, float] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                found[name] = module.weight.numel()
            for stack in experts.stacks_of(module):
                share = experts.routed_share(text_config(self.model), stack.count)
                each = {f"{name}.{stack.parameter}.{e}": share * stack.d_in * stack.d_out for e in range(stack.count)}
                found |= each
        return found

    def linear(self) -> float:
        """Forward and activation backward of all linear maps: 4 N T."""
        return 4.0 * sum(self.weights.values()) * self.tokens

    def outside(self) -> float:
        """Of that, what maps outside the layers take: the head."""
        return 4.0 * sum(n for name, n in self.weights.items() if not re.search(r"\.\d+\.", name)) * self.tokens

    def passes(self, groups: Iterable[list[TrackedMap]]) -> float:
        """A pass for each group of maps: the whole forward, and the backward down to the first of the group.

        Attention's products of tokens with tokens are counted too, and taken to be spread as the weights are.
        """
        config = text_config(self.model)
        entries = sum(self.weights.values())
        attention = 4.0 * config.num_hidden_layers * config.hidden_size * self.tokens**2
        operations = 0.0
        for maps in groups:
            share = self._crossed(maps) / entries
            operations += 2.0 * entries * self.tokens * (1 + share) + attention * (1 + 2 * share)
        return operations

    def _crossed(self, maps: list[TrackedMap]) -> float:
        """Entries of the maps that a backward down to the first of `maps` multiplies by: not those of its input."""
        inputs = {m.name: m.input_group for m in maps}
        reached = list(itertools.dropwhile(lambda name: name not in inputs, self.weights))
        return sum(self.weights[name] for name in reached if inputs.get(name) != inputs[reached[0]])

    def covariance(self) -> float:
        """Sums of a a^T and d d^T."""
        inputs = {m.input_group: m.routed * m.d_in**2 for m in self.maps}
        return 2.0 * self.tokens * (sum(inputs.values()) + sum(m.routed * m.s_entries for m in self.maps))

    def gradients(self, share: float = 1.0) -> float:
        """Per-sequence gradients, or that share of their coordinates, formed from the tokens."""
        return 2.0 * share * self.tokens * sum(m.routed * m.size for m in self.maps)

    def rotation(self, share: float = 1.0) -> float:
        """Into the eigenbasis, or that share of it: of tokens or gradients, whichever is cheaper, as the code does."""
        whole = sum(
            min(m.routed * self.tokens * (m.d_in**2 + m.s_entries), m.size * (m.pieces[1] + m.d_in)) for m in self.maps
        )
        return 2.0 * share * whole

    @property
    def eigenbasis_widths(self) -> dict[int, int]:
        """Width of every A and S, and how many there are of it."""
        found = Counter(self.inputs)
        for m in self.maps:
            found[m.pieces[1]] += m.pieces[0]
        return dict(found)

    def eigenbases(self) -> float:
        """Of every A and S."""
        return EIGH_FLOPS * sum(count * width**3 for width, count in self.eigenbasis_widths.items())

    def unrotation(self) -> float:
        """One gradient out of the eigenbasis."""
        return 2.0 * sum(m.size * (m.pieces[1] + m.d_in) for m in self.maps)
