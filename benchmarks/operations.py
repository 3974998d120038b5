"""The operations that a pass cannot do without, by METHOD's counts: what a floor is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from msif_core.models import TrackedMap


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one sequence of `tokens` tokens, or of one query.

    Attributes:
        maps: the tracked maps.
        tokens: T.
        untracked: entries of the linear maps that are not tracked (the head): the model's own pass includes them.
    """

    maps: Sequence[TrackedMap]
    tokens: int
    untracked: int

    @property
    def tracked(self) -> int:
        """Entries of the tracked maps."""
        return sum(m.size for m in self.maps)

    @property
    def bare(self) -> float:
        """Forward and activation backward: 4 N T."""
        return 4.0 * (self.tracked + self.untracked) * self.tokens

    @property
    def covariances(self) -> float:
        """2 T (d_in^2 + d_out^2) a map."""
        return 2.0 * self.tokens * sum(m.d_in**2 + m.s_entries for m in self.maps)

    @property
    def rotation(self) -> float:
        """Into the eigenbases: tokens or gradients, whichever is cheaper."""
        tokens = (self.tokens * (m.d_in**2 + m.s_entries) for m in self.maps)
        return 2.0 * sum(min(t, g) for t, g in zip(tokens, self._gradient_rotations(), strict=True))

    @property
    def unrotation(self) -> float:
        """A gradient's way back: 2 d_in d_out (d_in + d_out)."""
        return 2.0 * sum(self._gradient_rotations())

    @property
    def outer(self) -> float:
        """The gradient from its tokens: 2 T d_in d_out."""
        return 2.0 * self.tokens * self.tracked

    def products(self, queries: int) -> float:
        """Scores of a gradient with `queries` queries."""
        return 2.0 * self.tracked * queries

    def _gradient_rotations(self) -> list[int]:
        return [m.size * (m.d_in + m.pieces[1]) for m in self.maps]
