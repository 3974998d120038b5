"""Sketches of whitened gradients: signed folding, then one randomized Hadamard transform.

A gradient is the concatenation of its maps' entries in the eigendirections that are kept (without whitening: of all
entries, as they are), D coordinates in all. Coordinate p goes, with a random sign, to bucket p mod M; with D <= M
nothing collides, and the sketch is exact but for what was left out. M shares no factor with the maps' row lengths, so
that the few strong columns of a map do not all meet in one bucket. The folded vector is mixed by a randomized Hadamard
transform, which spreads every map over all dimensions: a code that keeps one norm per vector (RaBitQ) then loses
nothing to maps of unequal scale.

The error of an inner product is about |phi| |psi| / sqrt(M), as for the subsampled transform of the whole
gradient, at one multiply-add per entry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from msif_core import storage
from msif_core.batching import Sequences
from msif_core.capture import Consume, batches_of, capture
from msif_core.chain import Chain
from msif_core.curvature.factors import Factors
from msif_core.curvature.filters import SpectralFilter
from msif_core.curvature.fit import partitions, sum_dtype
from msif_core.curvature.gradients import PerSequenceGradients, RotatedGradients
from msif_core.directions import Directions
from msif_core.errors import InputError
from msif_core.losses import target_loss
from msif_core.randomness import random_signs
from msif_core.rows import Rows
from msif_core.tracking import TrackedMap

if TYPE_CHECKING:
    from msif_core.config import SketchSettings

VERSION = 3
FloatArray = npt.NDArray[np.float32]
Gradients = dict[str, torch.Tensor]


def fold_length(dimensions: int, widths: set[int]) -> int:
    """The largest M <= dimensions that shares no factor with any of `widths`."""
    return next(m for m in range(dimensions, 0, -1) if all(math.gcd(m, w) == 1 for w in widths if w < m))


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal Walsh-Hadamard transform of the last axis [..., n], n a power of two."""
    n = x.shape[-1]
    shape = x.shape
    step = 1
    while step < n:
        x = x.reshape(*shape[:-1], n // (2 * step), 2, step)
        x = torch.stack((x[..., 0, :] + x[..., 1, :], x[..., 0, :] - x[..., 1, :]), dim=-2)
        step *= 2
    return x.reshape(shape) / math.sqrt(n)


class Sketcher:
    """Sketches of documents (phi) and of queries (psi); <phi, psi> estimates the exact score.

    `kept` are the directions of the maps that have any; all of every map where it is not given.
    """

    def __init__(
        self,
        maps: list[TrackedMap],
        factors: Factors,
        spectral: SpectralFilter,
        settings: SketchSettings,
        task: str,
        kept: Mapping[str, Directions] | None = None,
    ) -> None:
        self.kept = {m.name: Directions.even(m) for m in maps} if kept is None else kept
        self.maps = [m for m in maps if m.name in self.kept]
        self.factors = factors
        self.filter = spectral
        self.settings = settings
        self.task = task
        sizes = [self.kept[m.name].size for m in self.maps]
        self.offsets = dict(zip((m.name for m in self.maps), np.cumsum([0, *sizes])[:-1].tolist(), strict=True))
        self.fold = fold_length(settings.dimensions, {len(kept.columns) for kept in self.kept.values()})
        self._signs = random_signs(settings.dimensions, settings.seed + 1)

    @property
    def rotates(self) -> bool:
        """Whether gradients are seen in the eigenbases; without whitening they stay as they are, which is cheaper."""
        return self.settings.whitening != "none"

    def manifest(self) -> dict[str, Any]:
        """What must agree for sketches to be comparable."""
        return {
            "version": VERSION, "dimensions": self.settings.dimensions, "fold": self.fold, "seed": self.settings.seed,
            "whitening": self.settings.whitening,
            "maps": {m.name: [*self.kept[m.name].rows.shape, len(self.kept[m.name].columns)] for m in self.maps},
        }  # fmt: skip

    def check_or_write(self, path: Path) -> None:
        """Write the manifest, or compare with the one that is there.

        Raises:
            InputError: the sketches beside `path` were made by another version, seed or map list.
        """
        if not path.exists():
            storage.write_json(path, self.manifest())
        elif (found := storage.read_json(path)) != self.manifest():
            keys = [key for key in self.manifest() if found.get(key) != self.manifest()[key]]
            raise InputError(
                f"{path}: made with another sketch ({', '.join(keys)} differ); rebuild the index with --refit"
            )

    def document_weight(self, name: str) -> torch.Tensor:
        """Whitening of a document's kept coordinates of one map, [P r c].

        balanced: f^(1/2) times the directions' split. eigen: f^(1/2). kronecker: its rank-one fit, row times column.
        none: 1, of the gradient as it is. Zero where f is.
        """
        return self._whitening(name, self._f(name))

    def query_weight(self, name: str) -> torch.Tensor:
        """What is left of f for the query's side, [P r c]: the product of the two weights is f."""
        f = self._f(name)
        left = self.kept[name].take(f)
        return torch.where(left > 0, left / self._whitening(name, f), 0)

    def _whitening(self, name: str, f: torch.Tensor) -> torch.Tensor:
        kept = self.kept[name]
        if self.settings.whitening == "none":
            return (kept.take(f) > 0).to(f.dtype)
        if self.settings.whitening == "kronecker":
            return kept.take(_rank_one(f.sqrt()))
        root = kept.take(f).sqrt()
        return root if self.settings.whitening == "eigen" else root * kept.split.to(root)

    def _f(self, name: str) -> torch.Tensor:
        found = self.factors[name]
        return self.filter.attributed(found.eigenvalues, found.mean)

    def documents(self, model: nn.Module, sequences: Sequences, batch_tokens: int, budget_gb: float) -> FloatArray:
        """Phi of each sequence: float32 [N, dimensions].

        Maps whose factors and weights fit the budget together take one pass over the sequences.
        """
        device, dtype = next(model.parameters()).device, sum_dtype(model)
        folded = torch.zeros(len(sequences), self.fold)
        for maps in partitions(self.maps, budget_gb, self._held):
            weights = {m.name: self._signed(m, self.document_weight(m.name)).to(device) for m in maps}
            formed: RotatedGradients | PerSequenceGradients = PerSequenceGradients(dtype)
            if self.rotates:
                formed = RotatedGradients(
                    {m.name: self.kept[m.name].factors(self.factors[m.name]) for m in maps}, dtype
                )
            for batch in batches_of(model, maps, sequences, batch_tokens):
                found = torch.zeros(len(batch.rows), self.fold, device=device)
                capture(model, maps, batch, target_loss(self.task), self._folding(found, formed, weights))
                folded[batch.rows] += found.cpu()
        return self._mix(folded).numpy()

    def _held(self, m: TrackedMap) -> float:
        """Entries of a map's bases and weights that a pass holds."""
        kept = self.kept[m.name]
        bases = m.d_in * len(kept.columns) + kept.rows.numel() * m.pieces[1] if self.rotates else 0
        return bases + 2.0 * kept.size

    def _folding(
        self, folded: torch.Tensor, formed: RotatedGradients | PerSequenceGradients, weights: Gradients
    ) -> Consume:
        """Adds a map's weighted gradients to `folded` [N, fold]."""

        def consume(m: TrackedMap, captured: Rows) -> None:
            columns = len(self.kept[m.name].columns)
            for part, rows, gradients in formed.blocks(m, captured.a, captured.d):
                entries = slice(rows.start * columns, rows.stop * columns)
                weighted = gradients[..., :columns].flatten(1).float().mul_(weights[m.name][entries])
                self._add(folded[part], weighted, self.offsets[m.name] + entries.start)

        return consume

    def queries(self, gradients: dict[str, torch.Tensor], chain: Chain, *, rotated: bool = False) -> FloatArray:
        """Psi of queries whose gradients [Q, G, b, d_in] at the last stage are given: float32 [Q, dimensions].

        `rotated` as in `Chain`.
        """
        first = next(iter(gradients.values()))
        folded = torch.zeros(len(first), self.fold, device=first.device)
        for m in self.maps:
            seen = chain.passed if self.rotates else chain.filter
            if m.name not in gradients or (V := seen(m.name, gradients[m.name], rotated=rotated)) is None:
                continue
            weight = self.query_weight(m.name) if self.rotates else torch.ones(m.size)
            own = self.kept[m.name].take(V).float() * self._signed(m, weight).to(first.device)
            self._add(folded, own, self.offsets[m.name])
        return self._mix(folded).cpu().numpy()

    def _signed(self, m: TrackedMap, weight: torch.Tensor) -> torch.Tensor:
        """The map's weights, flat, with its random signs."""
        seed = (self.settings.seed << 20) + self.maps.index(m) + 2
        return weight.float() * random_signs(len(weight), seed, weight.device)

    def _add(self, folded: torch.Tensor, flat: torch.Tensor, offset: int) -> None:
        """folded[:, (offset + i) mod M] += flat[:, i], as slices and one sum."""
        start, position = offset % self.fold, 0
        head = min(self.fold - start, flat.shape[1])
        folded[:, start : start + head] += flat[:, :head]
        position = head
        whole = (flat.shape[1] - position) // self.fold
        if whole:
            middle = flat[:, position : position + whole * self.fold]
            folded += middle.unflatten(1, (whole, self.fold)).sum(dim=1)
            position += whole * self.fold
        tail = flat.shape[1] - position
        if tail:
            folded[:, :tail] += flat[:, position:]

    def _mix(self, folded: torch.Tensor) -> torch.Tensor:
        """Random signs, then Hadamard transforms of power-of-two blocks from both ends: [N, dimensions].

        Widths that are no power of two take two overlapping blocks, one after the other.
        """
        x = torch.nn.functional.pad(folded, (0, self.settings.dimensions - self.fold))
        x = x * self._signs.to(x.device)
        block = 1 << (self.settings.dimensions.bit_length() - 1)
        x = torch.cat((hadamard(x[:, :block]), x[:, block:]), dim=1)
        if block < self.settings.dimensions:
            rest = self.settings.dimensions - block
            x = torch.cat((x[:, :rest], hadamard(x[:, rest:] * self._signs[:block].to(x.device))), dim=1)
        return x


def _rank_one(root: torch.Tensor) -> torch.Tensor:
    """The fit of log f^(1/2) [G, b, d_in]: row plus column means. A block without curvature has f = 0 throughout."""
    log = torch.where(root > 0, root, 1).log()
    fit = (log.mean(-1, keepdim=True) + log.mean(-2, keepdim=True) - log.mean((-2, -1), keepdim=True)).exp()
    return torch.where(root > 0, fit, 0)
